"""What a site gives to a sum is in no second one over other sites: the record, and the attack."""

import numpy as np
import pytest
from flower_world import TOLD_A_RUN, World, decoded, quick, update

from experiments import opened
from primia_jax.secagg import messages as msg
from primia_jax.secagg import roster
from primia_jax.secagg.errors import Lost, Refused
from primia_jax.secagg.opening import Opening

KEYS = {i: bytes([i]) * 32 for i in range(3)}
NAMES = {KEYS[2]: "hospital-c"}
MASKED_INPUT = 5  # of a site's messages in the first round


@pytest.fixture
def kept(tmp_path):
  return opened.keeper(tmp_path, 0, None)._replace(names=NAMES)


def opening(sites=(0, 1, 2), number=3, digest=b"a"):
  return Opening(number, 0, {i: KEYS[i] for i in sites}, digest)


def test_the_same_is_given_again_to_the_same_sites_only(kept):
  opened.note(kept, opening())
  opened.note(kept, opening())
  opened.note(kept, opening((0, 1), number=4))  # another round, another update
  opened.note(kept, opening((0, 1), digest=b"b"))  # other elements, as with fresh noise
  with pytest.raises(Refused, match=r"round 3 .*with \['hospital-c'\] besides and without nobody"):
    opened.note(kept, opening((0, 1)))
  with pytest.raises(Refused, match=r"without \['hospital-c'\] of this one"):
    opened.note(kept, opening(number=4))
  assert len((kept.folder / "sums.jsonl").read_text().splitlines()) == 3
  assert (kept.folder / "sums.jsonl").stat().st_mode & 0o077 == 0


def test_an_update_is_known_again_by_what_it_follows_from(kept):
  opened.note(kept, opening(), since=b"state")
  opened.note(kept, opening(digest=b"rounded otherwise"), since=b"state")
  with pytest.raises(Refused):
    opened.note(kept, opening((0, 1), digest=b"and again"), since=b"state")
  opened.note(kept, opening((0, 1)), since=b"another state")


def test_a_record_that_is_damaged_is_no_empty_one(kept):
  opened.note(kept, opening())
  with (kept.folder / "sums.jsonl").open("ab") as file:
    file.write(b'{"half')  # of a crash: what it would have opened was not sent
  opened.note(kept, opening(number=9))
  assert len((kept.folder / "sums.jsonl").read_text().splitlines()) == 2
  (kept.folder / "sums.jsonl").write_text("7\n")
  with pytest.raises(ValueError, match=r"sums\.jsonl is damaged .*; restore it"):
    opened.note(kept, opening((0, 1)))


def test_images_are_counted_with_a_model_over_one_set_of_sites(kept):
  images = np.arange(4 * 4, dtype=np.uint8).reshape(4, 2, 2, 1)
  all_of, some = opened.marks(kept, images), opened.marks(kept, images[1:])
  opened.check_images(kept, "m", all_of)
  opened.note_images(kept, "m", all_of, opening())
  opened.note_images(kept, "m", all_of, opening(digest=b"other bins"))
  with pytest.raises(Refused, match=r"the same images were counted with this model before.*hosp"):
    opened.note_images(kept, "m", all_of, opening((0, 1), digest=b"other bins"))
  with pytest.raises(Refused, match="the same images"):
    opened.note_images(kept, "m", some, opening((0, 1)))
  with pytest.raises(ValueError, match="3 of 3 images were counted with this model before, beside"):
    opened.check_images(kept, "m", some)
  opened.check_images(kept, "m", all_of)
  opened.check_images(kept, "another model", some)
  opened.check_images(kept, "m", opened.marks(kept, images + 100))


def attacked(root):
  """A coordinator opens the sum of all, tells nobody, and has it formed again without site 2: what
  the two starts ended with.
  """
  first, second = World(), World()
  is_total = lambda number: number == TOLD_A_RUN - 1
  first.spoil_told = lambda site, number, data: None if is_total(number) else data
  with quick():
    first.run(root)
    second.silent = 2, MASKED_INPUT
    second.run(root)
  assert all(isinstance(first.errors[i], Lost) for i in range(3))
  return first, second


def total_of(world):
  """The sum that the coordinator opened."""
  (found,) = [m for m in map(decoded, world.told[0]) if isinstance(m, msg.Total)]
  return found.vectors[0]


def test_a_sum_that_was_withheld_is_not_opened_again_without_a_site(tmp_path):
  first, second = attacked(tmp_path)
  total_of(first)
  for i in range(2):
    with pytest.raises(Refused, match=r"with \['site 2'\] besides|the key \w+"):
      raise second.errors[i]
  assert not [m for m in map(decoded, second.told[0]) if isinstance(m, msg.Total)]
  with quick():
    again = World().run(tmp_path)  # all are there, as in the sum before
  assert again.errors == {}


def test_without_the_record_the_difference_is_the_site_s_update(tmp_path, monkeypatch):
  monkeypatch.setattr(opened, "note", lambda *given, **named: None)
  first, second = attacked(tmp_path)
  np.testing.assert_array_equal(total_of(first) - total_of(second), update(2, 0))


def test_names_are_those_of_the_roster(tmp_path):
  members = [roster.Member(None, "coordinator", b"c" * 32), roster.Member(0, "hospital-a", KEYS[0])]
  known = roster.Roster("lungs", 1, tuple(members))
  assert opened.keeper(tmp_path, 0, known).names == {KEYS[0]: "hospital-a"}
