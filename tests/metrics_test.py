"""ROC curves, calibration and intervals, against scikit-learn, SciPy and brute force."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_jax import metrics


def random_model(seed, num_examples=200, num_classes=3, decimals=None):
  """Labels of every class and probabilities that favour them, with ties when rounded."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(num_examples) % num_classes)
  logits = rng.normal(size=(num_examples, num_classes)) + 1.5 * np.eye(num_classes)[labels]
  if decimals is not None:
    logits = logits.round(decimals)
  p = np.exp(logits)
  return labels, p / p.sum(1, keepdims=True)


# ROC.


binary_scores = st.lists(
  st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=40
).filter(lambda rows: len({y for y, _ in rows}) == 2)


@settings(deadline=None, max_examples=50)
@given(binary_scores)
def test_roc_equals_scikit_learn_and_brute_force_with_ties(rows):
  labels, scores = np.array([y for y, _ in rows]), np.array([s / 4 for _, s in rows])
  curve = metrics.roc_curve(labels, scores)
  for got, expected in zip(
    curve, sk.roc_curve(labels, scores, drop_intermediate=False), strict=True
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-14)
  wins = [
    fractions.Fraction(int(a > b) * 2 + int(a == b), 2)
    for a in scores[labels]
    for b in scores[~labels]
  ]
  area = metrics.roc_auc(labels.astype(int), scores)
  assert area == pytest.approx(float(sum(wins) / len(wins)), abs=1e-15)
  assert area == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-14)
  assert np.trapezoid(curve.true_positive_rate, curve.false_positive_rate) == pytest.approx(
    area, abs=1e-14
  )


@pytest.mark.parametrize("num_classes", [3, 5])
@pytest.mark.parametrize("decimals", [0, None])
def test_macro_roc_auc_equals_scikit_learn_one_vs_one(num_classes, decimals):
  labels, p = random_model(1, 300, num_classes, decimals)
  assert metrics.macro_roc_auc(labels, p) == pytest.approx(
    sk.roc_auc_score(labels, p, multi_class="ovo"), abs=1e-13
  )


def test_macro_roc_auc_of_two_classes_is_binary():
  labels, p = random_model(2, 100, 2)
  assert metrics.macro_roc_auc(labels, p) == pytest.approx(
    sk.roc_auc_score(labels, p[:, 1]), abs=1e-14
  )
  # Scores that only the second column tells apart: 1 - 1e-20 is 1.
  p = np.array([[1, 1e-20], [1, 2e-20], [1, 3e-20]])
  assert metrics.macro_roc_auc(np.array([0, 1, 1]), p) == 1


def test_roc_of_a_missing_class_is_undefined():
  labels, p = random_model(0, 60, 3)
  kept = labels != 2
  assert np.isnan(metrics.macro_roc_auc(labels[kept], p[kept]))
  assert np.isnan(metrics.roc_auc(np.ones(3, int), np.arange(3)))
  curve = metrics.roc_curve(np.ones(3, int), np.arange(3))
  assert np.isnan(curve.false_positive_rate).all()
  np.testing.assert_allclose(curve.true_positive_rate, [0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
  ("labels", "scores", "message"),
  [
    ([0, 1], [0.5, np.nan], "score 1 is not finite"),
    ([0, 2], [1, 2], "class 2"),
    ([], [], "N >= 1"),
  ],
)
def test_bad_input_of_roc(labels, scores, message):
  with pytest.raises(ValueError, match=message):
    metrics.roc_auc(np.array(labels, int), np.array(scores, float))


# Probabilities.


def test_brier_score_and_log_loss_equal_scikit_learn():
  labels, p = random_model(3)
  assert metrics.log_loss(labels, p) == pytest.approx(sk.log_loss(labels, p), rel=1e-12)
  by_hand = np.mean(
    [sum((p[n, k] - (k == labels[n])) ** 2 for k in range(3)) for n in range(len(p))]
  )
  assert metrics.brier_score(labels, p) == pytest.approx(by_hand, rel=1e-12)
  binary, q = random_model(3, num_classes=2)
  assert metrics.brier_score(binary, q) == pytest.approx(
    2 * sk.brier_score_loss(binary, q[:, 1]), rel=1e-12
  )
  assert metrics.log_loss(np.array([0]), np.array([[0.0, 1.0]])) == np.inf


def test_expected_calibration_error_by_hand():
  p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.35, 0.65], [1.0, 0.0]])
  labels = np.array([0, 1, 1, 0, 0])
  # Bins of a tenth: 0.9, 0.9 -> gap |1 - 1.8|; 0.6 -> |1 - 0.6|; 0.65 -> |0 - 0.65|; 1.0 -> 0.
  assert metrics.expected_calibration_error(labels, p, 10) == pytest.approx((0.8 + 0.4 + 0.65) / 5)
  # One bin: the gap of the means.
  assert metrics.expected_calibration_error(labels, p, 1) == pytest.approx(abs(3 - 4.05) / 5)


