"""What `primia-site` does: folders, rosters, approvals and what a site knows of itself."""

import contextlib
import dataclasses
import pathlib
import stat

import numpy as np
import pytest
from PIL import Image

from experiments import approving, joining, settings, site_folders
from experiments.configs import Train
from experiments.joining import Approve, Init, Join
from experiments.site_folders import Limits, Own
from primia_jax import approval, durable
from primia_jax.secagg import keys, pinning, roster
from primia_jax.secagg.errors import Refused

CONFIG = settings.replace(
  Train(), data="folder:elsewhere", label_names="normal,bacterial,viral", image_size=8, model="mlp",
  rounds=4, placement="flower",
)  # fmt: skip


def images(folder, **classes):
  for name, count in classes.items():
    (folder / name).mkdir(parents=True)
    for i in range(count):
      Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / name / f"{i}.png")
  folder.mkdir(exist_ok=True)
  return Own(f"folder:{folder}")


class World:
  """Three hospitals and a coordinator, each with a folder of its own."""

  def __init__(self, root, own):
    self.root = root
    for number, name in enumerate("abc"):
      joining.init(self.at(name), Init(number, f"hospital-{name}"), own, Limits())
    joining.init(self.at("s"), Init(-1, "coordinator", "coordinator"), Own(), Limits())
    parts = ",".join(str(root / name / "public.json") for name in "abc")
    joining.rosters(self.at("s"), Join("lungs", parts))
    self.file = self.at("s") + "/roster.json"
    self.config = str(root / "config.json")
    settings.save(CONFIG, pathlib.Path(self.config))

  def at(self, name):
    return str(self.root / name)

  def digest(self):
    return roster.spoken(roster.digest(roster.decode(pathlib.Path(self.file).read_bytes())))

  def accept(self, name, digest=None):
    joining.rosters(self.at(name), Join(accept=self.file, digest=digest or ""))


@pytest.fixture
def world(tmp_path):
  return World(tmp_path, images(tmp_path / "images", normal=3, bacterial=2, viral=1))


def lines(capsys):
  return capsys.readouterr().out.splitlines()


def test_a_folder_is_its_owners_alone_and_its_key_stays(world, capsys):
  lines(capsys)
  a = world.root / "a"
  closed = [a, *(path for path in a.iterdir())]
  assert not any(stat.S_IMODE(path.stat().st_mode) & 0o077 for path in closed)
  secret = (a / "identity").read_bytes()
  assert all(secret not in p.read_bytes() for p in a.glob("*.*") if p.is_file())
  assert secret.hex() not in (a / "public.json").read_text()
  member = site_folders.read(a)
  assert (member.number, member.name) == (0, "hospital-a")
  assert member.own.data == f"folder:{world.root / 'images'}"
  joining.init(world.at("d"), Init(7, "hospital-d"), Own("none"), Limits())
  first, second = lines(capsys)
  assert "made" in first
  assert "site 7; fingerprint" in first
  assert "give" in second
  with pytest.raises(ValueError, match="is not empty"):
    joining.init(world.at("a"), Init(0, "hospital-a"), Own("none"), Limits())
  a.chmod(0o755)
  with pytest.raises(ValueError, match="run chmod 700"):
    site_folders.find(str(a))


def test_a_site_accepts_a_roster_by_the_digest_that_was_told(world, capsys):
  with pytest.raises(Refused, match="not confirmed"):
    world.accept("a")
  lines(capsys)
  world.accept("a", world.digest())
  first, second = lines(capsys)
  assert "accepted roster 1 of lungs, 3 sites" in first
  assert world.digest() in second
  joining.rosters(world.at("a"), Join())
  listed = lines(capsys)
  assert len(listed) == 6
  assert world.digest() in listed[1]
  with pytest.raises(ValueError, match="the coordinator makes the roster"):
    joining.rosters(world.at("a"), Join("lungs", "x.json"))


