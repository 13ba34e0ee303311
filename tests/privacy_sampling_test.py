import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from primia_jax import prng
from primia_jax.privacy import sampling

SECRET = jnp.arange(8, dtype=jnp.uint32)


@functools.cache
def drawing(num_units, rate, max_units):
  """(secret, steps [T]) -> Poisson draws; compiled once for all tests that draw alike."""
  one = lambda secret, t: sampling.poisson(
    secret, t, jnp.int32(num_units), num_units, rate, max_units
  )
  return jax.jit(jax.vmap(one, (None, 0)))


def draws(num_steps, num_units, rate, max_units, secret=SECRET, first=0):
  """[T, num_units] whether each unit was drawn in each step, and overflow [T]."""
  draw = functools.partial(drawing(num_units, rate, max_units), secret)
  index, overflow = draw(first + jnp.arange(num_steps, dtype=jnp.int32))
  drawn = np.zeros((num_steps, num_units + 1), bool)
  np.put_along_axis(drawn, np.asarray(index), True, axis=1)  # -1 lands in the last column
  return drawn[:, :-1], np.asarray(overflow)


@pytest.mark.parametrize("rate", [1.0, 2**-32, 0.5, 0.1, 1 / 3, 1e-12])
def test_rates_are_rounded_up_to_multiples_of_2_to_the_minus_32(rate):
  effective = sampling.effective_rate(rate)
  assert rate <= effective < rate + 2**-32
  assert effective * 2**32 == round(effective * 2**32)
  assert sampling.effective_rate(effective) == effective


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, math.nan])
def test_impossible_rates_are_refused(rate):
  with pytest.raises(ValueError, match="sampling_rate"):
    sampling.effective_rate(rate)


@settings(deadline=None, max_examples=25)
@given(
  st.sampled_from([1, 70]), st.integers(0, 70), st.floats(2**-32, 1.0), st.sampled_from([1, 9, 70]),
  st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_draw_is_that_of_the_threshold_on_the_bits(
  max_examples, num_units, rate, max_units, step
):
  num_units = min(num_units, max_examples)
  got = sampling.poisson(SECRET, np.uint32(step), num_units, max_examples, rate, max_units)
  words = prng.bits(
    prng.derive(SECRET, 0x53414D50), jnp.array([step, 0, 0], jnp.uint32), (max_examples,)
  )
  chosen = [
    i
    for i, w in enumerate(np.asarray(words).tolist())
    if i < num_units and w < math.ceil(rate * 2**32)
  ]
  assert np.asarray(got.indices).tolist() == (chosen + [-1] * max_units)[:max_units]
  assert int(got.overflow) == max(0, len(chosen) - max_units)
  assert got.indices.dtype == jnp.int32


def test_rate_one_draws_everyone_and_no_unit_beyond_the_sites_own_is_drawn():
  index, overflow = sampling.poisson(SECRET, 3, 5, 9, 1.0, 7)
  assert np.asarray(index).tolist() == [0, 1, 2, 3, 4, -1, -1]
  assert int(overflow) == 0
  with pytest.raises(ValueError, match="raise max_examples"):
    sampling.poisson(SECRET, 3, 10, 9, 1.0, 7)


@pytest.mark.parametrize(("scale", "accepted"), [(1, True), (2 / 3, False), (3 / 2, False)])
def test_the_rate_is_right_for_every_unit_and_batch_sizes_are_binomial(scale, accepted):
  rate, num_steps, num_units = 0.1, 3000, 40
  drawn, _ = draws(num_steps, num_units, rate, num_units)
  each = drawn.sum(0)
  expected = scale * rate
  per_unit = np.sum((each - num_steps * expected) ** 2 / (num_steps * expected * (1 - expected)))
  assert (stats.chi2.sf(per_unit, num_units) > 1e-4) == accepted
  counts = np.bincount(drawn.sum(1), minlength=12)[:12]
  model = stats.binom.pmf(np.arange(12), num_units, expected)
  model /= model.sum()
  p = stats.chisquare(counts[:10], model[:10] / model[:10].sum() * counts[:10].sum()).pvalue
  assert (p > 1e-4) == accepted


def test_draws_are_independent_across_units_and_steps():
  """Shuffled batches of fixed size, which an accountant of Poisson sampling must not be given, fail
  this.
  """

  def largest(drawn):
    z = (drawn - drawn.mean(0)) / drawn.std(0)
    units = np.abs(z.T @ z / len(z) - np.eye(z.shape[1])).max() * math.sqrt(len(z))
    steps = np.abs(np.mean(z[1:] * z[:-1], 0)).max() * math.sqrt(len(z))
    return units, steps

  drawn, _ = draws(4000, 20, 0.25, 20)
  assert max(largest(drawn)) < 5  # of 190 normals
  rng = np.random.default_rng(0)
  shuffled = np.stack([rng.permutation(np.arange(20) < 5) for _ in range(4000)])
  epochs = np.concatenate(
    [np.arange(4)[:, None] == rng.permutation(20)[None] // 5 for _ in range(1000)]
  )
  assert max(largest(epochs)) > 10
  sizes = stats.chi2.cdf(len(drawn) * drawn.sum(1).var() / (20 * 0.25 * 0.75), len(drawn))
  assert 1e-4 < sizes < 1 - 1e-4
  assert shuffled.sum(1).var() == 0


def test_steps_and_secrets_give_other_draws_and_a_bound_that_is_too_small_is_counted():
  a, _ = draws(200, 30, 0.5, 30)
  b, _ = draws(200, 30, 0.5, 30, secret=SECRET + 1)
  c, _ = draws(200, 30, 0.5, 30, first=200)
  assert abs(np.mean(a == b) - 0.5) < 0.05
  assert abs(np.mean(a == c) - 0.5) < 0.05
  few, overflow = draws(200, 30, 0.5, 12)
  assert np.array_equal(few.sum(1) + overflow, a.sum(1))
  assert overflow.max() > 0


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(-1, 6), min_size=12, max_size=12), st.integers(1, 3))
def test_patients_bring_all_their_rows(unit_of_row, rows_per_unit):
  units = jnp.array([5, 0, -1, 6, 3], jnp.int32)
  index, left_out = sampling.rows_of(jnp.array(unit_of_row, jnp.int32), units, rows_per_unit)
  missing = 0
  for unit, rows in zip([5, 0, -1, 6, 3], np.asarray(index).tolist(), strict=True):
    own = [i for i, u in enumerate(unit_of_row) if u == unit and unit >= 0]
    assert rows == (own + [-1] * rows_per_unit)[:rows_per_unit]
    missing += max(0, len(own) - rows_per_unit)
  assert int(left_out) == missing
  if sampling.max_rows(np.array(unit_of_row)) <= rows_per_unit:
    assert missing == 0