@pytest.mark.parametrize(
  ("labels", "probabilities", "message"),
  [
    ([0, 1], [[0.5, 0.5], [0.5, 0.6]], r"example 1, \[0.5, 0.6\], do not sum to 1: pass softmax"),
    ([0, 1], [[2.0, -1.0], [0.5, 0.5]], "example 0, .*negative"),
    ([0, 1], [[0.5, 0.5], [np.nan, 0.5]], "example 1, .*not finite"),
    ([0, 2], [[0.5, 0.5], [0.5, 0.5]], "labels hold class 2, outside 0..1"),
    ([0, -1], [[0.5, 0.5], [0.5, 0.5]], "labels hold class -1"),
    ([0.0, 1.0], [[0.5, 0.5], [0.5, 0.5]], "labels must be integers"),
    ([0], [[0.5, 0.5], [0.5, 0.5]], r"\(1,\), \(2, 2\)"),
    ([0, 0], [[1.0], [1.0]], "L >= 2"),
  ],
)
def test_bad_probabilities(labels, probabilities, message):
  labels, probabilities = np.array(labels), np.array(probabilities)
  for function in (metrics.macro_roc_auc, metrics.log_loss, metrics.brier_score, metrics.scores):
    with pytest.raises(ValueError, match=message):
      function(labels, probabilities)
  with pytest.raises(ValueError, match=message):
    metrics.bootstrap_intervals(labels, probabilities, jax.random.key(0))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_probabilities_are_good_enough(dtype):
  labels, p = random_model(0)
  halves = jnp.asarray(p, jnp.float32).astype(dtype)
  assert metrics.macro_roc_auc(labels, halves) == pytest.approx(
    metrics.macro_roc_auc(labels, p), abs=2e-3
  )


# Intervals.


def oracle_scores(labels, p):
  predictions = p.argmax(1)
  num_classes = p.shape[1]
  return (
    sk.accuracy_score(labels, predictions),
    sk.matthews_corrcoef(labels, predictions),
    sk.roc_auc_score(labels, p, multi_class="ovo"),
    sk.recall_score(labels, predictions, average=None),
    [sk.recall_score(labels != k, predictions != k) for k in range(num_classes)],
  )


def test_intervals_equal_scikit_learn_on_each_resample():
  labels, p = random_model(5, 90, 3, decimals=0)
  other = random_model(6, 90, 3)[1]
  key, resamples = jax.random.key(7), 40
  draws = np.random.default_rng(np.asarray(jax.random.key_data(key))).integers(
    90, size=(resamples, 90)
  )
  oracle = [oracle_scores(labels[d], p[d]) for d in draws]
  got = metrics.bootstrap_intervals(labels, p, key, num_resamples=resamples, level=0.9)
  others = [oracle_scores(labels[d], other[d]) for d in draws]
  difference = metrics.bootstrap_difference(
    labels, p, other, key, num_resamples=resamples, level=0.9
  )
  for i in range(len(metrics.Scores._fields)):
    np.testing.assert_allclose(got.value[i], oracle_scores(labels, p)[i], rtol=1e-12)
    samples, other_samples = (np.array([s[i] for s in x]) for x in (oracle, others))
    for result, x in ((got, samples), (difference, samples - other_samples)):
      np.testing.assert_allclose(
        (result.low[i], result.high[i]), np.quantile(x, [0.05, 0.95], axis=0), atol=1e-12
      )
      assert not np.any(result.undefined[i])


