"""The work that all frameworks are timed on: FedAvg over sites of 64 images, one epoch of SGD in
batches of 16.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax import algorithms, federated, local, models, prng, secagg, sites

IMAGES, SIZE, CLASSES, BATCH, RATE = 64, 28, 10, 16, 0.1
_CONTRAST = 0.25  # of the images; small enough for the rate
_MAX_ABS = 32.0  # bound on any number in a message


def site_data(site: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns one site's images [64, 28, 28, 1] float32 and labels [64] int32: ten random prototypes
  plus noise.
  """
  prototypes = np.random.default_rng(0).normal(size=(CLASSES, SIZE, SIZE, 1)).astype(np.float32)
  rng = np.random.default_rng((1, site))
  labels = rng.integers(0, CLASSES, IMAGES).astype(np.int32)
  noise = rng.standard_normal((IMAGES, SIZE, SIZE, 1), np.float32)
  return np.float32(_CONTRAST) * (np.float32(0.35) * prototypes[labels] + noise), labels


def stack(ids: np.ndarray) -> federated.Site:
  """Makes the data of several sites."""
  images, labels = zip(*map(site_data, ids), strict=True)
  sizes = np.full(len(ids), IMAGES, np.int32)
  return federated.Site(np.asarray(ids, np.int32), np.stack(images), np.stack(labels), sizes)


def save(path: pathlib.Path, num_sites: int) -> None:
  """Writes the same data to a NumPy file, for peers."""
  everything = stack(np.arange(num_sites))
  np.savez(path, x=everything.images, y=everything.labels)


def resident(num_sites: int, placement: sites.Placement) -> federated.Loader:
  """Holds all sites' data in memory, and on the devices when all sites take part."""
  everything = stack(np.arange(num_sites))
  placed = sites.put(everything, placement)
  return federated.Loader(
    lambda ids: placed if len(ids) == num_sites else jax.tree.map(lambda a: a[ids], everything)
  )


def streamed(piece: int) -> federated.Loader:
  """Holds the data of at most `piece` sites in memory at a time."""
  return federated.Loader(stack, piece)


def model(name: str) -> models.Model:
  return models.build(models.ModelConfig(name, CLASSES, (SIZE, SIZE, 1)))


def fedavg(name: str) -> federated.Algorithm:
  """FedAvg with the model `leaf_cnn` or `mlp`."""
  loss = local.classification_loss(
    model(name).apply, lambda key, images, targets: (images, targets), CLASSES
  )
  work = local.Work(batch_size=BATCH, max_examples=IMAGES, min_examples=IMAGES)
  recipe = local.Recipe(
    local.gradients(loss), functools.partial(optax.sgd), lambda time: RATE, work
  )
  return algorithms.fedavg(recipe)


def aggregator(name: str, num_sites: int) -> federated.Aggregator:
  """Makes `clear`, `encoded` (secure aggregation without masks) or `masked` (up to 11 sites: all
  others are peers; else ten).
  """
  if name == "clear":
    return federated.in_the_clear()
  num_peers = None if num_sites <= 11 else 10
  config = secagg.secure_sum(num_sites, _MAX_ABS, num_peers=num_peers, masked=name == "masked")
  return federated.securely(config)


def rounds(
  name: str,
  num_sites: int,
  num_sampled: int,
  aggregator: federated.Aggregator,
  placement: sites.Placement,
  loader: federated.Loader,
) -> Callable[[], Any]:
  """Makes a function that runs the next round, from where the last one ended."""
  fed = federated.federated(fedavg(name), aggregator, placement)
  key, dealer_key = jax.random.key(0), prng.random_key()
  params, model_state = model(name).init(key)
  state = fed.init(params, model_state, num_sites)
  done = 0

  def run() -> Any:
    nonlocal state, done
    ids = federated.sample_sites(key, done, num_sites, num_sampled)
    state, info = fed.step(key, state, ids, loader, dealer_key)
    if int(info.out_of_range):
      raise RuntimeError(
        f"round {done}: the update of {int(info.out_of_range)} sites was out of range"
      )
    done += 1
    return state, jnp.asarray(info.loss)

  return run
