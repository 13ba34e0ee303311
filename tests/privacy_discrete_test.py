import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import special, stats

from primia_jax import prng
from primia_jax.privacy import discrete

KEY = prng.derive(jnp.arange(8, dtype=jnp.uint32), 4)
KINDS = ("discrete_gaussian", "skellam")
STDDEVS = (0.5, 1.0, 3.7, 40.0)


def pmf(x, stddev, kind):
  """By SciPy, apart from the module's own arithmetic."""
  if kind == "skellam":
    return special.ive(np.abs(x), stddev**2)
  support = np.arange(-math.ceil(40 * stddev) - 40, math.ceil(40 * stddev) + 41)
  return np.exp(-(x**2) / (2 * stddev**2)) / np.sum(np.exp(-(support**2) / (2 * stddev**2)))


def fit(drawn, stddev, kind):
  """The p-value of a chi-square test, in bins of at least 50 expected."""
  edge = int(6 * stddev) + 6
  x = np.arange(-edge, edge + 1)
  expected = drawn.size * pmf(x, stddev, kind)
  counts = np.bincount(np.clip(drawn, -edge, edge) + edge, minlength=2 * edge + 1)
  often = expected >= 50
  observed = np.append(counts[often], drawn.size - counts[often].sum())
  expected = np.append(expected[often], max(drawn.size - expected[often].sum(), 1e-9))
  if expected[-1] < 50:
    observed, expected = (
      np.append(observed[:-2], observed[-2:].sum()),
      np.append(expected[:-2], expected[-2:].sum()),
    )
  return stats.chi2.sf(np.sum((observed - expected) ** 2 / expected), len(observed) - 1)


def accepts(variance, stddev, num):
  """Whether a measured variance is what `num` draws of about normal values would show."""
  return abs(variance / stddev**2 - 1) < 6 * math.sqrt(2 / num) + 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stddev", STDDEVS)
def test_draws_have_the_distribution_and_another_scale_is_rejected(kind, stddev):
  drawn = np.asarray(discrete.sample(KEY, (200_000,), stddev, kind))
  assert drawn.dtype == np.int32
  assert fit(drawn, stddev, kind) > 1e-4
  for wrong in (2 / 3, 1.05, 3 / 2):
    assert fit(drawn, wrong * stddev, kind) < 1e-6
  assert fit(np.abs(drawn), stddev, kind) < 1e-6


def test_the_two_kinds_differ_where_they_should():
  drawn = np.asarray(discrete.sample(KEY, (200_000,), 1.0, "skellam"))
  assert fit(drawn, 1.0, "discrete_gaussian") < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stddev", [1000.0, 3000.5])
@pytest.mark.slow
def test_large_scales(kind, stddev):
  drawn = np.asarray(discrete.sample(KEY, (300_000,), stddev, kind)).astype(np.float64)
  assert accepts(np.var(drawn), stddev, drawn.size)
  assert not accepts(np.var(drawn), stddev * 2 / 3, drawn.size)
  assert not accepts(np.var(drawn), stddev * 3 / 2, drawn.size)
  assert abs(np.mean(drawn)) < 5 * stddev / math.sqrt(drawn.size)
  spread = drawn + np.random.default_rng(0).uniform(-0.5, 0.5, drawn.size)
  assert stats.kstest(spread / stddev, "norm").pvalue > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stddev", [0.3, 2.0, 9.3])
def test_the_table_is_within_the_stated_error_of_the_exact_probabilities(kind, stddev):
  """The chance of each magnitude is read off the table in whole numbers and compared with an oracle
  of 70 digits.
  """
  rows = discrete._table(stddev, kind).astype(object)
  num_columns = len(rows)
  full = 2**127 // num_columns
  chance = [0] * num_columns
  for column, (*words, alias) in enumerate(rows):
    threshold = sum(int(w) << shift for w, shift in zip(words, (96, 64, 32, 0), strict=True))
    assert threshold <= full
    chance[column] += threshold
    chance[alias] += full - threshold
  assert sum(chance) == 2**127
  with mpmath.workdps(70):
    variance = mpmath.mpf(stddev) ** 2
    if kind == "skellam":
      weight = lambda x: mpmath.exp(-variance) * mpmath.besseli(x, variance)
      total = mpmath.mpf(1)
    else:
      weight = lambda x: mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * variance))
      total = 1 + 2 * mpmath.fsum(weight(x) for x in range(1, int(20 * stddev) + 40))
    exact = [weight(x) / total * (1 if x == 0 else 2) for x in range(num_columns)]
    distance = mpmath.fsum(
      abs(mpmath.mpf(c) / 2**127 - p) for c, p in zip(chance, exact, strict=True)
    )
    distance = (distance + 1 - mpmath.fsum(exact)) / 2  # beyond the table
    assert distance <= discrete.sampler_error(stddev, kind) < 1e-33
    assert 2 * distance > mpmath.mpf(2) ** -130  # a bound, and not far from what is so


