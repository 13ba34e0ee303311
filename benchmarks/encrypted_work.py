"""What the encrypted benchmark runs: the networks as JAX functions, and one inference as phases that are timed apart."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.peers import networks
from primia_jax import conv, prng, ring
from primia_jax.mpc import dealing, gates, planning, protocol, secret, sharing
from primia_jax.mpc.gates import Gate
from primia_jax.mpc.planning import Plan
from primia_jax.types import Array, PyTree

OWNERS = ("model_owner", "data_owner")


class Ops:
  """`networks.apply`'s operations: NHWC, HWIO, dense [in, out]."""

  layer = staticmethod(jax.named_scope)
  relu = staticmethod(jax.nn.relu)
  add = staticmethod(jnp.add)
  max_pool = staticmethod(conv.max_pool)

  @staticmethod
  def conv(x: Array, w: Array, b: Array, stride: int, padding: int) -> Array:
    pads = [(padding, padding)] * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=numbers) + b

  @staticmethod
  def dense(x: Array, w: Array, b: Array) -> Array:
    return x @ w + b

  @staticmethod
  def flat(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)

  @staticmethod
  def mean(x: Array) -> Array:
    return x.mean((1, 2))


class Work(NamedTuple):
  """A function to compute under encryption, and whose arguments are whose."""

  fn: Callable[..., Array]
  owners: tuple[str, ...]
  args: tuple[PyTree, ...]


def network(case: str, batch: int = 1) -> Work:
  """A network of `networks`: the weights are the model owner's, the images the data owner's."""
  last = lambda w: w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T
  params = {name: (jnp.asarray(last(w)), jnp.asarray(b)) for name, (w, b) in networks.weights(case).items()}
  images = jnp.asarray(networks.inputs(case, batch)[0].transpose(0, 2, 3, 1))
  return Work(lambda params, x: networks.apply(case, Ops, params, x), OWNERS, (params, images))


def matmul(owners: tuple[str, ...]) -> Work:
  """The product of two matrices 1024 x 1024."""
  return Work(jnp.matmul, owners, tuple(map(jnp.asarray, networks.inputs("matmul"))))
