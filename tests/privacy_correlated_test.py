import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_jax import prng
from primia_jax.privacy import correlated, grid, noise, privatizers, strategies
from primia_jax.privacy.grid import Rounded

SECRET = jnp.arange(8, dtype=jnp.uint32) + 3


def subkey(level):
  return prng.derive(SECRET, 0x434F5252, level)


def grid_for(config, like):
  return correlated.grid_of(config)(grid.size(like))


@functools.partial(jax.jit, static_argnums=0)
def integers(config, like):
  """[T, ...] the noise of all steps in grid steps, by `scan`."""
  level = grid_for(config, like).level

  def step(state, t):
    drawn, state = correlated.next_noise(config, state, SECRET, t, level)
    return state, drawn

  return jax.lax.scan(
    step, correlated.init(config, like), jnp.arange(config.num_steps, dtype=jnp.uint32)
  )[1]


def run(config, like):
  """The same, as float32 numbers."""
  step = config.l2_clip_norm / grid_for(config, like).steps
  return grid.real(integers(config, like), jnp.float32(step))


def strategy(config):
  """C and C^-1 (or for trees, their left inverse) as matrices, from the definitions and by dense
  algebra.
  """
  num_steps = config.num_steps
  if isinstance(config, strategies.BandedNoise):
    c = np.zeros((num_steps, num_steps))
    for i, j in itertools.product(range(num_steps), repeat=2):
      if 0 <= i - j < len(config.coefficients):
        c[i, j] = config.coefficients[i - j]
    return c, np.linalg.inv(c)
  nodes, sums = [], np.zeros((num_steps, 0))
  for first in range(0, num_steps, config.restart_every):
    end = min(first + config.restart_every, num_steps)
    sums_of_tree, nodes_of_tree = (
      honaker(first, end, num_steps) if config.honaker else plain(first, end, num_steps)
    )
    sums = np.hstack([sums, np.zeros((num_steps, len(nodes_of_tree)))])
    sums[first:end, len(nodes) :] += sums_of_tree[: end - first]
    sums[end:, len(nodes) :] += sums_of_tree[end - first - 1]
    nodes += nodes_of_tree
  return np.array(nodes), np.diff(sums, axis=0, prepend=0)


def subtrees(first, n):
  """The subtrees that make up n steps, the largest first: (start, size)."""
  start, found = first, []
  for size in (1 << i for i in range(n.bit_length() - 1, -1, -1)):
    if n & size:
      found.append((start, size))
      start += size
  return found


def plain(first, end, num_steps):
  used = sorted({node for n in range(1, end - first + 1) for node in subtrees(first, n)})
  sums = np.array(
    [[node in subtrees(first, n) for node in used] for n in range(1, end - first + 1)], float
  )
  return sums, [[a <= t < a + size for t in range(num_steps)] for a, size in used]


def honaker(first, end, num_steps):
  """Each subtree's sum by least squares over all nodes within it: the best linear unbiased
  estimate.
  """
  nodes = [
    (a, 1 << i)
    for i in range((end - first).bit_length())
    for a in range(first, end, 1 << i)
    if a + (1 << i) <= end
  ]
  c = np.array([[a <= t < a + size for t in range(num_steps)] for a, size in nodes], float)
  sums = np.zeros((end - first, len(nodes)))
  for n in range(1, end - first + 1):
    for a, size in subtrees(first, n):
      inside = [k for k, (b, width) in enumerate(nodes) if a <= b and b + width <= a + size]
      sums[n - 1, inside] += np.linalg.pinv(c[np.ix_(inside, range(a, a + size))]).sum(axis=0)
  return sums, c.tolist()


