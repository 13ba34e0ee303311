"""Each hospital of a run as a site of its own: what it opens, tells, keeps and refuses."""

import json
import os
import pathlib
import stat
import subprocess
import sys
import threading

import jax
import numpy as np
import PIL.Image
import pytest
from experiments_apart import APART, in_threads, meeting_of
from experiments_runs import FIXED, flags_of, train

from experiments import image_facts, inputs, model_files, others, processes, settings
from primia_jax.data import sites as data_sites
from primia_jax.flower import channel
from primia_jax.secagg import Refused, coordinator, keys, meeting, pinning, roster

ROOT = pathlib.Path(__file__).parents[1]
MODULE = "experiments.train_federated"


def write_sources(folder):
  """A source for each of three sites: npz files, one of them unsplit, and a folder of images."""
  part = data_sites.phantom_part((12, 12, 16), size=16)
  label_names, sources = part.dataset.label_names, []
  for i, rows in enumerate(part.sites):
    (own := folder / f"site_{i}").mkdir(parents=True)
    images, labels = part.dataset.images[rows, ..., 0], part.dataset.labels[rows]
    if i < 2:
      splits = {"train": slice(0, 9), "test": slice(9, 12)} if i else {"train": slice(0, 12)}
      arrays = {
        f"{split}_{name}": a[of_split]
        for split, of_split in splits.items()
        for name, a in (("images", images), ("labels", labels))
      }
      np.savez(own / "images.npz", **arrays)
      sources.append(f"npz:{own / 'images.npz'}")
      continue
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
      (own / label_names[label]).mkdir(exist_ok=True)
      PIL.Image.fromarray(image).save(own / label_names[label] / f"{n}.png")
    sources.append(f"folder:{own}")
  return ",".join(sources), ",".join(label_names)


def over_channels(folders):
  """The coordinator's end where each hospital's process has a channel, without Flower between."""

  def ask(requests, timeout):
    answers = {}

    def one(i, request):
      answer = channel.relay(folders[i], request, max(timeout, 1.0))
      if answer:
        answers[i] = answer

    calls = [threading.Thread(target=one, args=item, daemon=True) for item in requests.items()]
    for call in calls:
      call.start()
    for call in calls:
      call.join(max(timeout, 1.0))
    return dict(answers)

  return ask


def test_a_process_a_site_trains_what_one_process_trains_and_opens_no_other_site_s_file(tmp_path):
  """Each process has a source and a folder of its own; an audit hook sees every file it opens."""
  site_data, label_names = write_sources(tmp_path / "data")
  config = settings.replace(APART, site_data=site_data, label_names=label_names)
  own = [processes.own_folder(tmp_path / "own", i) for i in range(3)]
  logs = [tmp_path / f"opened_{i}" for i in range(3)]
  hooked = str(ROOT / "tests" / "experiments_hooked.py")
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
  environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, hooked]
  children = [
    subprocess.Popen(
      [*command, str(logs[i]), MODULE, *flags_of(config), f"--run_dir={own[i]}", f"--site={i}"],
      env=environment,
    )
    for i in range(3)
  ]
  try:
    ask, reports = over_channels(dict(enumerate(own))), []
    left = coordinator.coordinate(ask, range(3), keys.identity(), 300.0, reports.append)
    assert left == {0: "", 1: "", 2: ""}
    assert [child.wait(300) for child in children] == [0, 0, 0]
  finally:
    for child in children:
      child.kill()
      child.wait()
  simulated = settings.replace(config, placement="scan", secagg_threshold=3)
  expected = train(simulated, tmp_path / "simulated")
  trained = [model_files.load_model(str(one / processes.RUN))[1][0] for one in own]
  for a, b, c, d in zip(
    *map(jax.tree.leaves, (*trained, expected.models[0])), strict=True
  ):  # the sums agree bit for bit, and so do all models
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
    np.testing.assert_allclose(a, d, atol=1e-5)
  for one in own:
    lines = (one / processes.RUN / "federated" / "rounds.jsonl").read_text().splitlines()
    got = [json.loads(line) for line in lines]
    assert [row["survivors"] for row in got] == [3, 3]
    for row, wanted in zip(got, expected.rows, strict=True):
      assert row["val_mcc"] == pytest.approx(wanted["val_mcc"])
      assert row["val_loss"] == pytest.approx(wanted["val_loss"], abs=1e-4)
    assert "no other process knows them" in (one / processes.RUN / "report.md").read_text()
  for i in range(3):
    opened = {pathlib.Path(line) for line in logs[i].read_text().splitlines()}
    for root in (tmp_path / "data", tmp_path / "own"):
      within = {one.relative_to(root).parts[:1] for one in opened if one.is_relative_to(root)}
      assert within - {()} == {(f"site_{i}",)}


