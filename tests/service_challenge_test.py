"""Checks of the dealer: a share of what it dealt is opened and destroyed; a bad one is caught."""

import json

import jax
import numpy as np
import pytest
import service_institution as institution
from service_institution import (
  CLINIC,
  MODEL,
  both,
  deal,
  deliver,
  every_file,
  killed_after,
  made,
  place,
  send,
)

from primia_jax import prng
from primia_jax.mpc import committing, protocol, saving
from primia_jax.mpc.dealer import Dealer
from primia_jax.service import folders, inbox, publications, supply
from primia_jax.service.errors import Refused


@pytest.fixture(scope="module")
def plan():
  return institution.planned()


@pytest.fixture
def roles(plan, tmp_path):
  return made(tmp_path, plan)


def challenged(roles, count=6, share=0.5):
  deal(roles, count, audited=True)
  asked = supply.challenge(roles.vendor, MODEL, CLINIC, share)
  send(roles.vendor, "dealer", roles.dealer, inbox.MODEL_OWNER, inbox.DEALER)
  return asked


def answered(roles):
  found = supply.release(roles.dealer, MODEL, CLINIC)
  send(roles.dealer, "model_owner", roles.vendor, inbox.DEALER, inbox.MODEL_OWNER)
  return found


def check(roles):
  recomputed = publications.kept(roles.vendor, MODEL).recomputed
  return supply.check(roles.vendor, MODEL, CLINIC, recomputed)


def test_a_share_is_opened_and_destroyed_and_no_seed_of_the_others_is_left(roles):
  assert challenged(roles) == 3
  assert both(roles)[1] == []  # nothing is released before
  asked = set(json.loads((place(roles.vendor) / CLINIC / supply.CHALLENGE).read_bytes()))
  assert answered(roles) == (3, 3)
  assert not any("seeds" in path or "held" in path for path in every_file(roles.dealer))
  openings = json.loads((place(roles.vendor) / CLINIC / supply.OPENINGS).read_bytes())
  assert set(openings) == asked
  assert check(roles) == 3
  deliver(roles)
  first, second = both(roles)
  assert first == second
  assert len(first) == 3
  assert not asked & set(first)
  assert folders.checked(place(roles.vendor) / CLINIC) == set(first)
  for number in asked:  # opened, so never used
    with pytest.raises(Refused, match="used"):
      folders.take(place(roles.vendor) / CLINIC, number)


def test_a_second_challenge_opens_nothing_more(roles):
  """After an opening, what is released has no seed; a model owner that asks again gets nothing."""
  challenged(roles)
  answered(roles)
  released = [p.name for p in (roles.dealer / "outbox" / CLINIC).rglob("*") if p.is_file()]
  for numbers in (released, ["0" * 64], []):
    (place(roles.dealer) / CLINIC / supply.CHALLENGE).write_text(json.dumps(numbers))
    with pytest.raises(ValueError, match="only some of those that no clinic has"):
      supply.release(roles.dealer, MODEL, CLINIC)
  assert not (roles.dealer / "outbox" / "model_owner").exists()