CONFIGS = {
  "one band": strategies.banded(12, 4, 0.7, 2.0, [1.0]),
  "square root": strategies.banded(13, 4, 0.7, 2.0, strategies.square_root_coefficients(4)),
  "optimal": strategies.banded(24, 6, 1.3, 0.5, strategies.optimal_coefficients(5, 24)),
  "all bands": strategies.banded(9, 9, 1.0, 1.0, strategies.square_root_coefficients(9)),
  "more bands than steps": strategies.banded(
    3, 9, 1.0, 1.0, strategies.square_root_coefficients(5)
  ),
  "plain tree": strategies.tree(22, 8, 0.7, 2.0, honaker=False),
  "plain short tree": strategies.tree(17, 7, 0.7, 2.0, restart_every=6, honaker=False),
  "tree": strategies.tree(22, 8, 0.7, 2.0),
  "short tree": strategies.tree(17, 7, 1.3, 0.5, restart_every=7),
  "tree of one": strategies.tree(5, 3, 1.0, 1.0, restart_every=1),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def patterns(config):
  """All steps in which one unit may take part."""
  for chosen in range(2**config.num_steps):
    steps = [t for t in range(config.num_steps) if chosen >> t & 1]
    far = all(b - a >= config.min_separation for a, b in itertools.pairwise(steps))
    if far and len(steps) <= config.max_participations:
      yield steps


def brute_force(config):
  c, _ = strategy(config)
  return max(np.linalg.norm(c[:, steps].sum(axis=1)) for steps in patterns(config))


LEVEL = 22


def columns(config):
  """[T, R] the noise of all steps for each unit impulse of Z."""
  levels = config.restart_every.bit_length() if isinstance(config, strategies.TreeNoise) else 1
  nodes = list(itertools.product(range(levels), range(config.num_steps)))
  size, shift = 2**28, noise.shift(LEVEL)

  @jax.jit
  def one(target, at):
    def noise_fn(key, step, like, level):
      here = jnp.all(key == target) & (step == at)
      nothing = jnp.zeros_like(like)
      return jnp.where(here, jnp.int32(size >> shift), nothing), nothing

    def step(state, t):
      drawn, state = correlated.next_noise(config, state, SECRET, t, LEVEL, noise_fn)
      return state, drawn

    steps = jnp.arange(config.num_steps, dtype=jnp.uint32)
    return jax.lax.scan(step, correlated.init(config, jnp.zeros((), jnp.int32)), steps)[1]

  drawn = np.stack([one(subkey(level), jnp.uint32(at)) for level, at in nodes], axis=1)
  return drawn / size * correlated.fraction(config)


@every_config
def test_the_noise_is_the_inverse_of_the_strategy_applied_to_independent_noise(config):
  _, inverse = strategy(config)
  got = columns(config)
  np.testing.assert_allclose(got @ got.T, inverse @ inverse.T, atol=2e-5)


@every_config
def test_what_is_released_is_a_function_of_the_strategy_s_output_to_the_last_bit(config):
  """Other sums X and the noise Z that makes up for them, C X + Z the same: equal releases. This is
  what lets one Gaussian mechanism be charged for the run.
  """
  rng, level, width = np.random.default_rng(0), 12, 50
  fine, shift = correlated.fraction(config), noise.shift(12)
  x, other = rng.integers(-1000, 1000, (2, config.num_steps, width))
  levels = config.restart_every.bit_length() if isinstance(config, strategies.TreeNoise) else 1
  z = rng.integers(-(10**5), 10**5, (levels, config.num_steps, width))
  moved = z.copy()
  if isinstance(config, strategies.BandedNoise):
    moved[0] += np.rint(fine * strategy(config)[0] @ (x - other)).astype(np.int64)
  else:  # a node's noise is drawn at the step that completes it
    every = config.restart_every
    for at, of_level in itertools.product(range(config.num_steps), range(levels)):
      if (at % every + 1) % 2**of_level == 0:
        moved[of_level, at] += (x - other)[at + 1 - 2**of_level : at + 1].sum(0)

  keys = jnp.stack([subkey(i) for i in range(levels)])

  @jax.jit
  def released(x, z):
    def noise_fn(key, step, like, level):
      drawn = z[jnp.argmax(jnp.all(keys == key[None], axis=1)), step.astype(jnp.int32)]
      return drawn >> shift, drawn & (2**shift - 1)

    def step(state, t):
      drawn, state = correlated.next_noise(config, state, SECRET, t, level, noise_fn)
      return state, x[t.astype(jnp.int32)] + drawn

    steps = jnp.arange(config.num_steps, dtype=jnp.uint32)
    return jax.lax.scan(step, correlated.init(config, jnp.zeros(width, jnp.int32)), steps)[1]

  as_int = lambda a: jnp.asarray(a, jnp.int32)
  first = released(as_int(x), as_int(z))
  np.testing.assert_array_equal(first, released(as_int(other), as_int(moved)))
  assert np.mean(np.asarray(first) != released(as_int(other), as_int(z))) > 0.9


@every_config
def test_noise_stays_within_the_draws_that_its_grid_has_room_for(config):
  """All draws as large as they come, each with the sign that adds to one number."""
  _, inverse = strategy(config)
  assert np.abs(inverse).sum(axis=1).max() <= strategies.largest_noise(config)
  assert strategies.largest_noise(strategies.banded(500, 20, 1.0, 1.0, [1.0, 1.0])) > 500


@every_config
def test_expected_errors_are_those_of_the_matrices(config):
  _, inverse = strategy(config)
  rows = np.cumsum(inverse, axis=0)
  want = np.sum(rows**2, axis=1) * strategies.stddev(config) ** 2
  np.testing.assert_allclose(strategies.squared_errors(config), want, rtol=1e-9)


@every_config
def test_all_that_is_released_follows_from_one_gaussian_mechanism(config):
  """A X + noise of prefix sums = (A C^+) (C X + Z): so A C^+ C = A, and C's sensitivity is what
  counts.
  """
  c, inverse = strategy(config)
  np.testing.assert_allclose(inverse @ c, np.eye(config.num_steps), atol=1e-9)


@pytest.mark.parametrize(
  "name", ["one band", "square root", "all bands", "plain short tree", "short tree"]
)
@pytest.mark.parametrize("most", [1, 2, None])
def test_sensitivity_is_that_of_the_worst_pattern(name, most):
  config = CONFIGS[name]
  if most is not None:
    config = dataclasses.replace(config, max_participations=most)
  assert math.isclose(strategies.sensitivity(config), brute_force(config), rel_tol=1e-9)
  assert math.isclose(
    strategies.stddev(config),
    config.noise_multiplier * config.l2_clip_norm * brute_force(config),
    rel_tol=1e-9,
  )


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.data())
def test_sensitivity_is_that_of_the_worst_pattern_whatever_the_numbers(
  num_steps, separation, most, data
):
  size = data.draw(st.integers(1, separation))
  steps = data.draw(st.lists(st.floats(0.3, 1), min_size=size, max_size=size))
  for config in (
    strategies.banded(num_steps, separation, 1.0, 1.0, np.cumprod(steps), max_participations=most),
    strategies.tree(num_steps, separation, 1.0, 1.0, size, max_participations=most),
    strategies.tree(num_steps, separation, 1.0, 1.0, size, max_participations=most, honaker=False),
  ):
    assert math.isclose(strategies.sensitivity(config), brute_force(config), rel_tol=1e-9)


