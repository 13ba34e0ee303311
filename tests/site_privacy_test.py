"""Site-level differential privacy in federated rounds: bounds, noise of the promised scale, and
nothing else sent.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from primia_jax import algorithms, local, prng, robust, secagg, site_privacy, sites, summation
from primia_jax import federated as fed
from primia_jax.privacy import adaptive
from primia_jax.privacy.distributed import DistributedNoise, error_stddev
from primia_jax.types import Metrics, Site

K, D, CLIP = 5, 600, 0.5
KNOWN, KEY, IDS = jnp.arange(8, dtype=jnp.uint32), jax.random.key(0), np.arange(K, dtype=np.int32)
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
  return Site(ids, images, np.zeros((len(ids), 2), np.int32), np.ones(len(ids), np.int32))


def known_secrets(round, purpose, ids):
  """The same in every run, which the tests of placements compare."""
  return np.stack([np.asarray(prng.derive(KNOWN, 5, round, int(i))) for i in ids])


def algorithm(**kwargs):
  recipe = local.Recipe(local.epochs(2, 2), grad_fn, None, optax.sgd, lambda t: 1.0)
  return algorithms.fedavg(recipe, **{"weighting": "uniform", **kwargs})


def noised(multiplier, num_bits=24, min_survivors=3):
  config = DistributedNoise(D, K, min_survivors, CLIP, multiplier, num_bits=num_bits)
  secure = secagg.secure_sum(K, 1.0, num_bits=num_bits, threshold=min_survivors)
  coding = site_privacy.distributed_noise(config, secure, START, {})
  return config, summation.masked(secure, coding)


def losing(summed, dropouts):
  return summation.losing(summed, lambda round, purpose, ids: dropouts)


def round_of(algorithm, summed, round_index=0):
  f = fed.federate(algorithm, summed, sites.scan(), K)
  state = f.init(START)._replace(round=jnp.int32(round_index))
  state, info = f.step(KEY, state, fed.Sites(IDS, load))
  return np.asarray(state.params["w"], np.float64), info


def bounded_mean(ids):
  norms = np.linalg.norm(UPDATES, axis=1, keepdims=True)
  return (UPDATES * np.minimum(1, CLIP / np.maximum(norms, 1e-9)))[ids].mean(0)


def test_updates_are_bounded_and_averaged():
  mean, info = round_of(
    site_privacy.bounded(algorithm(), CLIP), summation.masked(secagg.secure_sum(K))
  )
  assert np.isnan(info.loss)  # losses of training are not private, and never leave a site
  np.testing.assert_allclose(mean, bounded_mean(range(K)), atol=1e-6)
  unbounded, info = round_of(algorithm(), summation.masked(secagg.secure_sum(K)))
  assert info.loss == 7
  assert np.linalg.norm(unbounded) > 2 * np.linalg.norm(mean)


def accepts(errors, stddev):
  """Whether errors are normal with that deviation, and not with 2/3 or 3/2 of it."""
  chance = lambda scale: stats.chi2.cdf(np.sum((errors / (scale * stddev)) ** 2), errors.size)
  return 1e-4 < chance(1.0) < 1 - 1e-4 and chance(2 / 3) > 1 - 1e-6 and chance(3 / 2) < 1e-6


@pytest.mark.slow
def test_local_noise_has_the_promised_scale():
  private = site_privacy.bounded(algorithm(), CLIP, 2.0)
  mean, _ = round_of(private, summation.clear())
  again, _ = round_of(private, summation.clear(), round_index=1)
  assert accepts(mean - bounded_mean(range(K)), 2.0 * CLIP / np.sqrt(K))
  assert np.abs(mean - again).min() > 0


@pytest.mark.parametrize(
  "lost",
  [pytest.param((), marks=pytest.mark.slow), pytest.param((4,), marks=pytest.mark.slow), (0, 3)],
)
def test_all_sites_together_noise_the_sum_as_promised(lost):
  config, summed = noised(1.5)
  mask = np.isin(IDS, lost)
  dropouts = secagg.Dropouts(mask & (IDS < 2), mask & (IDS >= 2))
  mean, info = round_of(site_privacy.bounded(algorithm(), CLIP), losing(summed, dropouts))
  left = np.flatnonzero(~mask)
  assert info.survivors.tolist() == left.tolist()
  stddev = error_stddev(config, len(left)) / len(left)
  assert accepts(mean - bounded_mean(left), stddev)
  # a sum of the fewest sites has the noise of a trusted server
  assert error_stddev(config, 3) == pytest.approx(1.5 * CLIP, rel=0.01)


def with_known_noise(summed):
  """The same summation, whose sites draw known noise."""

  def begin(round, *args, **kwargs):
    session = summed.begin(round, *args, **kwargs)
    keys, *rest = session._rows[0]
    noise = jax.vmap(lambda i: prng.derive(KNOWN, 6, round, i))(jnp.arange(K, dtype=jnp.uint32))
    session._rows[0] = (keys._replace(noise=noise), *rest)
    return session

  return summed._replace(begin=begin)


@pytest.mark.slow
def test_placements_open_the_same_noisy_sum():
  summed, private = with_known_noise(noised(1.5)[1]), site_privacy.bounded(algorithm(), CLIP)
  want, _ = run(private, summed, 1)
  for placement in ("vmap", "chunk=2"):
    np.testing.assert_allclose(run(private, summed, 1, placement)[0], want, atol=1e-5)


def test_every_sum_has_noise_of_its_own():
  """A restart from one state would otherwise release one noise under two models."""
  summed, private = noised(1.5)[1], site_privacy.bounded(algorithm(), CLIP)
  first, second = (round_of(private, summed)[0] for _ in range(2))
  assert np.abs(first - second).max() > 0.1 * CLIP


def test_a_sum_of_too_few_sites_is_not_opened():
  _, summed = noised(1.5, min_survivors=4)
  lost = secagg.Dropouts(np.isin(IDS, (1, 2)), np.zeros(K, bool))
  with pytest.raises(secagg.RoundAborted):
    round_of(site_privacy.bounded(algorithm(), CLIP), losing(summed, lost))


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: site_privacy.bounded(algorithm(weighting="examples"), CLIP), "uniform weighting"),
    (lambda: site_privacy.bounded(algorithm(), 0.0), "l2_clip_norm=0"),
    (lambda: site_privacy.distributed_noise(*_pair(threshold=None)), "threshold"),
    (lambda: site_privacy.distributed_noise(*_pair(num_bits=20)), "do not fit"),
    (lambda: site_privacy.distributed_noise(*_pair()[:3], {"mean": jnp.zeros(2)}), "BatchNorm"),
  ],
)
def test_unsound_pairs_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def _pair(num_bits=24, threshold=3):
  config = DistributedNoise(D, K, 3, CLIP, 1.0, num_bits=24)
  return config, secagg.secure_sum(K, 1.0, num_bits=num_bits, threshold=threshold), START, {}


def test_local_noise_needs_a_secret():
  private = site_privacy.bounded(algorithm(), CLIP, 1.0)
  site = jax.tree.map(lambda a: jnp.asarray(a[1]), load(IDS))
  server = fed.Global(START, {}, (), jnp.int32(0), KEY)
  with pytest.raises(ValueError, match="secret at each site"):
    private.site(server, private.init_site(START, {}), site)


# A clip that moves. Bits have less noise than updates, so that a test could not take one for the
# other.
MOVING = adaptive.Clip(CLIP, 0.5, 0.2, count_stddev=3.0)
NORMS = np.linalg.norm(UPDATES, axis=1)


def run(algorithm, summed, rounds, placement="scan"):
  f = fed.federate(algorithm, summed, sites.parse_placement(placement), K)
  states, clips = [f.init(START)], []
  for _ in range(rounds):
    state, info = f.step(KEY, states[-1], fed.Sites(IDS, load, secrets=known_secrets))
    states.append(state)
    clips.append(info.tells.get("l2_clip_norm"))
  told = algorithm.tells(states[-1].server_state)
  clips.append(told.get("l2_clip_norm"))
  return np.stack([np.asarray(state.params["w"]) for state in states]), np.asarray(clips)


def moving_coding(dim=D):
  config = DistributedNoise(dim, K, 3, 1.0, 1.5, num_bits=24)
  secure = secagg.secure_sum(K, 1.0, num_bits=24, threshold=3)
  model = {"w": jnp.zeros(dim)}, {}
  return config, secure, site_privacy.distributed_noise(config, secure, *model, MOVING)


def moving_noise():
  _, secure, coding = moving_coding()
  return summation.masked(secure, coding)


@pytest.mark.parametrize(
  ("quantile", "norm"), [(0.5, 2.0), pytest.param(0.3, 1.0, marks=pytest.mark.slow)]
)
def test_the_clip_moves_to_the_quantile_of_norms_and_bounds_each_round(quantile, norm):
  """Without noise, so that every step is known."""
  private = site_privacy.bounded(algorithm(), adaptive.Clip(CLIP, quantile, 0.3, 1.0))
  params, clips = run(algorithms.averaged(private, 0.9), summation.clear(), 40)
  want = [CLIP]
  for _ in range(40):
    want.append(want[-1] * np.exp(-0.3 * (np.mean(want[-1] >= NORMS) - quantile)))
  np.testing.assert_allclose(clips, want, rtol=1e-4)
  assert np.abs(clips[-10:] / norm - 1).max() < 0.05
  for t in (0, 20, 39):
    mean = (UPDATES * np.minimum(1, clips[t] / np.maximum(NORMS, 1e-9))[:, None]).mean(0)
    np.testing.assert_allclose(params[t + 1] - params[t], mean, atol=1e-5)


@pytest.mark.slow
def test_the_share_within_is_that_of_the_sites_in_the_sum():
  lost = np.isin(IDS, (0, 3))
  private, secure = site_privacy.bounded(algorithm(), MOVING), secagg.secure_sum(K, threshold=3)
  dropouts = secagg.Dropouts(lost, np.zeros(K, bool))
  _, clips = run(private, losing(summation.masked(secure), dropouts), 1)
  assert clips[1] == pytest.approx(CLIP * np.exp(0.2 * 0.5), rel=1e-5)  # norms 1, 2, 4 are beyond


def global_of(round_index=0, clip=CLIP):
  server = {"inner": (), "clip": adaptive.ClipState(jnp.asarray(clip, jnp.float32))}
  return fed.Global(START, {}, server, jnp.asarray(round_index, jnp.int32), KEY)


def message_of(private, site_id=1, scale=1.0, round_index=0, clip=CLIP):
  with jax.ensure_compile_time_eval():
    site = jax.tree.map(lambda a: jnp.asarray(a[site_id]), load(IDS))
  secret = prng.derive(KNOWN, 7, jnp.asarray(round_index).astype(jnp.uint32))
  site = site._replace(images=site.images * scale, secret=secret)
  return private.site(global_of(round_index, clip), private.init_site(START, {}), site)[0]


def test_local_noise_of_the_bit_has_the_promised_scale():
  private = site_privacy.bounded(algorithm(), MOVING, 2.0)
  rounds = jnp.arange(400, dtype=jnp.int32)
  sent = jax.jit(jax.vmap(lambda t: message_of(private, round_index=t)))(rounds)
  of_bit = np.asarray(sent.more, np.float64) + 0.5
  of_update = np.asarray(sent.update[0]["w"], np.float64) - UPDATES[1] / NORMS[1]
  assert accepts(of_bit, 3.0)
  assert accepts(
    of_update, (2.0**-2 - 6.0**-2) ** -0.5
  )  # so that both together cost a noise multiplier of 2
  assert not accepts(of_update, 2.0)  # which is what updates alone would cost
  assert unlike(of_bit, of_update[:, 0])


def unlike(a, b):
  """Whether neither values nor magnitudes go together, as they would if both came from the same
  words.
  """
  return all(
    abs(np.corrcoef(f(a), f(b))[0, 1]) < 4.5 / np.sqrt(len(a)) for f in (np.asarray, np.abs)
  )


def test_whatever_its_update_a_site_sends_little():
  """And whatever clip a server sends it, honest or not."""
  private = site_privacy.bounded(algorithm(), MOVING)
  scales = jnp.asarray([0.0, 0.3, 1e6, 1e30, np.inf, np.nan], jnp.float32)
  clips = jnp.asarray([CLIP, 0.0, 1e-38, -1.0, np.inf, np.nan], jnp.float32)
  over_clips = jax.vmap(lambda scale, clip: message_of(private, scale=scale, clip=clip), (None, 0))
  sent = jax.jit(jax.vmap(over_clips, (0, None)))(scales, clips)
  assert isinstance(sent, fed.Message)  # nothing else is sent
  np.testing.assert_array_equal(np.abs(sent.more), 0.5)
  np.testing.assert_array_equal(sent.more[:, 0], [0.5, 0.5, -0.5, -0.5, -0.5, -0.5])
  assert np.all(np.linalg.norm(sent.update[0]["w"], axis=-1) <= 1 + 1e-4)
  assert not any(np.any(a) for a in jax.tree.leaves(sent.metrics))
  np.testing.assert_array_equal(sent.weight, 1)


# Openings at once; numbers in the updates opened: one, so that noise shared with bits would show.
NUM, FEW = 150, 1


@pytest.fixture(scope="module")
def opened():
  """Updates [NUM, K, FEW], bits [NUM, K], words [NUM] -> what is opened, by noise of the words."""
  _, _, coding = moving_coding(dim=FEW)
  words, zero = jnp.zeros(2, jnp.uint32), jnp.zeros((), jnp.float32)

  def one(updates, bits, number):
    own = jax.vmap(lambda i: prng.derive(KNOWN, number, i))(jnp.arange(K, dtype=jnp.uint32))

    def encode(update, bit, i, noise):
      row = secagg.Row(i, i[None], jnp.zeros((1, 8), jnp.uint32), None, noise)
      message = fed.Message(({"w": update}, {}), zero, Metrics(zero, zero, zero), bit)
      return coding.encode(message, row, words)

    sent = jax.vmap(encode)(updates, bits, jnp.asarray(IDS), own)
    total = jax.tree.map(lambda a: jnp.sum(a, axis=0, dtype=a.dtype), sent)
    message = coding.decode(total, words)
    return message.update[0]["w"], message.more, message.weight, total.out_of_range

  # One opening after the other: the draws of all at once are far larger than the caches.
  run = jax.jit(lambda *args: jax.lax.map(lambda each: one(*each), args))
  return lambda *args: [np.asarray(a, np.float64) for a in run(*args)]


@pytest.mark.optimised  # discrete noise is slow without
def test_all_sites_together_noise_the_sum_of_bits_as_promised(opened):
  config, *_ = moving_coding(dim=FEW)
  bits = np.tile(np.float32([0.5, -0.5, 0.5, 0.5, -0.5]), (NUM, 1))
  updates, within, weight, wrong = opened(
    np.zeros((NUM, K, FEW), np.float32), bits, np.arange(NUM, dtype=np.uint32)
  )
  of_bit = adaptive.bit_noise(config, MOVING)
  assert accepts(within - 0.5, error_stddev(of_bit, K))
  assert error_stddev(of_bit, 3) == pytest.approx(3.0, rel=1e-3)  # that of the fewest sites
  assert accepts(updates, error_stddev(config, K))
  assert unlike(within - 0.5, updates[:, 0])
  np.testing.assert_array_equal((weight, wrong), (np.full(NUM, K), np.zeros(NUM)))


@pytest.mark.optimised
def test_whatever_it_reports_a_site_changes_little_of_what_is_opened(opened):
  """Under the same noise, against a report of zeros: the sensitivity that the ledger takes."""
  reports = [(0.0, 0.0), (0.0, 0.5), (1e4, 0.5), (0.0, 1e4), (-3.0, -1e9), (np.nan, np.nan)]
  updates = np.tile(np.random.default_rng(1).normal(size=(K, FEW)).astype(np.float32), (NUM, 1, 1))
  bits = np.full((NUM, K), 0.5, np.float32)
  for row, (number, bit) in enumerate(reports):
    updates[row, 0], bits[row, 0] = number, bit
  sums, within, *_ = (a[: len(reports)] for a in opened(updates, bits, np.zeros(NUM, np.uint32)))
  assert np.linalg.norm(sums - sums[0], axis=1).max() <= 1.001
  np.testing.assert_allclose(within - within[0], [0, 0.5, 0.5, 0.5, -0.5, 0], atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "distributed"])
def test_placements_move_the_clip_alike(kind):
  private = site_privacy.bounded(algorithm(), MOVING, 2.0 if kind == "local" else 0.0)
  summed = summation.clear() if kind == "local" else with_known_noise(moving_noise())
  params, clips = run(private, summed, 2, "loop")
  again, others = run(private, summed, 2, "vmap")
  np.testing.assert_allclose(again, params, atol=1e-4)
  np.testing.assert_allclose(others, clips, rtol=1e-5)
  assert len(set(clips)) == 3


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: site_privacy.bounded(algorithm(), MOVING, 6.0), "count_stddev=3.0 must be more than"),
    (lambda: adaptive.bit_noise(_pair()[0], MOVING), "use l2_clip_norm=1"),
    (
      lambda: adaptive.bit_noise(moving_coding()[0], adaptive.Clip(1.0)),
      "fixed clip sends no bits",
    ),
    (lambda: site_privacy.distributed_noise(*_pair(), MOVING), "use l2_clip_norm=1"),
    (lambda: run(site_privacy.bounded(algorithm(), MOVING), noised(1.0)[1], 1), "the same Clip"),
    (lambda: run(site_privacy.bounded(algorithm(), 1.0), moving_noise(), 1), "the same Clip"),
    (
      lambda: run(
        site_privacy.bounded(algorithm(), MOVING), summation.by_rule("median", robust.median()), 1
      ),
      "clip that mo",
    ),
  ],
)
def test_clips_that_do_not_fit_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_a_clip_that_stays_is_the_norm_itself():
  fixed = site_privacy.bounded(algorithm(), adaptive.Clip(CLIP))
  state = fed.federate(fixed, summation.clear(), sites.scan(), K).init(START)
  assert (fixed.name, fixed.tells(state.server_state)) == ("fedavg, bounded", {})
