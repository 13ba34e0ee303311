"""Numbers that do not fit are refused, or spoil the outputs where nothing can be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import prng
from primia_jax.mpc import encoding, inference, planning
from primia_jax.mpc.circuit import Config, Operand
from primia_jax.mpc.maps import MULTIPLY

CONFIG = Config(32, 8, 10)
INPUT = Operand(1, lambda values: values[0], CONFIG.unit, (2,), None, None, "input")
WEIGHT = Operand(0, lambda values: values[0], 2.0**-6, (2,), 10, MULTIPLY, "layer")


@pytest.mark.parametrize(
  ("operand", "limit", "reason"), [(INPUT, 2.0**22, "an input"), (WEIGHT, 8.0, "layer: a weight")]
)
def test_what_fits(operand, limit, reason):
  fits = lambda v: encoding.fits(operand, encoding.largest(jnp.array([0, v])), CONFIG)
  below, beyond = np.nextafter(np.float32(limit), np.float32(0)), np.float32(limit)
  assert fits(below)
  assert fits(-below)
  for bad in (beyond, -beyond, np.inf, -np.inf, np.nan, -np.nan):
    assert not fits(bad)
    assert not jax.jit(fits)(bad)
    with pytest.raises(ValueError, match=f"{reason}.* does not fit below"):
      encoding.check_fits(operand, encoding.largest(jnp.array([0, bad])), CONFIG)
  encoding.check_fits(operand, below, CONFIG)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_the_least_whole_number_has_a_magnitude(dtype):
  """Its own absolute value is negative in its dtype."""
  least = np.iinfo(dtype).min
  values = jnp.array([least, 1], dtype)
  assert encoding.largest(values) == -float(least)


def test_a_plan_holds_the_least_whole_number():
  w, x = np.array([-128, 1], np.int8), np.ones(2, np.float32)
  fn, owners = lambda w, x: w * (x > 0).astype(w.dtype), ("model_owner", "data_owner")
  plan = planning.plan(fn, owners, (w, x), Config(32, 8, 16))
  assert max(plan.magnitudes) >= 128


def test_what_does_not_fit_spoils_the_outputs():
  """In each element of a vmap for itself."""
  outputs = {"x": np.float32([1, 2]), "i": np.int32([3]), "b": np.array([True])}

  def fn(v):
    return encoding.spoiled(outputs, encoding.fits(INPUT, encoding.largest(v), CONFIG))

  good, bad = jax.tree.map(jnp.asarray, outputs), jax.jit(fn)(np.float32([0, np.nan]))
  jax.tree.map(np.testing.assert_array_equal, jax.jit(fn)(np.float32([0, 1])), good)
  assert np.all(np.isnan(bad["x"]))
  assert bad["i"] == np.iinfo(np.int32).min
  both = jax.vmap(fn)(np.float32([[0, 1], [np.inf, 0]]))
  np.testing.assert_array_equal(both["x"], [[1, 2], [np.nan, np.nan]])


def test_a_bad_number_makes_the_logits_nan_under_jit_and_vmap():
  fn, owners = lambda w, x: (x @ w, jnp.argmax(x @ w, -1)), ("model_owner", "data_owner")
  args = (np.eye(2, dtype=np.float32), np.ones((1, 2), np.float32))
  f = inference.transform(planning.plan(fn, owners, args, CONFIG))
  rows = np.float32([[1, 2], [1, np.nan], [-np.inf, 1], [1e30, 1]])[:, None]
  outputs, places = jax.jit(jax.vmap(f, (None, None, 0)))(prng.random_key(), args[0], rows)
  np.testing.assert_array_equal(outputs[0], rows[0])
  assert places[0] == 1
  assert np.all(np.isnan(outputs[1:]))
  assert np.all(places[1:] < 0)
