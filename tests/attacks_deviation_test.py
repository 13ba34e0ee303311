"""A data owner that deviates extracts a model from the semi-honest protocol."""

import dataclasses

import jax
import numpy as np
import pytest
from mpc_reference import normal

from primia_jax import mpc
from primia_jax.attacks import extraction
from primia_jax.mpc import checks, multiprocess, tags
from primia_jax.mpc.circuit import Apply
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER

D, H, L = 6, 5, 3
W = {
  "hidden": normal(0, D, H),
  "hidden_bias": normal(1, H),
  "kernel": normal(2, H, L),
  "bias": normal(3, L),
}
CONFIG = mpc.Config(32, 10, 14, margin=4.0)
IMAGES = normal(4, 40, D)


def fn(w, x):
  return jax.nn.relu(x @ w["hidden"] + w["hidden_bias"]) @ w["kernel"] + w["bias"]


class World:
  """All roles; the data owner may shift what it opens."""

  def __init__(self, config):
    owners = ("model_owner", "data_owner")
    ranges = mpc.calibrate(fn, owners, [(W, x) for x in IMAGES])
    self.plan = mpc.plan(fn, owners, (W, IMAGES[0]), config, ranges)
    self.model_owner = mpc.ModelOwner(self.plan, W)
    self.dealer = mpc.Dealer(self.plan, self.model_owner.tag)
    self.data_owner = mpc.DataOwner(self.plan, self.model_owner.publish(self.dealer.blind()))
    self.online = [multiprocess.online(self.plan, party) for party in (MODEL_OWNER, DATA_OWNER)]
    self.relu = next(op.gate for op in self.plan.circuit.operations if _is_relu(op))
    # the unit of a pre-activation: that of the image times that of the weights
    self.unit = self.plan.config.unit * max(
      o.scale for o in self.plan.circuit.operands if o.map and o.shape == (D, H)
    )

  def ask(self, x, shifts={}):  # noqa: B006
    first, second = self.dealer.deal()
    asked, question = self.data_owner.ask(
      self.data_owner.prepare(second), np.asarray(x, np.float32)
    )
    answered = self.model_owner.answer(self.model_owner.prepare(first), question)
    honest, party = self.online[0].start(answered), self.online[1].start(asked)
    return self.data_owner.reveal(multiprocess.simulate(honest, extraction.shifted(party, shifts)))

  def shifted_relus(self, number):
    """How the attack asks: its shifts go into a round's message."""

    def ask(x, shifts):
      words = np.rint(shifts / self.unit).astype(np.int64).astype(np.uint32)
      return self.ask(x, {number: words})

    return ask


def _is_relu(op):
  return isinstance(op, Apply) and op.gate.action == "relu"


@pytest.fixture(scope="module")
def world():
  return World(CONFIG)


def test_without_a_shift_it_is_the_protocol(world):
  np.testing.assert_array_equal(world.ask(IMAGES[0]), mpc.check(world.plan, (W, IMAGES[0])))


def test_shifts_extract_the_model_in_fewer_queries_than_it_has_parameters(world):
  reach = 2**world.relu.range_bits * world.unit
  largest = np.abs(IMAGES @ W["hidden"] + W["hidden_bias"]).max()
  shift = reach / 4
  assert shift > largest
  found = extraction.by_shifts(world.shifted_relus(1), D, H, shift)
  assert found.num_queries == 1 + 2 * H + D * 2 == 23
  assert found.num_parameters == 53
  for name, value in W.items():
    np.testing.assert_allclose(getattr(found, name), value, atol=0.02, err_msg=name)


def test_the_same_queries_of_an_honest_data_owner_do_not(world):
  found = extraction.by_shifts(lambda x, shifts: world.ask(x), D, H, 8.0)
  errors = [np.abs(getattr(found, name) - value).max() for name, value in W.items()]
  assert min(errors[:3]) > 0.5


def test_a_shift_must_fit_its_message(world):
  with pytest.raises(ValueError, match="a shift of 4000 bytes"):
    world.ask(IMAGES[0], {0: np.zeros(1000, np.uint32)})


@pytest.fixture(scope="module")
def checked():
  return World(dataclasses.replace(CONFIG, client="checked"))


CLAMP = 3  # rounds before that of the image's masked wire


def test_tags_stop_the_attack_at_its_first_query(checked):
  np.testing.assert_array_equal(checked.ask(IMAGES[0]), mpc.check(checked.plan, (W, IMAGES[0])))
  with pytest.raises(checks.Deviated):
    extraction.by_shifts(checked.shifted_relus(CLAMP + 1), D, H, 8.0)


def test_without_the_check_it_succeeds_again(checked, monkeypatch):
  for name in ("check", "check_bits"):
    monkeypatch.setattr(tags, name, lambda *args: True)
  shift = 2**checked.relu.range_bits * checked.unit / 4
  found = extraction.by_shifts(checked.shifted_relus(CLAMP + 1), D, H, shift)
  for name, value in W.items():
    np.testing.assert_allclose(getattr(found, name), value, atol=0.02, err_msg=name)