def test_a_key_is_rotated_without_and_revoked_with_the_telephone(world):
  world.accept("a", world.digest())
  world.accept("b", world.digest())
  before = site_folders.identity(world.root / "b")
  joining.rosters(world.at("b"), Join(rotate=True))
  with pytest.raises(ValueError, match="already offers a new key"):
    joining.rosters(world.at("b"), Join(rotate=True))
  assert site_folders.identity(world.root / "b") == before
  joining.rosters(world.at("s"), Join(join=world.at("b") + "/public.json"))
  world.accept("a")
  world.accept("b")
  after = site_folders.identity(world.root / "b")
  assert after != before
  assert pinning.held(world.root / "a").sites[1].public == after.public
  joining.rosters(world.at("s"), Join(leave="hospital-b", revoke="hospital-b"))
  with pytest.raises(Refused, match="not confirmed: site hospital-b is gone; 1 more keys are rev"):
    world.accept("a")
  world.accept("a", world.digest())
  with pytest.raises(ValueError, match=r"leave='hospital-b' is not a member"):
    joining.rosters(world.at("s"), Join(leave="hospital-b"))
  with pytest.raises(ValueError, match="is revoked"):
    joining.rosters(world.at("s"), Join(join=world.at("b") + "/public.json"))


def test_what_is_approved_is_the_same_at_all_sites_and_another_is_refused(world, capsys):
  for name in "ab":
    world.accept(name, world.digest())
    joining.approve(world.at(name), Approve(world.config))
  a, b = (site_folders.approved(world.root / name) for name in "ab")
  assert approval.digest(a) == approval.digest(b)
  said = lines(capsys)[-2:]
  assert "approved mlp of" in said[0]
  assert "6 images: normal 3, bacterial 2, viral 1" in said[0]
  assert (
    "; no privacy (dp=none); a sum opens once 3 of 3 sites answer, at most 1 site may collude; "
    "exact validation counts leave; here"
  ) in said[0]
  assert roster.spoken(approval.digest(a)) in said[1]
  theirs = settings.replace(CONFIG, data="npz:of_site_b", patient_column="p", layout="")
  approval.check(a, approving.offered(theirs))  # where images are is a site's own affair
  for change in (
    {"label_names": "bacterial,normal,viral"},
    {"image_size": 16},
    {"augment": "light"},
    {"seed": 1},
  ):
    with pytest.raises(approval.NotApproved, match=f"configuration: {next(iter(change))}="):
      approval.check(a, approving.offered(settings.replace(CONFIG, **change)))


def test_limits_of_a_site_refuse_a_configuration(world):
  for name in "ab":
    world.accept(name, world.digest())
  for limits, words in (
    (Limits(max_rounds=3), "rounds=4 of the configuration, and max_rounds=3"),
    (Limits(max_epsilon=2), "max_epsilon=2 of this site, and dp=none"),
    (Limits(fewest_sites=4), "a sum over 3 sites; this site's policy needs at least 4"),
    (Limits(fewest_images=7), "fewer than fewest_images=7 images"),
    (Limits(leaves="sums of updates,exact counts"), "metrics may not leave this site"),
    (Limits(fewest_colluding=2), "fewest_colluding=2 of this site, and sums of 3 sites with"),
  ):
    member = site_folders.Member(0, "hospital-a", site_folders.read(world.root / "a").own, limits)
    site_folders.write(world.root / "a", member)
    with pytest.raises(ValueError, match=words):
      joining.approve(world.at("a"), Approve(world.config))
  for change, words in (
    ({"secagg_threshold": 2, "secagg_colluding": 0}, "fewest_colluding=1 .*secagg_threshold=2 and"),
    ({"secagg_colluding": 0}, "fewest_colluding=1 of this site, .* secagg_colluding=0 hold"),
    ({"secagg_threshold": 3, "secagg_colluding": 1, "num_sites": 5}, "secagg_threshold=3 and"),
    ({"data": "csv:x", "multi_label": True, "class_weights": False}, "scores of several labels an"),
  ):
    with pytest.raises(ValueError, match=words):
      approving.check(settings.replace(CONFIG, **change), Limits())
  trusting = Limits(fewest_patients=0, fewest_colluding=0)
  weak = settings.replace(CONFIG, secagg_threshold=2, secagg_colluding=0)
  approving.check(weak, trusting)
  approving.check(settings.replace(weak, num_sites=2, secagg_threshold=0), Limits())  # two trust
  assert not (world.root / "a" / "approval.json").exists()
  settings.save(settings.replace(CONFIG, label_names=""), pathlib.Path(world.config))
  with pytest.raises(ValueError, match="label_names is empty in the configuration"):
    joining.approve(world.at("b"), Approve(world.config))
  settings.save(settings.replace(CONFIG, num_sites=4), pathlib.Path(world.config))
  with pytest.raises(ValueError, match=r"num_sites=4 of .* has 3 sites"):
    joining.approve(world.at("b"), Approve(world.config))


