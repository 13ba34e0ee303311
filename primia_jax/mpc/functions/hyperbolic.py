"""Hyperbolic functions of shared numbers and their inverses.

For u, R, C, T and P see `polynomials`; `tanh` is among the bounded functions of `exponentials`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import piecewise
from primia_jax.mpc.functions.exponentials import exp
from primia_jax.mpc.functions.powers import log, sqrt


def sinh(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """(e^x - e^-x) / 2; |error| <= u(R) + 2 u cosh(x). Rounds as `exp2`."""
  return build.scaled(build.subtract(*_exponentials(build, x, bound)), 0.5)


def cosh(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """(e^x + e^-x) / 2; error and rounds as `sinh`."""
  return build.scaled(build.add(*_exponentials(build, x, bound)), 0.5)


def asinh(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """sign(x) log(|x| + sqrt(x^2 + 1)); |error| <= 4 u. 3 C + 12 P + 10 T rounds; not truncated."""
  x = build.narrow(x)
  sign = piecewise.table(build, piecewise.steps(build, x, [0]), np.array([-1.0, 1.0]), 1.0)
  size = build.multiply(sign, x)
  root = sqrt(build, build.add_public(build.multiply(x, x), 1.0), math.cosh(min(bound, 300.0)))
  out = log(build, build.add(size, root), max(1.0, bound))
  return build.multiply(sign, out)


def acosh(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """log(x + sqrt(x^2 - 1)); |error| <= 4 u; 0 for x = 1. 2 C + 10 P + 9 T rounds; not truncated."""
  x = build.narrow(x)
  root = sqrt(build, build.add_public(build.multiply(x, x), -1.0), math.cosh(min(bound, 300.0)))
  return log(build, build.add(x, root), max(1.0, bound))


def atanh(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """(log(1 + x) - log(1 - x)) / 2; |error| <= 2 u(R). Rounds as `log`; not truncated."""
  both = build.local(lambda v: jnp.stack([v, v.dtype.type(0) - v]), x)
  logs = log(build, build.add_public(both, 1.0), 2 * bound)
  first, second = (build.local(lambda v, i=i: v[i], logs) for i in (0, 1))
  return build.scaled(build.subtract(first, second), 0.5)


def _exponentials(build: Builder, x: Value, bound: float) -> tuple[Value, Value]:
  """e^x and e^-x, side by side, where their half sum or difference is up to `bound`."""
  x = build.narrow(x)
  both = exp(build, build.local(lambda v: jnp.stack([v, v.dtype.type(0) - v]), x), 2 * bound + 1)
  first, second = (build.local(lambda v, i=i: v[i], both) for i in (0, 1))
  return first, second
