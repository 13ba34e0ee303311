"""The work that frameworks are timed with: FedAvg over sites of 64 images, one epoch of SGD."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax import algorithms, federated, local, models, prng, secagg, sites, summation
from primia_jax.types import Site

IMAGES, SIZE, CLASSES, BATCH, RATE = 64, 28, 10, 16, 0.1
_CONTRAST = 0.25  # of the images: small enough for that rate
_MAX_ABS = 32.0  # of any number in a message


def site_data(site: int) -> tuple[np.ndarray, np.ndarray]:
  """One site's images [64, 28, 28, 1] float32 and labels [64] int32: noisy prototypes."""
  prototypes = np.random.default_rng(0).normal(size=(CLASSES, SIZE, SIZE, 1)).astype(np.float32)
  rng = np.random.default_rng((1, site))
  labels = rng.integers(0, CLASSES, IMAGES).astype(np.int32)
  noise = rng.standard_normal((IMAGES, SIZE, SIZE, 1), np.float32)
  return np.float32(_CONTRAST) * (np.float32(0.35) * prototypes[labels] + noise), labels


def stack(ids: np.ndarray) -> Site:
  """The data of several sites, made anew."""
  images, labels = zip(*map(site_data, ids), strict=True)
  sizes = np.full(len(ids), IMAGES, np.int32)
  return Site(np.asarray(ids, np.int32), np.stack(images), np.stack(labels), sizes)


def save(path: pathlib.Path, num_sites: int) -> None:
  """Writes the same data for peers, which read NumPy."""
  everything = stack(np.arange(num_sites))
  np.savez(path, x=everything.images, y=everything.labels)


def resident(num_sites: int, placement: sites.Placement) -> federated.Sites:
  """All sites' data in memory, and on the devices when all take part."""
  everything = stack(np.arange(num_sites))
  placed = placement.put(everything)
  load = lambda ids: placed if len(ids) == num_sites else jax.tree.map(lambda a: a[ids], everything)
  return federated.Sites(everything.id, load)


def streamed(num_sites: int, at_once: int) -> federated.Sites:
  """At most `at_once` sites' data in memory at a time."""
  return federated.Sites(np.arange(num_sites), stack, sites_per_load=at_once)


def model(name: str) -> models.Model:
  return models.build(models.ModelConfig(name, CLASSES, (SIZE, SIZE, 1)))


def fedavg(name: str) -> federated.Algorithm:
  """FedAvg with the model `leaf_cnn` or `mlp`."""
  loss = local.classification_loss(
    model(name).apply, lambda key, images, targets: (images, targets), CLASSES
  )
  steps = local.epochs(BATCH, IMAGES, min_examples=IMAGES)
  recipe = local.Recipe(steps, local.gradients(loss), None, optax.sgd, lambda time: RATE)
  return algorithms.fedavg(recipe)


def row(num_peers: int, key: jax.Array) -> secagg.Row:
  """Site 0's keys for one sum with sites 1, 2, ..., for timing its masks."""
  keys = prng.bits(key, jnp.zeros(3, jnp.uint32), (num_peers + 2, 8))
  peers = jnp.arange(1, num_peers + 1, dtype=jnp.int32)
  return secagg.Row(jnp.int32(0), peers, keys[2:], keys[0], keys[1])


def summed(name: str, num_sites: int) -> summation.Summation:
  """`clear`, `encoded` (secure aggregation without its masks) or `masked`.

  Each site has all others as peers up to 11 sites, else ten.
  """
  if name == "clear":
    return summation.clear()
  num_peers = None if num_sites <= 11 else 10
  config = secagg.secure_sum(num_sites, _MAX_ABS, num_peers=num_peers, masked=name == "masked")
  return summation.masked(config)


def rounds(
  name: str,
  num_sampled: int,
  how: summation.Summation,
  placement: sites.Placement,
  everybody: federated.Sites,
) -> Callable[[], Any]:
  """Makes the function that runs one round after the other, each from where the last ended."""
  num_sites = len(everybody.ids)
  fed = federated.federate(fedavg(name), how, placement, num_sites)
  key = jax.random.key(0)
  state = fed.init(*model(name).init(key))
  done = 0

  def run() -> Any:
    nonlocal state, done
    ids = federated.sample_sites(key, done, num_sites, num_sampled)
    state, info = fed.step(key, state, everybody._replace(ids=ids))
    if int(info.out_of_range):
      raise RuntimeError(f"round {done}: {int(info.out_of_range)} updates were out of range")
    done += 1
    return state, jnp.asarray(info.loss)

  return run
