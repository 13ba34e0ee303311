"""Updates of single images under one protection after the other, on the model of a run.

A run's own updates are sums over many images, in which no attack may find anything; here each
protection stands alone against the attack's best case, one image and one step at each site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax import local, models
from primia_jax.attacks import views
from primia_jax.privacy import accounting
from primia_jax.types import Array, Batch, Key, LossFn, ModelState, Params

from .. import transcripts
from ..configs.model import normalise
from . import context as shared
from .context import ARM, Context

_EPSILON, _DELTA = 6.0, 1e-5  # of one release, where the run has no noise of its own


class Protection(NamedTuple):
  """What stands in the way: sites in the sum, and noise over the clipping norm (0 for none)."""

  name: str
  num_sites: int = 1
  noise_multiplier: float = 0.0


class Bench(NamedTuple):
  """The model and the images.

  Attributes:
    model: the model at which gradients are taken.
    which: of the run, in words.
    images, labels: [N, ...] different images of the sites, with masks where the model learns them;
      the first of them are the victims.
    num_victims: V.
    l2_clip_norm: of the private update.
  """

  model: views.Model
  which: str
  images: np.ndarray
  labels: np.ndarray
  num_victims: int
  l2_clip_norm: float


def protections(context: Context) -> list[Protection]:
  """None, secure aggregation of 3 and 10 sites, and differential privacy."""
  noises = [r.noise_multiplier for one in context.ledgers for r in one.releases
            if "counts" not in r.what and r.noise_multiplier]  # fmt: skip
  if noises:
    noise, whose = min(noises), "the run's noise"
  else:
    noise = accounting.calibrate(_EPSILON, _DELTA, 1.0, 1)
    whose = f"epsilon {_EPSILON:g} in one release"
  sums = [Protection(f"secure aggregation of {n} sites", n) for n in (3, 10)]
  return [Protection("none"), *sums, Protection(f"differential privacy, {whose}", 1, noise)]


def bench(context: Context, num_images: int, num_victims: int) -> Bench:
  """The run's first recorded model, or its last where nothing was recorded, and distinct images."""
  if context.has_transcript:
    first = next(iter(transcripts.paths(context.run_dir / ARM).values()))
    model, which = transcripts.read(first).before, "the model before the first round"
  else:
    trained = context.trained
    model, which = views.Model(trained.params, trained.model_state), "the final model"
  train = context.images.train
  index = np.random.default_rng(context.effort.audit_seed).permutation(np.concatenate(train.sites))
  images, labels = shared.take(train.dataset, index[: 2 * num_images])
  flat = images.reshape(len(images), -1)
  first_of = np.sort(np.unique(flat, axis=0, return_index=True)[1])  # equal images count once
  is_plain = flat[first_of].min(1) < flat[first_of].max(1)
  rows = first_of[is_plain][:num_images]
  num_victims = min(num_victims, len(rows) // 2)
  clip = context.config.privacy.l2_clip_norm
  found = Bench(model, which, images[rows], labels[rows], num_victims, clip)
  if context.config.privacy.dp == "none":
    norms = [
      float(optax.tree.norm(gradient)) for gradient in _alone(context, found, range(num_victims))
    ]
    found = found._replace(l2_clip_norm=float(np.median(norms)))
  return found


def _alone(context: Context, on: Bench, rows: Any) -> Iterator[Params]:
  gradient = jax.jit(
    lambda image, label: mean_gradient(context, on.model, image[None], label[None])
  )
  for row in rows:
    yield gradient(on.images[row], on.labels[row])


def vulnerable(context: Context) -> tuple[LossFn, views.Model]:
  """A model whose updates are known to hold images, and its loss. It classifies images; one with a
  mask is of its largest number there.
  """
  given = context.trained.config
  config = models.ModelConfig("mlp", given.num_classes, given.image_shape)
  model = models.build(config)
  prepare = lambda key, images, targets: (normalise(images), targets)
  of_images = local.classification_loss(model.apply, prepare, config.num_classes)

  def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: Key):
    labels = batch.labels.max(tuple(range(1, batch.labels.ndim)))
    return of_images(params, model_state, batch._replace(labels=labels), key)

  return loss_fn, views.Model(*model.init(jax.random.key(context.effort.audit_seed)))


def mean_gradient(context: Context, model: views.Model, images: Array, labels: Array) -> Params:
  """The mean over images [K, ...], each alone at its site."""

  def add(total: Params, one: tuple[Array, Array]) -> tuple[Params, None]:
    image, label = one
    batch = Batch(image[None], label[None], jnp.ones(1, jnp.float32))
    grads, _ = jax.grad(context.loss_fn, has_aux=True)(*model, batch, jax.random.key(0))
    return jax.tree.map(jnp.add, total, grads), None

  zeros = jax.tree.map(lambda p: jnp.zeros(np.shape(p), jnp.float32), model.params)
  total, _ = jax.lax.scan(add, zeros, (images, labels))
  return jax.tree.map(lambda t: t / images.shape[0], total)


def updates(
  context: Context, on: Bench, protection: Protection, victims: Sequence[int]
) -> Iterator[Params]:
  """The gradient that stands for each victim, by its row: the mean of its own and those of images
  at other sites, or its own, clipped and noised.
  """
  run = jax.jit(lambda images, labels: mean_gradient(context, on.model, images, labels))
  add_noise = jax.jit(lambda key, g: noised(key, g, on.l2_clip_norm, protection.noise_multiplier))
  rng = np.random.default_rng(context.effort.audit_seed)
  for victim in victims:
    others = np.delete(np.arange(len(on.images)), victim)
    rows = [
      victim,
      *rng.choice(others, protection.num_sites - 1, len(others) < protection.num_sites),
    ]
    gradient = run(on.images[rows], on.labels[rows])
    if protection.noise_multiplier:
      key = jax.random.fold_in(jax.random.key(context.effort.audit_seed), victim)
      gradient = add_noise(key, gradient)
    yield gradient


def noised(key: Key, gradient: Params, l2_clip_norm: float, noise_multiplier: float) -> Params:
  """Clipped to the norm, with Gaussian noise; a reader of the noise's seed could take it off, so
  that this is for attacks only.
  """
  scale = jnp.minimum(1.0, l2_clip_norm / optax.tree.norm(gradient))
  leaves, tree = jax.tree.flatten(gradient)
  keys = jax.random.split(key, len(leaves))
  spread = jnp.float32(noise_multiplier * l2_clip_norm)
  noisy = [
    scale * leaf + spread * jax.random.normal(k, leaf.shape, leaf.dtype)
    for k, leaf in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(tree, noisy)
