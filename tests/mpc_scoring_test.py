"""Scores on secret images: equal to the clear, opened once, and not for single images."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import boundary, mpc, prng
from primia_jax.evaluation import batches
from primia_jax.mpc import clear, inference, roles, scoring
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER

BATCH, NAMES = 8, ("normal", "bacterial", "viral")
CONFIG = mpc.Config(num_bits=32, fraction_bits=12)


def logits(weights, images):
  return jax.nn.relu(images @ weights["in"]) @ weights["out"]


LOGITS = jax.jit(logits)


@pytest.fixture(scope="module")
def weights():
  first, second = jax.random.split(jax.random.key(0))
  return {"in": jax.random.normal(first, (6, 5)) / 3, "out": jax.random.normal(second, (5, 3)) / 2}


@pytest.fixture(scope="module")
def images():
  return np.asarray(jax.random.normal(jax.random.key(1), (21, 6)))


@pytest.fixture(scope="module")
def labels(images):
  return np.arange(len(images)) % 3


@pytest.fixture(scope="module")
def plans(weights, images):
  make = lambda score, num_rows: scoring.plan(score, weights, images, num_rows, BATCH, CONFIG)
  return {
    "confusion": make(scoring.confusion(logits), 3),
    "right": make(scoring.right(logits), 3),
    "roc": make(scoring.roc(logits, 1, (0.25, 0.4, 0.75)), 2),
  }


def totals(plan, weights, images, one_hot):
  """Both parties' totals over all batches, each role with nothing but its own."""
  model_owner = roles.ModelOwner(plan, weights)
  dealer = roles.Dealer(plan, model_owner.tag)
  data_owner = roles.DataOwner(plan, model_owner.publish(dealer.blind()))
  online = roles.online(plan)
  both = scoring.Total(plan, MODEL_OWNER), scoring.Total(plan, DATA_OWNER)
  for start, part in zip(range(0, len(images), BATCH), batches(images, BATCH), strict=True):
    first, second = dealer.deal()
    given = jnp.asarray(part), jnp.asarray(one_hot[start : start + BATCH])
    asked, question = data_owner.ask(data_owner.prepare(second), *given)
    shares = online(model_owner.answer(model_owner.prepare(first), question), asked)
    for party, total in enumerate(both):
      total.add([v[party] for v in shares])
  return both


@pytest.fixture(scope="module")
def simulated(plans):
  """Both parties' totals, all roles in one program for each plan: compiled faster than roles."""
  programs = {}

  def run_all(name, weights, images, one_hot):
    plan = plans.get(name, name)
    both = scoring.Total(plan, MODEL_OWNER), scoring.Total(plan, DATA_OWNER)
    for shares in each_run(plan, weights, images, one_hot):
      for party, total in enumerate(both):
        total.add([v[party] for v in shares])
    return both

  def each_run(plan, weights, images, one_hot):
    run = programs.setdefault(
      plan.digest,
      jax.jit(
        lambda key, given: inference.simulate(plan, inference.offline(plan, key, given), given)
      ),
    )
    for start, part in zip(range(0, len(images), BATCH), batches(images, BATCH), strict=True):
      given = weights, jnp.asarray(part), jnp.asarray(one_hot[start : start + BATCH])
      yield run(prng.random_key(), inference.encode(plan, given))

  return run_all


