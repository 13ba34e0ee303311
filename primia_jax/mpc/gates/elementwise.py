"""ReLU, truncation and sign of a shared number: one opening and a comparison each.

Each takes shares of z, a signed number with |z| + `slack` < 2^K, K <= k - 2, in Z_2^k. The dealer
knows a mask r. The parties open zh = z + 2^K (+ 2^(shift - 1), to round) + r, which is uniform
whatever z is. The sign of z follows from a bit of zh, a bit of r and a comparison of the public zh
with r. z >> shift is linear in values that the dealer knows: exactly once the borrow of the low
bits is known (`exact`), else within one unit. Apart from zh the parties open only bits under fresh
masks. A number beyond K is the one silent failure; `clear.check` finds it.

A clamp alone takes any ring element: it keeps the low bits, with their sign.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import ring
from primia_jax.mpc.dealing import (
  ADDITIVE,
  BOOLEAN,
  Correlation,
  Derived,
  Masks,
  Uniform,
  open_mask,
)
from primia_jax.mpc.gates.comparison import Compared, Comparison, Span
from primia_jax.mpc.gates.fss import FSS
from primia_jax.mpc.gates.tables import TABLES
from primia_jax.mpc.sharing import Wire, at
from primia_jax.ring import signed
from primia_jax.types import Array

RELU, TRUNCATE, SIGN, CLAMP = "relu", "truncate", "sign", "clamp"
_SIGNLESS = (TRUNCATE, CLAMP)
IMAGE = "image"  # what a clamp opens: its input, which whoever shared it chose freely
COMPARISONS = {comparison.name: comparison for comparison in (TABLES, FSS)}


class Gate(NamedTuple):
  """What a gate computes, element by element.

  Attributes:
    action: "relu": max(z, 0) >> shift; "truncate": z >> shift; "sign": 1 where z >= 0, else 0;
      "clamp": the number in [-2^(shift - 1), 2^(shift - 1)) that equals z modulo 2^shift, so z
      itself where z is in that range.
    num: elements.
    num_bits: k of the ring.
    range_bits: K; |z| + `slack` must stay below 2^K.
    shift: bits cut off at the end, rounding to nearest (ties up).
    skip: low bits that the sign ignores; it may err for |z| < 2^skip. 0 if the gate is exact.
    exact: whether the truncation is exact. If not, the result is one unit too high with a
      probability equal to the part that is cut off.
    comparison: the protocol for the comparison inside.
  """

  action: str
  num: int
  num_bits: int
  range_bits: int
  shift: int = 0
  skip: int = 0
  exact: bool = True
  comparison: Comparison = TABLES


def check(gate: Gate) -> None:
  """Raises a ValueError if the ring is too small for the gate."""
  if gate.range_bits > gate.num_bits - 2:
    raise ValueError(
      f"values of {gate.range_bits} bits need a ring of {gate.range_bits + 2} bits, not "
      f"{gate.num_bits}"
    )
  if not 0 <= gate.shift < gate.range_bits or not 0 <= gate.skip < gate.range_bits:
    raise ValueError(f"shift={gate.shift} and skip={gate.skip} must lie in [0, {gate.range_bits})")


def masks(gate: Gate) -> Masks:
  """The uniform masks of a gate."""
  out = {"r": Uniform((gate.num,), ring.storage(gate.num_bits), ADDITIVE)}
  packed = Uniform((-(-gate.num // 8),), np.uint8, BOOLEAN)
  if gate.action not in _SIGNLESS:
    out["sign"] = packed  # bit K of r ^ beta
  if _borrow(gate) and not _borrow_in_tree(gate):
    out["borrow"] = packed  # lambda
  if span := _span(gate):
    out |= gate.comparison.masks(span, gate.num)
  return out


def derive(gate: Gate, shares: dict[str, Array]) -> Derived:
  """What the dealer computes from both parties' mask shares [2, ...]."""
  dtype = ring.storage(gate.num_bits).type
  r = ring.reduce(open_mask(shares["r"], ADDITIVE), gate.num_bits)
  derived, lam = Derived({}, {}, {}), None
  if span := _span(gate):
    derived, lam = gate.comparison.derive(span, r, shares)
  additive = dict(derived.additive)
  values: dict[str, Array] = {}
  if gate.action == CLAMP:
    low = r & dtype(2**gate.shift - 1)
    lam = _unpack(open_mask(shares["borrow"], BOOLEAN), gate.num) if lam is None else lam
    values |= {"low": low, "lambda": lam.astype(dtype)}
  elif gate.shift:
    # sigma is multiplied by 2^(k - shift), so bits above shift do not count
    narrow = np.dtype(f"uint{max(8, 2 ** (gate.shift - 1).bit_length())}")
    values |= {
      "rho": r >> dtype(gate.shift),
      "sigma": (r >> dtype(gate.num_bits - 1)).astype(narrow),
    }
    if gate.exact:
      lam = _unpack(open_mask(shares["borrow"], BOOLEAN), gate.num) if lam is None else lam
      values["lambda"] = lam.astype(dtype)
  elif gate.action == RELU:
    values["r"] = r
  if gate.action not in _SIGNLESS:
    top = (r >> dtype(gate.range_bits)).astype(jnp.uint8) & np.uint8(1)
    beta = _unpack(open_mask(shares["sign"], BOOLEAN), gate.num) ^ top
    additive["beta"] = beta.astype(dtype)
    additive |= {
      f"{name}_beta": jnp.where(beta == 1, v, jnp.zeros_like(v)) for name, v in values.items()
    }
    values.pop("r", None)  # its shares are the mask's own
  return Derived({**additive, **values}, derived.boolean, derived.common)


