"""What a client sends, as a differentiable function of its images: the attacker's model of it.

Each takes a loss of `primia_jax.local` and returns (Seen, images) -> update. Gradients are
`jax.grad` of the loss: `local.gradients` cannot be differentiated again under `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from primia_jax.types import Array, Batch, Key, LossFn, ModelState, Params, PyTree


class Seen(NamedTuple):
  """What an attacker has of one update.

  Attributes:
    params, model_state: the model before the update.
    update: what was sent, in the form that the simulated client returns.
    labels: [B] int32 of the images behind it: known, or recovered by `attacks.labels`.
    key: of augmentation and dropout. None for a loss without; the attacker rarely knows it.
  """

  params: Params
  model_state: ModelState
  update: PyTree
  labels: Array
  key: Key | None = None


# (what was seen, float32 images [B, H, W, C] as the loss takes them) -> update
Simulate = Callable[[Seen, Array], PyTree]


def gradient(loss_fn: LossFn) -> Simulate:
  """The gradient of one batch, as in federated SGD."""

  def simulate(seen: Seen, images: Array) -> PyTree:
    return _gradient(loss_fn, seen, seen.params, images, seen.labels)[0]

  return simulate


def local_training(loss_fn: LossFn, rate: float, order: Array) -> Simulate:
  """The change of the parameters in several steps of SGD, which is differentiated through
  (Geiping et al. 2020, section 6; Dimitrov et al. 2022, "Data leakage in federated averaging").

  In one epoch the order is no secret that matters: another one only renames the images. In several
  epochs the attacker must know how batches differ from epoch to epoch, or guess it.

  Args:
    loss_fn: of the client.
    rate: its learning rate.
    order: [T, B'] int32, which of the images each step takes.
  """

  def simulate(seen: Seen, images: Array) -> PyTree:
    def step(carry, index):
      params, model_state = carry
      here = seen._replace(model_state=model_state)
      grads, model_state = _gradient(loss_fn, here, params, images[index], seen.labels[index])
      return (jax.tree.map(lambda p, g: p - rate * g, params, grads), model_state), None

    (params, _), _ = jax.lax.scan(step, (seen.params, seen.model_state), order)
    return jax.tree.map(jnp.subtract, params, seen.params)

  return simulate


def _gradient(
  loss_fn: LossFn, seen: Seen, params: Params, images: Array, labels: Array
) -> tuple[Params, ModelState]:
  key = jax.random.key(0) if seen.key is None else seen.key
  batch = Batch(images, labels, jnp.ones(labels.shape, jnp.float32))
  grads, (model_state, _) = jax.grad(loss_fn, has_aux=True)(params, seen.model_state, batch, key)
  return grads, model_state
