"""Private training by the binaries: what is charged before it is released, resumed and reported."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from private_runs import FIXED, MOVING, SITE, TINY, make, train

from experiments import inputs, learning, running, training
from primia_jax import federated, models, sites
from primia_jax.privacy import accounting
from primia_jax.privacy import ledger as books


def test_a_patient_of_many_images_changes_class_counts_by_one():
  """What the ledger is charged for: noise of `dp_count_noise` against a change by 1."""
  config = dataclasses.replace(TINY, dp="patient", dp_count_noise=1e-3, num_sites=1)
  images = inputs.site_images(config)
  model_config = learning.model_config(config, 3)
  cohort = training.Cohort("pooled", images.train, images.validation, np.arange(1))
  trainer = training.make_trainer(
    config, models.build(model_config), model_config, [cohort], sites.Placement("loop")
  )
  labels = np.array([0, 1, *[2] * 8, 0, 0], np.int32)  # ten images and padding

  def counts(units):
    padded = np.array([*units, -1, -1], np.int32)
    site = federated.Site(
      np.int32(0), np.zeros((12, 1)), labels, np.int32(10), np.zeros(8, np.uint32), padded
    )
    loader = federated.Loader(lambda ids: jax.tree.map(lambda a: a[None], site))
    return trainer.count_classes(jax.random.key(0), np.zeros(8, np.uint32), np.arange(1), loader)

  np.testing.assert_array_equal(counts([0, 1, *[2] * 8]), [1, 1, 1])
  np.testing.assert_array_equal(
    counts([0, 0, 0, 1, 1, 2, 3, 4, 5, 6]), [0, 0, 6]
  )  # a third of a patient each
  np.testing.assert_array_equal(counts(range(10)), [1, 1, 8])


@pytest.mark.parametrize(
  ("config", "gradients"), [pytest.param(TINY, 5, marks=pytest.mark.slow), (FIXED, 1)]
)
def test_what_is_released_is_charged_before_and_on_disk(config, gradients, tmp_path, monkeypatch):
  """So that whatever stops a run in the middle of a release, no ledger lacks it."""
  booked = []

  def note_and_stop(*_):
    saved = json.loads((tmp_path / "ledger.json").read_text())["ledgers"]
    booked.append(
      {(r.what, r.times) for one in saved for r in books.from_json(json.dumps(one)).releases}
    )
    raise KeyboardInterrupt

  made = training.make_trainer
  monkeypatch.setattr(
    training, "make_trainer", lambda *args: made(*args)._replace(count_classes=note_and_stop)
  )
  with pytest.raises(KeyboardInterrupt):
    train(config, tmp_path)
  counts, step = lambda *_: np.ones(3), lambda rounds: rounds._replace(step=note_and_stop)
  monkeypatch.setattr(
    training,
    "make_trainer",
    lambda *a: (t := made(*a))._replace(count_classes=counts, rounds=step(t.rounds)),
  )
  with pytest.raises(KeyboardInterrupt):
    train(config, tmp_path)
  assert booked == [{("class counts", 1)}, {("class counts", 2), ("gradients", gradients)}]


def test_a_stopped_run_goes_on_with_its_ledger_and_its_class_counts(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    train(TINY, tmp_path, 2)
  before = json.loads((tmp_path / "ledger.json").read_text())
  arm = train(TINY, tmp_path)
  after = json.loads((tmp_path / "ledger.json").read_text())
  assert before["class_counts"] == after["class_counts"]
  ledger = books.from_json(json.dumps(after["ledgers"][0]))
  counts, gradients = ledger.releases
  # The second round was not saved when the run was stopped: it was released twice, and is charged
  # twice.
  steps = make(TINY, inputs.site_images(TINY).train.sizes).num_steps
  assert (counts.times, gradients.times) == (1, 4 * steps)
  epsilons = [row["epsilon"] for row in arm.rows]
  assert len(epsilons) == 3
  assert epsilons == sorted(set(epsilons))
  assert epsilons[-1] == accounting.epsilon(ledger)
  assert all(row["train_loss"] is None for row in arm.rows)  # not private
  assert "NOT PRIVATE" in arm.privacy  # for its seed
  assert all("NOT PRIVATE" in row for row in arm.rows)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_correlated_noise_and_is_charged_again(tmp_path):
  """By its seed it goes on bit for bit, so all that noise needs is in the checkpoint."""
  whole = train(FIXED, tmp_path / "whole")
  with pytest.raises(KeyboardInterrupt):
    train(FIXED, tmp_path / "parts", 2)
  parts = train(FIXED, tmp_path / "parts")
  assert [row["val_loss"] for row in parts.rows] == [row["val_loss"] for row in whole.rows]
  jax.tree.map(np.testing.assert_array_equal, parts.models, whole.models)
  ledgers = {}
  for name in ("whole", "parts"):
    saved = json.loads((tmp_path / name / "ledger.json").read_text())["ledgers"][0]
    ledgers[name] = books.from_json(json.dumps(saved))
  assert [(r.what, r.times) for r in ledgers["whole"].releases] == [
    ("class counts", 1),
    ("gradients", 1),
  ]
  assert [(r.what, r.times) for r in ledgers["parts"].releases] == [
    ("class counts", 1),
    ("gradients", 2),
  ]
  assert {row["epsilon"] for row in whole.rows} == {accounting.epsilon(ledgers["whole"])}
  assert parts.rows[-1]["epsilon"] == accounting.epsilon(ledgers["parts"])
  for name in (
    "whole",
    "parts",
  ):  # a finished run that is started again trains nothing, and costs nothing
    train(FIXED, tmp_path / name)
    saved = json.loads((tmp_path / name / "ledger.json").read_text())["ledgers"][0]
    assert books.from_json(json.dumps(saved)) == ledgers[name]
  assert "3 bands" in whole.privacy["mechanism"]
  assert (
    "at least 3 steps between two uses of an image, at most 9 uses in 27"
    in whole.privacy["sampler"]
  )
  assert "NOT PRIVATE" in whole.privacy


@pytest.mark.slow
@pytest.mark.parametrize(
  "change",
  [
    {"dp_noise": "tree", "dp": "patient", "batch_size": 1, "dp_augmentations": 2},
    {
      "algorithm": "scaffold",
      "dropout_rate": 0.3,
      "secagg_threshold": -1,
      "num_sites": 4,
      "dp_clipping": "per_layer",
    },
    {"sites_per_round": 2, "dp_average": 0.9, "keep_optimizer": True, "dp_clipping": "automatic"},
  ],
)
def test_fixed_batches_go_with_other_settings(tmp_path, change):
  arm = train(dataclasses.replace(FIXED, **change), tmp_path)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(arm.models))
  assert "DP-FTRL" in arm.privacy["mechanism"]
  assert "once" in arm.privacy["released: gradients"]


@pytest.mark.slow
def test_pooled_training_takes_batches_in_a_fixed_order(tmp_path):
  result = running.run(dataclasses.replace(FIXED, rounds=2, num_sites=2), tmp_path, federated=False)
  assert "DP-FTRL" in result["privacy"]["mechanism"]
  assert "DP-FTRL" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_training_stops_at_the_budget(tmp_path):
  sizes = inputs.site_images(TINY).train.sizes
  made = make(TINY, sizes)
  target = (made.epsilon(1) + made.epsilon(2)) / 2
  arm = train(dataclasses.replace(TINY, target_epsilon=target, dp_seed=-1), tmp_path)
  assert [row["round"] for row in arm.rows] == [1]
  assert arm.rows[-1]["epsilon"] == pytest.approx(made.epsilon(1), rel=1e-6)
  saved = json.loads((tmp_path / "ledger.json").read_text())["ledgers"]
  assert {books.from_json(json.dumps(one)) for one in saved} == {made.spent(1)}
  assert "NOT PRIVATE" not in arm.privacy


@pytest.mark.parametrize(
  "change",
  [
    {"dp": "patient"},
    pytest.param(
      {"dp_average": 0.9, "dp_augmentations": 2, "augment": "light", "dp_clipping": "automatic"},
      marks=pytest.mark.slow,
    ),
    pytest.param({"model": "scatter_linear", "dp_clipping": "per_layer"}, marks=pytest.mark.slow),
  ],
)
def test_other_units_clippings_and_features_train(tmp_path, change):
  arm = train(dataclasses.replace(TINY, rounds=1, **change), tmp_path)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(arm.models))
  assert arm.rows[0]["epsilon"] > 0
  assert change.get("dp", "example") in next(
    v for k, v in arm.privacy.items() if k == "unit of privacy"
  )


@pytest.mark.slow
def test_sites_are_lost_and_the_sum_still_has_its_noise(tmp_path):
  config = dataclasses.replace(
    SITE,
    num_sites=6,
    phantom_images=48,
    dp_noise="distributed",
    secagg_threshold=-1,
    dropout_rate=0.2,
    rounds=4,
    dp_seed=-1,
  )
  arm = train(config, tmp_path)
  survivors = [row["survivors"] for row in arm.rows]
  assert min(survivors) < 6
  assert all(n >= 5 for n in survivors)
  assert "distributed discrete gaussian" in arm.privacy["mechanism"]


def test_rounds_that_were_aborted_are_told(tmp_path):
  config = dataclasses.replace(
    TINY, num_sites=6, phantom_images=48, dropout_rate=0.3, secagg_threshold=5, rounds=6
  )
  arm = train(config, tmp_path)
  assert arm.facts["rounds trained"] == len(arm.rows) < 6
  told = arm.facts["rounds aborted, too few sites being left"]
  assert told == f"{6 - len(arm.rows)}, charged all the same"


def test_rounds_say_how_the_clip_moves(tmp_path):
  arm = train(dataclasses.replace(MOVING, rounds=2), tmp_path)
  clips = [row["l2_clip_norm"] for row in arm.rows]
  assert clips[0] == pytest.approx(0.7)
  assert clips[1] != clips[0]
  assert [
    json.loads(line)["l2_clip_norm"]
    for line in (tmp_path / "rounds.jsonl").read_text().splitlines()
  ] == clips
  assert arm.privacy["clipping norm"].startswith("begins at 0.7 and follows the 0.5 quantile")
  assert "each site's bit" in arm.privacy["noise of the clip"]
  assert "norm that moves" in arm.privacy["mechanism"]
  saved = json.loads((tmp_path / "ledger.json").read_text())["ledgers"]
  (ledger,) = {books.from_json(json.dumps(one)) for one in saved}
  assert [(r.what, r.times, r.noise_multiplier) for r in ledger.releases] == [
    ("updates, and whether they were within the clip", 2, 1.0)
  ]
  assert ledger == make(dataclasses.replace(MOVING, rounds=2)).spent(2)  # as `account` foretells


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_clip(tmp_path):
  whole = train(MOVING, tmp_path / "whole")
  with pytest.raises(KeyboardInterrupt):
    train(MOVING, tmp_path / "parts", 2)
  parts = train(MOVING, tmp_path / "parts")
  assert [row["l2_clip_norm"] for row in parts.rows] == [row["l2_clip_norm"] for row in whole.rows]
  jax.tree.map(np.testing.assert_array_equal, parts.models, whole.models)


@pytest.mark.slow
def test_the_clip_moves_by_noise_of_all_sites_while_some_are_lost(tmp_path):
  config = dataclasses.replace(
    MOVING,
    num_sites=6,
    phantom_images=48,
    dp_noise="distributed",
    secagg_threshold=-1,
    dropout_rate=0.2,
    rounds=4,
    dp_seed=-1,
    algorithm="fedavgm",
    dp_average=0.9,
    sites_per_round=5,
  )
  arm = train(config, tmp_path)
  clips = [row["l2_clip_norm"] for row in arm.rows]
  assert len(set(clips)) == len(clips) > 1
  assert "their sum, from at least" in arm.privacy["noise of the clip"]
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(arm.models))
