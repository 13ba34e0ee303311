"""The audit of a tiny recorded run: what its parts claim, how it resumes, and its page."""

import json

import numpy as np
import pytest
from experiments_runs import PRIVATE, SITE, TINY

from experiments import running, settings
from experiments.audits import (
  auditing,
  classes,
  context,
  epsilons,
  extraction,
  first_layers,
  grids,
  inversion,
  membership,
  numbers,
  pages,
  parts,
  recognition,
  several,
  threats,
)
from experiments.audits.context import Context, Effort
from experiments.audits.parts import Part
from primia_jax.attacks.evidence import Evidence, beats_chance, verdict

TWO = settings.replace(
  TINY, rounds=2, record_transcript=True, num_sites=2, secagg_colluding=0,
  phantom_test_images=200, optimizer="sgd", keep_optimizer=False, learning_rate=0.1,
)  # fmt: skip
EFFORT = Effort(candidates=24, attacked_rounds=1, victims=2, iterations=2, canaries=64)
CONTROL = Evidence("control", "attack", "none", "rate", 0.9, (0.7, 0.98), 0.5)
FAILED = CONTROL._replace(threat="server", value=0.5, interval=(0.3, 0.7), control=CONTROL)
KNOWN = CONTROL._replace(threat="sum", assumed="all others")


def finished(config, folder):
  settings.save(config, folder / "config.json", "train_federated")
  running.run(config, folder, federated=True)
  return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return Context(
    finished(TWO, tmp_path_factory.mktemp("run")), tmp_path_factory.mktemp("out"), EFFORT
  )


@pytest.fixture(scope="module")
def recognised(run):
  return recognition.audit(run)


def test_a_recorded_run_is_headed_not_private(run):
  said = (run.run_dir / "report.md").read_text().splitlines()
  assert said[4].startswith("**NOT PRIVATE**: record_transcript=True")
  assert "NOT PRIVATE" in json.loads((run.run_dir / "metrics.json").read_text())["config"]


def test_of_two_sites_each_has_the_other_s_update(run):
  part = threats.points(run)
  none, two = part.failures
  assert none.startswith("no differential privacy")
  assert float(two.partition("error of ")[2].split()[0]) < 1e-3
  assert "has that of site 1" in two


def test_recognition_is_told_by_threat_point_with_a_control_that_succeeds(recognised):
  each, summed, peer = recognised.evidence
  assert [one.occurs for one in recognised.evidence] == [False, True, True]
  assert each.threat == "honest server, each site's update"
  assert peer.threat == "peer (site 0), site 1's update"
  assert summed.protection == "sum of 2 sites"
  assert all(one.control.value > 0.8 for one in recognised.evidence)
  assert each.value > 0.5  # SGD on few images
  assert all(one.interval[0] <= one.value <= one.interval[1] for one in recognised.evidence)


def test_exact_numbers_tell_of_one_image(run):
  """Class counts and validation losses, which are summed without noise."""
  part = numbers.audit(run)
  by_attack = {}
  for one in part.evidence:
    by_attack.setdefault(one.attack, []).append(one)
  assert [len(rows) for rows in by_attack.values()] == [3, 3, 3]
  assert all(one.value == 1 and one.assumed == "all other images" for one in part.evidence)
  assert [one.occurs for one in part.evidence] == [False, True, True] * 3
  assert len(part.failures) == 2
  sizes = run.images.train.sizes
  table = part.text[-1].splitlines()
  assert f"| {sizes[0]}, {sizes[1]} |" in table[2]
  assert f"| {sizes[1]} |" in table[4]  # of two sites, the other's


def test_noise_on_counts_hides_one_image_and_its_control_does_not(run):
  exact, noised = numbers.play(run, 0.0), numbers.play(run, 50.0)
  assert all(right.all() for right in exact.values())
  for (_, attack), right in noised.items():
    chance = 1 / 3 if attack == numbers._CLASS else 0.5
    assert abs(right.mean() - chance) < 4 * np.sqrt(0.25 / len(right))


def test_classes_are_read_off_one_step_and_not_under_noise(run):
  part = classes.audit(run)
  alone, *sums, private = part.evidence[:4]
  assert alone.value > 0.95
  assert alone.control is None
  assert all(one.control == alone for one in part.evidence[1:])
  assert sums[1].value < alone.value
  assert private.value < 0.75


def test_a_first_layer_gives_whole_batches(run):
  part = first_layers.audit(Context(run.run_dir, run.output, settings.replace(EFFORT, victims=3)))
  alone, _, of_ten, private = part.evidence
  assert alone.value == 1
  assert of_ten.value == private.value == 0
  assert (run.output / "first_layer.png").stat().st_size > 1000


