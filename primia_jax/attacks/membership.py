"""Membership inference: was this image among those that a model was trained on?

The attacker has the model's answers, the image with its label, and shadow models: trained in the
same way on other images of the same kind, so that it knows which images each of them saw
(`shadows`). All attacks here compare the model's confidence in the true label with the shadows'.

They are one test. An attack scores an image by log p(phi | in) - log p(phi | out), where phi is a
statistic of the model's answer and both densities are of a family that the shadows fit:

- `lira` (Carlini et al. 2022): phi = log p / (1 - p) is normal, with a mean and a variance for each
  image in and out (four numbers an image), or one variance for all images (two numbers);
- `bavaria`: in between. The variance of an image has an inverse gamma prior around that of all
  images, so that phi is Student's t;
- `base`: no density is fitted. If models were drawn from a posterior, log p(x | model) - log E
  p(x | model) would be the exact log-ratio, and the shadows' mean stands for E (one number an
  image);
- `rmia` (Zarifzadeh et al. 2024): the share of population images z whose ratio p(x | model) / p(x)
  the image's own exceeds by gamma. For one model that is a non-decreasing function of `base`, so
  that both have the same ROC curve up to ties.

That LiRA, RMIA and BASE are ends of such a hierarchy, and the names BASE and BaVarIA, are of
Brannvall 2026 (arXiv 2603.11799), which we know by its abstract and introduction. That the last
two are equivalent is shown above and tested. The prior of `bavaria` is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import special, stats


class Signals(NamedTuple):
  """What one model says, or several along leading axes: log-odds phi = log p / (1 - p) of the
  probability p of the true label, float64.

  Attributes:
    pool: [..., N] of the images whose membership is asked.
    population: [..., Z] of images of the same kind that no model was trained on; only `rmia` takes
      them.
  """

  pool: np.ndarray
  population: np.ndarray


# (Signals of the model, Signals of S shadows, included [S, N] bool: which images each shadow was
# trained on) -> [N] scores; larger means rather a member
Attack = Callable[[Signals, Signals, np.ndarray], np.ndarray]


def log_odds(logits: Any, labels: Any) -> np.ndarray:
  """log p / (1 - p) of the true label's probability: [..., N, L], [N] -> [..., N] float64.

  It is taken from logits, since p rounds to 1 (as Carlini et al. 2022 advise).

  Raises:
    ValueError: for logits that are not finite, or labels that do not fit.
  """
  logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
  if logits.ndim < 2 or logits.shape[-2:-1] != labels.shape or logits.shape[-1] < 2:
    raise ValueError(f"logits {logits.shape} and labels {labels.shape}; give [..., N, L] and [N]")
  if not np.isfinite(logits).all():
    raise ValueError("logits are not finite: the training of a model diverged; lower its rate")
  is_true = labels[:, None] == np.arange(logits.shape[-1])
  own = np.sum(logits * is_true, axis=-1)
  return own - special.logsumexp(np.where(is_true, -np.inf, logits), axis=-1)


def loss_threshold(target: Signals, shadows: Signals, included: np.ndarray) -> np.ndarray:
  """Minus the model's loss on each image (Yeom et al. 2018); shadows serve for thresholds only."""
  return -np.logaddexp(0, -target.pool)


def lira(
  target: Signals,
  shadows: Signals,
  included: np.ndarray,
  *,
  pooled_variance: bool = False,
  online: bool = True,
) -> np.ndarray:
  """The likelihood ratio attack (Carlini et al. 2022, algorithm 1, with one query an image).

  Args:
    target, shadows, included: see `Attack`.
    pooled_variance: one variance for all images, for few shadows (below about 64).
    online: log of the ratio of the densities in and out. False takes shadows that were not trained
      on the image alone, and scores by -log P[phi' > phi] under them (their offline attack).

  Raises:
    ValueError: for an image in fewer than two shadows, or out of fewer than two.
  """
  prior = math.inf if pooled_variance else 0.0
  return _ratio(target, shadows, included, prior, False, online)


def bavaria(
  target: Signals,
  shadows: Signals,
  included: np.ndarray,
  *,
  prior_degrees: float = 4.0,
  online: bool = True,
) -> np.ndarray:
  """LiRA with a conjugate prior on each image's variance, which is then integrated out.

  The variance of n shadows with sum of squares SS is (nu s^2 + SS) / (nu + n - 1), where s^2 is the
  pooled variance, and phi is Student's t of nu + n - 1 degrees around their mean, (1 + 1 / n) times
  as wide in variance.

  Args:
    prior_degrees: nu, what the pooled variance counts, in shadows.
    target, shadows, included, online: as in `lira`.

  Raises:
    ValueError: as `lira`, and for a prior that is not positive and finite.
  """
  if not 0 < prior_degrees < math.inf:
    raise ValueError(f"prior_degrees={prior_degrees} must be positive and finite; use lira else")
  return _ratio(target, shadows, included, prior_degrees, True, online)


