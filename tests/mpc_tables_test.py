"""The comparison by one-time tables, exhaustively for small spans and at the ends of large ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import prng
from primia_jax.mpc import dealing, sharing
from primia_jax.mpc.gates import tables
from primia_jax.mpc.gates.comparison import Compared, Span


def compare(span, v, r, tamper=None):
  """([v < r], borrow) on the bits of the span; tamper changes party 1's correlations."""
  with jax.enable_x64(v.dtype == np.uint64):

    @jax.jit
    def both(v, r, seeds):
      masks = tables.masks(span, v.shape[0])
      each = [dealing.expand_masks(seeds[p], 0, masks) for p in (0, 1)]
      shares = {name: jnp.stack([e[name] for e in each]) for name in masks}
      derived, borrow_mask = tables.derive(span, r, shares)
      sent = dealing.split(seeds[0], 0, derived)
      parties = [each[0] | dealing.expand_shares(seeds[0], 0, sent), each[1] | sent]
      if tamper is not None:
        parties[1] = tamper(dict(parties[1]))
      stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), *parties)
      run = lambda c: tables.evaluate(span, sharing.Wire(), v, c)
      out = jax.vmap(run, axis_name=sharing.PARTY, out_axes=Compared(0, 0, None))(stacked)
      borrow = None if out.borrow is None else out.borrow[0] ^ out.borrow[1]
      if out.opened_borrow is not None:
        borrow = out.opened_borrow ^ borrow_mask
      return out.lt[0] ^ out.lt[1], borrow

    return both(v, r, jnp.stack([prng.random_key(), prng.random_key()]))


def expected(span, v, r):
  bits = lambda x, low, high: [(int(n) >> low) % 2 ** (high - low) for n in x]
  lt = [
    int(a < b)
    for a, b in zip(bits(v, span.low, span.high), bits(r, span.low, span.high), strict=True)
  ]
  if span.cut is None:
    return lt, None
  return lt, [int(a < b) for a, b in zip(bits(v, 0, span.cut), bits(r, 0, span.cut), strict=True)]


SMALL = [
  Span(0, 1),
  Span(0, 4),
  Span(0, 5),
  Span(0, 6, 2),
  Span(0, 7, 6),
  Span(2, 7),
  Span(0, 6, 5),
]


@pytest.mark.parametrize("span", SMALL)
def test_all_numbers_of_a_few_bits(span):
  v, r = (a.reshape(-1).astype(np.uint32) for a in np.meshgrid(np.arange(128), np.arange(128)))
  lt, borrow = compare(span, v, r)
  want_lt, want_borrow = expected(span, v, r)
  np.testing.assert_array_equal(lt, want_lt)
  if span.cut is not None:
    np.testing.assert_array_equal(borrow, want_borrow)


LARGE = [
  Span(0, 62, 16),
  Span(0, 62, 24),
  Span(0, 40, 20),
  Span(17, 41),
  Span(0, 36, 13),
  Span(0, 64),
  Span(3, 20),
]


@pytest.mark.parametrize("span", LARGE)
def test_neighbours_and_ends_of_many_bits(span):
  rng = np.random.default_rng(span.high)
  r = rng.integers(0, 2**64, 400, np.uint64)
  one = np.uint64(1)
  flipped = r ^ (one << rng.integers(0, 64, 400).astype(np.uint64))
  with np.errstate(over="ignore"):
    v = np.concatenate(
      [r, r + one, r - one, flipped, rng.integers(0, 2**64, 400, np.uint64), 0 * r, ~(0 * r)]
    )
  r = np.tile(r, 7)
  lt, borrow = compare(span, v, r)
  want_lt, want_borrow = expected(span, v, r)
  np.testing.assert_array_equal(lt, want_lt)
  if span.cut is not None:
    np.testing.assert_array_equal(borrow, want_borrow)


@pytest.mark.parametrize("name", ["table0", "level0_0", "products0_0", "level1_0"])
def test_a_flipped_bit_of_a_correlation_gives_wrong_answers(name):
  """Every dealt value matters."""
  span = Span(0, 20, 8)
  v, r = np.random.default_rng(0).integers(0, 2**20, (2, 512)).astype(np.uint32)
  everything = lambda c: c | {name: ~c[name]}
  got = compare(span, v, r, everything)
  want = expected(span, v, r)
  assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
  ("span", "rounds"), [(Span(0, 3), 0), (Span(0, 16), 1), (Span(0, 62, 16), 2), (Span(0, 64), 2)]
)
def test_rounds(span, rounds):
  assert len({name.split("_")[0] for name in tables.masks(span, 8)}) == rounds
