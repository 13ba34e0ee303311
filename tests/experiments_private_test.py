"""Differential privacy of the binaries: what is charged, when, and what is said of it.

What is refused and how much noise is chosen is in `experiments_configs_test`.
"""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from experiments_runs import (
  FIXED,
  MOVING,
  PRIVATE,
  SITE,
  Drawn,
  assert_equal,
  charged,
  cohort_of,
  found,
  ledgers,
  make_trainer,
  train,
  trainer_of,
)

from experiments import checkpoints, running, settings, trainers
from primia_jax import federated
from primia_jax.data import sites as data_sites
from primia_jax.privacy import accounting, ledger
from primia_jax.privacy.chain import Chain
from primia_jax.types import Site

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
FRESH = settings.replace(PRIVATE, dp_seed=-1, secagg_threshold=3)  # private in earnest
LOSING = settings.replace(
  SITE, num_sites=6, phantom_images=48, secagg_threshold=-1, dropout_rate=0.2, rounds=4, dp_seed=-1
)


def chain_of(folder):
  return Chain(folder / "ledger", read_only=True)


def alone(config):
  """Site 0, as local training has it."""
  everyone = cohort_of(config)
  train, validation = (data_sites.merge(p, (0,)) for p in (everyone.train, everyone.validation))
  return trainers.Cohort("local: site 0", train, validation, np.arange(1), everyone.patients[:1])


def test_nothing_is_claimed_of_sites_for_an_arm_of_one():
  """Local and pooled arms of a run with dp=site: no update leaves them, so that nothing is noised
  or charged.
  """
  assert make_trainer(SITE, alone(SITE)).privacy is None
  assert make_trainer(PRIVATE, alone(PRIVATE)).privacy is not None


# ---- secrets of a run that is stopped and continued


def stop(config, folder):
  """Stops a run in its second round before the checkpoint; returns what it has drawn."""
  with pytest.MonkeyPatch.context() as patch:
    drawn = Drawn(patch)
    with pytest.raises(KeyboardInterrupt):
      train(config, folder, 2)
  return drawn


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """(folder, what was drawn) of a private run that was stopped."""
  folder = tmp_path_factory.mktemp("stopped") / "run"
  return folder, stop(FRESH, folder)


@pytest.fixture(scope="module")
def continued(stopped, tmp_path_factory):
  """The same run continued twice from one checkpoint: [(folder, arm)]."""
  starts = []
  for name in ("first", "second"):
    folder = tmp_path_factory.mktemp("continued") / name
    shutil.copytree(stopped[0], folder)
    starts.append((folder, train(FRESH, folder)))
  return starts


def test_a_stopped_run_goes_on_with_its_ledger_and_its_class_counts(stopped, continued):
  counts = [
    [entry["counts"] for entry in chain_of(folder).entries if entry["kind"] == "counts"]
    for folder in (stopped[0], continued[0][0])
  ]
  assert counts[0] == counts[1]
  assert len(counts[0]) == 1
  # The second round was not saved when the run was stopped: it was released twice, and is charged
  # twice.
  steps, (folder, arm) = trainer_of(FRESH).privacy.num_steps, continued[0]
  assert charged(stopped[0]) == [("class counts", 1), ("gradients", 2 * steps)]
  assert charged(folder) == [("class counts", 1), ("gradients", 4 * steps)]
  epsilons = [row["epsilon"] for row in arm.rows]
  assert len(epsilons) == 3
  assert epsilons == sorted(set(epsilons))
  assert epsilons[-1] == accounting.epsilon(ledgers(folder)[0])
  assert all(row["train_loss"] is None for row in arm.rows)  # not private
  assert "NOT PRIVATE" not in arm.privacy
  assert not any("NOT PRIVATE" in row for row in arm.rows)


def test_two_starts_from_one_checkpoint_have_fresh_noise(continued):
  """Noise that a checkpoint could repeat under other parameters would give the difference of two
  updates away.
  """
  (_, one), (_, other) = continued
  assert one.rows[0] == other.rows[0]  # of the checkpoint
  for a, b in zip(one.rows[1:], other.rows[1:], strict=True):
    assert a["update_norm"] != b["update_norm"]
  last = [
    ocp.StandardCheckpointer().restore((folder / "checkpoints" / "3" / "default").absolute())
    for folder, _ in continued
  ]
  params = [jax.tree.leaves(saved["state"]["params"]) for saved in last]
  assert all((np.asarray(a) != b).any() for a, b in zip(*params, strict=True))


