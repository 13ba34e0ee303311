"""Differential privacy of the binaries: what is refused, how much noise is chosen, what is charged
and said.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import inputs, learning, private, running, settings, training
from primia_jax import federated, models, secagg, sites
from primia_jax.privacy import accounting, adaptive, distributed
from primia_jax.privacy import ledger as books
from primia_jax.types import Metrics

TINY = settings.Train(
  phantom_images=36,
  image_size=16,
  model="mlp",
  rounds=3,
  batch_size=4,
  augment="none",
  optimizer="sgd",
  learning_rate=0.1,
  dp="example",
  noise_multiplier=1.0,
  dp_seed=1,
)
SITE = dataclasses.replace(TINY, dp="site", weighting="uniform", class_weights=False, delta=0.1)
MOVING = dataclasses.replace(SITE, dp_clip_quantile=0.5, l2_clip_norm=0.7)  # the clip of updates
FIXED = dataclasses.replace(TINY, dp_noise="banded", batch_size=2)  # batches in a fixed order
SIZES = (18, 12, 6)


def loss_fn(params, model_state, batch, key):
  count = jnp.sum(batch.weights)
  return jnp.sum(params) * count, (model_state, Metrics(count, count, count))


def make(config, sizes=SIZES, num_sites=3, num_parameters=100, threshold=None):
  return private.plan(config, loss_fn, sizes, num_sites, num_parameters, threshold)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"dp": "image"}, "dp='image'"),
    ({"dp": "none"}, "belong to differential privacy"),
    ({"noise_multiplier": 0.0}, "without noise nothing is private"),
    ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
    ({"target_epsilon": math.inf}, "target_epsilon=inf"),
    ({"norm": "batch", "model": "cnn"}, "norm=batch mixes"),
    ({"mixup": 0.2}, "mixup blends"),
    ({"dp_count_noise": 0.0}, "exact class counts"),
    ({"dp_noise": "distributed"}, "dp_noise='distributed' with dp=example"),
    ({"sync_batches": 3}, "sync_batches=0"),
    (
      dataclasses.asdict(FIXED) | {"dp": "none", "noise_multiplier": 0.0},
      "dp_noise=banded belongs to differential",
    ),
    (dataclasses.asdict(SITE) | {"dp_noise": "tree"}, "dp_noise='tree' with dp=site"),
    ({"dp_bands": 3}, "dp_bands=3 belongs to dp_noise=banded"),
    (dataclasses.asdict(FIXED) | {"dp_bands": -1}, "dp_bands=-1"),
    (dataclasses.asdict(FIXED) | {"sync_batches": 3}, "sync_batches=0"),
    ({"dp": "site"}, "noclass_weights"),
    ({"dp": "site", "class_weights": False}, "weighting=uniform"),
    (dataclasses.asdict(SITE) | {"algorithm": "scaffold"}, "scaffold sends more"),
    (dataclasses.asdict(SITE) | {"dp_noise": "distributed"}, "secagg_threshold"),
    ({"dp_clip_quantile": 0.5}, "dp=example does not clip"),
    ({"dp_clip_rate": 0.1}, "dp_clip_rate=0.1 belongs to a clip that moves"),
    (dataclasses.asdict(SITE) | {"dp_clip_rate": 0.1}, "set dp=site and dp_clip_quantile"),
    (dataclasses.asdict(MOVING) | {"dp_clip_quantile": 1.0}, "dp_clip_quantile=1.0"),
    (dataclasses.asdict(MOVING) | {"dp_clip_quantile": -0.5}, "dp_clip_quantile=-0.5"),
    (dataclasses.asdict(MOVING) | {"dp_clip_rate": 0.0}, "dp_clip_rate=0.0"),
    (
      dataclasses.asdict(MOVING) | {"aggregation": "median"},
      "aggregation=median does not give the share",
    ),
    ({"dropout_rate": 0.1}, "secagg_threshold"),
    ({"dropout_rate": 1.0}, "dropout_rate=1.0"),
    ({"secagg": "mesh"}, "secagg='mesh'"),
    ({"dp_average": 0.9, "algorithm": "fedbn", "model": "cnn"}, "fedbn keeps some"),
  ],
)
def test_what_could_not_be_claimed_is_refused(change, message):
  with pytest.raises(ValueError, match=message):
    learning.check(dataclasses.replace(TINY, **change))


def test_a_site_alone_has_no_site_level_privacy():
  with pytest.raises(ValueError, match="sites of a federation"):
    learning.check(SITE, federated=False)


def test_nothing_is_claimed_of_sites_for_an_arm_of_one():
  """Local and pooled arms of a run with dp=site: no update leaves them, so that nothing is noised
  or charged.
  """
  images = inputs.site_images(SITE)
  model_config = learning.model_config(SITE, 3)
  train, validation = (inputs.merge(part, (0,)) for part in (images.train, images.validation))
  alone = training.Cohort("local: site 0", train, validation, np.arange(1))
  trainer = lambda config: training.make_trainer(
    config, models.build(model_config), model_config, [alone], sites.Placement("loop")
  )
  assert trainer(SITE).privacy is None
  assert trainer(TINY).privacy is not None


@pytest.mark.slow
def test_the_noise_that_is_chosen_meets_the_target_and_the_sampler_that_runs_is_charged():
  config = dataclasses.replace(TINY, noise_multiplier=0.0, target_epsilon=4.0)
  made = make(config)
  (release,) = made.releases
  assert made.sampling_rate == pytest.approx(4 / 18, rel=1e-8)
  assert release.sampling_rate == made.sampling_rate
  assert release.noise_multiplier == made.noise_multiplier
  assert release.times == made.num_steps
  assert made.num_steps == 5
  assert made.delta == 1 / 18
  assert [release.what for release in made.before] == ["class counts"]
  assert 3.95 < made.epsilon(config.rounds) <= 4.0
  with pytest.raises(ValueError, match="publish somebody whole"):
    make(dataclasses.replace(config, delta=0.1))


def test_noise_of_all_sites_hides_from_each_of_them():
  """A site knows the share that it has added itself, which so hides nothing from it."""
  config = dataclasses.replace(
    SITE, num_sites=10, noise_multiplier=1.0, dp_noise="distributed", secagg_threshold=7
  )
  made = make(config, (5,) * 10, 10, 1000, 7)
  assert made.noise.num_honest == 6
  curve = distributed.rdp(dataclasses.replace(made.noise, num_colluding=0), accounting.ORDERS)[1]
  trusting = accounting.renyi("updates", curve, made.noise.sampler_error)
  trusted = accounting.spend(accounting.ledger("site", 0.1, 10), trusting, 5)
  assert made.epsilon(5) >= accounting.epsilon(trusted)
  assert made.noise.local_stddev > dataclasses.replace(made.noise, num_colluding=0).local_stddev


@pytest.mark.slow
def test_noise_of_all_sites_is_calibrated_to_the_fewest():
  config = dataclasses.replace(
    SITE,
    num_sites=10,
    noise_multiplier=0.0,
    target_epsilon=5.0,
    dp_noise="distributed",
    secagg_threshold=7,
  )
  made = make(config, (5,) * 10, 10, 1000, 7)
  assert made.noise.min_survivors == 7
  assert 4.95 < made.epsilon(config.rounds) <= 5.0
  alone = make(dataclasses.replace(config, dp_noise="site"), (5,) * 10, 10, 1000)
  assert made.noise.noise_multiplier == pytest.approx(alone.noise_multiplier, rel=0.2)


@pytest.mark.parametrize("num_sites", [10, 100])
def test_updates_and_what_moves_their_clip_are_charged_together(num_sites):
  """By sites alone they are one Gaussian mechanism, and together the divergences of both sums add
  up.
  """
  config = dataclasses.replace(MOVING, num_sites=num_sites, delta=0.01, noise_multiplier=2.0)
  sizes, least = (5,) * num_sites, num_sites // 2 + 1
  alone = make(config, sizes, num_sites, 1000)
  (released,) = alone.releases
  assert released == accounting.gaussian(released.what, 2.0)
  assert alone.clip == adaptive.Clip(0.7, 0.5, 0.2, 2.0)
  together = make(
    dataclasses.replace(config, dp_noise="distributed"), sizes, num_sites, 1000, least
  )
  noise, of_bit = together.noise, adaptive.bit_noise(together.noise, together.clip)
  (release,) = together.releases
  assert (noise.l2_clip_norm, together.clip.l2_clip_norm, of_bit.min_survivors) == (1.0, 0.7, least)
  assert of_bit.noise_multiplier == 2 * together.clip.count_stddev == max(4.0, num_sites / 10)
  curves = [distributed.rdp(n, accounting.ORDERS)[1] for n in (noise, of_bit)]
  assert min(map(min, curves)) > 0
  np.testing.assert_allclose(release.curve, np.add(*curves), rtol=1e-12)
  assert release.extra_delta == pytest.approx(noise.sampler_error + of_bit.sampler_error, rel=1e-9)
  # that is what noise of multiplier 2 costs without bits, but for the little that rounding adds
  fixed = make(
    dataclasses.replace(config, dp_noise="distributed", dp_clip_quantile=0.0),
    sizes,
    num_sites,
    1000,
    least,
  )
  np.testing.assert_allclose(release.curve, fixed.releases[0].curve, rtol=1e-3)
  assert noise.noise_multiplier > fixed.noise.noise_multiplier


@pytest.mark.slow
def test_a_clip_that_moves_keeps_within_the_target():
  config = dataclasses.replace(
    MOVING,
    num_sites=10,
    noise_multiplier=0.0,
    target_epsilon=5.0,
    dp_noise="distributed",
    secagg_threshold=7,
  )
  for change in ({}, {"dp_noise": "site"}):
    made = make(dataclasses.replace(config, **change), (5,) * 10, 10, 1000, 7)
    assert 4.95 < made.epsilon(config.rounds) <= 5.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["banded", "tree"])
def test_noise_of_a_whole_run_meets_the_target_once(kind):
  config = dataclasses.replace(FIXED, dp_noise=kind, noise_multiplier=0.0, target_epsilon=4.0)
  made = make(config)
  noises = made.strategy
  assert (noises.num_steps, noises.min_separation, noises.max_participations) == (27, 3, 9)
  assert (made.num_steps, made.delta, made.sampling_rate) == (9, 1 / 18, 1)
  assert made.releases == (accounting.gaussian("gradients", noises.noise_multiplier),)
  assert 3.95 < made.epsilon(config.rounds) == made.epsilon(1) <= 4.0
  assert make(dataclasses.replace(config, noise_multiplier=10.0))
  with pytest.raises(
    ValueError, match=r"noise_multiplier=0.3 costs epsilon .* more than target_epsilon=4"
  ):
    make(dataclasses.replace(config, noise_multiplier=0.3))


def test_batches_in_a_fixed_order_are_checked_against_the_smallest_site():
  assert len(make(FIXED).strategy.coefficients) == 3
  assert (
    len(make(dataclasses.replace(FIXED, dp_bands=2), SIZES, 3, 100, None).strategy.coefficients)
    == 2
  )
  for change, message in (
    ({"batch_size": 7}, "6 units, less than batch_size=7"),
    ({"dp_bands": 4}, "use bands=3"),
  ):
    with pytest.raises(ValueError, match=message):
      make(dataclasses.replace(FIXED, **change))


def test_a_whole_run_is_charged_at_its_start_and_at_every_other(tmp_path):
  config = dataclasses.replace(FIXED, class_weights=False)
  made = make(config)
  made = dataclasses.replace(made, target_epsilon=made.epsilon(1))
  times = lambda book: [sum(r.times for r in ledger.releases) for ledger in book.ledgers]
  start = lambda: books.Book(made, 3, tmp_path / "ledger.json")
  book = start()
  for sites_of_round in ([0, 2], [0, 1], [0, 1]):
    assert book.within_budget(
      sites_of_round
    )  # the budget is that of one whole run, and no round stops it
    book.spend_round(sites_of_round)
    assert times(start())[0] == 1  # it is in the file before anything is released
  assert times(book) == [1, 1, 1]
  again = start()
  assert not again.within_budget([0])
  again.spend_round([0, 1])
  again.spend_round([0, 1])
  assert times(start()) == [2, 2, 1]


def test_every_start_draws_other_secrets_unless_a_seed_is_given():
  ids, entropy = np.arange(3), dataclasses.replace(TINY, dp_seed=-1)
  assert len({tuple(s) for _ in range(2) for s in private.secrets(entropy, ids).tolist()}) == 6
  np.testing.assert_array_equal(private.secrets(TINY, ids), private.secrets(TINY, ids))
  assert len({tuple(s) for s in private.secrets(TINY, ids).tolist()}) == 3


def train(config, folder, stop_after=None):
  images = inputs.site_images(config)
  model_config = learning.model_config(config, 3)
  cohort = training.Cohort(
    "federated", images.train, images.validation, np.arange(config.num_sites)
  )
  trainer = training.make_trainer(
    config, models.build(model_config), model_config, [cohort], sites.Placement("scan")
  )

  def log(row):
    if row["round"] == stop_after:
      raise KeyboardInterrupt

  folder.mkdir(exist_ok=True)
  return training.train(config, cohort, trainer, model_config, folder, log)


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


def test_a_small_ring_is_for_updates_and_their_own_grid():
  """Counts of thousands of images would not fit; updates without noise would be too coarse."""
  config = dataclasses.replace(MOVING, dp_noise="distributed", secagg_threshold=-1, secagg_bits=16)
  learning.check(config)
  assert learning.secure_sum(config, 3).fixed.num_bits == 16
  assert learning.secure_sum(config, 3, 1e6).fixed.num_bits == 32
  with pytest.raises(ValueError, match="too coarse for updates"):
    learning.check(dataclasses.replace(config, dp_noise="site"))


def test_dropouts_are_drawn_at_their_rate_and_once_each():
  config = dataclasses.replace(TINY, dropout_rate=0.3)
  drawn = [learning.dropouts(config, r, 100) for r in range(20)]
  rate = np.mean([d.before | d.during for d in drawn])
  assert 0.25 < rate < 0.35
  assert not any((d.before & d.during).any() for d in drawn)
  assert learning.dropouts(TINY, 0, 100) is None


def test_bells_graph_is_sparse_and_its_threshold_holds():
  config = dataclasses.replace(TINY, num_sites=200, secagg="bell", dropout_rate=0.05)
  secure = learning.secure_sum(config, 200)
  assert secure.num_peers < 60
  assert secure.threshold > secure.num_peers / 2
  assert learning.min_survivors(secure) > 100
  dense = learning.secure_sum(
    dataclasses.replace(config, secagg="pairwise", secagg_threshold=-1), 200
  )
  assert (dense.num_peers, dense.threshold) == (199, 134)
  assert isinstance(secure, secagg.SecureSum)