def run(gate: Gate, wire: Wire, z: Array, correlation: Correlation) -> Array:
  """One party's part.

  Args:
    gate: what to compute.
    wire: to the other party.
    z: [N] uint32 or uint64, this party's additive share.
    correlation: this party's shares of the masks and of the derived values.

  Returns:
    [N], this party's additive share of the answer. Neither party learns anything.
  """
  dtype, k, c = z.dtype.type, gate.num_bits, correlation
  clamp = gate.action == CLAMP
  offset = _half(gate) + (0 if clamp else 2**gate.range_bits)
  masked = z + at(0, jnp.full_like(z, offset)) + c["r"]
  opened = ring.reduce(wire.open_additive(masked, IMAGE if clamp else "masked input"), k)
  borrow = sign = None
  if span := _span(gate):
    compared = gate.comparison.evaluate(span, wire, opened, c)
    borrow, sign = _open_bits(gate, wire, opened, compared, c)
  negated = lambda v: dtype(0) - v
  if gate.action == SIGN:
    return jnp.where(sign == 1, at(0, jnp.full_like(z, 1)) - c["beta"], c["beta"])
  if clamp:  # low bits of zh - r, with the borrow m ^ lambda = m + (1 - 2 m) lambda
    assert borrow is not None
    lam = jnp.where(borrow == 1, negated(c["lambda"]), c["lambda"]) << dtype(gate.shift)
    public = (opened & dtype(2**gate.shift - 1)) + (borrow.astype(z.dtype) << dtype(gate.shift))
    return at(0, public - dtype(offset)) - c["low"] + lam
  if not gate.shift:
    public = opened - dtype(offset)
    value, product = z, public * c["beta"] - c["r_beta"]
    return jnp.where(sign == 1, value - product, product)
  # z >> shift = public - rho + wrapped * sigma - borrow; borrow = m ^ lambda = m + (1 - 2 m) lambda
  public = (opened >> dtype(gate.shift)) - dtype(2 ** (gate.range_bits - gate.shift))
  wraps = opened >> dtype(k - 1) == dtype(0)

  def truncated(public: Array, suffix: str) -> Array:
    sigma = c["sigma" + suffix].astype(z.dtype) << dtype(k - gate.shift)
    out = public - c["rho" + suffix] + jnp.where(wraps, sigma, jnp.zeros_like(sigma))
    if borrow is None:
      return out
    lam = c["lambda" + suffix]
    return out - jnp.where(borrow == 1, negated(lam), lam)

  if borrow is not None:
    public = public - borrow.astype(z.dtype)
  value = truncated(at(0, public), "")
  if gate.action == TRUNCATE:
    return value
  product = truncated(public * c["beta"], "_beta")
  return jnp.where(sign == 1, value - product, product)


