"""Key agreement, signatures and sealed boxes, on the host: they replace the trusted dealer.

X25519 (RFC 7748), Ed25519 (RFC 8032), HKDF-SHA256 (RFC 5869), ChaCha20 and ChaCha20-Poly1305 (RFC
8439) are all from the library `cryptography`, which no other module imports. Everything here takes
plain bytes and NumPy arrays. `subkeys` lists what each key is for.

Identities are pinned: every site gets the others' Ed25519 public keys beforehand, outside the
protocol. The server carries the keys on which sites agree, but cannot replace them, assuming that
Ed25519 is unforgeable.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_SALT = b"primia_jax secure aggregation v1"
_BOX_NONCE, _BOX_TAG = 12, 16
BOX_OVERHEAD = _BOX_NONCE + _BOX_TAG  # bytes by which a sealed box is longer than its message
KEY_BYTES, SIGNATURE_BYTES = 32, 64

Entropy = Callable[[int], bytes]  # returns the given number of secret uniform bytes


class Identity(NamedTuple):
  """A long-lived Ed25519 pair of a site or the server; all others pin its public half.

  Attributes:
    private: 32 bytes, which never leave their owner and are not printed.
    public: 32 bytes.
  """

  private: bytes
  public: bytes

  def __repr__(self) -> str:
    return f"Identity(public={self.public.hex()})"


class KeyPair(NamedTuple):
  """An X25519 pair, fresh for each sum.

  Attributes:
    private: 32 bytes, not printed.
    public: 32 bytes.
  """

  private: bytes
  public: bytes

  def __repr__(self) -> str:
    return f"KeyPair(public={self.public.hex()})"


def identity(private: bytes | None = None) -> Identity:
  """The signing identity with this private half; a fresh one without."""
  private = os.urandom(KEY_BYTES) if private is None else private
  return Identity(
    private, Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
  )


def key_pair(private: bytes | None = None) -> KeyPair:
  """The pair for key agreement with this private half; a fresh one without."""
  private = os.urandom(KEY_BYTES) if private is None else private
  return KeyPair(private, public_key(private))


def public_key(private: bytes) -> bytes:
  """The X25519 public key of 32 private bytes; the server checks recovered private keys by it."""
  return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, *peers_public: bytes) -> list[bytes]:
  """The raw X25519 secrets shared with each peer; under CDH only the two private keys give one.

  The private key is loaded once, which costs as much as one agreement.

  Returns:
    32 bytes for each, not uniform: expand them before use.

  Raises:
    ValueError: for a key of the wrong length, or a public key of low order, whose secret
      anyone could compute.
  """
  own = X25519PrivateKey.from_private_bytes(private)

  def one(public: bytes) -> bytes:
    try:
      return own.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as e:
      raise ValueError(
        f"public key {public.hex()} cannot be agreed with: it must be 32 bytes and no point of low "
        f"order"
      ) from e

  return list(map(one, peers_public))


def expand(shared: bytes, purpose: str, round: int, a: int, b: int) -> np.ndarray:
  """A key for one use, by HKDF-SHA256 with the purpose, the round and the ordered pair in the info.

  Assuming that HMAC-SHA256 is a pseudorandom function, keys of different uses are independent and
  uniform over 256 bits to whoever lacks `shared`. The pair is ordered: both ends of a pair mask
  pass (lower, higher), a box from a to b passes (a, b), and a site's key for itself passes (a, a).

  Args:
    shared: 32 secret bytes.
    purpose: the use; `subkeys` has all of them.
    round: from 0 to 2^32 - 1, as are a and b.
    a: a site number.
    b: a site number.

  Returns:
    [8] uint32, as `prng` takes it.

  Raises:
    ValueError: for a number outside uint32 or a secret that is not 32 bytes.
  """
  if len(shared) != KEY_BYTES:
    raise ValueError(f"a shared secret of {len(shared)} bytes; it must be {KEY_BYTES}")
  for name, n in (("round", round), ("a", a), ("b", b)):
    if not 0 <= n < 2**32:
      raise ValueError(f"{name}={n}; it must be in [0, 2^32)")
  label = purpose.encode()
  info = b"".join(int(n).to_bytes(4, "little") for n in (len(label), round, a, b)) + label
  return words(HKDF(SHA256(), KEY_BYTES, _SALT, info).derive(shared))


def seal(key: np.ndarray, message: bytes, associated: bytes) -> bytes:
  """Encrypts and authenticates: only holders of the key can read it or make a box that opens.

  Args:
    key: [8] uint32, for one direction of one pair.
    message: its content is hidden, its length is not.
    associated: authenticated but not sent: sender, recipient and round.

  Returns:
    nonce | ciphertext | tag, `BOX_OVERHEAD` bytes longer than the message.
  """
  nonce = os.urandom(_BOX_NONCE)
  return nonce + ChaCha20Poly1305(raw(key)).encrypt(nonce, message, associated)


def open_box(key: np.ndarray, box: bytes, associated: bytes) -> bytes:
  """The message that `seal` sealed.

  Raises:
    ValueError: if the box was made or altered without the key, or for another recipient, round or
      purpose.
  """
  if len(box) < BOX_OVERHEAD:
    raise ValueError(f"a sealed box of {len(box)} bytes; it must have at least {BOX_OVERHEAD}")
  try:
    return ChaCha20Poly1305(raw(key)).decrypt(box[:_BOX_NONCE], box[_BOX_NONCE:], associated)
  except InvalidTag as e:
    raise ValueError(
      "the sealed box does not open: another key, another purpose, or altered on the way"
    ) from e


def sign(private: bytes, message: bytes) -> bytes:
  """The Ed25519 signature, 64 bytes, of an identity's private key."""
  return Ed25519PrivateKey.from_private_bytes(private).sign(message)


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
  """Whether the owner of this identity signed exactly this message."""
  try:
    Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
  except (InvalidSignature, ValueError):
    return False
  return True