@pytest.mark.parametrize("kind", ["fresh noise", slow("correlated noise")])
def test_no_secret_and_no_key_of_masks_is_in_a_run_folder(kind, stopped, tmp_path):
  folder, drawn = stopped
  if kind == "correlated noise":
    folder = tmp_path / "run"
    drawn = stop(settings.replace(FIXED, dp_seed=-1), folder)
  sums = 1 + 2  # class counts, and training of two rounds
  assert len(drawn.noise) == 3 * sums
  assert len(drawn.masks) >= 3 * sums
  everything = drawn.noise + drawn.masks
  assert len({key.tobytes() for key in everything}) >= 3 * 3 * sums
  assert (folder / "checkpoints").is_dir()
  assert found(everything, folder) == 0
  # The search finds a secret that a state holds, and one in a text.
  state = trainer_of(FRESH).rounds.init(
    *FRESH.model.initial(FRESH.model.config(FRESH.data, 3), jax.random.key(0))
  )
  best = checkpoints.Best(*state[:-1], np.float32(0), np.int32(0))
  tmp_path = tmp_path / "saved"
  tmp_path.mkdir()
  saved = checkpoints.Checkpoints(tmp_path)
  saved.save(1, state._replace(site_state={"secret": np.stack(everything[:3])}), best)
  saved.close()
  (tmp_path / "log.json").write_text(json.dumps([key.tolist() for key in everything[3:5]]))
  assert found(everything, tmp_path) == 5


def test_a_seed_repeats_a_run_which_says_so(tmp_path):
  config = settings.replace(FRESH, rounds=1)
  runs = [
    train(settings.replace(config, dp_seed=seed), tmp_path / str(i))
    for i, seed in enumerate((1, 1, 2))
  ]
  assert_equal(runs[0].models, runs[1].models)
  assert runs[0].rows[0]["update_norm"] != runs[2].rows[0]["update_norm"]
  for arm in runs:
    assert "NOT PRIVATE" in arm.privacy
    assert all("NOT PRIVATE" in row for row in arm.rows)


# ---- what is charged


def test_a_whole_run_is_charged_at_its_start_and_at_every_other(tmp_path):
  made = trainer_of(FIXED).privacy
  once = accounting.spend(accounting.Ledger("example", made.delta), *made.releases)
  made = dataclasses.replace(made, target_epsilon=accounting.epsilon(once))
  times = lambda charges: [sum(r.times for r in one.releases) for one in charges.ledgers]
  chain = lambda: Chain(tmp_path / "ledger")
  start = lambda: ledger.Ledgers(made, tmp_path / ledger.LEDGER, chain(), [None] * 3)
  charges = start()
  for sites_of_round in ([0, 2], [0, 1], [0, 1]):
    # The budget is that of one whole run, and no round stops it.
    assert charges.within_budget(sites_of_round)
    charges.spend_round(sites_of_round)
    assert times(start())[0] == 1  # it is in the file before anything is released
  assert times(charges) == [1, 1, 1]
  again = start()
  assert not again.within_budget([0])
  again.spend_round([0, 1])
  again.spend_round([0, 1])
  assert times(start()) == [2, 2, 1]


@pytest.mark.parametrize(("config", "gradients"), [(PRIVATE, 5), (FIXED, 1)])
def test_what_is_released_is_charged_before_and_on_disk(config, gradients, tmp_path):
  """So that whatever stops a run in the middle of a release, no ledger lacks it."""
  noted, made = [], trainer_of(config)

  def note_and_stop(*_):
    noted.append(charged(tmp_path))
    raise KeyboardInterrupt

  rounds = made.rounds._replace(step=note_and_stop)
  for stop in (
    {"count_classes": note_and_stop},
    {"count_classes": lambda *_: np.ones(3), "rounds": rounds},
  ):
    with pytest.raises(KeyboardInterrupt):
      train(config, tmp_path, trainer=made._replace(**stop))
  assert noted == [[("class counts", 1)], [("class counts", 2), ("gradients", gradients)]]


def test_a_patient_of_many_images_changes_class_counts_by_one():
  """What the ledger is charged for: noise of `dp_count_noise` against a change by 1."""
  config = settings.replace(PRIVATE, dp="patient", dp_count_noise=1e-3)
  made = make_trainer(config, alone(config))
  labels = np.array([0, 1, *[2] * 8, 0, 0], np.int32)  # ten images and padding

  def counts(units):
    padded = np.array([*units, -1, -1], np.int32)
    site = Site(np.int32(0), np.zeros((12, 1)), labels, np.int32(10), None, padded)
    stacked = jax.tree.map(lambda a: np.asarray(a)[None], site)
    return made.count_classes(federated.in_memory(stacked))

  np.testing.assert_array_equal(counts([0, 1, *[2] * 8]), [1, 1, 1])
  # a third of a patient each
  np.testing.assert_array_equal(counts([0, 0, 0, 1, 1, 2, 3, 4, 5, 6]), [0, 0, 6])
  np.testing.assert_array_equal(counts(range(10)), [1, 1, 8])


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_correlated_noise_and_is_charged_again(tmp_path):
  """By its seed it goes on bit for bit, so all that noise needs is in the checkpoint."""
  whole = train(FIXED, tmp_path / "whole")
  with pytest.raises(KeyboardInterrupt):
    train(FIXED, tmp_path / "parts", 2)
  parts = train(FIXED, tmp_path / "parts")
  norms = [[row["update_norm"] for row in arm.rows] for arm in (parts, whole)]
  assert norms[0] == norms[1]
  assert_equal(parts.models, whole.models)
  after = {name: ledgers(tmp_path / name) for name in ("whole", "parts")}
  assert charged(tmp_path / "whole") == [("class counts", 1), ("gradients", 1)]
  assert charged(tmp_path / "parts") == [("class counts", 1), ("gradients", 2)]
  assert {row["epsilon"] for row in whole.rows} == {accounting.epsilon(after["whole"][0])}
  assert parts.rows[-1]["epsilon"] == accounting.epsilon(after["parts"][0])
  for name in after:  # a finished run that is started again trains nothing, and costs nothing
    train(FIXED, tmp_path / name)
    assert ledgers(tmp_path / name) == after[name]
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
    {
      "num_sites": 4,
      "sites_per_round": 3,
      "dp_average": 0.9,
      "keep_optimizer": True,
      "dp_clipping": "automatic",
    },
  ],
)
def test_fixed_batches_go_with_other_settings(tmp_path, change):
  arm = train(settings.replace(FIXED, **change), tmp_path)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(arm.models))
  assert "DP-FTRL" in arm.privacy["mechanism"]
  assert "once" in arm.privacy["released: gradients"]