def test_whole_updates_are_searched_beside_a_control(run):
  part = several.audit(run)
  pixels, prior = part.evidence
  assert pixels.threat.startswith("peer")  # of two sites
  assert pixels.occurs
  assert prior.control.protection == "none"
  assert "2 steps" in pixels.control.threat
  assert "simulating its" in part.text[0]  # plain SGD, of few images
  assert (run.output / "whole_updates.png").stat().st_size > 1000


def test_a_grid_is_of_the_run_s_images_and_keeps_its_cells(run):
  few = Context(run.run_dir, run.output, settings.replace(EFFORT, grid_images=2))
  assert auditing.chosen(["auto", "grid"], few) == list(auditing.PARTS)
  assert "grid" not in auditing.chosen(["auto"], few)
  part = grids.audit(few)
  single, summed = part.evidence
  assert (single.control, single.protection) == (None, "none")
  assert summed.protection == "secure aggregation of 2 sites"
  assert summed.control.value == single.value
  assert not single.occurs
  assert len(part.text[2].splitlines()) == 4
  kept = run.output / parts.FOLDER / "grid"
  assert sorted(path.name for path in kept.iterdir()) == ["1_1_2.npz", "single.npz"]
  assert all((run.output / name).stat().st_size > 1000 for name in part.pictures)


def test_a_search_that_fails_has_a_control_on_a_vulnerable_model(run):
  """Two steps find nothing: what fails for lack of effort is called inconclusive."""
  part = inversion.audit(run)
  first = part.evidence[0]
  assert first.protection == "none"
  assert first.value <= first.chance or first.control is None
  assert all(one.control is not None for one in part.evidence[1:4])
  if first.control is not None:
    assert "vulnerable" in first.control.threat
    assert "known to be vulnerable" in part.text[0]
    assert all(one.control == first.control for one in part.evidence[:4])


def test_the_more_questions_the_more_alike(run):
  part = extraction.audit(run)
  assert [one.occurs for one in part.evidence] == [False] * 3
  assert "numbers for each question" in part.text[0]
  assert len(part.text[1].splitlines()) == 5
  assert len(part.failures) == beats_chance(part.evidence[-1])


def test_pairs_are_of_one_site_and_class(run):
  game = recognition.draw(run)
  members, strangers = game.pairs.T
  assert len(game.pairs) == EFFORT.candidates
  np.testing.assert_array_equal(game.site[members], game.site[strangers])
  np.testing.assert_array_equal(game.labels[members], game.labels[strangers])
  train = run.images.train
  own = {train.dataset.images[i].tobytes() for i in np.concatenate(train.sites)}
  is_member = [image.tobytes() in own for image in game.images]
  np.testing.assert_array_equal(np.flatnonzero(is_member), np.sort(members))