def clear(gate: Gate, z: Array) -> Array:
  """The gate in the clear on ring elements [N] uint32 or uint64; an exact gate equals it bit for
  bit.
  """
  v = signed(z, gate.num_bits)
  if gate.action == SIGN:
    return (v >= 0).astype(z.dtype)
  raised = v + v.dtype.type(_half(gate))
  if gate.action == CLAMP:
    out = (raised & v.dtype.type(2**gate.shift - 1)) - v.dtype.type(_half(gate))
    return lax.bitcast_convert_type(out, z.dtype)
  out = raised >> v.dtype.type(gate.shift)
  if gate.action == RELU:
    out = jnp.maximum(out, 0)
  return lax.bitcast_convert_type(out, z.dtype)


def slack(gate: Gate) -> int:
  """The room that |z| must leave below 2^K, for rounding and for the bits that the sign ignores."""
  if gate.action == CLAMP:  # what an honest party shares is in range already
    return 2**gate.range_bits - _half(gate)
  return _half(gate) + (2**gate.skip if gate.skip else 0)


def _half(gate: Gate) -> int:
  return 2 ** (gate.shift - 1) if gate.shift else 0


def _borrow(gate: Gate) -> bool:
  return bool(gate.shift) and (gate.exact or gate.action == CLAMP)


def _borrow_in_tree(gate: Gate) -> bool:
  """Whether the comparison opens the borrow under a mask of its own."""
  span = _span(gate)
  return span is not None and gate.comparison.opens_borrow(span)


def _span(gate: Gate) -> Span | None:
  if gate.action in _SIGNLESS:
    return Span(0, gate.shift) if _borrow(gate) else None
  return Span(gate.skip, gate.range_bits, gate.shift if _borrow(gate) else None)


def _open_bits(gate: Gate, wire: Wire, opened: Array, compared: Compared, c: Correlation):
  """The borrow and the sign, [N] uint8 each or None, public under their masks, in one round."""
  packed = []
  if gate.action in _SIGNLESS:
    packed.append(_pack(compared.lt) ^ c["borrow"])
  else:
    # bit K of zh - r is that of zh, that of r, and the borrow of the K bits below
    top = (opened >> opened.dtype.type(gate.range_bits)).astype(jnp.uint8) & np.uint8(1)
    packed.append(_pack(compared.lt) ^ at(0, _pack(top)) ^ c["sign"])
    if compared.borrow is not None:
      packed.append(_pack(compared.borrow) ^ c["borrow"])
  bits = [_unpack(b, gate.num) for b in wire.open_boolean(packed, "bits")]
  if gate.action in _SIGNLESS:
    return bits[0], None
  return (bits[1] if len(bits) > 1 else compared.opened_borrow), bits[0]


def _pack(bits: Array) -> Array:
  """[N] uint8 of 0 or 1 -> [ceil(N / 8)] uint8; element a W + w is bit a of byte w."""
  width = -(-bits.shape[0] // 8)
  bits = jnp.pad(bits, (0, 8 * width - bits.shape[0])).reshape(8, width)
  return lax.reduce(
    bits << np.arange(8, dtype=np.uint8)[:, None], np.uint8(0), lax.bitwise_or, (0,)
  )


def _unpack(packed: Array, num: int) -> Array:
  """The inverse of `_pack`."""
  shifts = np.arange(8, dtype=np.uint8)[:, None]
  return ((packed[None] >> shifts) & np.uint8(1)).reshape(-1)[:num]