def test_intervals_of_many_examples_run_in_chunks_with_the_same_result():
  n, resamples = 20_000, 300  # 6 million draws: more than one chunk
  labels, p = random_model(0, n, 2)
  key = jax.random.key(0)
  draws = np.random.default_rng(np.asarray(jax.random.key_data(key))).integers(
    n, size=(resamples, n)
  )
  expected = np.quantile((p.argmax(1) == labels)[draws].mean(1), [0.025, 0.975])
  got = metrics.bootstrap_intervals(labels, p, key, num_resamples=resamples)
  np.testing.assert_allclose((got.low.accuracy, got.high.accuracy), expected, rtol=1e-12)


def test_intervals_have_the_width_of_the_binomial_and_depend_on_the_key_alone():
  labels, p = random_model(0, 624)
  one, again, other = (metrics.bootstrap_intervals(labels, p, jax.random.key(s)) for s in (0, 0, 1))
  deviation = np.sqrt(one.value.accuracy * (1 - one.value.accuracy) / 624)
  assert one.high.accuracy - one.low.accuracy == pytest.approx(2 * 1.96 * deviation, rel=0.08)
  jax.tree.map(np.testing.assert_array_equal, one, again)
  assert one.low.macro_roc_auc != other.low.macro_roc_auc


def test_copies_of_a_patient_do_not_narrow_the_interval():
  labels, p = random_model(0, 60)
  key = jax.random.key(0)
  once = metrics.bootstrap_intervals(labels, p, key, num_resamples=200)
  repeated = [np.repeat(x, 4, axis=0) for x in (labels, p)]
  patients = np.repeat([f"patient {i:02}" for i in range(60)], 4)
  grouped = metrics.bootstrap_intervals(*repeated, key, groups=patients, num_resamples=200)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), once, grouped)
  naive = metrics.bootstrap_intervals(*repeated, key, num_resamples=200)
  assert naive.high.accuracy - naive.low.accuracy < 0.7 * (once.high.accuracy - once.low.accuracy)


def test_resamples_without_a_class_are_counted():
  labels = np.array([0] * 10 + [1] * 10 + [2])
  p = np.eye(3)[labels] * 0.7 + 0.1
  got = metrics.bootstrap_intervals(labels, p, jax.random.key(0))
  absent = got.undefined.sensitivity[2]
  assert absent == pytest.approx(2000 * (20 / 21) ** 21, rel=0.1)
  assert got.undefined.macro_roc_auc >= absent
  assert (got.low.sensitivity[2], got.high.sensitivity[2], got.undefined.accuracy) == (1, 1, 0)
  never = metrics.bootstrap_intervals(labels[:20], p[:20], jax.random.key(0), num_resamples=50)
  assert np.isnan(
    [never.value.macro_roc_auc, never.low.macro_roc_auc, never.high.sensitivity[2]]
  ).all()
  assert never.undefined.macro_roc_auc == 50


def test_a_model_does_not_differ_from_itself():
  labels, p = random_model(0)
  got = metrics.bootstrap_difference(labels, p, p, jax.random.key(0), num_resamples=50)
  assert all(np.all(x == 0) for x in jax.tree.leaves(got))


def test_bad_options_of_the_bootstrap():
  labels, p = random_model(0, 30)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="level must lie between 0 and 1, got 95"):
    metrics.bootstrap_intervals(labels, p, key, level=95)
  with pytest.raises(ValueError, match="num_resamples must be at least 1, got 0"):
    metrics.bootstrap_intervals(labels, p, key, num_resamples=0)
  with pytest.raises(ValueError, match=r"groups \(3,\)"):
    metrics.bootstrap_intervals(labels, p, key, groups=[1, 2, 3])
  with pytest.raises(ValueError, match="differ in shape"):
    metrics.bootstrap_difference(labels % 2, p, random_model(0, 30, 2)[1], key)


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 10), (398, 624), (1, 1)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_clopper_pearson_equals_scipy(successes, trials, level):
  expected = scipy.stats.binomtest(successes, trials).proportion_ci(level, method="exact")
  np.testing.assert_allclose(
    metrics.clopper_pearson(successes, trials, level), expected, atol=1e-12
  )


def test_clopper_pearson_refuses_impossible_counts():
  with pytest.raises(ValueError, match="got 11, 10"):
    metrics.clopper_pearson(11, 10)
