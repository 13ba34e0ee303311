import functools
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate, special, stats

from primia_jax.privacy import audit, correlated, grid, noise, plan, strategies
from primia_jax.types import Batch, Metrics

DELTA = 1e-5
MU, STEPS = 0.5, 2  # the claim: as one Gaussian mechanism of noise multiplier 2
STDDEV = math.sqrt(STEPS) / MU  # of one step at clip norm 1


def key(seed):
  return jnp.arange(8, dtype=jnp.uint32) + jnp.uint32(1000 * seed)


def noisy_sums(gradients, included, secret, stddev=STDDEV, clip=1.0):
  """The Gaussian mechanism as it should be, but for what the arguments break."""
  factors = jnp.minimum(1.0, clip / jnp.linalg.norm(gradients, axis=1)) * included.astype(
    jnp.float32
  )
  drawn = noise.integers(secret, (STEPS, gradients.shape[1]), 20)
  return (factors @ gradients)[None] + grid.real(drawn, np.float32(stddev / noise.stddev(20)))


def analytic_epsilon(mu, delta):
  """By integration over the privacy loss, which is Gaussian with mean mu^2 / 2 and variance
  mu^2.
  """
  loss = stats.norm(mu**2 / 2, mu)

  def excess(epsilon):
    top = max(epsilon, mu**2 / 2) + 12 * mu
    return integrate.quad(
      lambda x: -math.expm1(epsilon - x) * loss.pdf(x), epsilon, top, limit=200
    )[0]

  low, high = 0.0, 60.0
  for _ in range(40):
    middle = (low + high) / 2
    low, high = (middle, high) if excess(middle) > delta else (low, middle)
  return low


CLAIM = analytic_epsilon(MU, DELTA)


def run(release_fn, seed=0, **changes):
  settings = {"num_canaries": 256, "num_coordinates": 256, "l2_norm": 10.0, "num_runs": 128}
  return audit.audit(
    release_fn, key(seed), key(seed + 500), epsilon=CLAIM, delta=DELTA, **(settings | changes)
  )


def bounds(result):
  return result.epsilon, result.independent_epsilon, result.gaussian_epsilon


def assert_passes(result):
  assert all(bound <= CLAIM for bound in bounds(result))
  assert result.p_value > 0.05
  assert result.mu > 0.8 * MU  # not blind: what privacy loss there is, is seen
  assert result.epsilon > 0.3 * CLAIM


def assert_caught(result):
  assert result.p_value < 0.05
  assert all(bound > CLAIM for bound in (result.epsilon, result.gaussian_epsilon))


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_the_right_mechanism_passes(seed):
  assert_passes(run(noisy_sums, seed))


@pytest.mark.parametrize(
  ("broken", "seed"),
  [
    ({"stddev": STDDEV / 2}, 0),
    ({"stddev": STDDEV / 2}, 1),
    ({"clip": math.inf}, 0),
    ({"stddev": 0.0}, 0),
  ],
)
def test_a_broken_mechanism_is_caught(broken, seed):
  assert_caught(run(functools.partial(noisy_sums, **broken), seed))


@pytest.mark.slow
def test_trying_several_numbers_of_guesses_is_paid_for():
  result, total = run(noisy_sums, num_runs=8, num_guesses=[50, 200, 600]), 8 * 256
  tries = [(total, n, audit.guesses(result.scores, result.included, n)) for n in (50, 200, 600)]
  assert (total, result.num_guesses, result.num_right) in tries
  assert result.epsilon == max(
    audit.one_run_bound(*numbers, DELTA, 1 - 0.05 / 3) for numbers in tries
  )
  assert result.p_value == min(
    1.0, 3 * min(audit.p_value(*numbers, CLAIM, DELTA) for numbers in tries)
  )
  caught = run(functools.partial(noisy_sums, clip=math.inf), num_runs=8, num_guesses=[20, 200])
  assert caught.p_value == 2 * min(audit.p_value(total, n, n, CLAIM, DELTA) for n in (20, 200))