def test_shadows_train_as_long_as_the_run(run):
  game = recognition.draw(run)
  recipe, divisor = membership._recipe(run, game, is_private=False)
  assert divisor is None
  assert recipe.steps.batch_size == TWO.training.batch_size
  assert recipe.steps.max_steps == 2 * -(-recipe.steps.max_examples // 4)  # an epoch a round
  run_rate = TWO.training.build_schedule()
  for share in (0.0, 0.5, 0.9):
    assert float(recipe.schedule(np.float32(share))) == pytest.approx(
      float(run_rate(np.float32(2 * share)))
    )


def test_an_audit_continues_and_refuses_other_settings(run, recognised, monkeypatch, tmp_path):
  made = []

  def fake(name, part):
    return parts.Audit(lambda _: made.append(name) or part, ("candidates",), name == "b")

  table = {"a": fake("a", Part("A", ("text",), (), ("it fails",))), "b": fake("b", recognised)}
  monkeypatch.setattr(auditing, "PARTS", table)
  out = tmp_path / "out"
  auditing.audit(run.run_dir, out, EFFORT, ["a"])
  said = auditing.audit(run.run_dir, out, EFFORT, ["auto"])
  assert made == ["a", "b"]
  assert said == pages.first_line(recognised.evidence)
  key = parts.digest("b", table["b"], Context(run.run_dir, out, EFFORT))
  assert parts.kept(out / parts.FOLDER / "b.json", key) == recognised
  text = (out / auditing.REPORT).read_text().splitlines()
  assert text[2] == said
  assert "- it fails" in text
  assert out.stat().st_mode & 0o777 == 0o700
  assert (out / auditing.OVERVIEW).stat().st_size > 1000
  with pytest.raises(ValueError, match="holds the part 'a' of another run, or with other settings"):
    auditing.audit(run.run_dir, out, Effort(candidates=25), ["a"])
  bare = finished_without_transcript(run.run_dir, tmp_path / "bare")
  auditing.audit(bare, tmp_path / "second", EFFORT, ["auto"])
  assert made == ["a", "b", "a"]
  assert "Left out: b" in (tmp_path / "second" / auditing.REPORT).read_text()
  with pytest.raises(FileNotFoundError, match="train with --record_transcript"):
    auditing.audit(bare, tmp_path / "third", EFFORT, ["b"])
  assert not (tmp_path / "third").exists()
  apart = settings.replace(TWO, record_transcript=False, placement="flower")
  settings.save(apart, bare / "config.json", "train_federated")
  with pytest.raises(ValueError, match="each site keeps its own ledger"):
    auditing.audit(bare, tmp_path / "third", EFFORT, ["a"])


def finished_without_transcript(run_dir, folder):
  (folder / context.ARM).mkdir(parents=True)
  for name in ("config.json", "metrics.json", "model.json"):
    (folder / name).write_bytes((run_dir / name).read_bytes())
  return folder


@pytest.mark.parametrize(
  ("evidence", "said"),
  [
    ([FAILED], "**Identification is at chance**"),
    ([FAILED, CONTROL], "**Identification is not at chance**: control: attack, 0.900"),
    ([FAILED, CONTROL._replace(occurs=False)], "**Identification is at chance**"),
    ([FAILED._replace(control=None)], "**Inconclusive**"),
    ([CONTROL._replace(occurs=False)], "**No view of this run was attacked**"),
    ([FAILED._replace(chance=None)], "**No view of this run"),
    ([], "**No view of this run"),
    (
      [FAILED, KNOWN],
      "**Numbers tell of one image to whoever knows all others**: attack (sum). Else: **Ident",
    ),
    ([CONTROL, KNOWN], "**Identification is not at chance**: control: attack, 0.900"),
  ],
)
def test_the_first_line_says_where_identification_is_not_at_chance(evidence, said):
  assert pages.first_line(evidence).startswith(said)
  page = pages.page("Title", {"x": Part("Part", (), tuple(evidence))}, {}, {})
  assert page.splitlines()[2] == pages.first_line(evidence)
  assert ("not in this run" in page) == any(not one.occurs for one in evidence)


@pytest.mark.slow
def test_every_part_of_a_private_run(tmp_path):
  """Under privacy each part makes its claims, the first line included."""
  config = settings.replace(
    PRIVATE, record_transcript=True, phantom_test_images=200, noise_multiplier=4.0, dp_seed=-1
  )
  folder, out = finished(config, tmp_path), tmp_path / "audit"
  auditing.audit(folder, out, EFFORT, ["auto"])
  names = [name for name in auditing.PARTS if name != auditing.GRID]  # which only a request takes
  made = {name: json.loads((out / "parts" / f"{name}.json").read_text()) for name in names}
  part = {name: record["part"] for name, record in made.items()}
  assert all(part[name]["text"] for name in part)
  assert not any("unmasked" in text for text in part["boundary"]["failures"])
  assert any("malicious architecture" in text for text in part["servers"]["failures"])
  epsilon = parts._evidence(part["epsilon"]["evidence"][0])
  assert epsilon.note == "below the claim"
  for name in ("inversion", "first_layers", "heads"):
    of_attack = {}
    for one in map(parts._evidence, part[name]["evidence"]):
      of_attack.setdefault(one.attack, []).append(one)
    for first, *rest in of_attack.values():
      assert all(one.control == (first.control or first) for one in rest)
      assert not any(one.occurs for one in (first, *rest))
      assert verdict(rest[-1]) in ("at chance", "inconclusive")  # differential privacy
  for picture in ("reconstructions.png", "malicious_server.png", "membership.png", "evidence.png"):
    assert (out / picture).stat().st_size > 1000


def test_whole_sites_are_audited_by_canary_sites(tmp_path):
  """At the few sites of a run, the report says why they alone cannot refute the claim."""
  config = settings.replace(SITE, rounds=1, dp_seed=-1)
  folder = finished(config, tmp_path)
  part = epsilons.proved(Context(folder, tmp_path, settings.replace(EFFORT, canaries=512)))
  alone, summed, final = part.evidence
  claim = float(alone.measure.rpartition("of ")[2].split()[0])
  assert final.value == summed.value <= alone.value < claim
  assert alone.control.value > alone.value
  assert not alone.occurs
  assert summed.occurs
  assert "it would prove 0 of" in part.text[1]
  assert part.failures == ()
