"""What an owner puts in beyond its planned range is refused in its own process, in every mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpc_reference import OWNERS, normal

from primia_jax import mpc
from primia_jax.mpc import helping, inference, ranges
from primia_jax.mpc.roles import DataOwner, Dealer, ModelOwner

W = normal(0, 6, 5)
IMAGES = np.random.default_rng(1).uniform(0, 1, (3, 6)).astype(np.float32)
CONFIG = mpc.Config(32, 10, 14)


def layer(w, x):
  return jax.nn.relu(x @ w)


def planned(fn, *given, owners=OWNERS, config=CONFIG):
  args = (W, *given)
  return mpc.plan(fn, owners, args, config, mpc.calibrate(fn, owners, [args]))


def refused(plan, *args, at):
  where = rf"\(top\), {at} at mpc_ranges_test.py:\d+: .* leaves its planned range"
  with pytest.raises(ValueError, match=where):
    inference.encode(plan, (W, *args))


def test_an_image_of_0_to_255_is_not_one_of_0_to_1():
  """All 255 times as large, the logits would be plausible, and wrong."""
  plan = planned(layer, IMAGES)
  inference.encode(plan, (W, 1.9 * IMAGES))  # the margin is 2
  refused(plan, 255 * IMAGES, at="dot_general")
  refused(plan, np.where(IMAGES > 0.9, np.float32(-5), IMAGES), at="dot_general")
  encode = inference._tracing_encoder(plan)  # `transform` spoils its outputs where this says no
  fits = jax.jit(jax.vmap(lambda x: encode([W, x])[1]))
  assert fits(np.stack([1.9 * IMAGES, 255 * IMAGES, -9 * IMAGES])).tolist() == [True, False, False]


def test_the_data_owner_refuses_before_anything_is_used():
  plan = planned(layer, IMAGES)
  model_owner = ModelOwner(plan, W)
  data_owner = DataOwner(plan, model_owner.publish(Dealer(plan, model_owner.tag).blind()))
  with pytest.raises(ValueError, match="a value of the data owner has magnitude 2"):
    data_owner.ask(None, 255 * IMAGES)
  with pytest.raises(TypeError, match="expected a Prepared"):
    data_owner.ask(None, IMAGES)


def test_every_place_where_a_value_enters():
  """As shares, as an offset, as a factor of shared values, and as an output."""
  zeros = np.zeros((3, 5), np.float32)
  add = planned(lambda w, x, mask: layer(w, x) + mask, IMAGES, zeros, owners=(*OWNERS, OWNERS[1]))
  inference.encode(add, (W, IMAGES, zeros))
  refused(add, IMAGES, np.full_like(zeros, -1e5), at="add")
  gate = planned(lambda w, x, g: layer(w, x) * g, IMAGES, zeros + 1, owners=(*OWNERS, OWNERS[1]))
  inference.encode(gate, (W, IMAGES, zeros - 1.5))
  refused(gate, IMAGES, zeros + 5, at="mul")
  alone = planned(lambda w, x: (layer(w, x), x / 8), IMAGES)
  with pytest.raises(ValueError, match=r"the output: .* leaves its planned range"):
    inference.encode(alone, (np.zeros_like(W), 2.5 * IMAGES))


def test_what_a_party_computes_alone_may_be_as_large_as_it_likes():
  own = planned(lambda w, x: layer(w, jnp.tanh(x * 100)), IMAGES)
  inference.encode(own, (W, 1e3 * IMAGES))


def test_the_model_owner_s_offsets_and_factors_too():
  bias = normal(2, 5)
  fn = lambda w, x: jnp.sqrt(layer(w["k"], x) + 1) + w["b"][None]
  args = ({"k": W, "b": bias}, IMAGES)
  plan = mpc.plan(fn, OWNERS, args, CONFIG, mpc.calibrate(fn, OWNERS, [args]))
  inference.encode(plan, ({"k": W, "b": 1.9 * bias}, IMAGES))
  with pytest.raises(ValueError, match=r"a value of the model owner has .* its planned range"):
    inference.encode(plan, ({"k": W, "b": 9 * bias}, IMAGES))


def test_a_client_that_only_shares_its_image_knows_the_range():
  config = mpc.Config(32, 10, 14, client="sharing")
  plan = planned(layer, IMAGES, owners=("model_owner", "shared"), config=config)
  (image,) = helping.card(plan, "name")["images"]
  assert image["most"] == 2 - 2.0**-5  # 1 or less, times the margin of 2
  (entry,) = ranges.entries(plan, None).values()
  assert entry.bound == image["most"]


def test_without_calibration_there_is_no_range():
  plan = mpc.plan(layer, OWNERS, (W, IMAGES), CONFIG)
  assert ranges.entries(plan, 1) == {}
  inference.encode(plan, (W, 255 * IMAGES))


@pytest.mark.parametrize(
  ("v", "most"),
  [
    (np.int8([-128, 3]), 128),
    (np.uint32([7]), 7),
    (np.array([True, False]), 1),
    (np.complex64([3 - 4j]), 5),
    (np.float32([-2, -np.inf]), 2),
    (np.float32([np.inf]), np.inf),
    (np.float32([1, np.nan]), np.nan),
    (np.zeros((0, 3), np.float32), 0),
  ],
)
def test_magnitudes(v, most):
  got = ranges.largest(jnp.asarray(v))
  np.testing.assert_equal(float(got), float(most))
  entry = ranges.Entry("", 5.0)
  assert bool(ranges.keeps(entry, got)) == (most <= 5)