@pytest.mark.parametrize("step", ["replace", "unlink", "rename"])
def test_a_dealer_killed_while_it_opens_opens_the_same_again(roles, monkeypatch, step):
  """Whatever challenge comes after the kill: what was decided first is what is opened."""
  challenged(roles)
  asked = set(json.loads((place(roles.vendor) / CLINIC / supply.CHALLENGE).read_bytes()))
  held = {path.name for path in (place(roles.dealer) / "held" / CLINIC).iterdir()}
  target = supply.durable if step == "replace" else supply.pathlib.Path
  done, real = [], getattr(target, step)

  def killed(*args, **kwargs):
    done.append(None)
    if len(done) > 1:
      raise KeyboardInterrupt
    return real(*args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(target, step, killed)
    with pytest.raises(KeyboardInterrupt):
      supply.release(roles.dealer, MODEL, CLINIC)
  other = roles.dealer / "models" / MODEL / CLINIC / supply.CHALLENGE
  other.write_text(json.dumps(sorted(held - asked)))
  supply.release(roles.dealer, MODEL, CLINIC)
  shown = [*(roles.dealer / "outbox" / "model_owner").rglob(supply.OPENINGS)]
  assert set(json.loads(shown[0].read_bytes())) == asked
  released = {p.name for p in (roles.dealer / "outbox" / CLINIC).rglob("*") if p.is_file()}
  assert released == held - asked


def test_a_dealer_that_deals_badly_is_caught_and_all_is_destroyed(roles, monkeypatch):
  """Correlations that belong to another B are well-formed, but no honest dealer's."""
  deal_committed = Dealer.deal_committed

  def bad(self, seed=None):
    blinds = self._blinds
    self._blinds = jax.tree.map(lambda v: v + np.ones_like(v), blinds)
    try:
      return deal_committed(self, seed)
    finally:
      self._blinds = blinds

  monkeypatch.setattr(Dealer, "deal_committed", bad)
  challenged(roles, 4)
  answered(roles)
  with pytest.raises(ValueError, match="cannot account for 2 of 2 inferences"):
    check(roles)
  assert both(roles)[0] == []
  assert folders.checked(place(roles.vendor) / CLINIC) == set()


def test_a_wrong_seed_is_no_opening(roles):
  challenged(roles, 4)
  answered(roles)
  path = place(roles.vendor) / CLINIC / supply.OPENINGS
  openings = json.loads(path.read_bytes())
  path.write_text(json.dumps(dict.fromkeys(openings, "00" * 32)))
  with pytest.raises(ValueError, match="cannot account for 2 of 2"):
    check(roles)


def test_nothing_is_dealt_while_inferences_wait_to_be_checked(roles):
  challenged(roles, 4)
  dealer = supply.dealer(roles.dealer, MODEL)
  with pytest.raises(ValueError, match="wait to be checked"):
    supply.top_up(roles.dealer, dealer, MODEL, CLINIC, 6)


def asked_for(roles):
  return json.loads((place(roles.vendor) / CLINIC / supply.CHALLENGE).read_bytes())


def test_a_second_dealing_is_checked_beside_what_the_clinic_holds(roles):
  """Some of it checked, some delivered without: none of these is asked for again."""
  challenged(roles)
  answered(roles)
  check(roles)
  deliver(roles)
  deal(roles, 2)
  deliver(roles)
  before = set(both(roles)[1])
  assert len(before) == 5
  assert challenged(roles) == 3
  assert not before & set(asked_for(roles))
  assert answered(roles) == (3, 3)
  assert check(roles) == 3
  deliver(roles)
  first, second = both(roles)
  assert first == second
  assert len(first) == 8
  assert len(folders.checked(place(roles.vendor) / CLINIC)) == 6
  with pytest.raises(ValueError, match="of the 0 inferences that the dealer holds back"):
    supply.challenge(roles.vendor, MODEL, CLINIC, 0.5)


@pytest.mark.parametrize("after", range(6))
def test_a_model_owner_killed_while_it_asks_asks_for_the_same(roles, monkeypatch, after):
  deal(roles, 6, audited=True)
  counted = killed_after(after)
  with monkeypatch.context() as patch:
    patch.setattr(supply.durable, "replace", counted(supply.durable.replace))
    patch.setattr(supply.folders, "destroy", counted(supply.folders.destroy))
    with pytest.raises(KeyboardInterrupt):
      supply.challenge(roles.vendor, MODEL, CLINIC, 0.5)
  first = asked_for(roles) if after >= 2 else None
  assert supply.challenge(roles.vendor, MODEL, CLINIC, 0.5) == 3
  assert first in (None, asked_for(roles))
  send(roles.vendor, "dealer", roles.dealer, inbox.MODEL_OWNER, inbox.DEALER)
  assert answered(roles) == (3, 3)
  assert check(roles) == 3


@pytest.mark.parametrize("after", range(4))
def test_a_model_owner_killed_while_it_checks_goes_on(roles, monkeypatch, after):
  challenged(roles)
  answered(roles)
  path, counted = supply.pathlib.Path, killed_after(after)
  with monkeypatch.context() as patch:
    for name in ("unlink", "replace"):
      patch.setattr(path, name, counted(getattr(path, name)))
    with pytest.raises(KeyboardInterrupt):
      check(roles)
  if supply.is_answered(roles.vendor, MODEL, CLINIC):  # as primia-publish decides
    assert check(roles) == 3
  assert len(folders.checked(place(roles.vendor) / CLINIC)) == 3
  deliver(roles)
  challenged(roles)
  answered(roles)
  assert check(roles) == 3


def test_an_early_or_old_answer_costs_the_dealer_nothing(roles):
  place(roles.vendor).joinpath(CLINIC).mkdir(mode=0o700)
  early = place(roles.vendor) / CLINIC / supply.OPENINGS
  early.write_text(json.dumps({"0" * 64: "00" * 32}))
  assert not supply.is_answered(roles.vendor, MODEL, CLINIC)
  assert challenged(roles) == 3
  assert not early.exists()
  early.write_text(json.dumps({"0" * 64: "00" * 32}))
  with pytest.raises(ValueError, match="answers another challenge"):
    check(roles)
  assert answered(roles) == (3, 3)
  assert check(roles) == 3


# ---- why only the model owner may see an opening


def solved(rows, values, bits):
  """x with rows @ x = values in Z_2^bits, by elimination with odd pivots."""
  modulus, rows = 2**bits, [[*map(int, row), int(v)] for row, v in zip(rows, values, strict=True)]
  size = len(rows[0]) - 1
  for i in range(size):
    pivot = next(j for j in range(i, len(rows)) if rows[j][i] % 2)
    rows[i], rows[pivot] = rows[pivot], rows[i]
    inverse = pow(rows[i][i], -1, modulus)
    rows[i] = [v * inverse % modulus for v in rows[i]]
    for j in range(len(rows)):
      if j != i and rows[j][i]:
        rows[j] = [(a - rows[j][i] * b) % modulus for a, b in zip(rows[j], rows[i], strict=True)]
  return [row[-1] for row in rows[:size]]


def test_an_opening_in_the_clinics_hands_gives_it_the_weights(roles, plan):
  """The clinic holds r, and u - L_B(r) up to party 0's share; the seed gives that share, hence B,
  and D + B are the weights. Without the seed, the same equations give nothing of them.
  """
  dealer = deal(roles, 1)
  circuit = plan.circuit
  number, op = next(
    (n, op) for n, op in enumerate(circuit.operations) if type(op).__name__ == "Linear"
  )
  shape = circuit.operands[op.operand].shape
  publication = saving.read(place(roles.vendor) / "publication")
  with_seed, without, masks = [], [], []
  for _ in range(2 * shape[0]):
    seed = committing_seed()
    _, (part, _) = (one.take(p) for p, one in enumerate(dealer.deal_committed(seed)))
    with plan.config.scope():
      ready = protocol.prepare(circuit, 1, part, {}, {})
      key = committing.key(seed, "correlations")
      opened = prng.derive(key, protocol._SEED, 0)  # what the seed gives besides: party 0's own
      zero = protocol.expand({}, protocol.dealt_shapes(circuit).sent[number], opened, number)["u"]
      masks.append(np.asarray(ready[number]["r"]).reshape(-1))
      without.append(np.asarray(ready[number]["u"]).reshape(-1))
      with_seed.append(without[-1] + np.asarray(zero).reshape(-1))
  found = {}
  for name, values in (("with", with_seed), ("without", without)):
    columns = [solved(masks, [v[j] for v in values], 32) for j in range(shape[1])]
    found[name] = np.array(columns, np.uint64).astype(np.uint32).T
  d = np.asarray(publication.arrays[op.operand])
  kept = publications.kept(roles.vendor, MODEL).owner
  secret = np.asarray(kept._own[op.operand].elements)
  np.testing.assert_array_equal(d + found["with"], secret)
  assert np.mean((d + found["without"]) == secret) < 0.1


def committing_seed():
  return np.random.default_rng().bytes(committing.SEED_BYTES)