def test_what_protects_a_run_is_told_to_who_approves_it():
  here = approving.Held({"normal": 30, "bacterial": 20, "viral": 10}, 0)
  private = {"dp": "example", "batch_size": 4, "sync_epochs": 1, "sync_batches": 0}
  of = lambda change: settings.replace(CONFIG, **private | change)
  said = lambda held=here, **change: approving.protection(of(change), held)
  assert said(target_epsilon=3.0).startswith("epsilon at most 3 of each example; a sum")
  assert said(target_epsilon=3.0).endswith("; no validation")
  once, twice = (said(noise_multiplier=n) for n in (1.0, 2.0))
  assert once.startswith("epsilon ")
  assert ", for sites of 60 examples; a sum opens" in once
  assert float(once.split()[1]) > float(twice.split()[1]) > 0
  nobody = approving.Held({"normal": 0}, 0)
  assert said(nobody, noise_multiplier=1.0).startswith("epsilon of each example as the sizes of")
  of_sites = {"dp": "site", "weighting": "uniform", "class_weights": False, "delta": 0.1}
  assert " of each site; a sum opens" in said(noise_multiplier=2.0, **of_sites)


def test_few_images_of_few_classes_are_an_ordinary_case(tmp_path):
  of = lambda own: approving.held(CONFIG, site_folders.Member(0, "x", own))
  said = str(of(images(tmp_path / "one", normal=2)))
  assert said.startswith("2 images: normal 2; one class only, which is allowed")
  said = str(of(images(tmp_path / "two", normal=2, viral=1)))
  assert said == "3 images: normal 2, viral 1; none of bacterial, which is allowed"
  for own in (images(tmp_path / "empty"), Own("none")):
    assert "no images" in str(of(own))
  table = tmp_path / "table.csv"
  table.write_text("name,finding,person\none/normal/0.png,viral,p1\none/normal/1.png,viral,p1\n")
  csv = Own(f"csv:{table}", csv_columns="file=name,label=finding", patient_column="person")
  assert str(of(csv)).startswith("2 images of 1 patients: viral 2; one class only")
  with pytest.raises(ValueError, match="covid"):
    of(images(tmp_path / "other", covid=1, normal=1))


def test_status_and_ledger_say_where_a_site_stands(world, capsys):
  lines(capsys)
  joining.status(world.at("a"))
  assert (
    lines(capsys)[1]
    == "no roster accepted; nothing approved; 0 rounds; epsilon 0 spent, no limit set"
  )
  world.accept("a", world.digest())
  joining.approve(world.at("a"), Approve(world.config))
  site_folders.note(world.root / "a", "round", round=1)
  lines(capsys)
  joining.status(world.at("a"))
  first, second = lines(capsys)
  assert first.startswith("hospital-a, site 0, fingerprint ")
  assert first.endswith(": 6 images: normal 3, bacterial 2, viral 1")
  assert second.startswith("roster 1 of lungs with 3 sites; approved mlp (")
  assert second.endswith("1 rounds; epsilon 0 spent, no limit set")
  joining.status(world.at("s"))
  assert lines(capsys)[1].startswith("roster 1 of lungs")
  joining.ledger(world.at("a"))
  assert "0 runs charged" in lines(capsys)[0]
  with pytest.raises(ValueError, match="the coordinator's, which has no ledger"):
    joining.ledger(world.at("s"))


class Crash(BaseException):
  """The end of a process, which nothing in it outlives."""


def crashing(monkeypatch, at):
  """Ends the process before its write of this number: of a file, of a line, or of a new name."""
  done, durably = [], (durable._write, pathlib.Path.replace, site_folders.note)

  def counted(call):
    def run(*given, **named):
      done.append(call)
      if len(done) == at:
        raise Crash
      return call(*given, **named)

    return run

  write, rename, note = map(counted, durably)
  monkeypatch.setattr(durable, "_write", write)
  monkeypatch.setattr(pathlib.Path, "replace", rename)
  monkeypatch.setattr(site_folders, "note", note)
  return done