def test_no_directions_of_gradients_are_worse_than_equal_ones():
  config, rng = CONFIGS["square root"], np.random.default_rng(0)
  c, _ = strategy(config)
  for steps in patterns(config):
    x = np.zeros((config.num_steps, 3))
    x[steps] = rng.normal(size=(len(steps), 3))
    x[steps] /= np.linalg.norm(x[steps], axis=1, keepdims=True)
    assert np.linalg.norm(c @ x) <= strategies.sensitivity(config) * (1 + 1e-9)


def deviation(config, drawn):
  """How many standard errors the size of prefix sums is off, over all steps; whitened, so that all
  numbers count.
  """
  _, inverse = strategy(config)
  factor = np.linalg.cholesky(inverse @ inverse.T) * strategies.stddev(config)
  white = np.linalg.solve(factor, np.asarray(drawn, np.float64).reshape(config.num_steps, -1))
  return (np.mean(white**2) - 1) / math.sqrt(2 / white.size)


@pytest.mark.parametrize("name", ["square root", "optimal", "plain short tree", "tree"])
def test_the_covariance_is_right_and_no_other_scale_passes(name):
  config = CONFIGS[name]
  drawn = run(config, jnp.zeros(4000))
  assert abs(deviation(config, drawn)) < 4
  assert abs(deviation(config, np.asarray(drawn) * 2 / 3)) > 4
  assert abs(deviation(config, np.asarray(drawn) * 3 / 2)) > 4
  _, inverse = strategy(config)
  prefix = np.cumsum(inverse, axis=0)
  want = prefix @ prefix.T * strategies.stddev(config) ** 2
  sums = np.cumsum(np.asarray(drawn, np.float64), axis=0)
  got, size = sums @ sums.T / sums.shape[1], np.sqrt(np.diag(want))
  error = np.sqrt(
    (want**2 + np.outer(size, size) ** 2) / sums.shape[1]
  )  # standard errors of a covariance
  assert np.max(np.abs(got - want) / error) < 5
  independent = np.asarray(run(CONFIGS["one band"], jnp.zeros(4000)), np.float64)
  assert np.abs(np.corrcoef(independent)[0, 1:]).max() < 5 / math.sqrt(
    4000
  )  # one band: nothing correlates


