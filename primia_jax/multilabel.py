"""Images with several findings each: the sigmoid loss, and errors of each finding.

The findings of an image are one int32, the sum of 2^k over its findings k (`Dataset.is_multi`), so
sites, batches, rounds, sums and privacy are those of classification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax import evaluation
from primia_jax.types import ApplyFn, Array, Batch, Key, LossFn, Metrics, ModelState, Params


def findings(labels: Any, num_classes: int) -> Any:
  """int32 [...] -> bool [..., L], whether each finding is there; NumPy or JAX as given."""
  xp = jnp if isinstance(labels, jax.Array) else np
  shifts = xp.arange(num_classes, dtype=xp.int32).reshape((1,) * labels.ndim + (-1,))
  return (labels[..., None] >> shifts) & 1 > 0


def renumbered(labels: np.ndarray, numbers: np.ndarray) -> np.ndarray:
  """int32 [N] findings whose k-th is now the one of numbers[k]; numbers: [L], all different."""
  there = findings(np.asarray(labels), len(numbers))
  return (there * (1 << numbers.astype(np.int64))).sum(-1).astype(np.int32)


def multilabel_loss(
  apply_fn: ApplyFn,
  prepare: Callable[[Key, Array, Array], tuple[Array, Array]],
  num_classes: int,
  label_smoothing: float = 0.0,
) -> LossFn:
  """The sigmoid cross-entropy, averaged over findings and over the batch's examples of weight.

  Args:
    apply_fn, prepare: as for `local.classification_loss`; targets are 0 or 1 for each finding.
    num_classes: L, the number of findings.
    label_smoothing: in [0, 1); moves each target by half of it towards 1/2.

  Returns:
    A loss whose `Metrics.correct` is the share of right findings, summed over images.

  Raises:
    ValueError: for a label smoothing outside [0, 1).
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")

  def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: Key):
    prepare_key, model_key = jax.random.split(key)
    there = findings(batch.labels, num_classes)
    targets = there.astype(jnp.float32) * (1 - label_smoothing) + label_smoothing / 2
    images, targets = prepare(prepare_key, batch.images, targets)
    logits, model_state = apply_fn(params, model_state, images, train=True, key=model_key)
    entropy = optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1)
    loss = jnp.sum(batch.weights * entropy)
    counts = (batch.weights > 0).astype(jnp.float32)
    right = jnp.sum(counts * ((logits > 0) == there).astype(jnp.float32).mean(-1))
    found = Metrics(loss, right, jnp.sum(counts))
    return loss / jnp.maximum(found.num_examples, 1.0), (model_state, found)

  return loss_fn


def count_errors(
  apply_fn: ApplyFn, prepare: Callable[[Array], Array], num_classes: int, batch_size: int
) -> Callable[..., dict[str, Array]]:
  """`evaluation.count_errors` for findings.

  Returns:
    (params, model_state, images [N, H, W, C], labels [N], num_examples) -> {"confusion":
    [L, 2, 2] float32 for each finding, rows true (absent, there) and columns predicted (probability
    below, above 1/2); "loss": the sum of the examples' losses}.
  """

  def run(params, model_state, images, labels, num_examples):
    def of_batch(batch: Batch) -> dict[str, Array]:
      logits, _ = apply_fn(params, model_state, prepare(batch.images), train=False)
      there = findings(batch.labels, num_classes)
      one_hot = lambda yes: jnp.stack([~yes, yes], -1).astype(jnp.float32)  # [B, L, 2]
      true = one_hot(there) * batch.weights[:, None, None]
      confusion = jnp.einsum("blt,blp->ltp", true, one_hot(logits > 0))
      entropy = optax.sigmoid_binary_cross_entropy(logits, there.astype(jnp.float32)).mean(-1)
      loss = jnp.sum(jnp.where(batch.weights > 0, entropy * batch.weights, 0.0))
      return {"confusion": confusion, "loss": loss}

    confusion = jnp.zeros((num_classes, 2, 2), jnp.float32)
    zeros = {"confusion": confusion, "loss": jnp.zeros((), jnp.float32)}
    return evaluation.over_batches(of_batch, zeros, images, labels, num_examples, batch_size)

  return run


def predictor(
  apply_fn: ApplyFn, prepare: Callable[[Array], Array], batch_size: int = 64
) -> Callable[[Sequence[tuple[Params, ModelState]], Any], np.ndarray]:
  """Makes (models, images [N, ...]) -> probabilities of each finding [N, L]; of several models,
  their mean.
  """
  return evaluation.predictor(apply_fn, prepare, batch_size, jax.nn.sigmoid)