@pytest.mark.slow
def test_random_directions_too_show_that_nothing_is_clipped():
  changes = {"dirac": False, "num_canaries": 32, "num_runs": 128}
  right = run(noisy_sums, **changes)
  assert right.p_value > 0.05
  assert all(bound <= CLAIM for bound in bounds(right))
  assert_caught(run(functools.partial(noisy_sums, clip=math.inf), **changes))


FEATURES, CLASSES = 32, 8


def training(num_units, stddev, **changes):
  """Real private training of a linear classifier, among whose examples there are canaries."""
  rng = np.random.default_rng(0)
  real = rng.normal(size=(8, FEATURES)).astype(np.float32)
  labels = rng.integers(0, CLASSES, 8).astype(np.int32)

  def loss_fn(params, model_state, batch, key):
    """An image is an example's features, or, labelled -1, the gradient that a canary has."""
    del key
    logits = batch.images[:, :FEATURES] @ params["kernel"] + params["bias"][None]
    examples = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.labels, 0))
    losses = jnp.where(batch.labels < 0, batch.images @ params["kernel"].ravel(), examples)
    loss, num = jnp.sum(losses * batch.weights), jnp.sum((batch.weights > 0).astype(jnp.float32))
    return loss / jnp.maximum(num, 1.0), (model_state, Metrics(loss, jnp.zeros(()), num))

  made = plan.dp_sgd(
    loss_fn, num_units=num_units, sampling_rate=1.0, steps=STEPS, rounds=1, delta=1e-3,
    noise_multiplier=stddev or 1.0, microbatch=33, **changes,
  )  # fmt: skip
  silent = lambda total, state, params, **_: (grid.real(total.integers, total.step), state)
  update = made.privatizer.update if stddev else silent

  def release(gradients, included, secret):
    images = jnp.concatenate(
      [jnp.pad(real, ((0, 0), (0, gradients.shape[1] - FEATURES))), gradients]
    )
    batch = Batch(
      images,
      jnp.concatenate([labels, jnp.full(len(gradients), -1, jnp.int32)]),
      jnp.concatenate([jnp.ones(8), included.astype(jnp.float32)]),
      jnp.arange(len(images), dtype=jnp.int32),
    )

    def step(params, t):
      total, _ = made.grad_fn(params, {}, batch, jax.random.key(0))
      released, _ = update(total, (), params, secret=secret, step=t, num_units=1.0)
      return jax.tree.map(lambda p, g: p - 0.01 * g, params, released), released["kernel"].ravel()

    params = {"kernel": jnp.zeros((FEATURES, CLASSES)), "bias": jnp.zeros(CLASSES)}
    return jax.lax.scan(step, params, jnp.arange(STEPS, dtype=jnp.uint32))[1]

  return release


@pytest.mark.parametrize(
  ("changes", "caught"),
  [
    ({}, False),
    ({"stddev": STDDEV / 2.5}, True),  # half is found, too, but not with every seed
    # the same noise, and nothing is clipped
    ({"stddev": STDDEV / 1e3, "l2_clip_norm": 1e3}, True),
    ({"stddev": 0.0}, True),
  ],
  ids=["right", "two fifths of the noise", "no clipping", "no noise"],
)
def test_real_private_training_passes_and_broken_is_caught(changes, caught):
  result = run(training(**({"num_units": 264, "stddev": STDDEV} | changes)))
  (assert_caught if caught else assert_passes)(result)


def correlated_training(config, actual):
  """Canaries take part as often as they may; the attacker knows the strategy and looks where they
  show most.
  """
  c, steps = np.array(config.coefficients), config.num_steps
  strategy = np.array(
    [[c[i - j] if 0 <= i - j < len(c) else 0 for j in range(steps)] for i in range(steps)]
  )
  takes_part = (np.arange(steps) % config.min_separation == 0).astype(np.float32)
  pattern = strategy @ takes_part

  def release(gradients, included, secret):
    total = included.astype(jnp.float32) @ (
      gradients / jnp.linalg.norm(gradients, axis=1, keepdims=True)
    )

    on = correlated.grid_of(actual)(gradients.shape[1])

    def step(state, t):
      drawn, state = correlated.next_noise(actual, state, secret, t, on.level)
      return state, jnp.asarray(takes_part)[t] * total + grid.real(drawn, np.float32(1 / on.steps))

    numbers = jnp.arange(steps, dtype=jnp.uint32)
    released = jax.lax.scan(step, correlated.init(actual, total), numbers)[1]
    return jnp.asarray(strategy.T @ pattern, jnp.float32)[None] @ released  # post-processing

  return release