def test_a_process_is_given_the_sizes_of_the_others_and_none_of_their_images(tmp_path):
  site_data, label_names = write_sources(tmp_path)
  config = settings.replace(APART, site_data=site_data, label_names=label_names)
  everything = inputs.site_images(config)
  own = [inputs.site_images(config, i) for i in range(3)]
  said = {i: others.told(one, i, 100) for i, one in enumerate(own)}
  for i, one in enumerate(own):
    known = others.with_others(one, i, said, 100)
    assert known.train.sizes == everything.train.sizes
    assert known.validation.sizes == everything.validation.sizes
    assert known.patients == inputs.count_patients(everything.train)
    for part, whole in zip(known[:2], everything[:2], strict=True):
      np.testing.assert_array_equal(
        data_sites.stack(part, [i]).images, data_sites.stack(whole, [i]).images
      )
      with pytest.raises(ValueError, match=r"images are not in this process"):
        data_sites.stack(part, [(i + 1) % 3])
  for wrong, text in (
    (b"[]", "site 1 has not told how many images it has"),
    (b"[1e400, 1, 1, 1, 0]", "site 1 has not told how many images it has"),
    (b"[101, 1, 101, 1, 0]", "site 1 says that it has 101 images, and most_images=100; raise it"),
    (b"[1, 101, 1, 1, 0]", "site 1 says that it has 101 images, and most_images=100; raise it"),
    (b"[4, 1, 99, 1, 0]", "site 1 has not told .*it says 4 images, of 99 patients with 1 at most"),
    (b"[4, 1, 1, 99, 0]", "site 1 has not told .*it says 4 images, of 1 patients with 99 at most"),
    (b"[9, 1, 2, 4, 0]", "site 1 has not told .*it says 9 images, of 2 patients with 4 at most"),
    (b"[4, 1, 0, 0, 0]", r"site 1 has not told .*it says \[4, 1, 0, 0, 0\]"),
    (b"[4, 1, 4, 1, 101]", "site 1 says that it hides counts of fewer than 101 "),
    (b'[4, 2, 4, 1, 0, "a", "b"]', r"site 1 has the classes \['a', 'b'\], and site 0"),
  ):
    with pytest.raises(ValueError, match=text):
      others.with_others(own[0], 0, said | {1: wrong}, 100)
  with pytest.raises(ValueError, match=r"most_images=2: this site has .* images to train on"):
    others.told(own[0], 0, 2)
  assert others.largest_floor(said) == 0
  assert others.largest_floor(said | {1: others.told(own[1], 1, 100, 7)}) == 7


def test_facts_of_images_are_of_the_own_site_alone_wherever_it_stands_among_all():
  for i in range(3):
    found = inputs.site_images(APART, i)
    facts = image_facts.facts(APART, found.train, found.validation, found.test)
    assert "images at several sites" not in facts


def test_a_site_does_not_come_back_to_a_run_that_cannot_go_on_with_it():
  check = processes._check_return
  check(APART, 1, True)
  with pytest.raises(Refused, match="dp_noise=banded each start is charged a whole run"):
    check(settings.replace(FIXED, placement="flower"), 1, True)
  with pytest.raises(Refused, match="images or its approval have changed"):
    check(APART, 1, False)