def one_hot(labels, num_rows=3):
  out = np.zeros((-(-len(labels) // BATCH) * BATCH, num_rows), np.float32)
  out[np.arange(len(labels)), labels] = 1
  return out


def in_the_clear(weights, images, labels):
  found = np.zeros((3, 3), int)
  np.add.at(found, (labels, np.asarray(LOGITS(weights, images)).argmax(1)), 1)
  return found


@pytest.fixture(scope="module")
def matrix(plans, weights, images, labels):
  return scoring.opened(*totals(plans["confusion"], weights, images, one_hot(labels)))


def test_the_matrix_of_several_batches_is_that_in_the_clear(matrix, weights, images, labels):
  assert matrix.dtype == np.int64
  np.testing.assert_array_equal(matrix, in_the_clear(weights, images, labels))


def test_the_matrix_is_bit_for_bit_the_integer_models(plans, matrix, weights, images, labels):
  check, every = clear.checker(plans["confusion"]), one_hot(labels)
  parts = [
    check((weights, jnp.asarray(part), jnp.asarray(every[start : start + BATCH])))
    for start, part in zip(range(0, len(images), BATCH), batches(images, BATCH), strict=True)
  ]
  np.testing.assert_array_equal(matrix, np.sum(parts, 0))


def test_ties_and_close_logits_go_where_argmax_sends_them(weights):
  """All pairs of equal, and of nearly equal, scores: the first of the largest."""
  steps = np.array(np.meshgrid(*[[0.0, 2.0**-12, 1.0]] * 3)).reshape(3, -1).T.astype(np.float32)
  identity = {"in": jnp.eye(3), "out": jnp.eye(3)}
  score = scoring.confusion(logits)
  plan = scoring.plan(score, identity, steps, 3, BATCH, CONFIG)
  truth = np.arange(len(steps)) % 3
  check, every = clear.checker(plan), one_hot(truth)
  found = sum(
    check((identity, jnp.asarray(part), jnp.asarray(every[start : start + BATCH])))
    for start, part in zip(range(0, len(steps), BATCH), batches(steps, BATCH), strict=True)
  )
  expected = np.zeros((3, 3))
  np.add.at(expected, (truth, steps.argmax(1)), 1)
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("score", [scoring.confusion(logits), scoring.right(logits)])
def test_classes_that_calibration_never_predicted_are_counted(score):
  """The ranges of comparisons must not follow from images of one class."""
  identity = {"in": jnp.eye(3), "out": jnp.eye(3)}
  steps = 1 + np.eye(3, dtype=np.float32)
  for only in range(3):
    plan = scoring.plan(score, identity, steps[[only]], 3, 3, CONFIG)
    found = clear.check(plan, (identity, jnp.asarray(steps), jnp.eye(3)))
    np.testing.assert_array_equal(found, np.eye(3) if found.ndim == 2 else [3])


@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_winner_is_the_argmax(num):
  scores = np.random.default_rng(0).integers(0, 3, (200, num)).astype(np.float32)
  expected = np.eye(num, dtype=np.float32)[scores.argmax(1)]
  np.testing.assert_array_equal(jax.jit(scoring.winner)(scores), expected)


def test_one_bit_says_whether_enough_are_right(simulated, weights, images, labels):
  enough = np.trace(in_the_clear(weights, images, labels))
  for least, expected in ((enough, True), (enough + 1, False)):
    both = simulated("right", weights, images, one_hot(labels))
    assert scoring.at_least(*both, least) is expected
    with pytest.raises(ValueError, match="was opened"):  # the count itself stays closed
      scoring.opened(*both)


def test_a_roc_is_that_of_the_softmax(plans, weights, images, labels):
  positive = (labels == 1).astype(int)
  check, every = clear.checker(plans["roc"]), one_hot(positive, 2)
  found = sum(
    check((weights, jnp.asarray(part), jnp.asarray(every[start : start + BATCH])))
    for start, part in zip(range(0, len(images), BATCH), batches(images, BATCH), strict=True)
  )
  likely = np.asarray(jax.nn.softmax(LOGITS(weights, images)))[:, 1]
  expected = [
    [np.sum((positive == row) & (likely >= t)) for t in (0.25, 0.4, 0.75, -1)] for row in (0, 1)
  ]
  assert np.abs(likely[:, None] - [0.25, 0.4, 0.75]).min() > 1e-3  # none is too close to tell
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["confusion", "right", "roc"])
def test_all_that_crosses_is_masked(plans, weights, name):
  boundary.audit_secret(mpc.Private(plans[name], jax.tree.leaves(weights))).check()


def test_a_share_alone_is_uniform(simulated, weights, images, labels):
  """64 runs on the same images: the high bits of each party's sum, against those of the counts."""
  num, seen = 64, {MODEL_OWNER: [], DATA_OWNER: []}
  for _ in range(num):
    for total in simulated("right", weights, images, one_hot(labels)):
      seen[total.party] += total.take()
  counts = lambda values: np.bincount(np.ravel(values).astype(np.uint32) >> 29, minlength=8)
  for party, sums in seen.items():
    expected = num / 8
    assert np.sum((counts(sums) - expected) ** 2 / expected) < 35, party  # 7 degrees: 1e-5
  whole = [a + b for a, b in zip(*seen.values(), strict=True)]
  assert counts(whole)[0] == num  # the test sees what is not uniform


def test_an_opening_too_many_would_be_a_label_query(simulated, weights, images, labels):
  """Two openings, one image apart, tell that image's class; a total refuses the second."""
  fewer = simulated("confusion", weights, images[:20], one_hot(labels[:20]))
  before = scoring.opened(*simulated("confusion", weights, images[:20], one_hot(labels[:20])))
  after = scoring.opened(*simulated("confusion", weights, images, one_hot(labels)))
  stolen = after - before
  assert stolen.sum() == 1
  assert stolen[labels[20]].argmax() == np.asarray(logits(weights, images[20:])).argmax()
  scoring.opened(*fewer)
  with pytest.raises(ValueError, match="model owner was opened"):
    scoring.opened(*fewer)
  with pytest.raises(ValueError, match="data owner was opened"):
    fewer[1].add([jnp.zeros((3, 3), jnp.uint32)])
  with pytest.raises(TypeError, match="serves once"):
    copy.copy(fewer[0])


def test_totals_must_belong_together(plans, simulated, weights, images, labels):
  first, second = simulated("right", weights, images, one_hot(labels))
  with pytest.raises(ValueError, match="vendor's total comes first"):
    scoring.opened(second, first)
  second.add([jnp.zeros(1, jnp.uint32)])
  with pytest.raises(ValueError, match="different runs"):
    scoring.opened(first, second)
  with pytest.raises(ValueError, match="nothing was added"):
    scoring.Total(plans["right"], DATA_OWNER).take()


# ---- rows


def digests(num):
  return [i.to_bytes(4) for i in range(num)]


def test_a_class_of_few_images_is_refused_or_merged():
  labels = np.repeat([0, 1, 2], [30, 9, 12])
  with pytest.raises(ValueError, match=r"fewer than 10 different images: bacterial \(9\)"):
    scoring.rows(labels, digests(51), NAMES)
  found = scoring.rows(labels, digests(51), NAMES, merge=True)
  assert found.names == ("normal", "bacterial or viral")
  np.testing.assert_array_equal(
    found.one_hot(np.array([0, 1, 2]), 4), [[1, 0], [0, 1], [0, 1], [0, 0]]
  )


def test_a_class_without_images_keeps_its_row():
  found = scoring.rows(np.repeat([0, 2], 10), digests(20), NAMES)
  assert found.names == NAMES


def test_copies_of_an_image_make_no_class():
  """Ten copies in a row would tell the class of one image."""
  labels = np.repeat([0, 1, 2], 10)
  copies = [*digests(20), *[b"the same"] * 10]
  assert scoring.rows(labels, digests(30), NAMES).names == NAMES
  with pytest.raises(ValueError, match=r"viral \(1\)"):
    scoring.rows(labels, copies, NAMES)
  assert scoring.rows(labels, copies, NAMES, merge=True).names[0] == "normal or viral"


def test_too_few_images_are_no_result():
  with pytest.raises(ValueError, match="9 different images are too few"):
    scoring.rows(np.zeros(9, int), digests(9), NAMES, merge=True)


def test_small_classes_merge_until_all_are_large():
  labels = np.repeat([0, 1, 2], [4, 5, 6])
  assert scoring.rows(labels, digests(15), NAMES, merge=True).names == (
    "normal or bacterial or viral",
  )


@pytest.mark.parametrize("bits", [(32, 12), (64, 24)])
def test_labels_are_exact_in_every_ring(weights, images, labels, bits):
  config = mpc.Config(*bits)
  score = scoring.confusion(logits)
  plan = scoring.plan(score, weights, images, 3, BATCH, config)
  given = jnp.asarray(images[:BATCH]), jnp.asarray(one_hot(labels)[:BATCH])
  found = clear.check(plan, (weights, *given))
  np.testing.assert_array_equal(found, in_the_clear(weights, images[:BATCH], labels[:BATCH]))
  assert scoring.most_images(plan) >= 2**14