def test_correlated_noise_keeps_its_claim_for_the_whole_run_and_hardly_more():
  config = strategies.banded(6, 2, 1 / MU, 1.0, strategies.square_root_coefficients(2))
  assert_passes(run(correlated_training(config, config)))
  once = strategies.banded(
    6, 2, 1 / MU, 1.0, config.coefficients, max_participations=1
  )  # but they are three
  assert run(correlated_training(config, once)).gaussian_epsilon > CLAIM


def synthetic(rng, mu, size=2000):
  included = rng.random(size) < 0.5
  return rng.normal(size=size) + mu * included, included


@pytest.mark.parametrize("mu", [0.0, 1.0, 3.0])  # 0: ins and outs alike, and nothing is found
def test_bounds_hold_as_often_as_they_say(mu):
  rng, trials, truth = np.random.default_rng(1), 200, mu and analytic_epsilon(mu, DELTA)
  wrong = np.zeros(3)
  for _ in range(trials):
    scores, included = synthetic(rng, mu)
    right = audit.guesses(scores, included, 200)
    wrong[0] += audit.one_run_bound(2000, 200, right, DELTA, 0.9) > truth
    wrong[1] += audit.two_sided_bound(scores, included, DELTA, 0.9) > truth
    wrong[2] += audit.gaussian_bound(scores, included, 0.9) > mu
  assert np.all(stats.binom.sf(wrong - 1, trials, 0.1) > 1e-3)


def test_bounds_come_near_the_truth():
  rng = np.random.default_rng(2)
  scores, included = synthetic(rng, 1.0, 200_000)
  assert 0.97 < audit.gaussian_bound(scores, included) <= 1
  assert 0.5 * analytic_epsilon(1.0, DELTA) < audit.two_sided_bound(scores, included, DELTA)
  answers = rng.random(20_000) < special.expit(1.0)  # randomised response: theorem 5.2 is tight
  assert 0.95 < audit.one_run_bound(20_000, 20_000, int(answers.sum()), 0.0) <= 1


def slow_p_value(num_canaries, num_guesses, num_right, epsilon, delta):
  q = 1 / (1 + math.exp(-epsilon))
  pmf = [
    math.comb(num_guesses, k) * q**k * (1 - q) ** (num_guesses - k) for k in range(num_guesses + 1)
  ]
  shares = [sum(pmf[num_right - i : num_right]) / i for i in range(1, num_right + 1)]
  return min(1.0, sum(pmf[num_right:]) + 2 * num_canaries * delta * max(shares, default=0))


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_the_p_value_is_that_of_theorem_5_2(epsilon, delta):
  for num_guesses in (0, 1, 7, 20):
    for num_right in range(num_guesses + 1):
      numbers = (25, num_guesses, num_right, epsilon, delta)
      assert math.isclose(audit.p_value(*numbers), slow_p_value(*numbers), rel_tol=1e-9)


def test_the_p_value_allows_for_a_mechanism_that_tells_all_with_probability_delta():
  for delta in (1e-3, 0.05):
    assert audit.p_value(30, 30, 30, 0.5, delta) >= delta + (1 - delta) * special.expit(0.5) ** 30
    assert audit.one_run_bound(30, 30, 30, 0.06, 0.95) == 0


def test_bounds_in_closed_form():
  for n in (10, 1000):  # all right, delta 0: q^n = 0.05
    q = 0.05 ** (1 / n)
    assert math.isclose(audit.one_run_bound(n, n, n, 0.0), math.log(q / (1 - q)), rel_tol=1e-9)
  assert audit.one_run_bound(1000, 0, 0, 0.0) == 0
  scores = np.where(np.arange(400) % 4 < 2, 0.0, 1.0)  # perfectly told apart: no mistakes among 100
  rate = 1 - 0.025 ** (1 / 100)
  bound = audit.two_sided_bound(scores, scores > 0.5, 0.01)
  assert math.isclose(bound, math.log((1 - 0.01 - rate) / rate), rel_tol=1e-9)
  assert math.isclose(
    audit.gaussian_bound(scores, scores > 0.5), -2 * stats.norm.ppf(rate), rel_tol=1e-9
  )


