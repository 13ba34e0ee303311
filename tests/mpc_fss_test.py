import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from primia_jax.mpc.gates import fss
from primia_jax.mpc.gates.comparison import Span
from primia_jax.mpc.sharing import PARTY, Wire

LONG = [Span(17, 40), Span(0, 40, 13), Span(0, 62)]
SPAN, NUM = Span(0, 20, 9), 8000  # of all tests where any would do, to compile them once
NUMBERS = np.random.default_rng(1).integers(1, 2**20, (2, NUM), np.uint32)
DERIVE = jax.jit(fss.derive, static_argnums=0)


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


def roots(span, num, seed=0):
  """Both parties' shares [2, ...] of the masks."""
  rng = np.random.default_rng(seed)
  return {
    name: jnp.asarray(rng.integers(0, 2**32, (2, *mask.shape), np.uint32))
    for name, mask in sorted(fss.masks(span, num).items())
  }


def deal(span, r, shares):
  derived, borrow_mask = DERIVE(span, r, shares)
  assert borrow_mask is None
  assert not derived.additive
  assert not derived.boolean
  return derived.common


@functools.partial(jax.jit, static_argnums=0)
def both(span, v, shares, common):
  """Both parties' shares of the answers, [2, N] each."""
  party = lambda mine, theirs, v: fss.evaluate(span, Wire(), v, {**mine, **theirs})
  return jax.vmap(party, in_axes=(0, None, None), axis_name=PARTY)(shares, common, jnp.asarray(v))


def truth(span, v, r):
  """[v < r] of the compared bits and, with a cut, of the low bits; in Python integers."""
  bits = lambda low, high: np.array(
    [
      (a % 2**high) >> low < (b % 2**high) >> low
      for a, b in zip(map(int, v), map(int, r), strict=True)
    ]
  )
  return bits(span.low, span.high), None if span.cut is None else bits(0, span.cut)


def check(span, v, r, seed=0):
  shares = roots(span, len(v), seed)
  answer = both(span, v, shares, deal(span, jnp.asarray(r), shares))
  for shared, want in zip((answer.lt, answer.borrow), truth(span, v, r), strict=True):
    if want is None:
      assert shared is None
    else:
      assert shared.dtype == jnp.uint8
      np.testing.assert_array_equal(np.asarray(shared[0] ^ shared[1]), want)
  assert answer.opened_borrow is None


@pytest.mark.parametrize(
  ("span", "dtype"),
  [
    (Span(0, 1), np.uint32),
    (Span(1, 7), np.uint32),
    (Span(0, 7), np.uint64),
    (Span(1, 9), np.uint64),
    (Span(0, 9, 8), np.uint32),
  ],
  ids=str,
)
def test_every_pair_of_small_numbers(span, dtype):
  numbers = np.arange(2**span.high, dtype=dtype)
  check(span, np.tile(numbers, len(numbers)), np.repeat(numbers, len(numbers)))


def edges(span, rng):
  """Pairs of random numbers, equal, next to each other, different in one bit, and at both ends;
  more bits above.
  """
  top = 2**span.high - 1
  pairs = []
  for _ in range(40):
    a, b = (int(x) for x in rng.integers(0, top, 2, np.uint64, endpoint=True))
    pairs += [
      (a, b),
      (a, a),
      (a, min(a + 1, top)),
      (a, max(a - 1, 0)),
      (a, 0),
      (a, top),
      (0, a),
      (top, a),
    ]
  a = int(rng.integers(0, top, dtype=np.uint64))
  pairs += [(a, a ^ (1 << i)) for i in range(span.high)] + [(0, 0), (top, top), (0, top), (top, 0)]
  above = rng.integers(
    0, 2 ** (64 - span.high), (2, len(pairs)), np.uint64
  )  # 0 where there are none
  shift = np.uint64(span.high % 64)
  v, r = (
    np.array(x, np.uint64) | (y << shift)
    for x, y in zip(zip(*pairs, strict=True), above, strict=True)
  )
  return v, r


@pytest.mark.parametrize("span", LONG, ids=str)
def test_random_and_extreme_numbers(span):
  check(span, *edges(span, np.random.default_rng(span.high)))


def test_a_32_bit_ring():
  v, r = np.random.default_rng(0).integers(0, 2**32, (2, 500), np.uint32)
  v[:100] = r[:100]
  check(Span(0, 32), v, r)


