"""Private recipes: batches, clipping and noise as the plan says, from the site's secret alone."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from primia_jax import algorithms, local, prng, secagg, sites, summation
from primia_jax import federated as fed
from primia_jax.privacy import batches, correlated, grid, plan, sampling, strategies, subkeys
from primia_jax.types import Metrics, Site

N, D, STEPS, RATE = 40, 3, 5, 0.25
ROWS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
SECRET = jnp.arange(8, dtype=jnp.uint32)


ON_GRID = {"rtol": 4e-3, "atol": 1e-3}  # sums are rounded, and the clip gives half a percent to it


def loss_fn(params, model_state, batch, key):
  """Each example's gradient is its row."""
  rows = batch.images.reshape(batch.images.shape[0], -1)
  total, count = jnp.sum(batch.weights * (rows @ params["w"])), jnp.sum(batch.weights)
  return total / jnp.maximum(count, 1.0), (model_state, Metrics(total, 0.0 * total, count))


def sgd(noise_multiplier=1.0, num_units=N, noiseless=False, **changes):
  """A plan of five steps a round; `noiseless` keeps everything but the noise."""
  made = plan.dp_sgd(
    loss_fn, num_units=num_units, sampling_rate=RATE, steps=STEPS, rounds=4, delta=1e-3,
    noise_multiplier=noise_multiplier, **changes,
  )  # fmt: skip
  if not noiseless:
    return made

  def update(total, state, params, *, num_units, **_):
    scale = total.step / (np.float32(RATE) * num_units.astype(jnp.float32))
    return grid.real(total.integers, scale), state

  silent = local.Privatizer(lambda params: (), update).bound_to(made.steps, made.grad_fn)
  return dataclasses.replace(made, privatizer=silent)


def train(made, secret=SECRET, units=None, round_index=0, num=N, rows=ROWS):
  run, params = local.train(made.recipe(optax.sgd, lambda t: 1.0)), {"w": jnp.zeros(D)}
  images, labels = jnp.asarray(rows)[:, None, None, :], jnp.zeros(N, jnp.int32)
  now = local.Round(jnp.int32(round_index), jax.random.key(0), jax.random.key(1))

  def one(secret):
    here = Site(jnp.int32(0), images, labels, jnp.int32(num), secret, units)
    return run(params, {}, optax.sgd(1.0).init(params), (), here, now)

  trained = jax.jit(jax.vmap(one) if secret is not None and secret.ndim == 2 else one)(secret)
  assert all((m == 0).all() for m in trained.metrics)
  return -np.asarray(trained.params["w"])


def drawn(secret, step, num, max_units=N):
  key = subkeys.of_sampling(secret)
  return [int(i) for i in sampling.poisson(key, step, num, N, RATE, max_units)[0] if i >= 0]


def clipped(v, norm):
  return v * min(1.0, norm / np.linalg.norm(v))


@pytest.mark.parametrize("round_index", [0, 3])
def test_without_noise_it_is_the_sum_of_clipped_gradients_of_poisson_batches(round_index):
  want = sum(
    clipped(ROWS[i], 0.5) for t in range(STEPS) for i in drawn(SECRET, round_index * STEPS + t, 30)
  ) / (RATE * 30)
  np.testing.assert_allclose(
    train(sgd(l2_clip_norm=0.5, noiseless=True), round_index=round_index, num=30), want, **ON_GRID
  )


def test_a_patients_images_are_clipped_as_one():
  units = np.arange(N, dtype=np.int32) // 4  # ten patients of four images
  made = sgd(
    num_units=10, l2_clip_norm=0.5, unit="patient", rows_per_unit=4, max_examples=N, noiseless=True
  )
  means = ROWS.reshape(10, 4, D).mean(1)
  want = sum(clipped(means[i], 0.5) for t in range(STEPS) for i in drawn(SECRET, t, 10)) / (
    RATE * 10
  )
  np.testing.assert_allclose(train(made, units=jnp.asarray(units)), want, **ON_GRID)
  with pytest.raises(ValueError, match=r"Site\.units"):
    train(made)


