"""What the encrypted benchmark runs: the networks in JAX, and an inference in phases."""

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
from primia_jax.mpc import dealing, inference, protocol, sharing
from primia_jax.mpc.gates import elementwise
from primia_jax.mpc.gates.elementwise import Gate
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
  """The same for float32 in the clear, with the library's own convolution, on CPU up to 16 times
  faster than XLA's.
  """

  @staticmethod
  def conv(x: Array, w: Array, b: Array, stride: int, padding: int) -> Array:
    return conv.conv(x, w, strides=(stride, stride), padding=[(padding, padding)] * 2) + b


class Work(NamedTuple):
  """A function to compute under encryption, the same in float32, and its arguments' owners."""

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
      is the same every time and the online phase uses one set of correlations again and again. A
      protocol must never do that, and `mpc.roles` refuses it.
    compile: seconds to trace, lower and compile the online phase without a compilation cache.
    compile_again: the same with the cache that the first compilation left on disk.
    outputs: () -> what the data owner learns.
  """

  phases: dict[str, Callable[[], Any]]
  compile: float
  compile_again: float
  outputs: Callable[[], PyTree]


PHASES = ("deal", "prepare 0", "prepare 1", "online")


def prepared(plan: Plan, args: tuple[PyTree, ...]) -> Inference:
  """Prepares an inference and compiles its phases."""
  key, circuit = prng.random_key(), plan.circuit
  operands = inference.share_inputs(plan, inference.encode(plan, args), key)
  arrays = protocol.blinds(circuit, key, 0) | protocol.blinds(circuit, prng.random_key(), 1)
  blind = protocol.full(circuit, arrays)
  published = protocol.full(circuit, protocol.publish(operands, arrays))
  deal = jax.jit(functools.partial(protocol.deal, circuit))
  prepare = [jax.jit(functools.partial(protocol.prepare, circuit, party)) for party in (0, 1)]
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
  """fn compiled, the seconds without a cache, and those with the cache on disk
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
    each = [dealing.expand_masks(seed, 0, elementwise.masks(gate)) for seed in seeds]
    derived = elementwise.derive(
      gate, {name: jnp.stack([m[name] for m in each]) for name in each[0]}
    )
    sent = dealing.split(seeds[0], 0, derived)
    each[0] |= dealing.expand_shares(seeds[0], 0, sent) | derived.common
    each[1] |= sent | derived.common
    return inference.stack(*each)

  def online(
    shares: Array, correlation: dealing.Correlation, log: list[sharing.Sent] | None = None
  ) -> Array:
    return jax.vmap(
      lambda z, c: elementwise.run(gate, sharing.Wire(log=log), z, c), axis_name=sharing.PARTY
    )(shares, correlation)

  shares = jax.ShapeDtypeStruct((2, gate.num), ring.storage(gate.num_bits))
  jax.eval_shape(
    functools.partial(online, log=log), shares, jax.eval_shape(offline, prng.random_key())
  )
  return GateRun(jax.jit(offline), jax.jit(online), log)


def numbers(gate: Gate, key: Array) -> Array:
  """Ring elements [N] from a gate's whole range: half uniform, half with uniform magnitudes in
  bits.
  """
  dtype = ring.storage(gate.num_bits).type
  bits = prng.bits(key, jnp.asarray([1, 0, 0], jnp.uint32), (gate.num,), dtype)
  sizes = prng.bits(key, jnp.asarray([2, 0, 0], jnp.uint32), (gate.num,), jnp.uint32)
  signed = ring.signed(bits, gate.num_bits) >> (gate.num_bits - gate.range_bits - 1)
  smaller = (sizes >> 1) % jnp.uint32(gate.range_bits + 1)
  signed = jnp.where(sizes & 1 == 1, signed, signed >> smaller.astype(signed.dtype))
  most = 2**gate.range_bits - elementwise.slack(gate) - 1
  return lax.bitcast_convert_type(jnp.clip(signed, -most, most), dtype)


def failures(gate: Gate) -> Callable[[Array], Array]:
  """key -> the number of a gate's wrong answers on random numbers."""
  run = gate_run(gate)

  def count(key: Array) -> Array:
    z = numbers(gate, prng.derive(key, 2))
    first = prng.bits(prng.derive(key, 3), jnp.zeros(3, jnp.uint32), z.shape, z.dtype)
    y = run.online(jnp.stack([first, z - first]), run.offline(key))
    wrong = ring.reduce(y[0] + y[1] - elementwise.clear(gate, z), gate.num_bits) != 0
    return jnp.sum(wrong.astype(jnp.uint32))

  return jax.jit(count)
