import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpc_reference import OWNERS

from primia_jax.mpc import clear, planning, pricing, protocol
from primia_jax.mpc.circuit import Config
from primia_jax.mpc.lowering.holders import outwards
from primia_jax.mpc.pricing import Network

pytestmark = pytest.mark.usefixtures("x64")
W = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32) / 3
X = np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)


def fn(w, x):
  with jax.named_scope("first"):
    x = jax.nn.relu(x @ w[0])
  with jax.named_scope("second"):
    return x @ w[1]


def test_the_rows_say_what_is_dealt_sent_and_assumed():
  plan = planning.plan(
    fn, OWNERS, (W, X), Config(64, 16, 18), planning.calibrate(fn, OWNERS, [(W, X)])
  )
  rows = pricing.rows(plan.circuit)
  assert [(r.layer, r.what, r.rounds) for r in rows] == [
    ("first", "open", 1),
    ("first", "linear", 0),
    ("first", "relu", 4),
    ("second", "open", 1),
    ("second", "linear", 0),
    ("second", "truncate", 4),
    ("", "output", 1),
  ]
  largest = np.abs(X @ W[0]).max()
  relu = rows[2]
  unit = 2.0**-16 * 2.0 ** -(17 - np.frexp(np.abs(W[0]).max())[1])
  assert 2 ** (relu.range_bits - 1) < 2 * largest / unit + 2**relu.shift < 2**relu.range_bits
  assert rows[0].sent == 4 * 8 * 8
  assert sum(r.dealt for r in rows) == sum(
    math.prod(v.shape) * v.dtype.itemsize
    for v in jax.tree.leaves(protocol.dealt_shapes(plan.circuit).sent)
  )
  text = pricing.table(plan.circuit)
  assert text == str(plan)
  assert all(
    word in text
    for word in ("first", "relu", f"2^{relu.range_bits}", "total", "ring of 2^64", "WAN")
  )
  assert "gets a seed)" in text
  fss = planning.plan(fn, OWNERS, (W, X), Config(32, 10, 12, comparison="fss"))
  assert "gets a seed and the correction words)" in str(fss)


@pytest.mark.parametrize(
  ("fn", "reason"),
  [
    (lambda w, x: jnp.take(x, np.array([1, 9]), 0), "gather.*mode='clip'"),
    (lambda w, x: jnp.min(x, 1, where=np.eye(4, 8) > 0, initial=np.inf), "select_n.*-jnp.max"),
    (lambda w, x: jax.nn.softmax(x, where=np.zeros((4, 8), bool)), "sub.*-1e9"),
    (lambda w, x: x / (x - x), "div.*divisor"),
    (lambda w, x: jnp.log(x), "log.*above 0"),
  ],
)
def test_what_is_not_finite_on_finite_examples_is_named_with_a_cure(fn, reason):
  name, cure = reason.split(".*")
  where = rf": {name} at mpc_planning_test.py:\d+: infinite or NaN on the examples; .*{cure}"
  with pytest.raises(ValueError, match=where):
    planning.calibrate(fn, OWNERS, [(W, X)])


def test_without_calibration_the_whole_ring_is_assumed():
  plan = planning.plan(fn, OWNERS, (jax.ShapeDtypeStruct(W.shape, W.dtype), X), Config(64, 16, 18))
  assert {r.range_bits for r in pricing.rows(plan.circuit) if r.what == "relu"} == {62}
  np.testing.assert_allclose(clear.check(plan, (W, X)), fn(W, X), atol=1e-3)


def test_a_plan_tells_powers_of_two_and_nothing_finer():
  """The attack: the plan of slightly different weights and calibration images would differ."""
  w, x = (np.abs(v) / np.abs(v).max() for v in (W, X))  # largest magnitudes of 1
  w, x = (np.concatenate([v, -v]) for v in (w, x))

  def of(weight, image):
    args = (np.float32(weight) * w, np.float32(image) * x)
    config = Config(64, 16, 18, margin=1.0)
    return planning.plan(fn, OWNERS, args, config, planning.calibrate(fn, OWNERS, [args]))

  one, other = of(0.8, 0.6), of(0.81, 0.61)
  known = [v for v in one.magnitudes if math.isfinite(v)]
  for told in (one.bounds, np.array(known)):
    assert told.size
    mantissa, _ = np.frexp(told)
    np.testing.assert_array_equal(mantissa, 1 - 2.0**-6)
  assert one.digest == other.digest
  scales = [operand.scale for operand in one.circuit.operands]
  scales += [v.scale for v in one.circuit.outputs]
  assert all(np.frexp(scale)[0] == 0.5 for scale in scales)


@given(st.floats(1e-30, 1e30))
def test_outwards(magnitude):
  found = outwards(magnitude)
  assert magnitude <= found < 2 * magnitude / (1 - 2.0**-6)
  assert np.frexp(found)[0] == 1 - 2.0**-6
  assert outwards(found) == found


def test_a_plan_of_one_function_refuses_the_ranges_of_another():
  other = planning.calibrate(lambda w, x: x @ w[0], OWNERS, [(W, X)])
  with pytest.raises(ValueError, match="calibrate the same function"):
    planning.plan(fn, OWNERS, (W, X), Config(), other)


@pytest.mark.parametrize(
  ("examples", "reason"),
  [([], "examples is empty"), ([(W, X * np.float32(np.nan))], "infinite or NaN")],
)
def test_calibration_wants_sound_examples(examples, reason):
  with pytest.raises(ValueError, match=reason):
    planning.calibrate(fn, OWNERS, examples)


@pytest.mark.parametrize(
  "fn",
  [
    lambda w, x: (x > 5).astype(np.float32),
    lambda w, x: jax.numpy.where(x > 5, np.float32(3), 0) * w[0, 0, 0],
    lambda w, x: jax.numpy.sum(x > 5, axis=1).astype(np.float32),
    lambda w, x: jax.numpy.mean((x > 5) & (x < 50), axis=1, dtype=np.float32) - 0.0,
    lambda w, x: (x[:, :4] > 5).astype(np.float32) * 2 + (x[:, 4:] > 5).astype(np.float32),
    lambda w, x: jax.numpy.where(x + 6 > 7, x + 6, 0),
  ],
)
def test_what_follows_from_comparisons_that_no_example_made_true_has_room(fn):
  """Its range on the examples is 0."""
  examples, others = np.zeros_like(X), 10 + np.abs(X)
  ranges = planning.calibrate(fn, OWNERS, [(W, examples)])
  plan = planning.plan(fn, OWNERS, (W, X), Config(32, 10, 14), ranges)
  for x in (examples, others):
    np.testing.assert_allclose(clear.check(plan, (W, x)), fn(W, x), atol=1e-2)


def test_calibration_takes_the_largest_over_examples():
  one, two = (planning.calibrate(fn, OWNERS, [(W, s * X)]) for s in (np.float32(1), np.float32(3)))
  both = planning.calibrate(fn, OWNERS, [(W, np.float32(3) * X), (W, X)])
  np.testing.assert_array_equal(both, np.maximum(one, two))


def test_a_network_charges_every_round():
  assert Network(0.04, 100e6).seconds(100, 50_000_000) == pytest.approx(8.0)
