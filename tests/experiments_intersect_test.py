"""`primia-site intersect`: three steps by files at each of two sites."""

import dataclasses
import json
import stat

import pytest

from experiments import intersecting, joining, site_folders
from experiments.intersecting import Intersect
from experiments.joining import Init, Join
from experiments.site_folders import Limits, Own
from primia_jax.secagg import keys, roster

OF_A = [f"p{n:03}" for n in range(20)]
OF_B = [f"p{n:03}" for n in range(15, 40)]


class Two:
  """Two hospitals with one roster, and the files of their patients' ids."""

  def __init__(self, root):
    self.root = root
    for number, (name, ids) in enumerate((("a", OF_A), ("b", OF_B))):
      joining.init(str(root / name), Init(number, f"hospital-{name}"), Own("none"), Limits())
      (root / f"{name}.txt").write_text("\n".join(ids) + "\n\n")
    joining.init(str(root / "s"), Init(-1, "coordinator", "coordinator"), Own(), Limits())
    parts = ",".join(str(root / name / "public.json") for name in "ab")
    joining.rosters(str(root / "s"), Join("lungs", parts))
    file = root / "s" / "roster.json"
    digest = roster.spoken(roster.digest(roster.decode(file.read_bytes())))
    for name in "ab":
      joining.rosters(str(root / name), Join(accept=str(file), digest=digest))

  def step(self, name, **given):
    named = {what: str(value) for what, value in given.items()}
    intersecting.intersect(str(self.root / name), Intersect(other="ba".index(name), **named))

  def made(self, name, what):
    here = "ab".index(name)
    return self.root / name / "intersections" / f"{what}-{here}-to-{1 - here}.json"

  def first(self):
    for name in "ab":
      self.step(name, ids=self.root / f"{name}.txt")

  def second(self):
    for name, other in ("ab", "ba"):
      self.step(name, blinded=self.made(other, "blinded"))


@pytest.fixture
def two(tmp_path):
  return Two(tmp_path)


def test_each_site_learns_which_of_its_patients_the_other_has(two, capsys):
  two.first()
  two.second()
  capsys.readouterr()
  for name, other in ("ab", "ba"):
    two.step(name, returned=two.made(other, "answer"))
    folder = two.root / name / "intersections"
    shared = folder / f"shared_with_{'ba'.index(name)}.txt"
    assert shared.read_text().split() == OF_A[15:]
    assert stat.S_IMODE(shared.stat().st_mode) == 0o600
    assert not list(folder.glob("with_*"))  # ids and secret are gone
    *_, last = site_folders.notes(two.root / name)
    assert (last["did"], last["shared"]) == ("intersect", 5)
  assert "5 of 20 patients are at site 1, too" in capsys.readouterr().out
  for name in "ab":
    sent = [two.made(name, what).read_text() for what in ("blinded", "answer")]
    assert not any(one in text for one in {*OF_A, *OF_B} for text in sent)
  with pytest.raises(FileNotFoundError, match="no intersection with site 1 is under way"):
    two.step("a", blinded=two.made("b", "blinded"))


def test_a_secret_blinds_one_message_and_steps_have_an_order(two):
  two.first()
  with pytest.raises(ValueError, match="is under way; finish it, or remove"):
    two.step("a", ids=two.root / "a.txt")
  two.second()
  with pytest.raises(ValueError, match="this site has answered already"):
    two.step("a", blinded=two.made("b", "blinded"))
  with pytest.raises(ValueError, match="is not the file 'answer' that site 1 made for this one"):
    two.step("a", returned=two.made("b", "blinded"))


def test_a_site_answers_another_once_under_a_roster_and_no_more_ids_than_agreed(two):
  """Else each answer lets the other guess as many patients as it likes."""
  member = site_folders.read(two.root / "a")
  fewer = dataclasses.replace(member, limits=Limits(most_ids=len(OF_B) - 1))
  site_folders.write(two.root / "a", fewer)
  two.first()
  with pytest.raises(ValueError, match="the other site sends 25 ids, more than 24"):
    two.step("a", blinded=two.made("b", "blinded"))
  assert site_folders.notes(two.root / "a")[-1]["did"] == "roster"
  site_folders.write(two.root / "a", member)
  for name in "ab":
    (two.root / name / "intersections" / f"with_{'ba'.index(name)}.json").unlink()
  two.first()  # nothing was answered
  two.second()
  (last,) = [one for one in site_folders.notes(two.root / "a") if "answered" in one["did"]]
  assert (last["other"], last["theirs"]) == (1, 25)
  for name, other in ("ab", "ba"):
    two.step(name, returned=two.made(other, "answer"))
  with pytest.raises(ValueError, match="has answered site 1 under this roster already"):
    two.step("a", ids=two.root / "a.txt")
  intersecting.intersect(str(two.root / "a"), Intersect(1, True, str(two.root / "a.txt")))
  with pytest.raises(ValueError, match="again belongs to ids"):
    intersecting.intersect(str(two.root / "a"), Intersect(1, True, blinded="x"))


def test_files_of_others_and_changed_files_are_refused(two):
  two.first()
  path = two.made("b", "blinded")
  good = json.loads(path.read_text())
  fresh = keys.identity()
  unsigned = {name: value for name, value in good.items() if name != "signature"}
  forged = keys.sign(fresh.private, intersecting._TEXT + roster.canonical(unsigned)).hex()
  for change, words in (
    ({"points": good["points"][1:]}, "is not signed by site 1's key"),
    ({"signature": forged}, "is not signed by site 1's key"),
    ({"roster": "00"}, "holds another roster"),
    ({"receiver": 2}, "is not the file 'blinded'"),
    ({"points": 3}, "is not a file of an intersection"),
  ):
    path.write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match=words):
      two.step("a", blinded=path)
  path.write_text("[]")
  with pytest.raises(ValueError, match="is not a file of an intersection"):
    two.step("a", blinded=path)
  path.write_text(json.dumps(good))
  two.step("a", blinded=path)  # none of these has used the secret up
  two.step("b", blinded=two.made("a", "blinded"))
  two.made("a", "blinded").write_text("another")
  with pytest.raises(ValueError, match=r"does not answer .*blinded-0-to-1\.json"):
    two.step("a", returned=two.made("b", "answer"))


def test_what_cannot_begin_is_refused(two):
  step = lambda **given: intersecting.intersect(str(two.root / "a"), Intersect(**given))
  ids = str(two.root / "a.txt")
  with pytest.raises(ValueError, match="no step: give one of ids"):
    step(other=1)
  with pytest.raises(ValueError, match=r"ids=.* and blinded=x: give one of"):
    step(other=1, ids=ids, blinded="x")
  with pytest.raises(ValueError, match=r"other=0 is not another site; the roster has 0, 1"):
    step(other=0, ids=ids)
  with pytest.raises(FileNotFoundError, match="ids=none: there is no such file"):
    step(other=1, ids="none")
  few = two.root / "few.txt"
  few.write_text("1\n2\n")
  with pytest.raises(ValueError, match="fewer than fewest_patients=10 patients"):
    step(other=1, ids=str(few))
  few.write_bytes(b"\xff\xfe1")
  with pytest.raises(ValueError, match="is not UTF-8 text"):
    step(other=1, ids=str(few))
  with pytest.raises(ValueError, match="the coordinator's, which has no patients"):
    intersecting.intersect(str(two.root / "s"), Intersect(1, ids=ids))
  assert not list((two.root / "a").glob("intersections/*"))
