"""The labels behind an update, read off the gradient of the last dense layer.

With softmax cross-entropy the gradient of the last bias is the mean over the batch of p - y, the
predicted probabilities minus the one-hot labels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

from primia_jax.types import ApplyFn, Array, Batch, Key, LossFn, Metrics, ModelState, Params


def single(kernel: Array) -> Array:
  """The label of a single image: int32, exact (Zhao et al. 2020, "iDLG", section 3.2).

  The kernel's gradient is h (p - y)^T with the features h, so that columns i and j have the inner
  product |h|^2 (p - y)_i (p - y)_j. It is negative for all pairs with the label, whatever the signs
  of h, and for no other pair.

  Args:
    kernel: [K, L], the gradient of the last kernel.
  """
  products = kernel.T @ kernel
  off = products * (1 - jnp.eye(len(products), dtype=products.dtype))
  return jnp.argmin(off.sum(0)).astype(jnp.int32)


def distinct(kernel: Array, batch_size: int) -> Array:
  """The labels of a batch without two of one class: [B] int32, in ascending order (Yin et al. 2021,
  "See through gradients", equation 5).

  Right where features are not negative, as after ReLU, sigmoid or a mean of them, and other
  classes' probabilities are small.

  Args:
    kernel: [K, L], the gradient of the last kernel.
    batch_size: B, at most L.

  Raises:
    ValueError: the batch is larger than the number of classes.
  """
  if batch_size > kernel.shape[1]:
    raise ValueError(
      f"batch_size={batch_size} is more than the {kernel.shape[1]} classes, so labels repeat; use "
      "counts"
    )
  return jnp.sort(jax.lax.top_k(-kernel.min(0), batch_size)[1].astype(jnp.int32))


def counts(
  bias: Array | np.ndarray, probabilities: Array | np.ndarray, batch_size: int
) -> np.ndarray:
  """How many images of each class are in a batch: [L] int64 that sum to B.

  The bias's gradient g is mean(p) - counts / B. Exact if the attacker's guess of mean(p) is within
  1 / (2 B) of it for each class. An untrained model predicts much the same for all images, so that
  any public images give the guess.

  Args:
    bias: [L], the gradient of the last bias.
    probabilities: [L], the guess of the batch's mean prediction.
    batch_size: B.
  """
  guess = batch_size * (np.asarray(probabilities, np.float64) - np.asarray(bias, np.float64))
  whole = np.maximum(np.rint(guess), 0).astype(np.int64)
  while (excess := whole.sum() - batch_size) != 0:  # move the count that is nearest to the next one
    step = int(np.sign(excess))
    cost = np.where(whole - step < 0, np.inf, np.abs(whole - step - guess) - np.abs(whole - guess))
    whole[cost.argmin()] -= step
  return whole


def shares(
  kernel: np.ndarray, bias: np.ndarray, of_kernel: np.ndarray, of_bias: np.ndarray
) -> np.ndarray:
  """The share of each class behind an update of a few small steps of SGD: [L] float64, sums to 1.

  The update is about -rate sum_l share_l G_l, with G_l the mean gradient of class l, which public
  images of it give (compare Wainakh et al. 2022, "User-level label leakage from gradients in
  federated learning"). Shares are the least squares that are not negative, so that the rate and the
  number of steps need not be known. What one class's images do is public knowledge; another
  optimiser than SGD, or a model that moves far, spoils the sum.

  Args:
    kernel, bias: [K, L] and [L], the head's change: after less before.
    of_kernel, of_bias: [L, K, L] and [L, L], the mean gradient of each class, times its weight in
      the loss.

  Returns:
    The shares; 1 / L each where the update points away from all classes' descent.
  """
  columns = np.concatenate([of_kernel.reshape(len(of_bias), -1), of_bias], axis=1).T
  change = np.concatenate([np.ravel(kernel), np.ravel(bias)])
  found = scipy.optimize.nnls(columns.astype(np.float64), -change.astype(np.float64))[0]
  total = found.sum()
  return found / total if total > 0 else np.full(len(found), 1 / len(found))


def soft_loss(apply_fn: ApplyFn, prepare: Callable[[Array], Array]) -> LossFn:
  """The mean cross-entropy with labels that are probabilities, as an attacker needs it who searches
  for labels together with images (Zhu et al. 2019): equal to `local.classification_loss` where they
  are one-hot.

  Args:
    apply_fn: (params, model_state, images, train=, key=) -> (logits [B, L], new model_state).
    prepare: images -> as the model takes them.

  Returns:
    A loss whose batch has labels [B, L] float32. Its metrics count no right answers.
  """

  def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: Key):
    logits, model_state = apply_fn(params, model_state, prepare(batch.images), train=True, key=key)
    losses = batch.weights * optax.softmax_cross_entropy(logits, batch.labels)
    total, count = jnp.sum(losses), jnp.sum((batch.weights > 0).astype(jnp.float32))
    metrics = Metrics(total, jnp.zeros((), jnp.float32), count)
    return total / jnp.maximum(count, 1.0), (model_state, metrics)

  return loss_fn


def of_counts(whole: np.ndarray) -> np.ndarray:
  """[B] int32 labels in ascending order, from counts [L]. Their order within a batch is free."""
  return np.repeat(np.arange(len(whole)), whole).astype(np.int32)
