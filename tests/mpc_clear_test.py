"""The comparison in the clear finds what the protocol cannot notice."""

import jax
import numpy as np
import pytest
from mpc_reference import OWNERS, normal

from primia_jax import mpc

W, X = normal(0, 6, 5), normal(1, 3, 6)
CONFIG = mpc.Config(40, 12, 16)


def fn(w, x):
  with jax.named_scope("head"):
    return (x @ w) ** 2


def test_a_value_beyond_its_range_is_named():
  plan = mpc.plan(fn, OWNERS, (W, X), CONFIG, mpc.calibrate(fn, OWNERS, [(W, X)]))
  mpc.check(plan, (W, X))
  with pytest.raises(ValueError, match=r"head, .* at mpc_clear_test.py:\d+: a value of magnitude"):
    mpc.check(plan, (W, 8 * X))


def test_an_output_beyond_the_ring_is_named():
  """Without calibration: the square wraps around, and the protocol gives another number."""
  plan = mpc.plan(fn, OWNERS, (W, X), CONFIG)
  far = X * np.float32(300)
  assert np.abs(fn(W, far)).max() > 2.0**18
  wrong = mpc.infer(plan, W, far)
  assert np.abs(wrong - fn(W, far)).max() > 1e4
  with pytest.raises(ValueError, match=r"does not fit|takes .* bits but was planned"):
    mpc.check(plan, (W, far))


def test_work_of_one_party_alone_has_no_range():
  """The data owner's own floats may be as large as they like, if what enters fits."""
  own = lambda w, x: jax.nn.relu((x * 1e6 / 1e6) @ w)
  plan = mpc.plan(own, OWNERS, (W, X), CONFIG, mpc.calibrate(own, OWNERS, [(W, X)]))
  np.testing.assert_allclose(mpc.check(plan, (W, 1.5 * X)), own(W, 1.5 * X), atol=0.01)


def test_the_error_is_the_largest_difference():
  plan = mpc.plan(fn, OWNERS, (W, X), CONFIG, mpc.calibrate(fn, OWNERS, [(W, X)]))
  checked = mpc.clear.comparer(plan)((W, X))
  assert checked.error == np.abs(checked.outputs - checked.plain).max() > 0
  np.testing.assert_allclose(checked.plain, fn(W, X), rtol=1e-6)
