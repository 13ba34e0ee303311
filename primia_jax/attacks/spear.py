"""Exact inversion of batches through a dense layer and its ReLU (SPEAR; Dimitrov et al. 2024).

A layer z = x W + b with ReLU after it has dW = X^T G and db = G^T 1, with inputs X [B, D] and
gradients G [B, M] at its outputs. dW has rank B at most, so G = Q R with R [B, M] known from its
singular value decomposition and Q [B, B] not. But ReLU makes G sparse: G[i, k] is 0 where unit k is
inactive on image i. So row q_i of Q is orthogonal to each column of R whose unit is inactive on
image i, and B - 1 such columns fix it up to scale. Columns are drawn at random until each image has
been hit; wrong directions mostly show, since they make G zero at few other units. Of the directions
with the most zeros, B are kept for which the layer, applied to the inputs found, is inactive where
G is zero; the bias's gradient gives the scales. The number of draws grows as 2^B, and images that
open nearly the same units need many units to be told apart.

This attacks one step on one batch under an honest server that sees a site's own update. A sum over
sites is a larger batch. Noise on the gradient fills its spectrum and its zeros and ends the attack.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from primia_jax.types import Array

_DEPENDENT = 1e-6  # least singular value of independent unit directions
_ALIKE = 0.999  # cosine from which two directions count as one
_DRAWS_AT_ONCE = 4096
_MOST = 64  # directions to choose from


class Recovered(NamedTuple):
  """What was found.

  Attributes:
    inputs: [B, D] float64, in no particular order.
    gradients: [B, M], at the layer's outputs.
    agreement: the share of (image, unit) where the gradient is zero exactly if the layer leaves
      the unit inactive. 1 shows that the batch is right: no wrong one passes this by chance, since
      it is a test of every unit on every image.
  """

  inputs: np.ndarray
  gradients: np.ndarray
  agreement: float


def invert(
  kernel_gradient: Array,
  bias_gradient: Array,
  kernel: Array,
  bias: Array,
  *,
  seed: int,
  num_draws: int = 20000,
  resolved: float = 1e-4,
) -> Recovered | None:
  """The inputs of a batch from the gradient of a dense layer that a ReLU follows.

  Exact up to rounding when it succeeds; float32 gradients give about four digits. It runs on the
  host in float64.

  Args:
    kernel_gradient, bias_gradient: [D, M] and [M], of one step, or a common multiple of both.
    kernel, bias: [D, M] and [M] of the layer before the step.
    seed: of the columns drawn.
    num_draws: how many sets of columns to try.
    resolved: what counts as zero, as a share of the largest: singular values and gradients.

  Returns:
    The batch; None where no B independent directions were found, as under noise.

  Raises:
    ValueError: shapes that do not go together, or fewer than one draw.
  """
  dw, db, w, b = (np.asarray(a, np.float64) for a in (kernel_gradient, bias_gradient, kernel, bias))
  if dw.ndim != 2 or dw.shape != w.shape or db.shape != b.shape or db.shape != dw.shape[1:]:
    raise ValueError(
      f"gradients {dw.shape} and {db.shape} of a kernel {w.shape} and bias {b.shape}; give those "
      "of one dense layer, [D, M] and [M]"
    )
  if num_draws < 1:
    raise ValueError(f"num_draws={num_draws} must be at least 1")
  left, values, right = np.linalg.svd(dw, full_matrices=False)
  size = int(np.sum(values > resolved * values[0])) if values[0] > 0 else 0
  if not 0 < size < dw.shape[1]:
    return None
  rows, strong = right[:size], left[:, :size] * values[:size]
  pool = _distinct(_directions(rows, seed, num_draws, resolved))
  chosen = _independent(pool, size)
  if chosen is None:
    return None

  def batch(directions: np.ndarray) -> Recovered:
    # G = diag(s) Q R up to the scales s, which the bias gives: db = R^T Q^T s
    scales = np.linalg.lstsq((directions @ rows).T, db, rcond=None)[0]
    mixing = scales[:, None] * directions
    gradients = mixing @ rows
    inputs = np.linalg.lstsq(mixing.T, strong.T, rcond=None)[0]
    inactive = np.abs(gradients) <= resolved * np.abs(gradients).max(axis=1, keepdims=True)
    return Recovered(inputs, gradients, float(np.mean(inactive == (inputs @ w + b <= 0))))

  best, improves = batch(chosen), True
  while improves and best.agreement < 1:  # one direction exchanged at a time
    improves = False
    for i, one in itertools.product(range(size), pool):
      trial = chosen.copy()
      trial[i] = one
      if np.linalg.matrix_rank(trial, tol=_DEPENDENT) == size:
        found = batch(trial)
        if found.agreement > best.agreement:
          best, chosen, improves = found, trial, True
  return best


def _directions(rows: np.ndarray, seed: int, num_draws: int, resolved: float) -> np.ndarray:
  """Unit directions [n, B] that make the gradient zero at more units than were drawn, those with
  the most zeros first; each is orthogonal to B - 1 columns drawn at random.
  """
  size, width = rows.shape
  rng, found, zeros = np.random.default_rng(seed), [], []
  for start in range(0, num_draws, _DRAWS_AT_ONCE):
    count = min(_DRAWS_AT_ONCE, num_draws - start)
    drawn = np.argsort(rng.random((count, width)), axis=1)[:, : size - 1]
    columns = rows.T[drawn]  # [count, B - 1, B]
    direction = np.linalg.svd(columns)[2][:, -1] if size > 1 else np.ones((count, 1))
    gradient = np.abs(direction @ rows)
    is_zero = gradient <= resolved * gradient.max(axis=1, keepdims=True)
    total = is_zero.sum(axis=1)
    # A wrong direction is zero at the B - 1 units drawn and nowhere else, but for dead units,
    # which are zero in every direction.
    dead = np.sum(np.abs(rows).max(axis=0) <= resolved * np.abs(rows).max())
    kept = total > size - 1 + dead if size > 1 else np.ones(count, bool)
    found.append(direction[kept])
    zeros.append(total[kept])
  order = np.argsort(-np.concatenate(zeros), kind="stable")
  return np.concatenate(found)[order]


def _distinct(directions: np.ndarray) -> np.ndarray:
  """The first directions that differ, [n, B]."""
  chosen = directions[:0]
  for one in directions:
    if np.all(np.abs(chosen @ one) < _ALIKE):
      chosen = np.concatenate([chosen, one[None]])
      if len(chosen) == _MOST:
        break
  return chosen


def _independent(directions: np.ndarray, size: int) -> np.ndarray | None:
  """The first `size` directions that are independent, [B, B]; None if there are not as many."""
  chosen = directions[:0]
  for one in directions:
    more = np.concatenate([chosen, one[None]])
    if np.linalg.matrix_rank(more, tol=_DEPENDENT) == len(more):
      chosen = more
    if len(chosen) == size:
      return chosen
  return None
