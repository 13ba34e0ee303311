"""A server that was put back to an earlier state: what it would give away, and how it is found."""

import shutil

import numpy as np
import pytest
import service_world
from service_world import CLINIC, KEY, Pipe, X, dealt, inference

from primia_jax.service import folders, frames, receipts
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


# ---- with the protocol


@pytest.fixture(scope="module")
def world():
  return service_world.world()


class Copying(dict):
  """A clinic that kept copies: the folder comes back before each use."""


def put_back(both, root):
  return shutil.copytree(both[0], root / "put_back"), shutil.copytree(both[1], root / "kept")


def test_a_clinic_that_kept_copies_sees_one_mask_twice_where_a_server_was_put_back(world, tmp_path):
  """The attack: the difference of what the server opens is that of masked values."""
  both = dealt(world, tmp_path, 1)
  again = put_back(both, tmp_path)  # marks are missing on both sides, as is the receipt
  other = X + 1
  pipes = Pipe(), Pipe()
  assert inference(world, both, pipes[0])[0] is None
  assert inference(world, again, pipes[1], [other])[0] is None
  first, second = (
    next(m for m in pipe.sent[0] if frames.kind_of(m) == frames.SHARES_0) for pipe in pipes
  )
  opened = [np.frombuffer(m, np.uint32, offset=frames.HEADER_BYTES) for m in (first, second)]
  assert len(opened[0]) > 0


def test_an_honest_clinic_ends_that_with_its_next_request(world, tmp_path):
  both = dealt(world, tmp_path, 3)
  again, _ = put_back(both, tmp_path)
  for images in ([X], [X]):
    assert inference(world, both, Pipe(), images)[0] is None
  ends = inference(world, (again.parent / again.name, both[1]), Pipe())
  assert isinstance(ends[0], PutBack)
  assert len(folders.unused(both[1])) == 0  # it keeps nothing that could serve there