def test_noise_is_of_the_promised_scale_and_no_other():
  made = sgd(2.0, l2_clip_norm=0.5)
  zeros = np.zeros((N, D), np.float32)
  secrets = jnp.stack([prng.derive(SECRET, i) for i in range(60)])
  noise = train(made, secrets, rows=zeros)
  unit = 2.0 * 0.5 * np.sqrt(STEPS) / (RATE * N)  # of the sum of all steps
  chance = lambda scale: stats.chi2.cdf(np.sum((noise / (scale * unit)) ** 2), noise.size)
  assert 0.001 < chance(1.0) < 0.999
  assert chance(2 / 3) > 0.9999
  assert chance(3 / 2) < 0.0001


def test_secrets_and_rounds_never_repeat_noise_or_batches():
  made = sgd()
  again = train(made)
  np.testing.assert_array_equal(again, train(made))
  others = [train(made, prng.derive(SECRET, 1)), train(made, round_index=1)]
  assert all(np.abs(again - other).min() > 1e-6 for other in others)
  assert len({tuple(drawn(SECRET, t, N)) for t in range(20)}) == 20


def test_a_private_recipe_without_a_secret_is_refused():
  with pytest.raises(ValueError, match="needs a secret at each site"):
    train(sgd(), secret=None)


# DP-FTRL: four rounds of three steps; two batches of five make an epoch of the smallest site.
ROUNDS, EACH, SIZE = 4, 3, 5
TOTAL = ROUNDS * EACH


def ftrl(kind, min_units=30, size=SIZE, num_units=N, **changes):
  return plan.dp_ftrl(
    loss_fn, num_units=num_units, min_units=min_units, batch_size=size, steps=EACH, rounds=ROUNDS,
    delta=1e-3, kind=kind, bands=min(min_units // size, 6) if kind == "banded" else None,
    noise_multiplier=1.0, l2_clip_norm=0.5, **changes,
  )  # fmt: skip


every_kind = pytest.mark.parametrize(
  "kind", ["banded", pytest.param("tree", marks=pytest.mark.slow)]
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def places(total, size, num_units):
  """[T, B] the units of every step of a site with a padding of N images."""
  here = Site(jnp.int32(0), jnp.zeros((N, 1)), None, num_units)
  _, draw = batches.cyclic(1, size, N).begin(here, None)
  one = lambda t: draw(jnp.int32(0), correlated.NoiseState(t, {}))
  return jax.vmap(one)(jnp.arange(total, dtype=jnp.uint32))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(40, 1), (30, 3), (25, 7)]), st.data())
def test_units_come_as_far_apart_and_as_often_as_promised(shape, data):
  total, size = shape
  num_units = data.draw(st.integers(size, N))
  steps = np.asarray(places(total, size, jnp.int32(num_units)))
  assert steps.min() >= 0
  assert steps.max() < num_units
  separation, times = batches.participation(total, size, num_units)
  uses = {u: np.flatnonzero((steps == u).any(axis=1)) for u in range(num_units)}
  assert sum(map(len, uses.values())) == total * size  # no batch holds a unit twice
  assert max(map(len, uses.values())) <= times
  assert all(b - a >= separation for at in uses.values() for a, b in itertools.pairwise(at))
  assert min(map(len, uses.values())) >= total * size // num_units  # and none is left out


def test_the_order_mixes_images_that_are_sorted():
  first = np.asarray(places(40, 1, jnp.int32(N)))[:, 0]
  assert sorted(first.tolist()) == list(range(N))
  assert abs(np.corrcoef(first, np.arange(N))[0, 1]) < 0.5


@functools.lru_cache
def trainer(kind, unit="example"):
  """A recipe and its compiled rounds; images are W wide."""
  made = ftrl(kind)
  if unit == "patient":
    made = ftrl(kind, 10, 2, 10, unit=unit, rows_per_unit=4, max_examples=N)
  recipe = made.recipe(optax.sgd, lambda t: 1.0)
  return recipe, jax.jit(local.train(recipe))


W = 400
WIDE = np.random.default_rng(1).normal(size=(N, W)).astype(np.float32)


