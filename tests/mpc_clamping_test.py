"""Which plans serve a client that need not be trusted, and what is refused."""

import jax
import numpy as np
import pytest
from mpc_reference import OWNERS, normal

from primia_jax import mpc
from primia_jax.mpc import helping
from primia_jax.mpc.circuit import Apply, Input, Open
from primia_jax.mpc.gates.elementwise import CLAMP

W, X = normal(0, 4, 3), normal(1, 4)
CONFIG = mpc.Config(32, 10, 14, client="checked")


def layer(w, x):
  return jax.nn.relu(x @ w)


def planned(fn, owners=OWNERS, args=(W, X), config=CONFIG):
  return mpc.plan(fn, owners, args, config, mpc.calibrate(fn, owners, [args]))


@pytest.mark.parametrize("owner", ["data_owner", "shared"])
def test_the_image_is_clamped_before_anything_else(owner):
  config = mpc.Config(32, 10, 14, client="sharing") if owner == "shared" else CONFIG
  plan = planned(layer, ("model_owner", owner), config=config)
  operations = plan.circuit.operations
  (entry,) = [op for op in operations if isinstance(op, Input)]
  (clamp,) = [op for op in operations if isinstance(op, Apply) and op.gate.action == CLAMP]
  first_open = next(op for op in operations if isinstance(op, Open))
  assert (clamp.input, first_open.input) == (entry.out, clamp.out)
  operand = plan.circuit.operands[entry.operand]
  assert clamp.gate.shift == operand.bits
  # the planned range is within the clamp's, which is less than four times as wide
  reach = 2 ** (operand.bits - 1) * operand.scale
  bound = np.abs(X).max() * plan.config.margin
  assert bound <= reach < 8 * bound
  assert "clamp" in str(plan)


def test_an_honest_image_beyond_the_range_is_refused_in_the_clear():
  plan = planned(layer)
  model_owner = mpc.ModelOwner(plan, W)
  dealer = mpc.Dealer(plan, model_owner.tag)
  data_owner = mpc.DataOwner(plan, model_owner.publish(dealer.blind()))
  with pytest.raises(ValueError, match="does not fit below"):
    data_owner.ask(data_owner.prepare(dealer.deal()[1]), 1e3 * X)


def test_a_trusted_client_has_no_clamp():
  plan = planned(layer, config=mpc.Config(32, 10, 14))
  assert "clamp" not in str(plan).replace("client='checked'", "")
  assert "with client='checked' it would be" in str(plan)


@pytest.mark.parametrize(
  "fn",
  [
    lambda w, x: jax.nn.relu(x @ w) * x[:3],
    lambda w, x: jax.nn.relu(x @ w) + x[:3],
    lambda w, x: (x * x) @ w + x @ w,
  ],
)
def test_an_image_that_enters_twice_is_refused(fn):
  with pytest.raises(ValueError, match="the image enters the model in more than one place"):
    planned(fn)


def test_what_does_not_go_together_is_refused():
  with pytest.raises(ValueError, match="needs the range of every input"):
    mpc.plan(layer, OWNERS, (W, X), CONFIG)
  with pytest.raises(ValueError, match="needs num_bits of at most 32"):
    mpc.Config(64, 16, client="checked")
  with pytest.raises(ValueError, match="and comparison='tables'"):
    mpc.Config(32, 10, client="checked", comparison="fss")
  with pytest.raises(ValueError, match="client='hostile'; use trusted"):
    mpc.Config(client="hostile")
  with pytest.raises(ValueError, match="no room for its clamp"):
    planned(layer, args=(W / 1e5, 1e5 * X), config=mpc.Config(20, 9, 9, client="checked"))
  sharing = mpc.Config(32, 10, 14, client="sharing")
  with pytest.raises(ValueError, match='name it in the place of "data_owner"'):
    mpc.ModelOwner(planned(layer, config=sharing), W)
  with pytest.raises(ValueError, match="is a party and needs the plan itself"):
    helping.card(planned(layer), "name")
  with pytest.raises(ValueError, match="needs no helper"):
    helping.Helper(planned(layer), None)
