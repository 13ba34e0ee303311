import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from primia_jax import native, prng

NONCE = jnp.asarray([7, 0, 2**32 - 1], jnp.uint32)


@pytest.fixture(params=["native", "plain"])
def form(request, monkeypatch):
  """Runs the test with and without the C form."""
  monkeypatch.setenv("PRIMIA_NATIVE", "1" if request.param == "native" else "0")
  if request.param == "native" and not native.available():
    pytest.skip("no C compiler here")


def key_of(seed: int) -> jax.Array:
  return prng.key_of(np.random.default_rng(seed).bytes(32))


def words(text: str) -> jax.Array:
  return jnp.asarray(np.frombuffer(bytes.fromhex(text), "<u4"))


def oracle(key, nonce, counter: int, num_blocks: int) -> np.ndarray:
  """[num_blocks, 16] words of the `cryptography` package's keystream."""
  start = np.concatenate([[counter], np.asarray(nonce)]).astype("<u4").tobytes()
  cipher = Cipher(algorithms.ChaCha20(np.asarray(key).astype("<u4").tobytes(), start), None)
  return np.frombuffer(cipher.encryptor().update(bytes(64 * num_blocks)), "<u4").reshape(-1, 16)


def oracle_bits(key, nonce, size: int, dtype) -> np.ndarray:
  """The order of words in the docstring of `bits`, written as indices."""
  num_tiles = -(-size * np.dtype(dtype).itemsize // (64 * prng.TILE))
  stream = oracle(key, nonce, 0, num_tiles * prng.TILE)
  t, p = np.divmod(np.arange(size), (64 // np.dtype(dtype).itemsize) * prng.TILE)
  w, b = np.divmod(p, prng.TILE)
  if dtype == np.uint32:
    return stream[t * prng.TILE + b, w]
  low, high = stream[t * prng.TILE + b, w], stream[t * prng.TILE + b, w + 8]
  return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


# RFC 8439: section 2.3.2; 2.4.2 (the first block of its keystream); appendix A.1, vectors 1 to 5.
ZERO, COUNT = "00" * 32, bytes(range(32)).hex()
VECTORS = [
  (
    COUNT,
    "000000090000004a00000000",
    1,
    "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4ed2826446079faa09"
    "14c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
  ),
  (
    COUNT,
    "000000000000004a00000000",
    1,
    "224f51f3401bd9e12fde276fb8631ded8c131f823d2c06e27e4fcaec9ef3cf788a3b0aa372600a92"
    "b57974cded2b9334794cba40c63e34cdea212c4cf07d41b7",
  ),
  (
    ZERO,
    "00" * 12,
    0,
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a376a43"
    "b8f41518a11cc387b669b2ee6586",
  ),
  (
    ZERO,
    "00" * 12,
    1,
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed29b721769ce64e43d57133b074d839d531ed"
    "1f28510afb45ace10a1f4b794d6f",
  ),
  (
    "00" * 31 + "01",
    "00" * 12,
    1,
    "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a8eca00bbb4a73bdad192b5c4"
    "2f73f2fd4e273644c8b36125a64addeb006c13a0",
  ),
  (
    "00ff" + "00" * 30,
    "00" * 12,
    2,
    "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca13b25aa26cb4a648cb9b9d1b"
    "e65b2c0924a66c54d545ec1b7374f4872e99f096",
  ),
  (
    ZERO,
    "00" * 11 + "02",
    0,
    "c2c64d378cd536374ae204b9ef933fcd1a8b2288b3dfa49672ab765b54ee27c78a970e0e955c14f3a88e741b97c2"
    "86f75f8fc299e8148362fa198a39531bed6d",
  ),
]


@pytest.mark.parametrize(("key", "nonce", "counter", "stream"), VECTORS)
def test_rfc_8439_vectors(key, nonce, counter, stream):
  block = prng.chacha20(words(key), words(nonce), counter, 1)
  np.testing.assert_array_equal(block.T.ravel(), words(stream))


@pytest.mark.parametrize(("counter", "num_blocks"), [(0, 1), (5, 300), (2**32 - 9, 9)])
def test_blocks_equal_the_cryptography_package(counter, num_blocks):
  for seed in range(3):
    key = key_of(seed)
    expected = oracle(key, NONCE, counter, num_blocks)
    np.testing.assert_array_equal(prng.chacha20(key, NONCE, counter, num_blocks).T, expected)
    traced = jax.jit(prng.chacha20, static_argnums=3)(key, NONCE, jnp.uint32(counter), num_blocks)
    np.testing.assert_array_equal(traced.T, expected)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("size", [0, 1, 2049, 150_001])
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_bits_are_the_stated_words(size, dtype):
  with jax.enable_x64(dtype == np.uint64):
    got = prng.bits(key_of(0), NONCE, (size,), dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, oracle_bits(key_of(0), NONCE, size, dtype))


@pytest.mark.usefixtures("form")
def test_bits_do_not_depend_on_the_transformation():
  keys, shape = jnp.stack([key_of(i) for i in range(4)]), (50, 70)
  expected = np.stack([oracle_bits(k, NONCE, 3500, np.uint32).reshape(shape) for k in keys])
  one = functools.partial(prng.bits, nonce=NONCE, shape=shape)
  mesh = Mesh(np.array(jax.devices()[:4]), ("site",))
  sharded = jax.shard_map(
    jax.vmap(one), mesh=mesh, in_specs=PartitionSpec("site"), out_specs=PartitionSpec("site")
  )
  for got in (
    jnp.stack([one(k) for k in keys]),
    jax.jit(jax.vmap(one))(keys),
    lax.map(one, keys),
    jax.jit(sharded)(keys),
  ):
    np.testing.assert_array_equal(got, expected)
  nonces = jnp.stack([NONCE, NONCE + np.uint32(1)])
  got = jax.vmap(lambda n: prng.bits(keys[0], n, shape))(nonces)
  np.testing.assert_array_equal(got, [prng.bits(keys[0], n, shape) for n in nonces])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("size", [1, 20_001])
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_mask_sum_is_the_signed_sum_of_bits(size, dtype):
  signs = [1, -1, 0, 1, -1, -1]
  keys = jnp.stack([key_of(i) for i in range(len(signs))])
  with jax.enable_x64(dtype == np.uint64), np.errstate(over="ignore"):
    expected = sum(
      int(s) * oracle_bits(k, NONCE, size, dtype).astype(object)
      for s, k in zip(signs, keys, strict=True)
    )
    expected = (expected % 2 ** (8 * np.dtype(dtype).itemsize)).astype(dtype)
    for fn in (prng.mask_sum, jax.jit(lambda *args: prng.mask_sum(*args), static_argnums=(3, 4))):
      got = fn(keys, jnp.asarray(signs, jnp.int32), NONCE, (size,), dtype)
      assert got.dtype == dtype
      np.testing.assert_array_equal(got, expected)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("how", ["vmap", "shard_map", "scan"])
def test_pairwise_masks_cancel_over_sites(dtype, how):
  num_sites, shape = 8, (2, 3, 5000)
  root = key_of(0)
  pair = lambda i, j: prng.derive(root, min(i, j), max(i, j))
  keys = jnp.stack([jnp.stack([pair(i, j) for j in range(num_sites)]) for i in range(num_sites)])
  signs = jnp.sign(jnp.arange(num_sites)[None, :] - jnp.arange(num_sites)[:, None]).astype(
    jnp.int32
  )
  mesh, spec = Mesh(np.array(jax.devices()[:4]), ("site",)), PartitionSpec("site")
  with jax.enable_x64(dtype == np.uint64):
    one = lambda k, s: prng.mask_sum(k, s, NONCE, shape, dtype)
    many = {
      "vmap": jax.vmap(one),
      "shard_map": jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=(spec, spec), out_specs=spec),
      "scan": lambda k, s: lax.map(lambda a: one(*a), (k, s)),
    }[how]
    masks = np.asarray(jax.jit(many)(keys, signs))
  assert masks.shape == (num_sites, *shape)
  np.testing.assert_array_equal(masks.sum(0, dtype=dtype), np.zeros(shape, dtype))
  assert all(np.unique(mask).size > 0.99 * mask.size for mask in masks)
  expected = sum(
    int(s) * oracle_bits(k, NONCE, 30_000, dtype).astype(object)
    for s, k in zip(signs[2], keys[2], strict=True)
  )
  np.testing.assert_array_equal(
    masks[2].ravel(), (expected % 2 ** (8 * np.dtype(dtype).itemsize)).astype(dtype)
  )


def test_plain_jax_does_not_depend_on_the_chunk():
  keys, signs = jnp.stack([key_of(i) for i in range(3)]), jnp.asarray([1, -1, 1], jnp.int32)
  size = 7 * 16 * prng.TILE + 5
  get = lambda chunk: prng._portable_mask_sum(keys, signs, NONCE, size, np.dtype(np.uint32), chunk)
  expected = sum(
    int(s) * oracle_bits(k, NONCE, size, np.uint32).astype(np.int64)
    for s, k in zip(signs, keys, strict=True)
  )
  for chunk in (3 * prng.TILE, 2**18):
    np.testing.assert_array_equal(get(chunk), (expected % 2**32).astype(np.uint32))


@pytest.mark.parametrize(("platform", "calls_c"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_only_the_cpu_calls_c(platform, calls_c):
  if not native.available():
    pytest.skip("no C compiler here")
  traced = jax.jit(lambda key: prng.bits(key, NONCE, (5000,))).trace(key_of(0))
  assert ("primia_mask_sum" in traced.lower(lowering_platforms=(platform,)).as_text()) == calls_c


def test_the_sum_over_no_peers_is_zero():
  got = prng.mask_sum(jnp.zeros((0, 8), jnp.uint32), jnp.zeros(0, jnp.int32), NONCE, (2, 3))
  np.testing.assert_array_equal(got, np.zeros((2, 3), np.uint32))


def test_derived_keys_are_the_stated_blocks():
  key = key_of(0)
  np.testing.assert_array_equal(prng.derive(key, 3), oracle(key, [3, 0, 0], 2**32 - 2, 1)[0, :8])
  np.testing.assert_array_equal(
    prng.derive(key, 3, 4, 5), oracle(key, [3, 4, 5], 2**32 - 4, 1)[0, :8]
  )
  np.testing.assert_array_equal(
    prng.derive(key, jnp.uint32(3), 4), jax.jit(prng.derive)(key, jnp.uint32(3), jnp.uint32(4))
  )
  paths = [(1,), (1, 0), (1, 0, 0), (0, 1), (0, 0, 1), (2**32 - 1,)]
  assert len({np.asarray(prng.derive(key, *path)).tobytes() for path in paths}) == len(paths)
  np.testing.assert_array_equal(
    jax.vmap(prng.derive, (None, 0))(key, jnp.arange(3, dtype=jnp.uint32)),
    [prng.derive(key, i) for i in range(3)],
  )


def test_a_key_is_32_bytes_little_endian():
  np.testing.assert_array_equal(prng.key_of(bytes(range(32))), words(COUNT))
  first, second = prng.random_key(), prng.random_key()
  assert first.shape == (8,)
  assert first.dtype == jnp.uint32
  assert not np.array_equal(first, second)


def chi_square(values: np.ndarray) -> float:
  """Pearson's statistic of the values' bytes against uniform, as a z-score (255 degrees of
  freedom).
  """
  counts = np.bincount(np.ascontiguousarray(values).view(np.uint8), minlength=256)
  expected = counts.sum() / 256
  return (((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255)


def test_bits_are_uniform_and_a_biased_generator_is_rejected():
  good = np.asarray(prng.bits(key_of(1), NONCE, (1 << 20,)))
  assert abs(chi_square(good)) < 5
  ones = np.unpackbits(good.view(np.uint8).reshape(-1, 4), axis=1).mean(0)
  assert np.abs(ones - 0.5).max() < 5 * 0.5 / np.sqrt(good.size)
  assert abs(np.corrcoef(good[:-1], good[1:])[0, 1]) < 5 / np.sqrt(good.size)
  biased = np.where(
    np.arange(good.size) % 50 == 0, good & ~np.uint32(1), good
  )  # 1 % of the low bits moved
  assert abs(chi_square(biased)) > 5


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda k: prng.chacha20(k[:7], NONCE, 0, 1), r"key is uint32\[7\]"),
    (lambda k: prng.chacha20(k, NONCE.astype(jnp.int32), 0, 1), r"nonce is int32\[3\]"),
    (lambda k: prng.chacha20(k, NONCE, 0, -1), "num_blocks=-1"),
    (lambda k: prng.chacha20(k, NONCE, 2**32 - 1, 2), "pass the 32-bit counter"),
    (lambda k: prng.bits(k, NONCE, (2**33, 8)), "use several nonces"),
    (lambda k: prng.bits(k, NONCE, (4,), jnp.int32), "must be uint32 or uint64"),
    (lambda k: prng.bits(k, NONCE, (4,), np.uint64), "jax_enable_x64"),
    (lambda k: prng.mask_sum(k, jnp.ones(8, jnp.int32), NONCE, (4,)), r"must be uint32\[P, 8\]"),
    (
      lambda k: prng.mask_sum(k[None], jnp.ones(2, jnp.int32), NONCE, (4,)),
      r"signs is int32\[2\]; .* int32\[1\]",
    ),
    (
      lambda k: prng.mask_sum(k[None], jnp.ones(1, jnp.uint32), NONCE, (4,)),
      r"signs is uint32\[1\]",
    ),
    (lambda k: prng.derive(k), "0 words"),
    (lambda k: prng.derive(k, 1, 2, 3, 4), "4 words"),
    (lambda k: prng.derive(k, -1), r"word -1 is not in \[0, 2\^32\)"),
    (lambda k: prng.derive(k, jnp.int32(1)), r"word int32\[\] is not a uint32 scalar"),
  ],
)
def test_bad_input_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call(key_of(0))


def test_random_keys_are_as_many_fresh_keys():
  keys = prng.random_keys(4)
  assert (keys.shape, keys.dtype) == ((4, 8), np.uint32)
  assert len({row.tobytes() for row in [*keys, *prng.random_keys(4)]}) == 8