def base(
  target: Signals, shadows: Signals, included: np.ndarray, *, offline_a: float | None = None
) -> np.ndarray:
  """log p(x | model) - log p(x), where p(x) is the mean of the shadows' p (Lassila et al. 2025).

  Args:
    offline_a: None takes the mean of the shadows' means in and out. A number a from 0 to 1 takes
      shadows alone that were not trained on x: p(x) = ((1 + a) p_out + 1 - a) / 2 (Zarifzadeh et
      al. 2024, who tune a on shadows; 0.3 is common).
    target, shadows, included: see `Attack`.

  Raises:
    ValueError: for an image in or out of too few shadows, or an a outside [0, 1].
  """
  return special.log_expit(target.pool) - _log_mean(shadows.pool, included, offline_a)


def rmia(
  target: Signals,
  shadows: Signals,
  included: np.ndarray,
  *,
  gamma: float = 2.0,
  offline_a: float | None = None,
) -> np.ndarray:
  """The share of population images z with ratio(x) >= gamma ratio(z) (Zarifzadeh et al. 2024).

  The ratio is p(. | model) / p(.), with p(.) as in `base`.

  Args:
    gamma: at least 1. No image whose p(x) is above 1 / gamma can reach it, so that 1 suits models
      that are sure of most images, as with two classes.
    target, shadows, included, offline_a: as in `base`.

  Raises:
    ValueError: as `base`; for a gamma below 1, or no population.
  """
  if not 1 <= gamma < math.inf:
    raise ValueError(f"gamma={gamma} must be at least 1 and finite")
  if not target.population.size:
    raise ValueError("rmia compares with a population; give Signals.population some images")
  ratios = base(target, shadows, included, offline_a=offline_a)
  if offline_a is None:
    mean = np.mean(special.expit(shadows.population), axis=0)
    of_z = np.log(np.maximum(mean, np.finfo(float).tiny))
  else:
    nowhere = np.zeros(shadows.population.shape, bool)
    of_z = _log_mean(shadows.population, nowhere, offline_a)
  others = np.sort(special.log_expit(target.population) - of_z)
  return np.searchsorted(others, ratios - math.log(gamma), side="right") / others.size


def _log_mean(log_odds: np.ndarray, included: np.ndarray, offline_a: float | None) -> np.ndarray:
  _check(log_odds, included, 1 if offline_a is None else 0, 1)
  p, outs = special.expit(log_odds), np.sum(~included, axis=0)
  out = np.sum(p * ~included, axis=0) / outs
  if offline_a is None:
    mean = (out + np.sum(p * included, axis=0) / np.sum(included, axis=0)) / 2
  elif 0 <= offline_a <= 1:
    mean = ((1 + offline_a) * out + 1 - offline_a) / 2
  else:
    raise ValueError(f"offline_a={offline_a} must lie in [0, 1]")
  return np.log(np.maximum(mean, np.finfo(float).tiny))


def _ratio(
  target: Signals,
  shadows: Signals,
  included: np.ndarray,
  prior_degrees: float,
  student: bool,
  online: bool,
) -> np.ndarray:
  """log p(phi | in) - log p(phi | out), or offline -log P[phi' > phi | out]."""
  _check(shadows.pool, included, 2 if online else 0, 2)
  out = _fit(shadows.pool, ~included, prior_degrees, student)
  if not online:
    return -out.logsf(target.pool)
  return _fit(shadows.pool, included, prior_degrees, student).logpdf(target.pool) - out.logpdf(
    target.pool
  )


def _fit(phi: np.ndarray, chosen: np.ndarray, prior_degrees: float, student: bool) -> Any:
  """The distribution of each image's phi [S, N] over the shadows that are chosen."""
  count = np.sum(chosen, axis=0)
  mean = np.sum(phi * chosen, axis=0) / count
  squares = np.sum((phi - mean) ** 2 * chosen, axis=0)
  pooled = np.sum(squares) / np.sum(count - 1)
  if math.isinf(prior_degrees):
    variance = np.full(mean.shape, pooled)
  else:
    variance = (prior_degrees * pooled + squares) / (prior_degrees + count - 1)
  variance = np.maximum(variance, 1e-30)  # shadows that all say the same
  if student:
    return stats.t(prior_degrees + count - 1, mean, np.sqrt(variance * (1 + 1 / count)))
  return stats.norm(mean, np.sqrt(variance))


def _check(phi: np.ndarray, included: np.ndarray, fewest_in: int, fewest_out: int) -> None:
  if phi.shape != included.shape or included.dtype != bool:
    raise ValueError(
      f"shadows say {phi.shape} of the pool and included is {included.dtype} {included.shape}; "
      "give both [S, N], included as booleans"
    )
  ins = np.sum(included, axis=0)
  least_in, least_out = np.min(ins), np.min(len(included) - ins)
  if least_in < fewest_in or least_out < fewest_out:
    raise ValueError(
      f"an image is in {least_in} and another out of {least_out} shadows, and at least {fewest_in} "
      f"and {fewest_out} are needed; train more shadows, each on a random half of the images"
    )
