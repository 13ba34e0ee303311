"""How often a membership attack is right: true against false positives, with intervals.

A rate at few false positives says what averages hide (Carlini et al. 2022): that some
images are surely recognised. The threshold for a false positive rate comes from the shadows alone,
as an attacker must choose it. One from the target's own scores, which no attacker has, is given
beside it, as the literature reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from scipy import stats

from primia_jax.attacks.membership import Attack, Signals
from primia_jax.metrics import clopper_pearson


class Attacked(NamedTuple):
  """Scores of T models, each attacked with shadows that hold neither it nor its complement.

  Attributes:
    scores: [T, N].
    included: [T, N] bool, the truth.
    thresholds: [T, A] for each aimed rate, from the shadows alone: a score above is a guess "in".
    own_thresholds: [T, A] from the target's own images that are out; no attacker has them.
  """

  scores: np.ndarray
  included: np.ndarray
  thresholds: np.ndarray
  own_thresholds: np.ndarray


class Rates(NamedTuple):
  """A share of trials with its intervals; each [A], for A thresholds.

  Attributes:
    value: over all trials.
    low, high: the exact interval (Clopper and Pearson 1934), trials taken as independent.
    least, most: Student's interval of the mean over models, which share no training noise; NaN for
      one model. It holds where trials of one model depend on each other.
  """

  value: np.ndarray
  low: np.ndarray
  high: np.ndarray
  least: np.ndarray
  most: np.ndarray


class Curve(NamedTuple):
  """Points of a ROC curve, for log-log axes, with intervals.

  Attributes:
    aimed: [A] false positive rates that thresholds were chosen for.
    false_positive, true_positive: what these thresholds gave.
  """

  aimed: np.ndarray
  false_positive: Rates
  true_positive: Rates


def attack_each(
  attack: Attack,
  signals: Signals,
  included: np.ndarray,
  aimed: Sequence[float],
  num_targets: int | None = None,
) -> Attacked:
  """Attacks each of S models with the others.

  For the threshold of a target the attacker plays the same game with its own shadows: it attacks
  each with the rest, and takes the threshold that at most the aimed share of images that were out
  exceeds.

  Args:
    attack: see `membership.Attack`.
    signals: of the S models.
    included: [S, N], from `shadows.halves`.
    aimed: false positive rates.
    num_targets: T, the first T models; None for all.

  Raises:
    ValueError: for models that are not in complementary pairs, or fewer than four pairs.
  """
  num_models = len(included)
  if num_models < 8 or num_models % 2 or np.any(included[::2] == included[1::2]):
    raise ValueError(
      f"{num_models} models; give at least eight, 2k and 2k + 1 trained on complementary "
      "images, as shadows.halves draws them"
    )
  everyone = np.arange(num_models)
  of = lambda rows: jax.tree.map(lambda a: a[rows], signals)

  def played(model: int, shadows: np.ndarray) -> np.ndarray:
    return attack(of(model), of(shadows), included[shadows])

  found = []
  for model in range(num_models if num_targets is None else num_targets):
    shadows = everyone[everyone // 2 != model // 2]
    scores = played(model, shadows)
    outs = [played(s, shadows[shadows // 2 != s // 2])[~included[s]] for s in shadows]
    own = threshold(scores[~included[model]], aimed)
    found.append((scores, included[model], threshold(np.concatenate(outs), aimed), own))
  return Attacked(*(np.stack(parts) for parts in zip(*found, strict=True)))


def threshold(outs: np.ndarray, aimed: Sequence[float]) -> np.ndarray:
  """[A] the least score that at most a share `aimed` of the scores [M] of outs exceeds."""
  falling = np.sort(outs)[::-1]
  return falling[np.minimum(np.floor(np.asarray(aimed) * len(outs)).astype(int), len(outs) - 1)]


def curve(
  scores: np.ndarray, included: np.ndarray, thresholds: np.ndarray, aimed: Sequence[float]
) -> Curve:
  """The rates that thresholds [T, A] give on scores and truth [T, N], at 95 % confidence each."""
  guessed = scores[:, :, None] > thresholds[:, None, :]

  def rates(trial: np.ndarray) -> Rates:
    hits, trials = np.sum(guessed & trial[:, :, None], axis=1), np.sum(trial, axis=1)
    total, number = hits.sum(axis=0), int(trials.sum())
    low, high = np.array([clopper_pearson(int(n), number) for n in total]).T
    each = hits / trials[:, None]
    if len(each) > 1:
      wide = stats.t.ppf(0.975, len(each) - 1) * stats.sem(each, axis=0)
    else:
      wide = np.full(total.shape, math.nan)
    mean = each.mean(axis=0)
    return Rates(total / number, low, high, mean - wide, mean + wide)

  return Curve(np.asarray(aimed), rates(~included), rates(included))


def precision(points: Curve, prior: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Of those guessed "in", the share that is, where a share `prior` of those asked about is in.

  Returns:
    value, low, high, each [A]: pi TPR / (pi TPR + (1 - pi) FPR), NaN where nobody is guessed in.
    The ends take one rate's low and the other's high end, so that they hold together at 90 %.

  Raises:
    ValueError: for a prior outside (0, 1).
  """
  if not 0 < prior < 1:
    raise ValueError(f"prior={prior} must lie in (0, 1)")

  def of(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
      return prior * true / (prior * true + (1 - prior) * false)

  true, false = points.true_positive, points.false_positive
  return of(true.value, false.value), of(true.low, false.high), of(true.high, false.low)