def test_patients_are_drawn_as_one_and_independently_of_their_number_of_rows():
  unit_of_row = np.array([3, 0, 1, 3, 3, -1, 2, 0], np.int32)
  draw = jax.jit(
    lambda t: sampling.poisson_patients(
      SECRET, t, jnp.asarray(unit_of_row), jnp.int32(4), 6, 0.5, 6, 3
    )
  )
  for step in range(30):
    (index, overflow), left_out = draw(jnp.int32(step))
    units = np.asarray(sampling.poisson(SECRET, step, 4, 6, 0.5, 6).indices)
    rows = np.asarray(index)
    assert sorted(rows[rows >= 0]) == [
      i for i, u in enumerate(unit_of_row) if u in units[units >= 0]
    ]
    assert int(overflow) == int(left_out) == 0


@pytest.mark.parametrize(
  ("num_examples", "rate", "steps"),
  [(5000, 0.01, 3000), (200, 0.5, 10), (3, 0.9, 1), (60000, 1.0, 5)],
)
def test_capacity_is_the_smallest_that_fits_and_overflow_agrees(num_examples, rate, steps):
  rows = sampling.capacity(num_examples, rate, steps)
  overflow = lambda rows: sampling.overflow_probability(rows, num_examples, rate, steps)
  assert overflow(rows) <= 1e-12
  if rows > 1:
    assert overflow(rows - 1) > 1e-12
  exact = steps * math.fsum(
    stats.binom.pmf(
      np.arange(rows + 1, num_examples + 1), num_examples, sampling.effective_rate(rate)
    )
  )
  np.testing.assert_allclose(overflow(rows), min(exact, 1), rtol=1e-6)
  assert sampling.overflow_probability(1, 10**6, rate, 10**6) <= 1


def test_impossible_runs_are_refused():
  for arguments in ((0, 0.1, 1), (1, 0.1, 0), (1, 0.1, 1, 0.0), (1, 2.0, 1)):
    with pytest.raises(ValueError, match="must"):
      sampling.capacity(*arguments)
