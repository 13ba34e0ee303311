import os

import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import prng
from primia_jax.secagg import keys, subkeys

KEY = np.arange(8, dtype=np.uint32) * 0x1234567 + 5
# The 0.1 % and 99.9 % quantiles of chi-square with 255 degrees of freedom (Wilson and Hilferty's
# cube root).
LOW, HIGH = (255 * (1 - 2 / (9 * 255) + z * (2 / (9 * 255)) ** 0.5) ** 3 for z in (-3.09, 3.09))


def chi_square(values):
  counts = np.bincount(np.asarray(values).view(np.uint8).ravel(), minlength=256)
  return np.sum((counts - counts.sum() / 256) ** 2 / (counts.sum() / 256))


@pytest.mark.parametrize("num_words", [0, 1, 15, 16, 17, 1000])
def test_the_stream_on_the_host_is_that_of_the_arrays(num_words):
  nonce = (7, 2**32 - 1, 3)
  blocks = prng.chacha20(jnp.asarray(KEY), jnp.asarray(nonce, jnp.uint32), 0, -(-num_words // 16))
  assert np.array_equal(
    keys.stream(KEY, nonce, num_words), np.asarray(blocks).T.ravel()[:num_words]
  )


def test_the_stream_is_that_of_rfc_8439():
  """Section 2.3.2, whose counter is 1: the second block."""
  key = keys.words(bytes(range(32)))
  nonce = keys.words(bytes.fromhex("000000090000004a00000000"))
  block = keys.stream(key, nonce, 32)[16:].astype("<u4").tobytes()
  assert block.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4")


def test_x25519_agrees_as_in_rfc_7748():
  """Section 6.1."""
  a = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
  b = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
  shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
  assert (
    keys.public_key(a).hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
  )
  assert [*keys.agree(a, keys.public_key(b)), *keys.agree(b, keys.public_key(a))] == [
    bytes.fromhex(shared)
  ] * 2


# The points of small order on Curve25519 and its twist (Bernstein's list), with which anybody knows
# the secret.
P = 2**255 - 19
LOW_ORDER = [
  0,
  1,
  325606250916557431795983626356110631294008115727848805560023387167927233504,
  39382357235489614581723060781553021112529911719440698176882885853963445705823,
  P - 1,
  P,
  P + 1,
]


@pytest.mark.parametrize("point", LOW_ORDER)
def test_points_of_low_order_are_refused(point):
  with pytest.raises(ValueError, match="low order"):
    keys.agree(keys.key_pair().private, point.to_bytes(32, "little"))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_keys_of_another_length_are_refused(size):
  with pytest.raises(ValueError, match="32"):
    keys.agree(os.urandom(32), bytes(size))
  with pytest.raises(ValueError, match="32"):
    keys.expand(bytes(size), "mask", 0, 0, 1)


def test_keys_of_all_uses_differ_and_both_ends_make_the_same():
  a, b = keys.key_pair(), keys.key_pair()
  (shared,) = keys.agree(a.private, b.public)
  uses = [
    (purpose, round_index, low, high)
    for purpose in ("mask", "box", "mas", "k")
    for round_index in (0, 1, 256, 2**32 - 1)
    for low, high in ((0, 1), (1, 0), (0, 256), (256, 0), (1, 1))
  ]
  made = [keys.expand(shared, *use) for use in uses]
  assert all(key.shape == (8,) and key.dtype == np.uint32 for key in made)
  assert len({key.tobytes() for key in made}) == len(uses)
  (again,) = keys.agree(b.private, a.public)
  assert all(
    np.array_equal(key, keys.expand(again, *use)) for key, use in zip(made, uses, strict=True)
  )


@pytest.mark.parametrize("use", [(-1, 0, 1), (2**32, 0, 1), (0, -1, 0), (0, 0, 2**32)])
def test_a_use_outside_its_range_is_refused(use):
  with pytest.raises(ValueError, match=r"\[0, 2\^32\)"):
    keys.expand(bytes(32), "mask", *use)


def folded(secret):
  """What seeds the masks of Flower 1.42: the exclusive or of the secret's words, of base64 text at
  that.
  """
  return np.bitwise_xor.reduce(np.frombuffer(secret, "<u4")).astype("<u4").tobytes()


def test_mask_seeds_carry_all_their_256_bits():
  """Flower's fold to 28 varying bits; here each of 256 bits is set half the time, and no two move
  together.
  """
  pairs = [keys.key_pair() for _ in range(64)]
  made = [
    keys.raw(keys.expand(keys.agree(a.private, b.public)[0], "mask", 1, i, j))
    for i, a in enumerate(pairs)
    for j, b in enumerate(pairs[i + 1 :], i + 1)
  ]
  bits = (
    np.unpackbits(np.frombuffer(b"".join(made), np.uint8))
    .reshape(len(made), 256)
    .astype(np.float64)
  )
  n = len(made)
  assert n == 2016
  assert np.all(np.abs(bits.mean(0) - 0.5) < 5 * 0.5 / n**0.5)
  correlation = np.corrcoef(bits.T) - np.eye(256)
  assert np.abs(correlation).max() < 6 / n**0.5
  assert np.linalg.matrix_rank(np.cov(bits.T)) == 256
  assert LOW / 1.2 < chi_square(np.frombuffer(b"".join(made), np.uint8)) < HIGH * 1.2
  text = [key.hex().encode() for key in made]  # the same statistic, of a key folded as Flower's is
  weak = np.unpackbits(np.frombuffer(b"".join(map(folded, text)), np.uint8)).reshape(n, 32)
  assert np.linalg.matrix_rank(np.cov(weak.T.astype(np.float64))) <= 28


def test_one_changed_bit_of_the_secret_changes_half_of_the_key():
  secret = bytearray(os.urandom(32))
  before = np.unpackbits(
    np.frombuffer(keys.raw(keys.expand(bytes(secret), "mask", 0, 0, 1)), np.uint8)
  )
  for bit in range(256):
    secret[bit // 8] ^= 1 << bit % 8
    after = np.unpackbits(
      np.frombuffer(keys.raw(keys.expand(bytes(secret), "mask", 0, 0, 1)), np.uint8)
    )
    assert 76 < (before != after).sum() < 180  # 6.5 standard deviations
    secret[bit // 8] ^= 1 << bit % 8


def test_a_box_opens_for_its_key_and_its_purpose_only():
  box = keys.seal(KEY, b"two shares", b"1 to 2, round 3")
  assert len(box) == len(b"two shares") + keys.BOX_OVERHEAD
  assert keys.open_box(KEY, box, b"1 to 2, round 3") == b"two shares"
  other = KEY.copy()
  other[3] ^= 1
  tries = [
    (other, box, b"1 to 2, round 3"),
    (KEY, box, b"2 to 1, round 3"),
    (KEY, box[:-1], b"1 to 2, round 3"),
  ]
  tries += [
    (KEY, box[:i] + bytes([box[i] ^ 1]) + box[i + 1 :], b"1 to 2, round 3") for i in range(len(box))
  ]
  tries += [(KEY, b"", b""), (KEY, bytes(keys.BOX_OVERHEAD), b"")]
  for wrong in tries:
    with pytest.raises(ValueError, match="sealed box"):
      keys.open_box(*wrong)
  assert keys.seal(KEY, b"two shares", b"") != keys.seal(KEY, b"two shares", b"")


def test_a_signature_is_of_one_message_by_one_identity():
  a, b = keys.identity(), keys.identity()
  signature = keys.sign(a.private, b"message")
  assert len(signature) == keys.SIGNATURE_BYTES
  assert keys.verify(a.public, b"message", signature)
  assert not keys.verify(a.public, b"massage", signature)
  assert not keys.verify(b.public, b"message", signature)
  assert not keys.verify(a.public, b"message", signature[:-1] + bytes([signature[-1] ^ 1]))
  assert not keys.verify(a.public, b"message", b"")
  assert not keys.verify(b"short", b"message", signature)


def test_pairs_follow_from_a_private_half_and_are_fresh_without():
  private = bytes(range(32))
  for made in (keys.key_pair, keys.identity):
    assert made(private) == made(private)
    assert made(private).private == private
    with pytest.raises(ValueError, match="32 bytes"):
      made(b"")  # as an empty file has it
  assert (
    len({keys.key_pair().private for _ in range(50)} | {keys.identity().private for _ in range(50)})
    == 100
  )


def test_no_private_key_is_printed():
  for pair in (keys.key_pair(), keys.identity()):
    assert pair.private.hex() not in repr(pair)
    assert repr(pair.private) not in f"{pair} {pair!r}"


def test_a_commitment_binds_and_differs_from_the_secret():
  secrets = [bytes([i]) * 32 for i in range(256)]
  assert len({keys.commit(s) for s in secrets} | set(secrets)) == 512


@pytest.mark.parametrize(
  ("call", "told"),
  [
    (lambda: keys.stream(KEY, (0, 0), 1), "three integers"),
    (lambda: keys.stream(KEY, (0, 0, 2**32), 1), "three integers"),
    (lambda: keys.stream(KEY[:7], (0, 0, 0), 1), r"uint32\[8\]"),
    (lambda: keys.stream(KEY.astype(np.int64), (0, 0, 0), 1), r"uint32\[8\]"),
    (lambda: keys.stream(KEY, (0, 0, 0), -1), "num_words=-1"),
    (lambda: keys.stream(KEY, (0, 0, 0), 2**36 + 1), "num_words"),
  ],
)
def test_bad_input_is_named(call, told):
  with pytest.raises(ValueError, match=told):
    call()


def test_expanding_a_key_gives_the_next_bytes_of_its_stream_at_each_call():
  entropy = keys.expanding(KEY)
  want = keys.stream(KEY, (0, 0, 0), 16).astype("<u4").tobytes()
  assert entropy(5) + entropy(0) + entropy(59) == want
  assert keys.expanding(KEY)(64) == want
  assert keys.expanding(KEY + 1)(64) != want


def test_no_two_uses_of_a_sites_secrets_share_a_key():
  """Every row of the table in `subkeys`, for pairs of three sites in two rounds."""
  secrets = {i: subkeys.draw(os.urandom) for i in range(3)}
  boxes = {i: keys.key_pair() for i in range(3)}
  found = [keys.words(s.noise) for s in secrets.values()]
  for round_index in (0, 1):
    for i, own in secrets.items():
      public = {j: secrets[j].mask.public for j in secrets if j != i}
      for j, key in subkeys.pair_mask_keys(own.mask.private, public, round_index, i).items():
        other = subkeys.pair_mask_keys(
          secrets[j].mask.private, {i: own.mask.public}, round_index, j
        )
        assert np.array_equal(key, other[i])
        found += [key] if i < j else []
        sent = subkeys.box_key(boxes[i].private, boxes[j].public, round_index, i, j)
        got = subkeys.box_key(boxes[j].private, boxes[i].public, round_index, i, j)
        assert np.array_equal(sent, got)
        found += [sent]
      found += [subkeys.self_mask_key(own.seed, round_index, i)]
  ids = np.arange(3, dtype=np.int32)
  of_pairs, noise = subkeys.dealt(jnp.asarray(KEY), ids, np.array([[1, 2], [0, 2], [0, 1]]))
  found += [*np.asarray(of_pairs)[[0, 0, 1], [0, 1, 1]], *np.asarray(noise)]
  found += [
    keys.words(subkeys.simulated(keys.raw(KEY), name)(32)) for name in (0, 1, 2, "graph", "dealer")
  ]
  assert len({keys.raw(np.asarray(key)) for key in found}) == len(found) == 3 + 2 * 12 + 6 + 5
