"""Shamir's t-of-n sharing of 32-byte secrets, byte by byte over GF(2^8), for many secrets at once.

Byte i of a secret is the constant of a polynomial of degree t - 1 with uniform other coefficients;
holder x receives its value at x. Fewer than t shares of one secret are uniform and independent of
it, whatever the computing power (Shamir, CACM 1979); t shares give it.

Over GF(2^8), unlike a prime field, a share is exactly as long as the secret (32 bytes), every
string of bytes is a legal share, and a product is one table look-up. The field has 255 points
besides 0. That bounds a neighbourhood, not the number of sites: for more, use a sparser graph.
"""

from __future__ import annotations

import os

import numpy as np

MAX_SHARES = 255


def _tables() -> tuple[np.ndarray, np.ndarray]:
  """Powers of the generator 3 of GF(2^8) modulo x^8 + x^4 + x^3 + x + 1, and their logarithms."""
  power, log, value = np.zeros(510, np.uint8), np.zeros(256, np.int64), 1
  for i in range(255):
    power[i] = power[i + 255] = value
    log[value] = i
    value ^= (value << 1) ^ (0x11B if value & 0x80 else 0)
  return power, log


_POWER, _LOG = _tables()
_UNITS = _POWER[_LOG[1:, None] + _LOG[None, 1:]]
_PRODUCT = np.pad(_UNITS, ((1, 0), (1, 0)))  # [256, 256] uint8, the multiplication table


def share(secrets: np.ndarray, threshold: int, points: np.ndarray) -> np.ndarray:
  """Shares each secret among the holders of the points.

  Args:
    secrets: [S, 32] uint8.
    threshold: t shares give the secret; t - 1 tell nothing about it.
    points: [n], distinct, from 1 to 255.

  Returns:
    [S, n, 32] uint8.

  Raises:
    ValueError: for point 0 (it would be the secret), a repeated point, or a threshold outside [1,
      n].
  """
  points = _checked(np.asarray(points)[None], threshold)[0]
  secrets = np.asarray(secrets)
  if secrets.ndim != 2 or secrets.dtype != np.uint8:
    raise ValueError(f"secrets is {secrets.dtype}{list(secrets.shape)}; it must be uint8[S, 32]")
  drawn = os.urandom(secrets.size * (threshold - 1))
  coefficients = (*np.frombuffer(drawn, np.uint8).reshape(threshold - 1, *secrets.shape), secrets)
  shares = np.empty((len(secrets), len(points), secrets.shape[1]), np.uint8)
  for j, point in enumerate(points):
    times_point, value = _PRODUCT[point].tobytes(), np.zeros_like(secrets)
    for coefficient in coefficients:  # Horner, the constant last
      value = (
        np.frombuffer(value.tobytes().translate(times_point), np.uint8).reshape(secrets.shape)
        ^ coefficient
      )
    shares[:, j] = value
  return shares


def combine(points: np.ndarray, shares: np.ndarray, threshold: int) -> np.ndarray:
  """The secrets, from at least t shares of each.

  Args:
    points: [m], of the holders of all secrets, or [S, m], of each secret's.
    shares: [S, m, 32] uint8.
    threshold: t; the first t shares are used, and the others are compared with what they imply.

  Returns:
    [S, 32] uint8. With m = t no wrong share can be noticed; then check the secret against a
    commitment or its public key.

  Raises:
    ValueError: for fewer than t shares, point 0, a repeated point, or shares that are not on one
      polynomial.
  """
  shares = np.asarray(shares)
  points = np.broadcast_to(np.asarray(points), shares.shape[:2])
  points = _checked(points, threshold)
  if shares.ndim != 3 or shares.dtype != np.uint8:
    raise ValueError(f"shares is {shares.dtype}{list(shares.shape)}; it must be uint8[S, m, 32]")
  known, held = points[:, :threshold], shares[:, :threshold]
  for extra in range(threshold, points.shape[1]):
    wrong = np.any(_evaluate(known, held, points[:, extra]) != shares[:, extra], axis=1)
    if wrong.any():
      raise ValueError(
        f"inconsistent shares of the secrets in rows {np.flatnonzero(wrong).tolist()}: some are "
        f"forged"
      )
  return _evaluate(known, held, np.zeros(len(points), np.uint8))


def extend(points: np.ndarray, shares: np.ndarray, at: np.ndarray) -> np.ndarray:
  """The shares of other holders, from exactly t of each secret; they tell which shares are wrong.

  Args:
    points: [t], distinct, from 1 to 255.
    shares: [S, t, 32] uint8.
    at: [n], from 0 to 255.

  Returns:
    [S, n, 32] uint8.
  """
  known = _checked(np.broadcast_to(points, shares.shape[:2]), len(points))
  place = lambda x: np.full(len(shares), x, np.uint8)
  return np.stack([_evaluate(known, shares, place(x)) for x in at], axis=1)


def _evaluate(points: np.ndarray, shares: np.ndarray, at: np.ndarray) -> np.ndarray:
  """The polynomials through (points [S, t], shares [S, t, 32]), at one place each [S]."""
  total = np.zeros((len(shares), shares.shape[2]), np.uint8)
  for j in range(points.shape[1]):
    others = np.delete(points, j, axis=1)
    factors = _PRODUCT[
      at[:, None] ^ others, _inverse(points[:, j, None] ^ others)
    ]  # Lagrange's basis polynomial
    basis = np.ones(len(points), np.uint8)
    for factor in factors.T:
      basis = _PRODUCT[basis, factor]
    total ^= _PRODUCT[basis[:, None], shares[:, j]]
  return total


def _inverse(x: np.ndarray) -> np.ndarray:
  return _POWER[255 - _LOG[x]]


def _checked(points: np.ndarray, threshold: int) -> np.ndarray:
  """The points [S, n] as uint8."""
  n = points.shape[1]
  if not 1 <= threshold <= n:
    raise ValueError(
      f"threshold={threshold} with {n} shares; a secret needs 1 <= threshold <= number of shares"
    )
  if n and (points.min() < 1 or points.max() > MAX_SHARES):
    raise ValueError(
      f"points from {points.min()} to {points.max()}; they must be in [1, {MAX_SHARES}]"
    )
  ordered = np.sort(points, axis=1)
  repeated = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
  if repeated.size:
    raise ValueError(
      f"repeated points {sorted(set(repeated.tolist()))}; every holder needs its own"
    )
  return points.astype(np.uint8)
