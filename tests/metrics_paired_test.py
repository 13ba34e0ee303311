"""Paired comparisons against SciPy, enumeration, the definitions, and simulation."""

import itertools

import jax
import numpy as np
import pytest
import scipy.stats

from primia_jax import metrics

RADIOLOGIST = np.array([[189, 3, 42], [67, 85, 90], [13, 11, 124]])


def test_mcnemar_is_the_binomial_test_of_the_images_on_which_one_alone_is_right():
  labels = np.array([0] * 12)
  first = np.array([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1])
  second = np.array([1, 2, 1, 1, 1, 1, 1, 0, 0, 0, 1, 2])
  only_first, only_second, p = metrics.mcnemar(labels, first, second)
  assert (only_first, only_second) == (7, 1)
  assert p == pytest.approx(2 * (1 + 8) / 2**8)
  assert metrics.mcnemar(labels, first, first) == (0, 0, 1.0)


def test_mcnemar_refuses_at_its_level_where_nothing_differs_and_not_where_something_does():
  rng = np.random.default_rng(0)
  labels = np.zeros(200, np.int64)

  def refused(chance):
    wrong = rng.random((400, 2, 200)) < np.array([0.3, chance])[:, None]
    return np.mean([metrics.mcnemar(labels, *w.astype(int)).p < 0.05 for w in wrong])

  assert refused(0.3) < 0.07
  assert refused(0.5) > 0.9


@pytest.mark.parametrize("seed", range(4))
def test_the_worst_pairing_is_the_worst_of_all_pairings(seed):
  rng = np.random.default_rng(seed)
  labels = np.sort(rng.integers(0, 2, 6)).tolist()
  first, second = rng.integers(0, 2, (2, 6))
  cm = lambda said: np.asarray(metrics.confusion_matrix(np.array(labels), said, 2))
  # every order of the second reader's answers that keeps its confusion matrix
  pairings = {
    metrics.mcnemar(np.array(labels), first, np.array(order))
    for order in set(itertools.permutations(second.tolist()))
    if (cm(np.array(order)) == cm(second)).all()
  }
  worst = metrics.worst_mcnemar(cm(first), cm(second))
  assert worst.p == max(pairing.p for pairing in pairings)
  assert worst in pairings


def test_the_worst_pairing_with_the_radiologist():
  better = np.array([[200, 10, 24], [5, 235, 2], [13, 40, 95]])
  worst = metrics.worst_mcnemar(better, RADIOLOGIST)
  assert worst.only_first - worst.only_second == 530 - 398
  # all that he alone can be right on: 23 + 2 + 53 of the classes
  assert worst.only_second == (234 - 200) + (242 - 235) + (148 - 95)
  assert worst.p == scipy.stats.binomtest(worst.only_second, 320).pvalue
  assert worst.p < 1e-3


def delong_by_definition(truth, scores):
  """The areas and their covariance from the kernel of all pairs."""
  kernels = [
    (s[truth][:, None] > s[~truth]) + 0.5 * (s[truth][:, None] == s[~truth]) for s in scores
  ]
  of_positives, of_negatives = (np.cov([k.mean(axis) for k in kernels]) for axis in (1, 0))
  covariance = of_positives / truth.sum() + of_negatives / (~truth).sum()
  return [k.mean() for k in kernels], covariance


@pytest.mark.parametrize("decimals", [1, 8])
def test_delong_is_its_definition_also_with_ties(decimals):
  rng = np.random.default_rng(1)
  truth = rng.random(60) < 0.4
  scores = (rng.normal(size=(2, 60)) + truth).round(decimals)
  areas, covariance = delong_by_definition(truth, scores)
  deviation = np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
  got = metrics.delong(truth, *scores, level=0.9)
  assert (got.first, got.second) == pytest.approx(areas, abs=1e-14)
  assert got.first == pytest.approx(metrics.roc_auc(truth, scores[0]), abs=1e-14)
  assert got.high - got.low == pytest.approx(2 * 1.6448536 * deviation, rel=1e-6)
  z = abs(areas[0] - areas[1]) / deviation
  assert got.p == pytest.approx(2 * (1 - scipy.stats.norm.cdf(z)), rel=1e-6)
  same = metrics.delong(truth, scores[0], scores[0])
  assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_delong_covers_the_true_difference_of_areas():
  rng, inside = np.random.default_rng(2), 0
  true = float(scipy.stats.norm.cdf(1.5 / 2**0.5) - scipy.stats.norm.cdf(1 / 2**0.5))
  for _ in range(300):
    truth = np.arange(120) < 50
    shared = rng.normal(size=120)
    noise = 0.6 * shared + 0.8 * rng.normal(size=(2, 120))
    got = metrics.delong(truth, *(noise + truth * np.array([[1.5], [1.0]])))
    inside += got.low <= true <= got.high
  assert 0.92 < inside / 300 < 0.98


def test_the_mean_over_seeds_has_students_interval():
  values = [0.79, 0.80, 0.82, 0.77, 0.81]
  low, high = scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values))
  assert metrics.over_seeds(values) == pytest.approx((np.mean(values), low, high))
  mean, low, high = metrics.over_seeds([0.5])
  assert mean == 0.5
  assert np.isnan([low, high]).all()


def test_the_mean_difference_over_seeds():
  rng = np.random.default_rng(3)
  labels = np.arange(150) % 3
  draw = lambda gain: rng.dirichlet(np.ones(3), 150) + gain * np.eye(3)[labels]
  first = [p / p.sum(1, keepdims=True) for p in (draw(0.8), draw(0.8))]
  second = [p / p.sum(1, keepdims=True) for p in (draw(0.3), draw(0.3))]
  key, options = jax.random.key(0), {"num_resamples": 200}
  alone = metrics.bootstrap_difference(labels, first[0], second[0], key, **options)
  one = metrics.bootstrap_mean_difference(labels, first[:1], second[:1], key, **options)
  for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(one), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-12)
  other = metrics.bootstrap_difference(labels, first[1], second[1], key, **options)
  both = metrics.bootstrap_mean_difference(labels, first, second, key, **options)
  assert both.value.mcc == pytest.approx((alone.value.mcc + other.value.mcc) / 2)
  assert both.low.accuracy > 0
  # seeds average out, so the interval is narrower than that of one
  assert both.high.accuracy - both.low.accuracy < alone.high.accuracy - alone.low.accuracy


@pytest.mark.parametrize(
  ("call", "said"),
  [
    (lambda: metrics.mcnemar([0, 1], [0, 1], [0]), "must all be"),
    (lambda: metrics.worst_mcnemar(RADIOLOGIST, RADIOLOGIST.T), "the same images"),
    (lambda: metrics.worst_mcnemar(RADIOLOGIST / 2, RADIOLOGIST), "matrix of counts"),
    (lambda: metrics.worst_mcnemar(RADIOLOGIST, -RADIOLOGIST), "counts of at least one"),
    (lambda: metrics.delong([0, 1, 1], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]), "two of each"),
    (lambda: metrics.delong([0, 0, 1, 1], [0.1] * 4, [0.1] * 4, level=95), "level must"),
    (lambda: metrics.over_seeds([]), "one for each seed"),
    (lambda: metrics.over_seeds([0.1, float("nan")]), "finite"),
    (
      lambda: metrics.bootstrap_mean_difference([0], [[[1.0, 0]]], [], jax.random.key(0)),
      "pair them",
    ),
  ],
)
def test_wrong_input_is_refused(call, said):
  with pytest.raises(ValueError, match=said):
    call()
