"""What the encrypted benchmark runs: the networks in JAX, and an inference as phases that are timed
apart.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.peers import networks
from primia_jax import conv, prng, ring
from primia_jax.mpc import dealing, gates, inference, protocol, sharing
from primia_jax.mpc.gates import Gate
from primia_jax.mpc.planning import Plan
from primia_jax.types import Array, PyTree

OWNERS = ("model_owner", "data_owner")


class Ops:
  """`networks.apply`'s operations: NHWC, HWIO, dense [in, out]."""

  layer = staticmethod(jax.named_scope)
  relu = staticmethod(jax.nn.relu)
  add = staticmethod(jnp.add)
  max_pool = staticmethod(conv.max_pool)

  @staticmethod
  def conv(x: Array, w: Array, b: Array, stride: int, padding: int) -> Array:
    pads = [(padding, padding)] * 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=numbers) + b

  @staticmethod
  def dense(x: Array, w: Array, b: Array) -> Array:
    return x @ w + b

  @staticmethod
  def flat(x: Array) -> Array:
    return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)

  @staticmethod
  def mean(x: Array) -> Array:
    return x.mean((1, 2))


class PlainOps(Ops):
  """The same for float32 in the clear, by the library's own convolution: on CPU XLA's is up to 16
  times slower.
  """

  @staticmethod
  def conv(x: Array, w: Array, b: Array, stride: int, padding: int) -> Array:
    return conv.conv(x, w, strides=(stride, stride), padding=[(padding, padding)] * 2) + b


class Work(NamedTuple):
  """A function to compute under encryption, the same for float32 in the clear, and whose arguments
  are whose.
  """

  fn: Callable[..., Array]
  plain: Callable[..., Array]
  owners: tuple[str, ...]
  args: tuple[PyTree, ...]


def network(case: str, batch: int = 1) -> Work:
  """A network of `networks`: the weights are the model owner's, the images the data owner's."""
  last = lambda w: w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T
  params = {
    name: (jnp.asarray(last(w)), jnp.asarray(b)) for name, (w, b) in networks.weights(case).items()
  }
  images = jnp.asarray(networks.inputs(case, batch)[0].transpose(0, 2, 3, 1))
  fn, plain = (functools.partial(networks.apply, case, ops) for ops in (Ops, PlainOps))
  return Work(fn, plain, OWNERS, (params, images))


def matmul(owners: tuple[str, ...]) -> Work:
  """The product of two matrices 1024 x 1024."""
  return Work(jnp.matmul, jnp.matmul, owners, tuple(map(jnp.asarray, networks.inputs("matmul"))))


class Inference(NamedTuple):
  """One encrypted inference.

  Attributes:
    phases: by name as in `PHASES`, functions without arguments. For timing only, the dealer's key
      is the same every time and the online phase uses one set of correlations again and again,
      which a protocol must never do.
    compile: seconds to trace, lower and compile the online phase, with an empty cache of compiled
      programs.
    compile_again: the same with the cache that this left on disk.
    outputs: () -> what the data owner learns.
  """

  phases: dict[str, Callable[[], Any]]
  compile: float
  compile_again: float
  outputs: Callable[[], PyTree]


PHASES = ("deal", "prepare 0", "prepare 1", "online")


def prepared(plan: Plan, args: tuple[PyTree, ...]) -> Inference:
  """Makes ready what an inference needs, and compiles its phases."""
  key = prng.random_key()
  operands = inference.share_inputs(plan, inference.encode(plan, args), key)
  blind, published = inference.blinds(plan, key), inference.publish(plan, operands, key)
  deal = jax.jit(functools.partial(inference.deal, plan))
  prepare = [jax.jit(functools.partial(inference.prepare, plan, party)) for party in (0, 1)]
  dealt = deal(key, blind)
  parts = [protocol.part(dealt, party) for party in (0, 1)]
  ready = inference.stack(*[prepare[party](parts[party], operands, published) for party in (0, 1)])
  online, *seconds = compile_twice(functools.partial(inference.simulate, plan), ready, operands)
  phases = {
    "deal": functools.partial(deal, key, blind),
    "prepare 0": functools.partial(prepare[0], parts[0], operands, published),
    "prepare 1": functools.partial(prepare[1], parts[1], operands, published),
    "online": functools.partial(online, ready, operands),
  }
  return Inference(phases, *seconds, lambda: inference.reveal(plan, online(ready, operands)))