def test_many_chunks_of_which_the_last_overlaps():
  assert NUM > fss._CPU_CHUNK
  assert NUM % fss._CPU_CHUNK
  check(SPAN, *NUMBERS)


def test_a_single_element_without_jit():
  span, shares = Span(0, 9), roots(Span(0, 9), 1)
  derived, _ = fss.derive(span, jnp.asarray([300], jnp.uint32), shares)
  party = lambda mine: (
    fss.evaluate(span, Wire(), jnp.asarray([299], jnp.uint32), {**mine, **derived.common}).lt
  )
  a, b = jax.vmap(party, axis_name=PARTY)(shares)
  assert int(a[0] ^ b[0]) == 1


def test_two_devices_agree_with_vmap():
  v, r = NUMBERS
  shares = roots(SPAN, NUM)
  common = deal(SPAN, jnp.asarray(r), shares)
  spec, mesh = PartitionSpec(PARTY), Mesh(jax.devices()[:2], (PARTY,))

  def party(mine, theirs, v):
    answer = fss.evaluate(
      SPAN, Wire(swap=True), v, {**{k: x[0] for k, x in mine.items()}, **theirs}
    )
    return answer.lt[None], answer.borrow[None]

  run = jax.shard_map(
    party, mesh=mesh, in_specs=(spec, PartitionSpec(), PartitionSpec()), out_specs=spec
  )
  want = both(SPAN, v, shares, common)
  for a, b in zip(
    jax.jit(run)(shares, common, jnp.asarray(v)), (want.lt, want.borrow), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def deviation(bits):
  """The number of ones minus one half of all, along the last axis, in standard deviations."""
  bits = np.asarray(bits, float)
  return (bits.sum(-1) - bits.shape[-1] / 2) / np.sqrt(bits.shape[-1] / 4)


def chi_square(z):
  """The chi-square statistic of independent deviations, in its own standard deviations."""
  return (np.sum(np.square(z)) - z.size) / np.sqrt(2 * z.size)


@pytest.mark.parametrize("near", [False, True])
def test_a_share_alone_is_a_fair_coin(near):
  v, r = NUMBERS
  v = r - (v & np.uint32(1)) if near else v
  shares = roots(SPAN, NUM)
  answer = both(SPAN, v, shares, deal(SPAN, jnp.asarray(r), shares))
  for shared in (answer.lt, answer.borrow):
    want = np.asarray(shared[0] ^ shared[1])
    for share in np.asarray(shared):
      assert abs(deviation(share)) < 5
      assert abs(deviation(share ^ want)) < 5


def unpacked(words):
  """[..., num] uint32 -> [bits, num]."""
  words = np.asarray(words).reshape(-1, words.shape[-1])
  return ((words[:, None] >> np.arange(32, dtype=np.uint32)[:, None]) & 1).reshape(
    -1, words.shape[-1]
  )


@pytest.mark.parametrize("number", [0, 2**20 - 1, 0b01011100101101110010])
def test_correction_words_are_uniform_whatever_the_number(number):
  """Each bit, alone and against the bits of either party's root."""
  shares = roots(SPAN, NUM)
  common = deal(SPAN, jnp.full(NUM, number, jnp.uint32), shares)
  used = 3 * (13 % 10)  # bits of the second word of controls
  controls = unpacked(common["controls"])
  assert not controls[30:32].any()
  assert not controls[32 + used :].any()
  bits = np.concatenate(
    [unpacked(common["seeds"]), unpacked(common["leaf"]), controls[:30], controls[32 : 32 + used]]
  )
  assert len(bits) == 13 * 131 + 128
  assert abs(chi_square(deviation(bits))) < 5
  assert np.abs(deviation(bits)).max() < 6
  for root in shares["root"]:
    for i in (0, 77):
      assert abs(chi_square(deviation(bits ^ unpacked(root)[i]))) < 5


@pytest.mark.parametrize(
  ("name", "where", "bit"), [("seeds", (0, 2), 5), ("controls", (0,), 2), ("controls", (0,), 3)]
)
def test_one_flipped_bit_spoils_the_answers(name, where, bit):
  v, r = NUMBERS
  v = r ^ (v & np.uint32(0xFFF))  # the path is left late
  shares = roots(SPAN, NUM)
  common = deal(SPAN, jnp.asarray(r), shares)
  common[name] = common[name].at[where].set(common[name][where] ^ np.uint32(1 << bit))
  answer = both(SPAN, v, shares, common)
  want, borrow = truth(SPAN, v, r)
  assert np.mean(np.asarray(answer.lt[0] ^ answer.lt[1]) != want) > 0.2
  np.testing.assert_array_equal(np.asarray(answer.borrow[0] ^ answer.borrow[1]), borrow)


def test_one_flipped_bit_of_a_leaf_spoils_its_number_alone():
  r = NUMBERS[1]
  v = r & ~np.uint32(127)
  shares = roots(SPAN, NUM)
  common = deal(SPAN, jnp.asarray(r), shares)
  common["leaf"] = common["leaf"].at[0].set(common["leaf"][0] ^ np.uint32(1))
  for number, flipped in ((v, 1), (v + np.uint32(1), 0)):
    lt = both(SPAN, number, shares, common).lt
    np.testing.assert_array_equal(np.asarray(lt[0] ^ lt[1]) ^ flipped, truth(SPAN, number, r)[0])


def test_keys_of_other_roots_do_not_answer():
  v, r = NUMBERS
  lt = both(SPAN, v, roots(SPAN, NUM, 1), deal(SPAN, jnp.asarray(r), roots(SPAN, NUM))).lt
  assert abs(deviation(np.asarray(lt[0] ^ lt[1]) ^ truth(SPAN, v, r)[0])) < 5


def test_the_block_function_is_chacha20_with_a_key_of_16_bytes():
  """Test vector 1 of draft-strombergson-chacha-test-vectors: zero key and nonce, 20 rounds."""
  want = (
    "89670952608364fd00b2f90936f031c8e756e15dba04b8493d00429259b20f46"
    "cc04f111246b6c2ce066be3bfb32d9aa0fddfbc12123d4b9e44f34dca05a103f"
  )
  state = tuple(jnp.full((2, 3), word, jnp.uint32) for word in (*fss._SIGMA, *[0] * 12))
  for rounds in (fss._rounds, fss._rounds_in_one_loop):
    words = np.stack(jax.jit(rounds)(state))
    for i, j in np.ndindex(2, 3):
      assert words[:, i, j].astype("<u4").tobytes().hex() == want
  assert fss._windows_are_exact()


def test_a_compiler_that_treats_windows_otherwise_is_not_trusted(monkeypatch):
  fss._windows_are_exact.cache_clear()
  monkeypatch.setattr(fss, "_rounds_in_one_loop", lambda state: state)
  assert not fss._windows_are_exact()
  v, r = np.random.default_rng(7).integers(0, 2**10, (2, 300), np.uint32)
  check(Span(0, 10), v, r)
  fss._windows_are_exact.cache_clear()


@pytest.mark.parametrize("span", [Span(0, 3), Span(0, 6), Span(0, 17), *LONG], ids=str)
def test_the_keys_take_the_bytes_of_their_tree(span):
  """For each element 16 bytes and 3 control bits a level, ten levels' to a word, and the leaf.

  The roots come from a seed.
  """
  num, key_bytes = 3, 0
  for bits in [span.high - span.low] + ([] if span.cut is None else [span.cut]):
    levels = max(0, bits - 7)
    key_bytes += 16 * levels + 4 * -(-levels // 10) + 4 * -(-(2 ** min(bits, 7)) // 32)
  shapes = {
    name: jax.ShapeDtypeStruct((2, *m.shape), m.dtype) for name, m in fss.masks(span, num).items()
  }
  derive = lambda r, shares: fss.derive(span, r, shares)[0].common
  common = jax.eval_shape(derive, jax.ShapeDtypeStruct((num,), jnp.uint64), shapes)
  assert key_bytes == sum(x.size * x.dtype.itemsize for x in common.values()) / num


@pytest.mark.optimised
def test_millions_of_elements_need_little_memory_besides_their_keys():
  span, num = Span(0, 40, 16), 2**22
  shares = {
    name: jax.ShapeDtypeStruct((2, *m.shape), m.dtype) for name, m in fss.masks(span, num).items()
  }
  number = jax.ShapeDtypeStruct((num,), jnp.uint64)
  derive = jax.jit(lambda r, s: fss.derive(span, r, s)[0].common)
  party = lambda mine, theirs, v: fss.evaluate(span, Wire(), v, {**mine, **theirs})
  run = jax.jit(jax.vmap(party, in_axes=(0, None, None), axis_name=PARTY))
  for lowered in (
    derive.lower(number, shares),
    run.lower(shares, jax.eval_shape(derive, number, shares), number),
  ):
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 128 * 2**20