@pytest.mark.slow
def test_pooled_training_takes_batches_in_a_fixed_order(tmp_path):
  config = settings.replace(FIXED, rounds=2, num_sites=2)
  result = running.run(config, tmp_path, federated=False)
  assert "DP-FTRL" in result["privacy"]["mechanism"]
  assert "DP-FTRL" in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_training_stops_at_the_budget(tmp_path):
  made = trainer_of(FRESH).privacy
  target = (made.epsilon(1) + made.epsilon(2)) / 2
  arm = train(settings.replace(FRESH, target_epsilon=target), tmp_path)
  assert [row["round"] for row in arm.rows] == [1]
  assert arm.rows[-1]["epsilon"] == pytest.approx(made.epsilon(1), rel=1e-6)
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
  arm = train(settings.replace(PRIVATE, rounds=1, **change), tmp_path)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(arm.models))
  assert arm.rows[0]["epsilon"] > 0
  assert change.get("dp", "example") in arm.privacy["unit of privacy"]


# ---- sites that are lost, and a clip that moves


@pytest.mark.slow
def test_sites_are_lost_and_the_sum_still_has_its_noise(tmp_path):
  arm = train(settings.replace(LOSING, dp_noise="distributed"), tmp_path)
  survivors = [row["survivors"] for row in arm.rows]
  assert min(survivors) < 6
  assert all(n >= 5 for n in survivors)
  assert "distributed discrete gaussian" in arm.privacy["mechanism"]


def test_rounds_that_were_aborted_are_told(tmp_path):
  config = settings.replace(
    PRIVATE, num_sites=6, phantom_images=48, dropout_rate=0.3, secagg_threshold=5, rounds=6
  )
  arm = train(config, tmp_path)
  assert arm.facts["rounds trained"] == len(arm.rows) < 6
  told = arm.facts["rounds aborted, too few sites being left"]
  assert told == f"{6 - len(arm.rows)} of 6, charged all the same"
  steps = trainer_of(config).privacy.num_steps
  assert charged(tmp_path) == [("class counts", 1), ("gradients", 6 * steps)]


def test_rounds_say_how_the_clip_moves(tmp_path):
  arm = train(settings.replace(MOVING, rounds=2), tmp_path)
  clips = [row["l2_clip_norm"] for row in arm.rows]
  assert clips[0] == pytest.approx(0.7)
  assert clips[1] != clips[0]
  lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
  assert [json.loads(line)["l2_clip_norm"] for line in lines] == clips
  assert arm.privacy["clipping norm"].startswith("begins at 0.7 and follows the 0.5 quantile")
  assert "each site's bit" in arm.privacy["noise of the clip"]
  assert "norm that moves" in arm.privacy["mechanism"]
  (one,) = set(ledgers(tmp_path))
  assert [(r.what, r.times, r.noise_multiplier) for r in one.releases] == [
    ("updates, and whether they were within the clip", 2, 1.0)
  ]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_clip(tmp_path):
  whole = train(MOVING, tmp_path / "whole")
  with pytest.raises(KeyboardInterrupt):
    train(MOVING, tmp_path / "parts", 2)
  parts = train(MOVING, tmp_path / "parts")
  assert [row["l2_clip_norm"] for row in parts.rows] == [row["l2_clip_norm"] for row in whole.rows]
  assert_equal(parts.models, whole.models)


@pytest.mark.slow
def test_the_clip_moves_by_noise_of_all_sites_while_some_are_lost(tmp_path):
  config = settings.replace(
    LOSING,
    dp_clip_quantile=0.5,
    l2_clip_norm=0.7,
    dp_noise="distributed",
    algorithm="fedavgm",
    dp_average=0.9,
    sites_per_round=5,
  )
  arm = train(config, tmp_path)
  clips = [row["l2_clip_norm"] for row in arm.rows]
  assert len(set(clips)) == len(clips) > 1
  assert "their sum, from at least" in arm.privacy["noise of the clip"]
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(arm.models))