def compile_twice(fn: Callable, *args: PyTree) -> tuple[Callable, float, float]:
  """fn compiled, and the seconds it took: as it is, and from the cache on disk
  (jax_compilation_cache_dir).
  """
  seconds = []
  for _ in range(2):
    jax.clear_caches()
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(*args).compile()
    seconds.append(time.perf_counter() - start)
  return compiled, *seconds


def num_bytes(tree: PyTree) -> int:
  """Bytes of arrays or their shapes."""
  return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(tree))


# ---- the gate alone


class GateRun(NamedTuple):
  """Many gates at once, both parties.

  Attributes:
    offline: key -> both parties' correlations, dealt and expanded.
    online: (shares [2, N], correlations) -> shares [2, N].
    sent: the messages that each party sends.
  """

  offline: Callable[[Array], dealing.Correlation]
  online: Callable[[Array, dealing.Correlation], Array]
  sent: list[sharing.Sent]


def gate_run(gate: Gate) -> GateRun:
  """The phases of a gate, without a circuit around it."""
  log: list[sharing.Sent] = []

  def offline(key: Array) -> dealing.Correlation:
    seeds = [prng.derive(key, party) for party in (0, 1)]
    each = [dealing.expand_masks(seed, 0, gates.masks(gate)) for seed in seeds]
    derived = gates.derive(gate, {name: jnp.stack([m[name] for m in each]) for name in each[0]})
    each[0] |= dealing.expand_derived(seeds[0], 0, derived) | derived.common
    each[1] |= dealing.split(seeds[0], 0, derived) | derived.common
    return inference.stack(*each)

  def online(
    shares: Array, correlation: dealing.Correlation, log: list[sharing.Sent] | None = None
  ) -> Array:
    return jax.vmap(
      lambda z, c: gates.run(gate, sharing.Wire(log=log), z, c), axis_name=sharing.PARTY
    )(shares, correlation)

  shares = jax.ShapeDtypeStruct((2, gate.num), ring.storage(gate.num_bits))
  jax.eval_shape(
    functools.partial(online, log=log), shares, jax.eval_shape(offline, prng.random_key())
  )
  return GateRun(jax.jit(offline), jax.jit(online), log)


def numbers(gate: Gate, key: Array) -> Array:
  """Ring elements [N] from the whole range of a gate: half of them uniform, half of all magnitudes
  alike.
  """
  dtype = ring.storage(gate.num_bits).type
  bits = prng.bits(key, jnp.asarray([1, 0, 0], jnp.uint32), (gate.num,), dtype)
  sizes = prng.bits(key, jnp.asarray([2, 0, 0], jnp.uint32), (gate.num,), jnp.uint32)
  signed = gates.to_signed(bits, gate.num_bits) >> (gate.num_bits - gate.range_bits - 1)
  smaller = (sizes >> 1) % jnp.uint32(gate.range_bits + 1)
  signed = jnp.where(sizes & 1 == 1, signed, signed >> smaller.astype(signed.dtype))
  most = 2**gate.range_bits - gates.slack(gate) - 1
  return lax.bitcast_convert_type(jnp.clip(signed, -most, most), dtype)


def failures(gate: Gate) -> Callable[[Array], Array]:
  """key -> how many of a gate's answers on random numbers are wrong."""
  run = gate_run(gate)

  def count(key: Array) -> Array:
    z = numbers(gate, prng.derive(key, 2))
    first = prng.bits(prng.derive(key, 3), jnp.zeros(3, jnp.uint32), z.shape, z.dtype)
    y = run.online(jnp.stack([first, z - first]), run.offline(key))
    wrong = ring.reduce(y[0] + y[1] - gates.clear(gate, z), gate.num_bits) != 0
    return jnp.sum(wrong.astype(jnp.uint32))

  return jax.jit(count)