def step(call, at):
  """Whether a command was cut short at that write; it is then given once more."""
  with pytest.MonkeyPatch.context() as patch:
    writes = crashing(patch, at)
    try:
      call()
    except Crash:
      return True
  assert len(writes) < at
  return False


def test_a_crash_at_any_write_of_a_rotation_locks_nobody_out(world):
  """Each step is cut short at each of its writes, and done again; at the end the roster has the
  site's new key, and the site has that key.
  """
  for name in "ab":
    world.accept(name, world.digest())
  rotate = lambda: joining.rosters(world.at("b"), Join(rotate=True))
  number, cut = 1, [0, 0]
  while True:
    before = site_folders.identity(world.root / "b")
    if offered := step(rotate, number):
      cut[0] += 1
      with contextlib.suppress(ValueError):  # it was offered already
        rotate()
    joining.rosters(world.at("s"), Join(join=world.at("b") + "/public.json"))
    world.accept("a")  # without the telephone: the old key has signed the new one
    if taken := step(lambda: world.accept("b"), number):
      cut[1] += 1
      own = site_folders.identity(world.root / "b")
      with contextlib.suppress(ValueError):  # the roster in between is not the one that is held
        assert own.public in {m.public for m in pinning.held(world.root / "b").members}
      world.accept("b")
    own = site_folders.identity(world.root / "b")
    assert own != before
    assert pinning.held(world.root / "a").sites[1].public == own.public
    assert pinning.held(world.root / "b").sites[1].public == own.public
    assert not (world.root / "b" / pinning.NEXT).exists()
    if not offered and not taken:
      break
    number += 1
  assert min(cut) >= 4


def test_a_key_file_that_a_crash_tore_is_never_there(world, monkeypatch):
  """A torn one could neither be used nor replaced."""
  world.accept("b", world.digest())
  real = pathlib.Path.replace

  def torn(self, target):
    if self.name.startswith(pinning.NEXT):
      self.write_bytes(self.read_bytes()[:7])
      raise Crash
    return real(self, target)

  monkeypatch.setattr(pathlib.Path, "replace", torn)
  with pytest.raises(Crash):
    joining.rosters(world.at("b"), Join(rotate=True))
  monkeypatch.undo()
  assert not (world.root / "b" / pinning.NEXT).exists()
  joining.rosters(world.at("b"), Join(rotate=True))
  assert (world.root / "b" / pinning.NEXT).stat().st_size == keys.KEY_BYTES


def test_after_a_site_has_left_the_last_one_takes_its_number(world, capsys):
  """Until then nothing is trained, and it is said why."""
  for name in "ac":
    world.accept(name, world.digest())
  joining.rosters(world.at("s"), Join(leave="hospital-b"))
  assert "nothing is trained yet: the sites of roster 2 have the numbers [0, 2]" in (
    capsys.readouterr().out
  )
  world.accept("a", world.digest())
  settings.save(
    settings.replace(CONFIG, num_sites=2, secagg_colluding=0), pathlib.Path(world.config)
  )
  with pytest.raises(ValueError, match=r"numbers \[0, 2\], .* must be 0 to 1. Let the site with"):
    joining.approve(world.at("a"), Approve(world.config))
  c = world.root / "c"
  site_folders.write(c, dataclasses.replace(site_folders.read(c), number=1))
  joining.rosters(world.at("c"), Join(renumber=True))
  assert "hospital-c offers to be site 1" in capsys.readouterr().out
  joining.rosters(world.at("s"), Join(join=str(c / "public.json")))
  world.accept("c", world.digest())
  world.accept("a", world.digest())
  joining.approve(world.at("a"), Approve(world.config))
  own = site_folders.identity(c)
  assert pinning.held(world.root / "a").sites[1].public == own.public
  with pytest.raises(ValueError, match="is the coordinator's, which has no number"):
    joining.rosters(world.at("s"), Join(renumber=True))
  with pytest.raises(ValueError, match="rotate or renumber: do one after another"):
    joining.rosters(world.at("c"), Join(renumber=True, rotate=True))
  joining.rosters(world.at("c"), Join(rotate=True))
  with pytest.raises(ValueError, match="offers a new key; accept a roster that has it first"):
    joining.rosters(world.at("c"), Join(renumber=True))
