"""How a server that was put back is found; `service_sessions_test` carries out the attack."""

import shutil
import types

import pytest
from service_world import CLINIC, KEY

from primia_jax.service import folders, institutions, receipts
from primia_jax.service.errors import PutBack, Refused, UsedUp

NUMBERS = [f"{i:064x}" for i in range(4)]


@pytest.fixture
def both(tmp_path):
  """A server's folder of one clinic, and the clinic's, without correlations."""
  return folders.make(tmp_path / "server" / CLINIC), folders.make(tmp_path / "clinic")


def used(both, number):
  """What both keep once an inference is used."""
  folders.destroy(both[0], number)
  receipts.keep(both[1], number, receipts.issued(KEY, CLINIC, number))


def test_a_server_that_was_put_back_is_found_by_the_last_receipt(both, tmp_path):
  check = lambda folder: receipts.check(KEY, CLINIC, folder, receipts.shown(both[1]))
  check(both[0])  # a clinic that has none yet
  used(both, NUMBERS[0])
  snapshot = shutil.copytree(both[0], tmp_path / "snapshot")
  check(snapshot)
  used(both, NUMBERS[1])
  check(both[0])
  with pytest.raises(PutBack, match="put back to an earlier state"):
    check(snapshot)


def test_a_clinic_cannot_say_so_without_cause(both):
  """Neither of an inference that is unused, nor with what another clinic was given."""
  for who, key in ((CLINIC, bytes(32)), ("clinic-b", KEY)):
    shown = bytes.fromhex(NUMBERS[0]) + receipts.issued(key, who, NUMBERS[0])
    with pytest.raises(Refused, match="not of this server") as found:
      receipts.check(KEY, CLINIC, both[0], shown)
    assert not isinstance(found.value, UsedUp)


def test_a_receipt_finds_only_once_that_a_server_was_put_back(both, tmp_path):
  """Of an inference that it never held in that state: what is dealt afterwards stays."""
  used(both, NUMBERS[0])
  put_back = folders.make(tmp_path / "put_back")
  place = folders.make(put_back / "models" / "m-1" / CLINIC)
  served = types.SimpleNamespace(name="m-1", folder=place.parent)
  said = []
  journal = types.SimpleNamespace(note=lambda event, **fields: said.append(event))
  verify = institutions.verifying(put_back, journal, lambda: None)
  shown = receipts.shown(both[1])
  with pytest.raises(PutBack):
    verify(served, KEY, CLINIC, shown)
  later = folders.make(place / folders.CORRELATIONS) / NUMBERS[1]
  later.write_bytes(b"x")
  verify(served, KEY, CLINIC, shown)
  assert later.exists()
  assert said == ["put back"]


def test_discarding_leaves_nothing_of_any_clinic_or_model_and_marks_all(tmp_path):
  places = [tmp_path / "models" / model / who for model in ("m-1", "m-2") for who in ("a", "b")]
  inbox = folders.make(tmp_path / "inbox" / "dealer" / "models" / "m-1" / "a" / "correlations")
  for path in (*(folders.make(place / folders.CORRELATIONS) for place in places), inbox):
    (path / NUMBERS[0]).write_bytes(b"x")
  assert folders.discard(tmp_path) == 4
  for place in places:
    assert folders.unused(place) == []
    with pytest.raises(UsedUp):
      folders.check_unused(place, NUMBERS[0])
  assert (inbox / NUMBERS[0]).exists()


def test_a_damaged_receipt_is_named(both):
  (both[1] / receipts.RECEIPT).write_bytes(b"x")
  with pytest.raises(ValueError, match="receipt is damaged"):
    receipts.shown(both[1])
