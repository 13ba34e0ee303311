"""Site-level differential privacy in federated rounds: bounds, noise of the promised scale, and nothing else sent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from primia_jax import algorithms, local, prng, secagg, site_privacy, sites
from primia_jax import federated as fed
from primia_jax.privacy.distributed import DistributedNoise, error_stddev
from primia_jax.types import Metrics

K, D, CLIP = 5, 600, 0.5
DEALER, KEY, IDS = prng.derive(jnp.arange(8, dtype=jnp.uint32), 3), jax.random.key(0), np.arange(K, dtype=np.int32)
START = {"w": jnp.zeros(D)}
# Site i's update is i times a direction of its own: norms 0, 1, 2, 3, 4 before clipping.
UPDATES = np.random.default_rng(0).normal(size=(K, D))
UPDATES *= np.arange(K)[:, None] / np.linalg.norm(UPDATES, axis=1, keepdims=True)


def grad_fn(params, model_state, batch, key):
  update = batch.images[0, :, 0, 0]
  return {"w": -update}, (model_state, Metrics(jnp.float32(7), jnp.float32(1), jnp.float32(1)))


def load(ids):
  images = np.zeros((len(ids), 2, D, 1, 1), np.float32)
  images[...] = UPDATES[ids][:, None, :, None, None]
  secret = np.stack([np.asarray(prng.derive(jnp.arange(8, dtype=jnp.uint32), 5, int(i))) for i in ids])
  return fed.Site(ids, images, np.zeros((len(ids), 2), np.int32), np.ones(len(ids), np.int32), secret)


def algorithm(**kwargs):
  work = local.Work(batch_size=2, max_examples=2, epochs=1)
  recipe = local.Recipe(grad_fn, optax.sgd, lambda t: 1.0, work)
  return algorithms.fedavg(recipe, **{"weighting": "uniform", **kwargs})


def noised(multiplier, num_bits=24, min_survivors=3):
  config = DistributedNoise(D, K, min_survivors, CLIP, multiplier, num_bits=num_bits)
  secure = secagg.secure_sum(K, 1.0, num_bits=num_bits, threshold=min_survivors)
  return config, site_privacy.noised(config, secure, START, {})


def round_of(algorithm, aggregator, dropouts=None, round_index=0, placement="scan"):
  f = fed.federated(algorithm, aggregator, sites.parse_placement(placement))
  state = f.init(START, {}, K)._replace(round=jnp.int32(round_index))
  state, info = f.step(KEY, state, IDS, fed.Loader(load), DEALER, dropouts=dropouts)
  return np.asarray(state.params["w"], np.float64), info


def bounded_mean(ids):
  norms = np.linalg.norm(UPDATES, axis=1, keepdims=True)
  return (UPDATES * np.minimum(1, CLIP / np.maximum(norms, 1e-9)))[ids].mean(0)


def test_updates_are_bounded_and_averaged():
  mean, info = round_of(site_privacy.bounded(algorithm(), CLIP), fed.securely(secagg.secure_sum(K)))
  assert info.loss == 0  # losses of training are not private, and never leave a site
  np.testing.assert_allclose(mean, bounded_mean(range(K)), atol=1e-6)
  unbounded, info = round_of(algorithm(), fed.securely(secagg.secure_sum(K)))
  assert info.loss == 7
  assert np.linalg.norm(unbounded) > 2 * np.linalg.norm(mean)


def accepts(errors, stddev):
  """Whether errors are normal with that deviation, and not with 2/3 or 3/2 of it."""
  chance = lambda scale: stats.chi2.cdf(np.sum((errors / (scale * stddev)) ** 2), errors.size)
  return 1e-4 < chance(1.0) < 1 - 1e-4 and chance(2 / 3) > 1 - 1e-6 and chance(3 / 2) < 1e-6


@pytest.mark.slow
def test_local_noise_has_the_promised_scale():
  private = site_privacy.bounded(algorithm(), CLIP, 2.0)
  mean, _ = round_of(private, fed.in_the_clear())
  again, _ = round_of(private, fed.in_the_clear(), round_index=1)
  assert accepts(mean - bounded_mean(range(K)), 2.0 * CLIP / np.sqrt(K))
  assert np.abs(mean - again).min() > 0


@pytest.mark.parametrize(
  "lost", [pytest.param((), marks=pytest.mark.slow), pytest.param((4,), marks=pytest.mark.slow), (0, 3)]
)
def test_all_sites_together_noise_the_sum_as_promised(lost):
  config, aggregator = noised(1.5)
  mask = np.isin(IDS, lost)
  dropouts = secagg.Dropouts(mask & (IDS < 2), mask & (IDS >= 2))
  mean, info = round_of(site_privacy.bounded(algorithm(), CLIP), aggregator, dropouts)
  left = np.flatnonzero(~mask)
  assert info.survivors == len(left)
  stddev = error_stddev(config, len(left)) / len(left)
  assert accepts(mean - bounded_mean(left), stddev)
  # a sum of the fewest sites has the noise of a trusted server
  assert error_stddev(config, 3) == pytest.approx(1.5 * CLIP, rel=0.01)


@pytest.mark.slow
def test_placements_open_the_same_noisy_sum():
  _, aggregator = noised(1.5)
  private = site_privacy.bounded(algorithm(), CLIP)
  want, _ = round_of(private, aggregator)
  for placement in ("vmap", "chunk=2"):
    np.testing.assert_allclose(round_of(private, aggregator, placement=placement)[0], want, atol=1e-5)


def test_a_sum_of_too_few_sites_is_not_opened():
  _, aggregator = noised(1.5, min_survivors=4)
  lost = np.isin(IDS, (1, 2))
  with pytest.raises(secagg.RoundAborted):
    round_of(site_privacy.bounded(algorithm(), CLIP), aggregator, secagg.Dropouts(lost, np.zeros(K, bool)))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: site_privacy.bounded(algorithm(weighting="examples"), CLIP), "uniform weighting"),
    (lambda: site_privacy.bounded(algorithm(), 0.0), "l2_clip_norm=0"),
    (lambda: site_privacy.noised(*_pair(threshold=None)), "threshold"),
    (lambda: site_privacy.noised(*_pair(num_bits=20)), "do not fit"),
    (lambda: site_privacy.noised(*_pair()[:3], {"mean": jnp.zeros(2)}), "BatchNorm"),
  ],
)
def test_unsound_pairs_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def _pair(num_bits=24, threshold=3):
  config = DistributedNoise(D, K, 3, CLIP, 1.0, num_bits=24)
  return config, secagg.secure_sum(K, 1.0, num_bits=num_bits, threshold=threshold), START, {}


def test_local_noise_needs_a_secret():
  bare = fed.Loader(lambda ids: load(ids)._replace(secret=None))
  private = site_privacy.bounded(algorithm(), CLIP, 1.0)
  f = fed.federated(private, fed.in_the_clear(), sites.parse_placement("scan"))
  with pytest.raises(ValueError, match="secret at each site"):
    f.step(KEY, f.init(START, {}, K), IDS, bare, DEALER)