def run_rounds(kind, secret=SECRET, rows=WIDE, num=N, rounds=range(ROUNDS), carry=True, units=None):
  """[rounds, W] the sum of all gradients so far, after each round."""
  (made, train_fn), params = (
    trainer(kind, "example" if units is None else "patient"),
    {"w": jnp.zeros(W)},
  )
  images, labels = jnp.asarray(rows)[:, None, None, :], jnp.zeros(N, jnp.int32)
  here = Site(jnp.int32(0), images, labels, jnp.int32(num), secret, units)
  noise, out = local.init_noise(made, params), []
  for r in rounds:
    now = local.Round(jnp.int32(r), jax.random.key(0), jax.random.key(1))
    done = train_fn(params, {}, optax.sgd(1.0).init(params), noise, here, now)
    params, noise = done.params, done.noise if carry else noise
    out.append(-np.asarray(params["w"], np.float64))
  return np.stack(out)


def accepts(noise, stddev):
  """Whether it is normal with that deviation, and not with 2/3 or 3/2 of it."""
  chance = lambda scale: stats.chi2.cdf(np.sum((noise / (scale * stddev)) ** 2), noise.size)
  return 1e-4 < chance(1.0) < 1 - 1e-4 and chance(2 / 3) > 1 - 1e-6 and chance(3 / 2) < 1e-6


@every_kind
def test_correlated_noise_of_all_rounds_has_the_scale_of_its_matrices(kind):
  """Which is not that of fresh noise, nor that of a state which every round starts anew."""
  noises, nothing = ftrl(kind).strategy, np.zeros((N, W), np.float32)
  stddevs = np.sqrt(strategies.squared_errors(noises))[EACH - 1 :: EACH]
  for sums, stddev in zip(run_rounds(kind, rows=nothing) * SIZE, stddevs, strict=True):
    assert accepts(sums, stddev)
  assert not accepts(run_rounds(kind, rows=nothing, carry=False)[-1] * SIZE, stddevs[-1])
  assert strategies.stddev(noises) * np.sqrt(TOTAL) > 1.5 * stddevs[-1]


@every_kind
def test_gradients_are_clipped_sums_over_batches_in_order(kind):
  got = run_rounds(kind, num=33) - run_rounds(
    kind, num=33, rows=np.zeros((N, W), np.float32)
  )  # the noise is the same
  steps = np.asarray(places(25, SIZE, jnp.int32(33)))
  for r in range(ROUNDS):
    want = sum(clipped(WIDE[i], 0.5) for t in range((r + 1) * EACH) for i in steps[t]) / SIZE
    np.testing.assert_allclose(got[r], want, **ON_GRID)


@pytest.mark.slow
def test_a_patients_images_are_clipped_as_one_in_order_too():
  units = jnp.arange(N, dtype=jnp.int32) // 4  # ten patients of four images
  got = run_rounds("tree", units=units) - run_rounds(
    "tree", rows=np.zeros((N, W), np.float32), units=units
  )
  means, steps = WIDE.reshape(10, 4, W).mean(1), np.asarray(places(25, 2, jnp.int32(10)))
  want = sum(clipped(means[i], 0.5) for t in range(TOTAL) for i in steps[t]) / 2
  np.testing.assert_allclose(got[-1], want, **ON_GRID)


def test_a_step_that_comes_again_has_other_noise():
  """As after a round that was refused: the same noise twice would leave the difference of two
  gradients bare.
  """
  first, again = (run_rounds("banded", rounds=[r]) for r in (0, 1))
  assert np.mean(np.abs(first - again) > 1e-3) > 0.95


def test_a_site_of_too_few_units_releases_nothing():
  assert np.isfinite(run_rounds("banded", num=30)).all()
  assert np.isnan(run_rounds("banded", num=29)).all()


def site_of(i):
  images = np.roll(WIDE, i, axis=0)[:, None, None, :]
  secret = np.asarray(prng.derive(SECRET, i))
  return Site(np.int32(i), images, np.zeros(N, np.int32), np.int32(30 + 3 * i), secret)


def load(ids):
  sites = [site_of(i)._replace(secret=None) for i in ids]
  return jax.tree.map(lambda *rows: np.stack(rows), *sites)


def known_secrets(round, purpose, ids):
  return np.stack([np.asarray(site_of(i).secret) for i in ids])


