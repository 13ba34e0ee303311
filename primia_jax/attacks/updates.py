"""What a client sends, as a differentiable function of its images: the attacker's model of it.

Each takes a loss of `primia_jax.local` and returns (Seen, images) -> update. Gradients are
`jax.grad` of the loss: `local.gradients` cannot be differentiated again under `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from primia_jax.types import Array, Batch, Key, LossFn, ModelState, Params, PyTree


class Seen(NamedTuple):
  """What an attacker has of one update.

  Attributes:
    params, model_state: the model before the update.
    update: what was sent, in the form that the simulated client returns.
    labels: [B] int32 of the images behind it: known, or recovered by `attacks.labels`; or [B, L]
      probabilities, for a loss that takes them (`labels.soft_loss`).
    key: of augmentation and dropout. None for a loss without; the attacker rarely knows it.
    class_weights: [L] float32, the weight of an example of each class, which sites know; None for
      1.
  """

  params: Params
  model_state: ModelState
  update: PyTree
  labels: Array
  key: Key | None = None
  class_weights: Array | None = None


# (what was seen, float32 images [B, H, W, C] as the loss takes them) -> update
Simulate = Callable[[Seen, Array], PyTree]


def gradient(loss_fn: LossFn) -> Simulate:
  """The gradient of one batch, as in federated SGD."""

  def simulate(seen: Seen, images: Array) -> PyTree:
    return _gradient(loss_fn, seen, seen.params, images, seen.labels)[0]

  return simulate


def local_training(
  loss_fn: LossFn,
  rates: float | Array,
  order: Array,
  optimizer: Callable[[Array], optax.GradientTransformation] = optax.sgd,
) -> Simulate:
  """The change of the parameters in several local steps, which is differentiated through (Geiping
  et al. 2020, section 6; Dimitrov et al. 2022, "Data leakage in federated averaging").

  In one epoch the order is no secret that matters: another one only renames the images. In several
  epochs the attacker must know how batches differ from epoch to epoch, or guess it. Sites of
  `algorithms` take it from the run's public key.

  Args:
    loss_fn: of the client.
    rates: the learning rate, or [T] that of each step.
    order: [T, B'] int32, which of the images each step takes; -1 is padding.
    optimizer: learning rate -> the client's optimiser, which begins anew. Adam's first steps hardly
      depend on the size of gradients, so that their derivative says little.
  """
  rates = jnp.broadcast_to(jnp.asarray(rates, jnp.float32), order.shape[:1])

  def simulate(seen: Seen, images: Array) -> PyTree:
    def step(carry, now):
      params, model_state, opt_state = carry
      rate, index = now
      here, real = seen._replace(model_state=model_state), index >= 0
      safe = jnp.maximum(index, 0)
      batch = images[safe], seen.labels[safe], real
      grads, model_state = _gradient(loss_fn, here, params, *batch)
      moves, opt_state = optimizer(rate).update(grads, opt_state, params)
      return (optax.apply_updates(params, moves), model_state, opt_state), None

    start = seen.params, seen.model_state, optimizer(jnp.float32(0)).init(seen.params)
    (params, *_), _ = jax.lax.scan(step, start, (rates, order))
    return jax.tree.map(jnp.subtract, params, seen.params)

  return simulate


def _gradient(
  loss_fn: LossFn,
  seen: Seen,
  params: Params,
  images: Array,
  labels: Array,
  real: Array | None = None,
) -> tuple[Params, ModelState]:
  key = jax.random.key(0) if seen.key is None else seen.key
  weights = jnp.ones(len(images), jnp.float32) if real is None else real.astype(jnp.float32)
  if seen.class_weights is not None:
    weights = weights * seen.class_weights[labels]
  grads, (model_state, _) = jax.grad(loss_fn, has_aux=True)(
    params, seen.model_state, Batch(images, labels, weights), key
  )
  return grads, model_state
