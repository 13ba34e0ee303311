"""What a federation measures: counts, scores and predictions against NumPy and scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated_sites import IDS, IMAGES, KEY, LABELS, NUM, D, L, S, apply_fn, load, secure, start
from scipy.special import softmax
from sklearn import metrics as sk

from primia_jax import evaluation, metrics, sites, summation
from primia_jax import federated as fed

AS_THEY_ARE = lambda images: images
PARAMS = {
  "w": jnp.asarray(np.random.default_rng(1).normal(size=(D, L)), jnp.float32),
  "b": jnp.asarray([0.1, 0.0, -0.1], jnp.float32),
}
IDENTITY = fed.Algorithm(  # whose sites score the global model
  "identity", None, None, None, None, lambda s, _: (s.params, s.model_state), True, True
)
REAL = np.arange(LABELS.shape[1])[None] < NUM[:, None]


def probabilities(images):
  logits = images.reshape(len(images), D).astype(np.float64) @ np.asarray(PARAMS["w"])
  return softmax(logits + np.asarray(PARAMS["b"]), axis=1)


@pytest.mark.parametrize(("n", "batch_size"), [(20, 8), (13, 4), (16, 16), (1, 8), (20, 64)])
def test_count_errors_against_scikit_learn(n, batch_size):
  images, labels = IMAGES[0], LABELS[0]
  run = jax.jit(evaluation.count_errors(apply_fn, AS_THEY_ARE, L, batch_size))
  got = run(PARAMS, {}, jnp.asarray(images), jnp.asarray(labels), jnp.int32(n))
  p = probabilities(images[:n])
  want = sk.confusion_matrix(labels[:n], p.argmax(1), labels=range(L))
  np.testing.assert_array_equal(got["confusion"], want)
  loss = n * sk.log_loss(labels[:n], p, labels=range(L))
  np.testing.assert_allclose(got["loss"], loss, rtol=1e-5)


@pytest.mark.parametrize(
  "summed", [secure(max_abs=1000.0), summation.clear()], ids=["masked", "clear"]
)
def test_validation_is_that_of_all_sites_images(summed):
  validate = evaluation.validation(
    IDENTITY, apply_fn, AS_THEY_ARE, L, summed, sites.scan(), batch_size=8
  )
  state = fed.State(PARAMS, {}, (), (), jnp.int32(3))
  scores = validate(KEY, state, fed.Sites(IDS, load))
  p, labels = probabilities(IMAGES[REAL]), LABELS[REAL]
  want = sk.confusion_matrix(labels, p.argmax(1), labels=range(L))
  np.testing.assert_array_equal(scores.confusion, want)
  assert scores.loss == pytest.approx(sk.log_loss(labels, p, labels=range(L)), rel=1e-4)


def test_a_loss_that_is_not_finite_is_told():
  validate = evaluation.validation(IDENTITY, apply_fn, AS_THEY_ARE, L, secure(), sites.scan(), 8)
  state = fed.State({**PARAMS, "b": jnp.full(L, jnp.nan)}, {}, (), (), jnp.int32(3))
  with pytest.raises(RuntimeError, match="at 5 of 5 sites the loss is not finite"):
    validate(KEY, state, fed.Sites(IDS, load))


def by_patient(ids):
  """Each site's first image and last are of one patient, all others each of another."""
  site = load(ids)
  units = np.where(REAL[ids], np.arange(LABELS.shape[1])[None], -1)
  units[np.arange(len(ids)), NUM[ids] - 1] = 0
  return site._replace(units=units.astype(np.int32))


def test_class_counts_are_those_of_all_images_or_patients():
  count = evaluation.class_counting(L, secure(), sites.scan())
  want = np.bincount(LABELS[REAL], minlength=L)
  np.testing.assert_array_equal(count(fed.Sites(IDS, load)), want)
  shares = np.where(REAL, 1.0, 0.0)
  shares[IDS, 0], shares[IDS, NUM - 1] = 0.5, 0.5
  want = np.bincount(LABELS.ravel(), shares.ravel(), minlength=L)
  exact = summation.clear()
  of_patients = evaluation.class_counting(L, exact, sites.scan())(fed.Sites(IDS, by_patient))
  np.testing.assert_array_equal(of_patients, np.round(want))