def test_sites_that_meet_know_the_same_of_each_other(tmp_path):
  """At a second start, too, over what the first has left; its label is another one."""
  config, labels = settings.replace(APART, num_sites=2), []
  for _ in range(2):

    def call(i, carriers):
      place, told = meeting_of(config, tmp_path, i, carriers, b"%d" % i)
      place.joined.exchange.close()
      return place, told

    results, errors = in_threads(call, range(2), tmp_path)
    assert errors == {}
    (first, told), (second, same) = results[0], results[1]
    assert told == same == {0: b"0", 1: b"1"}
    assert first.joined.pinned[1:] == second.joined.pinned[1:]
    assert first.joined.exchange.label == second.joined.exchange.label
    labels.append(first.joined.exchange.label)
  assert labels[0] != labels[1]


def test_a_site_with_a_roster_meets_its_members_and_nobody_else(tmp_path):
  """Nothing is pinned at the first meeting; site 1 has another key than in the second roster."""
  config, root = settings.replace(APART, num_sites=2), tmp_path / "own"
  own = [processes.own_folder(root, i) for i in range(2)]
  known = [meeting.own_identity(folder / "identity") for folder in own]
  server = meeting.own_identity(root / "coordinator")

  def call(i, carriers):
    place, _ = meeting_of(config, tmp_path, i, carriers)
    place.joined.exchange.close()
    return place.joined.exchange.label

  def members(second):
    number = lambda i, public: roster.Member(i, f"hospital-{i}", public)
    coordinating = roster.Member(None, "coordinator", server.public)
    return [coordinating, number(0, known[0].public), number(1, second)]

  labels = set()
  for serial, second in ((1, known[1].public), (2, known[1].public), (3, keys.identity().public)):
    made = roster.make("trial", serial, members(second))
    for folder, identity in zip(own, known, strict=True):
      if serial < 3 or identity is known[0]:
        digest = roster.digest(made).hex()
        pinning.accept(folder, roster.encode(made), identity, digest)
    results, errors = in_threads(call, range(2), tmp_path)
    if serial < 3:
      assert errors == {}
      assert results[0] == results[1]
      labels.add(results[0])
  assert "site 1 shows another identity than in the roster" in str(errors[0])
  assert len(labels) == 2
  assert not list(root.rglob("identities.json"))


def test_a_site_that_cannot_go_on_tells_no_more_than_the_protocol(tmp_path):
  def call(i, carriers):
    place, _ = meeting_of(settings.replace(APART, num_sites=2), tmp_path, i, carriers)
    with processes.leaving(place.joined.carrier, i):
      raise ValueError("patient 7 has no image")

  _, errors = in_threads(call, range(2), tmp_path)
  said = str(errors.pop("coordinator"))
  assert "site 0 left: an error; its own log says which" in said
  assert "patient" not in said
  assert sorted(errors) == [0, 1]


def test_a_site_s_own_folder_is_closed_to_others(tmp_path):
  folder = tmp_path / "run"
  assert processes.sites_folder(folder, "") == tmp_path / "run.sites"
  with pytest.raises(ValueError, match="within the run folder, which is the coordinator's"):
    processes.sites_folder(folder, str(folder / "sites"))
  own = processes.own_folder(tmp_path / "run.sites", 1)
  assert stat.S_IMODE(own.stat().st_mode) == 0o700
  own.chmod(0o750)
  with pytest.raises(ValueError, match=r"site_1 holds the secrets of a site, and other users"):
    processes.own_folder(tmp_path / "run.sites", 1)


def test_another_coordinator_is_refused_by_name(tmp_path):
  """Of a second one that takes the first one's place at a restart."""
  config = settings.replace(APART, num_sites=2)

  def call(i, carriers):
    place, _ = meeting_of(config, tmp_path, i, carriers)
    place.joined.exchange.close()
    return place.joined.pinned.server

  first, errors = in_threads(call, range(2), tmp_path)
  assert errors == {}
  (tmp_path / "own" / "coordinator").unlink()  # another coordinator comes with its own identity
  _, errors = in_threads(call, range(2), tmp_path)
  assert all("the coordinator shows another identity" in str(errors[i]) for i in range(2))
  assert first[0] == first[1]
