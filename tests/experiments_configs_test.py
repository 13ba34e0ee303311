"""What a run's settings build, and what is refused before any image is read."""

import dataclasses
import math
import pathlib

import numpy as np
import pytest
from absl import flags
from experiments_runs import FIXED, MOVING, PRIVATE, SITE, TINY

from experiments import inputs, settings
from experiments.configs import Train, rehearse
from experiments.configs.aggregation import min_survivors
from experiments.configs.run import build_site_level
from primia_jax import federated, local, secagg
from primia_jax.privacy import accounting, adaptive, distributed_cost, noise
from primia_jax.secagg import graph
from primia_jax.summation import Purpose

DISTRIBUTED = settings.replace(SITE, num_sites=10, dp_noise="distributed", secagg_threshold=7)
SAMPLER = noise.error_of_release()
SIZES = (18, 12, 6)


@pytest.fixture
def no_images(monkeypatch):
  def read(*args, **options):
    raise AssertionError("images were read")

  for name in ("site_images", "images_to_test", "unlabelled_images", "listed", "_phantom"):
    monkeypatch.setattr(inputs, name, read)


def test_presets_parse_and_are_sound(no_images):
  presets = sorted((pathlib.Path(inputs.__file__).parent / "flags").glob("*.flags"))
  assert presets
  for preset in presets:
    values = flags.FlagValues()
    settings.define_flags(Train, values)
    flags.DEFINE_list("baselines", [], "", flag_values=values)
    values(["program", f"--flagfile={preset}"])
    config = settings.from_flags(Train, values)
    for is_federated in (config.hospitals.num_sites > 1, False):  # train_pooled takes all
      rehearse(config, is_federated=is_federated)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"algorithm": "fedsgd"}, "algorithm='fedsgd'"),
    ({"rounds": 0}, "rounds=0"),
    ({"sync_epochs": 2, "sync_batches": 5}, "sync_epochs=2 and sync_batches=5.*give one of them"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0"),
    ({"sites_per_round": 4}, "sites_per_round=4 of num_sites=3"),
    ({"algorithm": "scaffold", "optimizer": "adam"}, "scaffold is sound with optimizer=sgd"),
    ({"algorithm": "fednova", "optimizer": "adam"}, "fednova must know .* use optimizer=sgd"),
    ({"augment": "rotate=3"}, "unknown"),
    ({"augment": "noise=high"}, "is not NAME=NUMBER"),
    ({"mixup": -1.0}, "mixup=-1.0"),
    ({"aggregation": "average"}, "aggregation='average'"),
    ({"aggregation": "trimmed_mean=0.7"}, "fraction=0.7"),
    ({"secagg_bits": 8}, "leave 0 fraction bits"),
    ({"secagg_bits": 48}, "JAX_ENABLE_X64"),
    ({"secagg_peers": 5}, "secagg_peers=5"),
    ({"secagg_colluding": -2}, "secagg_colluding=-2"),
    ({"num_sites": 2}, "secagg_colluding=1 of 2 sites"),
    ({"num_sites": 2, "aggregation": "clear"}, "secagg_colluding=1 of 2 sites"),
    ({"secagg_colluding": 2}, "secagg_colluding=2 of 3 sites"),
    ({"secagg_threshold": 2}, "secagg_threshold=2, could open another"),
    ({"num_sites": 10, "secagg_threshold": -1, "secagg_colluding": 7}, "secagg_colluding=7"),
    (
      {"placement": "flower", "num_sites": 10, "secagg_colluding": 4},
      "secagg_colluding=4 of 10 sites, each with 9 peers and secagg_threshold=7",
    ),
    ({"aggregation": "median"}, "uniform weighting"),
    (
      {"aggregation": "median", "weighting": "uniform", "algorithm": "fednova", "optimizer": "sgd"},
      "fednova",
    ),
    ({"aggregation": "krum=1", "weighting": "uniform"}, "needs more than 4 sites"),
    ({"aggregation": "trimmed_mean=0.4", "weighting": "uniform"}, "leaves none"),
    ({"aggregation": "clear", "norm": "batch"}, "BatchNorm statistics"),
    ({"model": "resnet50"}, "resnet50"),
    ({"model": "vgg16", "image_size": 16}, "vgg16"),
    ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
    ({"placement": "chunk"}, "chunk=C"),
    ({"partition": "random"}, "partition='random'"),
    ({"site_fractions": "0.5,x"}, "site_fractions="),
    ({"pretrained": "nowhere.pth", "model": "resnet18"}, "nowhere.pth"),
    ({"site_data": "npz:a,npz:b"}, "names 2 sources for num_sites=3"),
    ({"site_data": "npz:a,npz:b,phantom"}, "use data=phantom"),
    ({"site_data": "npz:a,npz:b,npz:c", "partition": "iid"}, "site_data deals no images"),
    ({"site_data": "npz:a,npz:b,npz:c", "data": "npz:d"}, "give one of them"),
    ({"placement": "flower", "secagg_bits": 8}, "leave 0 fraction bits"),
    ({"placement": "flower", "secagg_peers": 5}, "secagg_peers=5"),
    ({"placement": "flower", "aggregation": "clear"}, "nothing but masked sums"),
    ({"placement": "flower", "sites_per_round": 2}, "secagg_colluding=1 of 2 sites"),
    (
      {
        "placement": "flower",
        "num_sites": 9,
        "secagg_peers": 2,
        "secagg_threshold": 2,
        "secagg_colluding": 0,
      },
      "secagg_colluding=0 of 9 sites, each with 2 peers",
    ),
    ({"placement": "flower", "dropout_rate": 0.1}, "end a process"),
    ({"placement": "flower", "sites_in_memory": 1}, "sites_in_memory=1"),
    ({"data": "npz:x", "patient_pattern": "(p)"}, "no file names; use patient_column"),
    ({"data": "folder:x", "patient_pattern": "p"}, "has 0 groups"),
    ({"data": "folder:x", "patient_pattern": "(p)", "patient_column": "c"}, "use one of them"),
    ({"patient_column": "site"}, "the phantom has one image a patient"),
    ({"data": "npz:x", "label_names": "cat"}, "label_names='cat': give at least two"),
    ({"data": "npz:x", "label_names": "cat,dog, cat"}, "each with a name of its own"),
    ({"data": "npz:x", "label_names": "cat,,dog"}, "each with a name of its own"),
    ({"label_names": "cat,dog"}, "the phantom has its own classes"),
    ({"channels": 3}, "the phantom is grey"),
  ],
)
def test_wrong_settings_are_refused_before_images_are_read(change, message, no_images):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    rehearse(settings.replace(Train(), **change))


