"""Two parties on a named axis: shares, and `Wire`, the only place where the parties meet.

Additive shares x_0 + x_1 = x live in Z_2^64 or Z_2^32 and are reduced to Z_2^k where a value is
opened. Boolean shares b_0 ^ b_1 = b are bits packed into unsigned words. A protocol is one
function, written for one party over the axis "party": `jax.vmap(..., axis_name=PARTY)` runs both
parties in one process, `shard_map` runs each on a device of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax.types import Array

PARTY = "party"
MODEL_OWNER, DATA_OWNER = 0, 1


class Sent(NamedTuple):
  """One message of each party: a round of the protocol."""

  what: str
  num_bytes: int  # sent by each party
  operation: int = -1  # its number in the circuit


class Wire(NamedTuple):
  """How two parties open values to each other.

  Attributes:
    swap: exchange by `ppermute` (devices and processes). False reduces over the axis (vmap), whose
      result is then one array instead of two.
    log: a list that notes each message while the function is traced; None notes nothing.
  """

  swap: bool = False
  log: list[Sent] | None = None

  def open_additive(self, x: Array, what: str) -> Array:
    """The sum of both parties' x in one round of x's bytes each way.

    Both parties learn the sum, so x must be masked.
    """
    self._note([x], what)
    # Without the barrier XLA would compute the opened value again in every consumer.
    return lax.optimization_barrier(x + _swap(x) if self.swap else lax.psum(x, PARTY))

  def open_boolean(self, words: list[Array], what: str) -> list[Array]:
    """The exclusive or of both parties' words in one round; every bit must be masked."""
    self._note(words, what)
    return [lax.optimization_barrier(self._xor(x)) for x in words]

  def _xor(self, x: Array) -> Array:
    if self.swap:
      return x ^ _swap(x)
    # XLA computes a reduction once for all its consumers.
    return lax.reduce(lax.all_gather(x, PARTY), x.dtype.type(0), lax.bitwise_xor, (0,))

  def _note(self, values: list[Array], what: str) -> None:
    if self.log is not None:
      self.log.append(Sent(what, sum(x.size * x.dtype.itemsize for x in values)))


def _swap(x: Array) -> Array:
  return lax.ppermute(x, PARTY, [(0, 1), (1, 0)])


def at(party: int, x: Array) -> Array:
  """x at one party and zero at the other: a sharing of x, additive and Boolean alike."""
  return jnp.where(lax.axis_index(PARTY) == party, x, jnp.zeros_like(x))


def compute_at(party: int, fn: Callable[[], Array], wire: Wire) -> Array:
  """fn() at one party and zeros at the other, which does not run it; under vmap it runs once."""
  if not wire.swap:  # vmap would turn `cond` into a selection and compute fn for both parties
    return at(party, fn())
  out = jax.eval_shape(fn)
  return lax.cond(lax.axis_index(PARTY) == party, fn, lambda: jnp.zeros(out.shape, out.dtype))


def party_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A mesh over the axis "party": the first two devices, one for each party.

  Raises:
    ValueError: there is only one device.
  """
  devices = jax.devices() if devices is None else devices
  if len(devices) < 2:
    raise ValueError(
      f"two parties need two devices, not {len(devices)}; on CPU set jax_num_cpu_devices=2"
    )
  return jax.sharding.Mesh(np.array(devices[:2]), (PARTY,))