def commit(secret: bytes) -> bytes:
  """SHA-256 of 32 uniform secret bytes: it binds to them, and their entropy hides them."""
  return hashlib.sha256(_SALT + secret).digest()


def stream(key: np.ndarray, nonce: Sequence[int], num_words: int) -> np.ndarray:
  """The ChaCha20 keystream from counter 0: `prng.chacha20(key, nonce, 0, n).T`, flat, on the host.

  Args:
    key: [8] uint32.
    nonce: three integers from 0 to 2^32 - 1, never used twice with this key.
    num_words: at most 2^36, the range of the block counter.

  Returns:
    [num_words] uint32.

  Raises:
    ValueError: for a wrong key, nonce or number of words.
  """
  start = np.array([0, *map(int, nonce)], np.uint64)
  if start.size != 4 or np.any(start >= 2**32):
    raise ValueError(f"nonce={nonce}; it must be three integers in [0, 2^32)")
  if not 0 <= num_words <= 2**36:
    raise ValueError(f"num_words={num_words}; it must be in [0, 2^36]")
  cipher = Cipher(algorithms.ChaCha20(raw(key), start.astype("<u4").tobytes()), mode=None)
  return words(cipher.encryptor().update(bytes(4 * num_words)))


def expanding(key: np.ndarray) -> Entropy:
  """Entropy from one key: every call returns the next bytes of its ChaCha20 keystream.

  Args:
    key: [8] uint32, used for this and nothing else.
  """
  cipher = Cipher(algorithms.ChaCha20(raw(key), bytes(16)), mode=None).encryptor()
  return lambda size: cipher.update(bytes(size))


def words(secret: bytes) -> np.ndarray:
  """Bytes as little-endian uint32 words: 32 bytes are a key of `prng`."""
  return np.frombuffer(secret, "<u4").astype(np.uint32)


def raw(key: np.ndarray) -> bytes:
  """The 32 bytes of an [8] uint32 key.

  Raises:
    ValueError: for another shape or dtype.
  """
  if np.shape(key) != (8,) or key.dtype != np.uint32:
    raise ValueError(f"key is {np.asarray(key).dtype}{list(np.shape(key))}; it must be uint32[8]")
  return np.asarray(key).astype("<u4").tobytes()