def test_noised_counts_have_the_promised_scale_and_are_fresh_each_time():
  count = evaluation.class_counting(L, summation.clear(), sites.scan(), noise_stddev=1e3)
  exact = np.bincount(LABELS[REAL], minlength=L)
  errors = np.stack([count(fed.Sites(IDS, load)) - exact for _ in range(80)])
  stddev = 1e3 * np.sqrt(S)
  assert 0.75 * stddev < errors.std() < 1.35 * stddev  # 240 numbers: 5 deviations
  assert len(np.unique(errors, axis=0)) == 80


def test_counts_that_do_not_fit_are_told():
  count = evaluation.class_counting(L, secure(max_abs=1.0), sites.scan())
  with pytest.raises(RuntimeError, match="larger max_abs"):
    count(fed.Sites(IDS, load))


def of_each_site():
  """What each site counts of its own images: [S, ...]."""
  real = [(LABELS[i, :n], probabilities(IMAGES[i, :n])) for i, n in enumerate(NUM)]
  counts = [metrics.score_counts(*one) for one in real]
  return metrics.ScoreCounts(*(np.stack(column) for column in zip(*counts, strict=True)))


@pytest.mark.parametrize(
  "summed", [secure(max_abs=200.0), summation.clear()], ids=["masked", "clear"]
)
def test_sums_of_score_counts_are_those_of_all_images_to_the_last_one(summed):
  """No site's own counts being opened; the areas and the calibration are those of the pooled
  scores, within the bound.
  """
  found, survivors = evaluation.score_summing(summed, sites.scan())(IDS, of_each_site())
  p, labels = probabilities(IMAGES[REAL]), LABELS[REAL]
  want = metrics.score_counts(labels, p)
  for name in ("confusion", "patients", "everyone", "table"):
    np.testing.assert_array_equal(getattr(found, name), getattr(want, name))
  np.testing.assert_array_equal(found.calibration[:2], want.calibration[:2])
  np.testing.assert_allclose(found.calibration[2], want.calibration[2], atol=1e-4)
  np.testing.assert_allclose(found.squares, want.squares, atol=0.01)
  np.testing.assert_array_equal(found.confusion, sk.confusion_matrix(labels, p.argmax(1)))
  assert survivors.tolist() == IDS.tolist()
  value, error = metrics.binned_macro_roc_auc(found.table)
  assert 0 < error < 0.05
  assert abs(value - metrics.macro_roc_auc(labels, p)) <= error
  ece = metrics.expected_calibration_error(labels, p)
  assert metrics.binned_calibration_error(found.calibration) == pytest.approx(ece, abs=1e-5)


def test_score_counts_that_do_not_fit_are_told():
  small = evaluation.score_summing(secure(max_abs=1.0), sites.scan())
  with pytest.raises(RuntimeError, match="larger max_abs"):
    small(IDS, of_each_site())


def test_batches_have_one_size():
  parts = list(evaluation.batches(np.arange(5), 3))
  assert [part.tolist() for part in parts] == [[0, 1, 2], [3, 4, 3]]


@pytest.mark.parametrize("n", [1, 5, 20])
def test_predictions_are_the_mean_of_the_models(n):
  predict = evaluation.predictor(apply_fn, AS_THEY_ARE, batch_size=8)
  images = IMAGES[0][:n]
  np.testing.assert_allclose(predict([(PARAMS, {})], images), probabilities(images), atol=1e-6)
  both = predict([(PARAMS, {}), (start(), {})], images)
  np.testing.assert_allclose(both, (probabilities(images) + 1 / L) / 2, atol=1e-6)


def test_a_robust_rule_makes_no_counts():
  rule = summation.by_rule("median", lambda stack: stack)
  with pytest.raises(ValueError, match="makes no sum of counts"):
    evaluation.class_counting(L, rule, sites.scan())
  with pytest.raises(ValueError, match="makes no sum of counts"):
    evaluation.validation(IDENTITY, apply_fn, AS_THEY_ARE, L, rule, sites.scan())
  with pytest.raises(ValueError, match="makes no sum of counts"):
    evaluation.score_summing(rule, sites.scan())