def test_rates_are_bounded_as_by_clopper_and_pearson():
  rng = np.random.default_rng(3)
  scores, included = synthetic(rng, 1.5, 400)
  even, odd = slice(0, None, 2), slice(1, None, 2)
  middle = (scores[even][included[even]].mean() + scores[even][~included[even]].mean()) / 2
  over = scores[odd] > middle
  rates = [
    stats.binomtest(int(np.sum(over[group] == mistake)), int(group.sum()), alternative="less")
    .proportion_ci(0.975)
    .high
    for group, mistake in ((~included[odd], True), (included[odd], False))
  ]
  want = stats.norm.ppf(1 - rates[0]) - stats.norm.ppf(rates[1])
  assert math.isclose(audit.gaussian_bound(scores, included), want, rel_tol=1e-9)


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 4.0, 40.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-5, 0.1])
def test_the_epsilon_of_a_gaussian_mechanism(mu, delta):
  want = dp_accounting.get_epsilon_gaussian(1 / mu, delta)
  assert math.isclose(audit.gaussian_epsilon(mu, delta), want, rel_tol=1e-6, abs_tol=1e-6)
  if mu <= 4:
    assert math.isclose(analytic_epsilon(mu, delta), want, rel_tol=1e-4, abs_tol=1e-4)


COINS = jax.jit(audit.canaries, static_argnums=(1, 2))


def test_canaries_are_what_they_say():
  drawn = audit.canaries(key(1), 300, 500)
  assert np.array_equal(drawn.directions, np.eye(300, 500))
  coins = np.array([COINS(key(seed), 300, 300).included for seed in range(20)])
  assert abs(coins.mean() - 0.5) < 4 * 0.5 / math.sqrt(coins.size)
  assert not np.array_equal(coins[0], coins[1])
  drawn = audit.canaries(key(1), 300, 500, dirac=False)
  np.testing.assert_allclose(jnp.linalg.norm(drawn.directions, axis=1), 1, rtol=1e-5)
  products = np.asarray(drawn.directions @ drawn.directions.T)[np.triu_indices(300, 1)]
  assert abs(products.std() * math.sqrt(500) - 1) < 0.05
  updates = jnp.asarray(np.random.default_rng(0).normal(size=(3, 500)).astype(np.float32))
  want = np.asarray(drawn.directions, np.float64) @ np.asarray(updates, np.float64).sum(0)
  np.testing.assert_allclose(audit.score(updates, drawn.directions), want, atol=1e-4)


def test_guesses_are_counted_at_both_ends():
  scores, included = (
    np.array([3.0, -1.0, 0.5, 2.0, -2.0]),
    np.array([True, False, True, False, True]),
  )
  assert [audit.guesses(scores, included, n) for n in range(6)] == [0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: audit.p_value(10, 11, 5, 1.0, 0.0), "11 guesses"),
    (lambda: audit.p_value(10, 5, 6, 1.0, 0.0), "6 right"),
    (lambda: audit.p_value(10, 5, 5, -1.0, 0.0), "epsilon=-1.0"),
    (lambda: audit.one_run_bound(10, 5, 5, 0.0, 1.0), "confidence=1.0"),
    (lambda: audit.guesses(np.zeros(3), np.zeros(3, bool), 4), "num_guesses=4"),
    (lambda: audit.canaries(key(0), 11, 10), "num_canaries=11"),
    (lambda: audit.gaussian_epsilon(1.0, 0.0), "delta=0.0"),
    (lambda: audit.gaussian_bound(np.zeros(8), np.zeros(8, bool)), "some are in"),
    (lambda: audit.two_sided_bound(np.zeros(8), np.zeros(7, bool), 0.0), "one of each"),
    (lambda: audit.gaussian_bound(np.full(8, np.nan), np.arange(8) < 4), "not finite"),
  ],
)
def test_impossible_numbers_are_refused(call, match):
  with pytest.raises(ValueError, match=match):
    call()
