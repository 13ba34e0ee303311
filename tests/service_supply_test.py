"""A dealer's folder: correlations come in pairs across kills, and keys and dealers are rotated."""

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

from primia_jax import mpc
from primia_jax.mpc import saving
from primia_jax.service import folders, inbox, publications, supply
from primia_jax.service.errors import Refused


@pytest.fixture(scope="module")
def plan():
  return institution.planned()


@pytest.fixture
def roles(plan, tmp_path):
  return made(tmp_path, plan)


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
  dealer, counted = supply.dealer(roles.dealer, MODEL), killed_after(after)

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