def test_a_column_is_split_at_its_threshold_to_the_last_bit():
  rows = discrete._table(3.7, "discrete_gaussian")
  index_bits = len(rows).bit_length() - 1
  column = int(np.argmax(np.all(rows[:, :4] > 0, axis=1)))
  threshold = sum(
    int(word) << shift for word, shift in zip(rows[column, :4], (96, 64, 32, 0), strict=True)
  )

  def drawn(fraction, sign):
    words = [
      column << (32 - index_bits) | (fraction >> 96) << 1 | sign,
      *(fraction >> shift & 0xFFFFFFFF for shift in (64, 32, 0)),
    ]
    heads, tails = jnp.asarray(rows[:, [0, 4]]), jnp.asarray(rows[:, 1:4])
    first = jnp.asarray(words[:1], jnp.uint32)
    whole = int(discrete._lookup(heads, tails, jnp.asarray(words, jnp.uint32)[:, None])[0])
    by_head, tie = discrete._by_head(first, heads)
    assert int(by_head[0]) == whole or bool(tie[0])
    return whole

  alias = int(rows[column, 4])
  for fraction, magnitude in [
    (0, column),
    (threshold - 1, column),
    (threshold, alias),
    (threshold + 1, alias),
    (threshold - 2**32, column),
    (threshold + 2**32, alias),
    (threshold - 2**64, column),
    (threshold + 2**64, alias),
    (threshold - 2**96, column),
    (threshold + 2**96, alias),
    (2 ** (127 - index_bits) - 1, alias),
  ]:
    if 0 <= fraction < 2 ** (127 - index_bits):
      assert drawn(fraction, 0) == magnitude
      assert drawn(fraction, 1) == -magnitude


@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_bound_holds(kind):
  for stddev in (0.3, 1.0, 10.0):
    top = discrete.largest(stddev, kind)
    x = np.arange(top + 1, top + 200)
    assert 2 * float(np.sum(pmf(x, stddev, kind))) <= 2.0**-130
    assert top >= 11 * stddev


def test_jit_vmap_and_shape_change_nothing():
  keys = jax.vmap(lambda i: prng.derive(KEY, i))(jnp.arange(3, dtype=jnp.uint32))
  plain = jnp.stack([discrete.sample(k, (5, 7), 9.0) for k in keys])
  assert np.array_equal(plain, jax.jit(jax.vmap(lambda k: discrete.sample(k, (5, 7), 9.0)))(keys))
  assert len(np.unique(plain[0])) > 10
  assert not np.array_equal(plain[0], plain[1])
  assert discrete.sample(KEY, (0,), 1.0).shape == (0,)
  many = np.asarray(discrete.sample(KEY, (2**17 + 5,), 50.0))  # several chunks, no two alike
  assert not np.array_equal(many[: 2**16], many[2**16 : 2**17])
  assert abs(np.corrcoef(many[: 2**16], many[2**16 : 2**17])[0, 1]) < 0.03


@pytest.mark.parametrize("stddev", [0.0, -1.0, math.nan, math.inf, 1e6])
def test_impossible_scales_are_refused(stddev):
  with pytest.raises(ValueError, match="stddev"):
    discrete.sample(KEY, (3,), stddev)


def test_unknown_kinds_are_refused():
  with pytest.raises(ValueError, match="discrete_gaussian"):
    discrete.sampler_error(1.0, "gaussian")


def test_probabilities_add_up():
  for kind in KINDS:
    p = [Fraction(n) for n in discrete.probabilities(5.0, kind)]
    assert abs(p[0] + 2 * sum(p[1:]) - 1) < Fraction(1, 10**50)
    assert all(a > b for a, b in itertools.pairwise(p))
