"""A dealer's folder: correlations come in pairs across kills, and a cheating dealer is caught."""

import json

import jax
import numpy as np
import pytest
import service_institution as institution
from service_institution import CLINIC, MODEL, deal, deliver, every_file, made, place, send

from primia_jax import mpc, prng
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


def both(roles):
  """The numbers that each party holds unused."""
  return (folders.unused(place(roles.vendor) / CLINIC), folders.unused(place(roles.clinic)))


def test_both_parties_hold_the_same_inferences_and_the_dealer_nothing(roles):
  deal(roles, 3)
  deliver(roles)
  first, second = both(roles)
  assert first == second
  assert len(first) == 3
  kept = {path for path in every_file(roles.dealer) if "inbox" not in path}
  assert kept == {f"models/{MODEL}/{name}" for name in ("plan", "tag", "secret", "blind_given")}
  taken = [folders.take(folder, first[0]) for folder in (place(roles.vendor) / CLINIC,
           place(roles.clinic))]  # fmt: skip
  assert {one.inference for one in taken} == {first[0]}


def test_an_outbox_is_filled_up_by_a_dealer_that_comes_back(roles, plan):
  deal(roles, 2)
  dealer = supply.dealer(roles.dealer, MODEL)  # in a next process
  supply.top_up(roles.dealer, dealer, MODEL, CLINIC, 3)
  assert supply.ready(roles.dealer, MODEL, CLINIC) == 3
  send(roles.dealer, "model_owner", roles.vendor, inbox.DEALER, inbox.MODEL_OWNER)
  deliver(roles)
  assert len(set(both(roles)[0]) & set(both(roles)[1])) == 3
  owner = publications.kept(roles.vendor, MODEL).owner
  for number in both(roles)[0]:
    owner.prepare(folders.take(place(roles.vendor) / CLINIC, number))  # all of one publication


def test_a_dealer_keeps_to_its_disk(tmp_path, monkeypatch):
  (tmp_path / "held").write_bytes(bytes(600))
  supply.check_disk(tmp_path, 400, 1000.0)
  with pytest.raises(ValueError, match=r"401 B are needed besides 600 B .* 1.0 kB are allowed"):
    supply.check_disk(tmp_path, 401, 1000.0)
  usage = supply.shutil.disk_usage(tmp_path)._replace(free=400)
  monkeypatch.setattr(supply.shutil, "disk_usage", lambda folder: usage)
  with pytest.raises(ValueError, match="the disk has 400 B free"):
    supply.check_disk(tmp_path, 400, float("inf"))


@pytest.mark.parametrize("after", range(6))
def test_a_dealer_killed_at_any_step_leaves_pairs(roles, monkeypatch, after):
  """Each file and each rename is a step; the process is killed before one of them."""
  dealer, steps = supply.dealer(roles.dealer, MODEL), [0]

  def counted(step):
    def run(*args, **kwargs):
      steps[0] += 1
      if steps[0] > after:
        raise KeyboardInterrupt
      return step(*args, **kwargs)

    return run

  with monkeypatch.context() as patch:
    patch.setattr(saving, "write", counted(saving.write))
    patch.setattr(supply.pathlib.Path, "rename", counted(supply.pathlib.Path.rename))
    with pytest.raises(KeyboardInterrupt):
      supply.top_up(roles.dealer, dealer, MODEL, CLINIC, 2)
  supply.top_up(roles.dealer, dealer, MODEL, CLINIC, 2)
  outbox = roles.dealer / "outbox"
  first = outbox / "model_owner" / "models" / MODEL / CLINIC / "correlations"
  second = outbox / CLINIC / "models" / MODEL / "correlations"
  numbers = [{path.name for path in folder.iterdir()} for folder in (first, second)]
  assert numbers[0] == numbers[1]
  assert len(numbers[0]) == 2
  for folder in (first, second):
    for path in folder.iterdir():
      saving.check(path)
  assert not any(path.is_file() for path in (place(roles.dealer) / "dealing").rglob("*"))


def test_a_part_that_is_not_the_one_committed_to_is_refused(roles, plan):
  """A dealer that gives the clinic another part than the number stands for."""
  deal(roles, 2)
  deliver(roles)
  folder = place(roles.clinic)
  one, other = (folder / folders.CORRELATIONS / number for number in folders.unused(folder))
  first, second = saving.read(one), saving.read(other)
  first._secret, second._secret = second._secret, first._secret
  saving.write(one, first)
  with pytest.raises(Refused, match="committed to other correlations"):
    folders.take(folder, one.name)
  with pytest.raises(Refused, match="were used"):
    folders.take(folder, one.name)


# ---- checks of the dealer


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
  steps = [0]

  def counted(step):
    def run(*args, **kwargs):
      steps[0] += 1
      if steps[0] > after:
        raise KeyboardInterrupt
      return step(*args, **kwargs)

    return run

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
  steps, real = [0], {name: getattr(supply.pathlib.Path, name) for name in ("unlink", "replace")}

  def counted(name):
    def run(*args, **kwargs):
      steps[0] += 1
      if steps[0] > after:
        raise KeyboardInterrupt
      return real[name](*args, **kwargs)

    return run

  with monkeypatch.context() as patch:
    for name in real:
      patch.setattr(supply.pathlib.Path, name, counted(name))
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


# ---- rotation


def test_rotation_gives_new_keys_and_another_dealer_and_the_same_answers(roles, plan):
  deal(roles, 1)
  about, again, weights = publications.copy_of(roles.vendor, MODEL)
  publications.begin(roles.vendor, "chest-2", about, again, weights)
  send(roles.vendor, "dealer", roles.dealer, inbox.MODEL_OWNER, inbox.DEALER)
  deal(roles, 1, model="chest-2")
  old, new = (publications.kept(roles.vendor, name) for name in (MODEL, "chest-2"))
  assert old.owner.plan.digest == new.owner.plan.digest
  assert old.owner.tag != new.owner.tag
  for i, d in old.published.arrays.items():
    assert np.mean(np.asarray(d) == np.asarray(new.published.arrays[i])) < 0.1
  number = folders.unused(place(roles.vendor, "chest-2") / CLINIC)[0]
  with pytest.raises(ValueError, match="another publication"):
    old.owner.prepare(folders.take(place(roles.vendor, "chest-2") / CLINIC, number))
  with pytest.raises(FileExistsError, match="chest-2"):
    publications.begin(roles.vendor, "chest-2", about, again, weights)


def test_a_publication_waits_for_the_dealer_and_comes_back_after_a_restart(plan, tmp_path):
  roles = made(tmp_path, plan)
  with pytest.raises(FileNotFoundError, match="the dealer has not answered yet"):
    publications.finish(roles.vendor, MODEL)
  with pytest.raises(FileNotFoundError, match="not published yet"):
    publications.kept(roles.vendor, MODEL)
  deal(roles, 1)
  publications.finish(roles.vendor, MODEL)  # again, for another clinic
  assert publications.kept(roles.vendor, MODEL).owner.tag
  with pytest.raises(FileNotFoundError, match="holds chest-1; check the name"):
    publications.kept(roles.vendor, "chest-9")
  with pytest.raises(ValueError, match="model="):
    publications.model_folder(roles.vendor, "../up")
  assert mpc.read(place(roles.vendor) / "plan").digest == plan.digest