MADE = {
  "fedavg": lambda made: algorithms.fedavg(made, weighting="uniform"),
  "scaffold": lambda made: algorithms.scaffold(made, 3),
  "fednova": lambda made: algorithms.fednova(made, weighting="uniform"),
}


def federation(kind, placement="scan", name="fedavg"):
  lost_next = []

  def dropouts(round, purpose, ids):
    return secagg.Dropouts(np.isin(ids, lost_next.pop()), np.zeros(len(ids), bool))

  summed = summation.losing(summation.clear(), dropouts)
  f = fed.federate(MADE[name](trainer(kind)[0]), summed, sites.parse_placement(placement), 3)

  def step(state, ids=(0, 1, 2), lost=()):
    lost_next.append(lost)
    return f.step(KEY, state, fed.Sites(np.array(ids), load, secrets=known_secrets))[0]

  return f.init({"w": jnp.zeros(W)}), step


KEY = jax.random.key(0)


def noise_of(state):
  kept = state.site_state
  kept = kept["noise"] if isinstance(kept, dict) else kept
  return np.asarray(kept.step), np.asarray(kept.rows["w"])


def test_lost_and_absent_sites_go_on_in_turn():
  """Site 1 is lost in the first round, and goes on in the second where it would have begun."""
  state, step = federation("banded")
  first = step(state, lost=[1])
  steps, rows = noise_of(first)
  assert steps.tolist() == [EACH, 0, EACH]
  assert not rows[1].any()
  assert rows[0].any()
  second = step(first)
  assert noise_of(second)[0].tolist() == [2 * EACH, EACH, 2 * EACH]
  sums = [
    run_rounds("banded", site_of(i).secret, site_of(i).images[:, 0, 0], 30 + 3 * i, range(2))
    for i in range(3)
  ]
  late = run_rounds(
    "banded", site_of(1).secret, site_of(1).images[:, 0, 0], 33, [1]
  )  # its first steps, in round 1
  want = np.mean([sums[0][1] - sums[0][0], late[0], sums[2][1] - sums[2][0]], axis=0)
  np.testing.assert_allclose(first.params["w"] - second.params["w"], want, atol=1e-4)


@pytest.mark.slow
def test_sites_that_are_not_drawn_keep_their_state():
  state, step = federation("banded")
  state = step(step(state, ids=(0, 2)), ids=(1, 2))
  assert noise_of(state)[0].tolist() == [EACH, EACH, 2 * EACH]


@pytest.mark.slow
@every_kind
def test_placements_agree_and_algorithms_keep_the_state(kind):
  def after_two_rounds(placement, name="fedavg"):
    state, step = federation(kind, placement, name)
    return step(step(state))

  grid_step = 0.5 * 0.005 / W**0.5 / SIZE / 3  # of the mean over three sites
  want = after_two_rounds("scan")
  for placement in ("loop", "vmap"):
    got = after_two_rounds(placement)
    for a, b in zip(
      *map(jax.tree.leaves, ((got.params, got.site_state), (want.params, want.site_state))),
      strict=True,
    ):
      np.testing.assert_allclose(a, b, atol=3 * grid_step)  # placements round floats differently
  for name in MADE:
    got = after_two_rounds("scan", name)
    assert noise_of(got)[0].tolist() == [2 * EACH] * 3
    np.testing.assert_allclose(noise_of(got)[1], noise_of(want)[1], atol=1e-5)
  np.testing.assert_allclose(
    after_two_rounds("scan", "fednova").params["w"], want.params["w"], atol=1e-4
  )


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (
      lambda: batches.participation(10, 8, 7),
      "batch_size=8: a step would .* use batch_size=7 or less",
    ),
    (lambda: batches.participation(0, 8, 70), "num_steps=0"),
    (lambda: ftrl("tree", size=2**29, min_units=2**30), "fewer than 2\\^32"),
    (lambda: ftrl("tree", unit="site"), "unit='site'"),
    (lambda: ftrl("tree", size=0), "batch_size=0"),
    (lambda: batches.cyclic(0, SIZE, N), "num_steps=0"),
  ],
)
def test_fixed_orders_that_cannot_be_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
