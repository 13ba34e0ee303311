"""Private settings: what is refused, how much noise is chosen, and what the rings of sums hold."""

import dataclasses
import math

import numpy as np
import pytest
from private_runs import FIXED, MOVING, SITE, SIZES, TINY, make

from experiments import inputs, learning, private, training
from primia_jax import models, secagg, sites
from primia_jax.privacy import accounting, adaptive, distributed_cost
from primia_jax.privacy import ledger as books


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
  trusting = dataclasses.replace(made.noise, num_colluding=0)
  curve = distributed_cost.rdp(trusting, accounting.ORDERS)[1]
  release = accounting.renyi("updates", curve, made.noise.sampler_error)
  trusted = accounting.spend(accounting.ledger("site", 0.1, 10), release, 5)
  assert made.epsilon(5) >= accounting.epsilon(trusted)
  assert made.noise.local_stddev > trusting.local_stddev


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
  curves = [distributed_cost.rdp(n, accounting.ORDERS)[1] for n in (noise, of_bit)]
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