@pytest.mark.parametrize(
  ("base", "change", "message"),
  [
    (PRIVATE, {"dp": "image"}, "dp='image'"),
    (PRIVATE, {"dp": "none"}, "belong to differential privacy"),
    (PRIVATE, {"noise_multiplier": 0.0}, "without noise nothing is private"),
    (PRIVATE, {"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
    (PRIVATE, {"target_epsilon": math.inf}, "target_epsilon=inf"),
    (PRIVATE, {"norm": "batch", "model": "cnn"}, "norm=batch mixes"),
    (PRIVATE, {"mixup": 0.2}, "mixup blends"),
    (PRIVATE, {"dp_count_noise": 0.0}, "exact class counts"),
    (PRIVATE, {"dp_noise": "distributed"}, "dp=example with dp_noise='distributed'"),
    (PRIVATE, {"sync_epochs": 0, "sync_batches": 3}, "sync_batches=0"),
    (FIXED, {"dp": "none", "noise_multiplier": 0.0}, "dp_noise=banded belongs to differential"),
    (SITE, {"dp_noise": "tree"}, "dp=site with dp_noise='tree'"),
    (PRIVATE, {"dp_bands": 3}, "dp_bands=3 belongs to dp_noise=banded"),
    (FIXED, {"dp_bands": -1}, "dp_bands=-1"),
    (FIXED, {"sync_epochs": 0, "sync_batches": 3}, "sync_batches=0"),
    (PRIVATE, {"dp": "site"}, "noclass_weights"),
    (PRIVATE, {"dp": "site", "class_weights": False}, "weighting=uniform"),
    (SITE, {"algorithm": "scaffold"}, "scaffold sends more"),
    (SITE, {"dp_noise": "distributed"}, "secagg_threshold"),
    (PRIVATE, {"dp_clip_quantile": 0.5}, "dp=example does not clip"),
    (PRIVATE, {"dp_clip_rate": 0.1}, "dp_clip_rate=0.1 belongs to a clip that moves"),
    (SITE, {"dp_clip_rate": 0.1}, "set dp=site and dp_clip_quantile"),
    (MOVING, {"dp_clip_quantile": 1.0}, "dp_clip_quantile=1.0"),
    (MOVING, {"dp_clip_quantile": -0.5}, "dp_clip_quantile=-0.5"),
    (MOVING, {"dp_clip_rate": 0.0}, "dp_clip_rate=0.0"),
    (MOVING, {"aggregation": "median"}, "aggregation=median does not give the share"),
    (PRIVATE, {"dropout_rate": 0.1}, "secagg_threshold"),
    (PRIVATE, {"dropout_rate": 1.0}, "dropout_rate=1.0"),
    (PRIVATE, {"secagg": "mesh"}, "secagg='mesh'"),
    (PRIVATE, {"dp_average": 0.9, "algorithm": "fedbn", "model": "cnn"}, "fedbn keeps some"),
    (SITE, {"delta": 0.5}, "delta=0.5"),
    (SITE, {"delta": 0.5, "placement": "flower", "dp_seed": -1}, "delta=0.5"),
    (SITE, {"placement": "flower"}, "dp_seed=1 with placement=flower"),
    (PRIVATE, {"placement": "flower", "dp": "patient", "dp_seed": -1}, "one image a patient"),
    (PRIVATE, {"patience": 3}, "patience=3 needs scores of validation images"),
    (PRIVATE, {"validation": "noised"}, "validation='noised'"),
  ],
)
def test_what_could_not_be_claimed_is_refused_before_images_are_read(
  base, change, message, no_images
):
  with pytest.raises(ValueError, match=message):
    rehearse(settings.replace(base, **change))


def test_a_site_alone_has_no_site_level_privacy():
  with pytest.raises(ValueError, match="sites of a federation"):
    rehearse(SITE, is_federated=False)


def test_what_is_right_is_rehearsed_without_images(no_images):
  for config in (TINY, PRIVATE, SITE, MOVING, FIXED, DISTRIBUTED):
    rehearse(config)
    rehearse(settings.replace(config, placement="flower", dp_seed=-1))
  rehearse(settings.replace(PRIVATE, patience=3, validation="exact"))


# ---- sums


def test_all_peers_of_a_round_are_an_odd_number_of_all_sites():
  """4 sites of 6 in a round, each with all 3 others as peers; a sum over all 6 takes all 5."""
  a = settings.replace(TINY, num_sites=6, sites_per_round=4, secagg_peers=3).aggregation
  assert a.secure_sum(4, 4, False).num_peers == 3
  assert a.secure_sum(6, 4, False, 1e3).num_peers == 5


def test_a_small_ring_is_for_updates_and_their_own_grid():
  """Counts of thousands of images would not fit; updates without noise would be too coarse."""
  config = settings.replace(MOVING, dp_noise="distributed", secagg_threshold=-1, secagg_bits=16)
  rehearse(config)
  a = config.aggregation
  assert a.secure_sum(3, 3, False).fixed.num_bits == 16
  assert a.secure_sum(3, 3, False, 1e6).fixed.num_bits == 32
  with pytest.raises(ValueError, match=r"leave .* fraction bits, and updates need 10"):
    rehearse(settings.replace(config, dp_noise="site"))


def test_dropouts_are_drawn_at_their_rate_and_once_each(monkeypatch):
  config, drawn = settings.replace(TINY, dropout_rate=0.3, secagg_threshold=-1), []
  monkeypatch.setattr(
    "primia_jax.summation.losing", lambda summation, dropouts: drawn.append(dropouts) or summation
  )
  config.aggregation.losing(None, config.seed)
  (of_sum,) = drawn
  ids = np.arange(100)
  lost = [of_sum(r, Purpose.TRAINING, ids) for r in range(20)]
  assert 0.25 < np.mean([d.before | d.during for d in lost]) < 0.35
  assert 0.3 < np.mean([d.before.sum() / (d.before | d.during).sum() for d in lost]) < 0.7
  assert not any((d.before & d.during).any() for d in lost)
  assert len({d.before.tobytes() for d in lost}) == 20
  again = of_sum(3, Purpose.TRAINING, ids)
  np.testing.assert_array_equal(again.before, lost[3].before)  # of an interrupted run, alike
  TINY.aggregation.losing(None, 0)
  assert len(drawn) == 1


def test_bells_graph_is_sparse_and_its_threshold_holds():
  config = settings.replace(TINY, num_sites=200, secagg="bell", dropout_rate=0.05)
  secure = config.aggregation.secure_sum(200, 200, False)
  assert secure.num_peers < 60
  assert secure.threshold > secure.num_peers / 2
  assert min_survivors(secure) > 100
  dense = settings.replace(config, secagg="pairwise", secagg_threshold=-1).aggregation
  dense = dense.secure_sum(200, 200, False)
  assert (dense.num_peers, dense.threshold) == (199, 134)
  assert isinstance(secure, secagg.SecureSum)


@pytest.mark.parametrize("secagg", ["pairwise", "bell"])
@pytest.mark.parametrize("num_sites", [4, 5, 10, 50])
def test_sums_of_processes_do_not_trust_the_server_and_survive_a_loss(num_sites, secagg):
  a = settings.replace(TINY, num_sites=num_sites, secagg=secagg).aggregation
  secure = a.secure_sum(num_sites, num_sites, True)
  holders = secure.num_peers + 1
  assert graph.smallest_threshold(holders, malicious_server=True) <= secure.threshold < holders
  if secure.num_peers == num_sites - 1:
    least = num_sites // 2 + 1
    trusting = settings.replace(TINY, secagg=secagg, secagg_threshold=least).aggregation
    assert trusting.secure_sum(num_sites, num_sites, True).threshold == least


# ---- plans of privacy


def of_steps(config, sizes=SIZES):
  loss = local.classification_loss(lambda *args, **options: None, config.augment.build(), 3)
  return config.privacy.build_steps(config.training, loss, sizes)


def of_sites(config, least=None):
  n = config.hospitals.num_sites
  return config.privacy.build_sites(config.training, n, n, 1000, 32, least, num_colluding=1)


@pytest.mark.slow
def test_the_noise_that_is_chosen_meets_the_target_and_the_sampler_that_runs_is_charged():
  config = settings.replace(PRIVATE, noise_multiplier=0.0, target_epsilon=4.0)
  made = of_steps(config)
  (release,) = made.releases
  assert made.sampling_rate == pytest.approx(4 / 18, rel=1e-8)
  assert (release.sampling_rate, release.noise_multiplier) == (
    made.sampling_rate,
    made.noise_multiplier,
  )
  assert made.num_steps == release.times == 5
  assert made.delta == 0.1 / 18
  assert made.before == (accounting.gaussian("class counts", 20.0, 1.0, SAMPLER),)
  assert 3.95 < made.epsilon(config.training.rounds) <= 4.0
  with pytest.raises(ValueError, match="publish one unit completely"):
    of_steps(settings.replace(config, delta=0.1))


def test_noise_of_all_sites_hides_from_each_of_them():
  """A site knows the share that it has added itself, which so hides nothing from it."""
  made = of_sites(DISTRIBUTED, 7)
  assert made.noise.num_honest == 6
  alone = dataclasses.replace(made.noise, num_colluding=0)
  curve = distributed_cost.rdp(alone, accounting.ORDERS)[1]
  trusting = accounting.renyi("updates", curve, made.noise.sampler_error)
  start = accounting.ledger("site", 0.1, 10)
  of = lambda release: accounting.epsilon(accounting.spend(start, release, 5))
  assert of(made.releases[0]) >= of(trusting)
  assert made.noise.local_stddev > alone.local_stddev


@pytest.mark.parametrize(("colluding", "honest"), [(-1, 6), (0, 7), (3, 4)])
def test_distributed_noise_does_not_count_on_sites_that_may_collude(colluding, honest):
  config = settings.replace(DISTRIBUTED, secagg_colluding=colluding)
  noise = build_site_level(config, 1000).noise
  assert (noise.num_honest, noise.num_colluding) == (honest, 7 - honest)


@pytest.mark.slow
def test_noise_of_all_sites_is_calibrated_to_the_fewest():
  config = settings.replace(DISTRIBUTED, noise_multiplier=0.0, target_epsilon=5.0)
  made = of_sites(config, 7)
  assert made.noise.min_survivors == 7
  assert 4.95 < made.epsilon(config.training.rounds) <= 5.0
  alone = of_sites(settings.replace(config, dp_noise="site"))
  assert made.noise_multiplier == pytest.approx(alone.noise_multiplier, rel=0.2)


@pytest.mark.parametrize("num_sites", [10, 100])
def test_updates_and_what_moves_their_clip_are_charged_together(num_sites):
  """By sites alone they are one Gaussian mechanism, and together the divergences of both sums add
  up.
  """
  config = settings.replace(MOVING, num_sites=num_sites, delta=0.01, noise_multiplier=2.0)
  least = num_sites // 2 + 1
  alone = of_sites(config)
  assert alone.releases == (accounting.gaussian(alone.releases[0].what, 2.0, 1.0, 2 * SAMPLER),)
  assert alone.clip == adaptive.Clip(0.7, 0.5, 0.2, 2.0)
  config = settings.replace(config, dp_noise="distributed")
  together = of_sites(config, least)
  noise, of_bit = together.noise, adaptive.bit_noise(together.noise, together.clip)
  assert (noise.l2_clip_norm, together.clip.l2_clip_norm, of_bit.min_survivors) == (1.0, 0.7, least)
  assert of_bit.noise_multiplier == 2 * together.clip.count_stddev == max(4.0, num_sites / 10)
  curves = [distributed_cost.rdp(n, accounting.ORDERS)[1] for n in (noise, of_bit)]
  assert min(map(min, curves)) > 0
  (release,) = together.releases
  np.testing.assert_allclose(release.curve, np.add(*curves), rtol=1e-12)
  errors = noise.sampler_error + of_bit.sampler_error
  assert release.extra_delta == pytest.approx(errors, rel=1e-9)
  # That is what noise of multiplier 2 costs without bits, but for the little that rounding adds.
  fixed = of_sites(settings.replace(config, dp_clip_quantile=0.0), least)
  np.testing.assert_allclose(release.curve, fixed.releases[0].curve, rtol=1e-3)
  assert noise.noise_multiplier > fixed.noise.noise_multiplier


@pytest.mark.slow
def test_a_clip_that_moves_keeps_within_the_target():
  config = settings.replace(MOVING, num_sites=10, noise_multiplier=0.0, target_epsilon=5.0)
  together = settings.replace(config, dp_noise="distributed", secagg_threshold=7)
  for made in (of_sites(together, 7), of_sites(config)):
    assert 4.95 < made.epsilon(config.training.rounds) <= 5.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["banded", "tree"])
def test_noise_of_a_whole_run_meets_the_target_once(kind):
  config = settings.replace(FIXED, dp_noise=kind, noise_multiplier=0.0, target_epsilon=4.0)
  made = of_steps(config)
  noises = made.strategy
  assert (noises.num_steps, noises.min_separation, noises.max_participations) == (27, 3, 9)
  assert (made.num_steps, made.delta, made.sampling_rate) == (9, 0.1 / 18, 1)
  assert made.whole_run
  sigma, of_all_steps = noises.noise_multiplier, 54 * SAMPLER
  assert made.releases == (accounting.gaussian("gradients", sigma, 1.0, of_all_steps),)
  assert 3.95 < made.epsilon(1) == made.epsilon(3) <= 4.0
  assert of_steps(settings.replace(config, noise_multiplier=10.0))
  match = r"noise_multiplier=0.3 costs epsilon .* more than target_epsilon=4"
  with pytest.raises(ValueError, match=match):
    of_steps(settings.replace(config, noise_multiplier=0.3))


def test_batches_in_a_fixed_order_are_checked_against_the_smallest_site():
  assert len(of_steps(FIXED).strategy.coefficients) == 3
  assert len(of_steps(settings.replace(FIXED, dp_bands=2)).strategy.coefficients) == 2
  for change, message in (
    ({"batch_size": 7}, "6 units, less than batch_size=7"),
    ({"dp_bands": 4}, "bands=4 .* use bands=3"),
  ):
    with pytest.raises(ValueError, match=message):
      of_steps(settings.replace(FIXED, **change))


def test_every_sum_draws_other_secrets_unless_a_seed_is_given():
  ids, entropy = np.arange(3), settings.replace(PRIVATE, dp_seed=-1).privacy.secrets()
  rows = lambda secrets, *of_sum: [tuple(row) for row in secrets(*of_sum, ids).tolist()]
  assert len({s for _ in range(2) for s in rows(entropy, 1, Purpose.TRAINING)}) == 6
  assert entropy is federated.fresh_secrets
  sums = [(r, purpose) for r in range(3) for purpose in Purpose]
  seen = {s for of_sum in sums for s in rows(PRIVATE.privacy.secrets(), *of_sum)}
  assert len(seen) == 3 * len(sums)  # of every site and sum its own, and the same at every start
  assert seen == {s for of_sum in sums for s in rows(PRIVATE.privacy.secrets(), *of_sum)}
  other = settings.replace(PRIVATE, dp_seed=2).privacy.secrets()
  assert not seen & {s for of_sum in sums for s in rows(other, *of_sum)}