def test_one_band_is_dp_sgd_without_amplification():
  config = strategies.banded(10, 1, 1.1, 3.0, [1.0])
  assert math.isclose(
    strategies.stddev(config), 1.1 * 3 * math.sqrt(10)
  )  # composition of ten Gaussians
  like = {"a": jnp.zeros(5), "b": jnp.zeros((2, 3))}
  draw = jax.jit(noise.integers_like, static_argnums=3)
  level = grid_for(config, like).level
  want = [draw(subkey(0), jnp.uint32(t), like, level) for t in range(10)]
  want = jax.tree.map(lambda *rows: (jnp.stack(rows) + 32) >> 6, *want)  # of 64ths of a step
  jax.tree.map(np.testing.assert_array_equal, integers(config, like), want)


def test_scan_loop_and_resumed_state_agree():
  for name in ("optimal", "tree"):
    config, like = CONFIGS[name], {"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}
    state, rows = correlated.init(config, like), []
    step = jax.jit(functools.partial(correlated.next_noise, config), static_argnums=3)
    level = grid_for(config, like).level
    for t in range(config.num_steps):
      drawn, state = step(state, SECRET, jnp.uint32(t), level)
      state = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), state)  # through a checkpoint
      rows.append(drawn)
    want = integers(config, like)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    jax.tree.map(np.testing.assert_array_equal, stacked, want)
    assert all(leaf.dtype == jnp.int32 for leaf in jax.tree.leaves(want))


@pytest.mark.parametrize("name", ["square root", "tree", "plain tree"])
def test_a_step_out_of_turn_releases_nothing(name):
  config, like = CONFIGS[name], {"a": jnp.zeros(3, jnp.int32)}
  start, noisy = correlated.init(config, like), privatizers.correlate(config, 1)
  on = grid_for(config, like)
  total = Rounded(like, jnp.float32(1), on)
  numbers = {"secret": SECRET, "step": jnp.uint32(0), "num_units": jnp.int32(1000)}
  release = jax.jit(lambda state: noisy.update(total, state, **numbers)[0])
  assert np.all(np.isfinite(release(start)["a"]))
  ended = start._replace(step=jnp.uint32(config.num_steps))
  assert np.all(np.isnan(release(ended)["a"]))
  with pytest.raises(ValueError, match="out of turn"):
    correlated.next_noise(config, start, SECRET, 1, on.level)
  with pytest.raises(ValueError, match="out of turn"):
    correlated.next_noise(config, ended, SECRET, config.num_steps, on.level)
