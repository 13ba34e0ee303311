"""Inputs for the tests of encrypted inference, and functions of shared numbers beside their
reference.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import mpc, prng, ring
from primia_jax.mpc import clear as integer_model
from primia_jax.mpc import inference, protocol, sharing
from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Apply, Config

_NUM = 1536  # the length to which `check` repeats its numbers, so that it compiles for no other
OWNERS = ("model_owner", "data_owner")
CONFIGS = [Config(64, 16), Config(48, 12), Config(40, 10), Config(32, 8)]
# Each configuration, and whether inputs are bounded by a calibration.
each_range = pytest.mark.parametrize(
  ("config", "bounded"),
  list(zip(CONFIGS, (False, True, False, True), strict=True)),
  ids=lambda v: (
    f"{v.num_bits}-{v.fraction_bits}" if isinstance(v, Config) else "calibrated" if v else "any"
  ),
)
each_config = pytest.mark.parametrize(
  "config", CONFIGS, ids=lambda c: f"{c.num_bits}-{c.fraction_bits}"
)


def normal(seed, *shape):
  """Standard normal numbers in float32."""
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def spread(config, top=None, low=0.0, num=300, seed=0):
  """Numbers of both signs over all octaves, all octaves' ends, and the smallest, on the grid of the
  configuration.
  """
  unit = 2.0**-config.fraction_bits
  top = 2.0 ** (config.num_bits - 2 * config.fraction_bits - 4) if top is None else top
  rng = np.random.default_rng(seed)
  octaves = 2.0 ** np.arange(-config.fraction_bits, math.ceil(math.log2(top)) + 1)
  x = np.exp(rng.uniform(math.log(unit), math.log(top), num))
  x = np.concatenate(
    [x, rng.uniform(0, min(8, top), num), np.arange(64) * unit, octaves, octaves - unit]
  )
  x = np.rint(x / unit) * unit
  x = x[(x < top) & (x >= low)]
  return np.concatenate([x, -x])


def result_unit(config, bound):
  """u(R): relative to a result's range where that is below 1, or large."""
  finest = 2.0 ** -max(0, (config.num_bits - 8) // 2 - config.fraction_bits)
  fine = max(finest, 2.0 ** math.ceil(math.log2(min(1.0, bound))))
  return config.unit * max(fine, bound * 2.0 ** (2 * config.fraction_bits + 7 - config.num_bits))


def build(fn, shapes, config, max_abs=math.inf):
  """The circuit of fn(builder, *values), whose arguments are given as shares."""
  builder = Builder(config)
  out = fn(
    builder, *(builder.input(None, lambda leaves: leaves, shape, max_abs) for shape in shapes)
  )
  return builder.circuit([out])


def encoded(arrays, config):
  """The operands of `build`'s circuit in the clear."""
  integers = (
    np.rint(np.asarray(x, np.float64) * 2**config.fraction_bits).astype(np.int64) for x in arrays
  )
  return {i: jnp.asarray(v.astype(config.dtype)) for i, v in enumerate(integers)}


def clear(fn, arrays, config, max_abs=math.inf):
  """The protocol's result as float64; no gate gets more bits than it was built for."""
  with jax.enable_x64(True):
    circuit = build(fn, [np.shape(x) for x in arrays], config, max_abs)

    def compute(operands):
      tops = []
      watch = lambda op, z: tops.append(jnp.max(jnp.abs(z), initial=0))
      return integer_model.compute(circuit, operands, watch), tops

    # Operations on rows of one length serve many tests; other shapes compile faster as one program.
    run = compute if all(np.shape(x) == (_NUM,) for x in arrays) else jax.jit(compute)
    (out,), tops = run(encoded(arrays, config))
    applied = [op.gate for op in circuit.operations if isinstance(op, Apply)]
    for gate, top in zip(applied, map(float, tops), strict=True):
      assert top < 2.0**gate.range_bits, (gate, math.log2(top))
    (value,) = circuit.outputs
    assert out.shape == value.shape
    real = np.asarray(ring.signed(out, config.num_bits)).astype(np.float64) * value.scale
    assert np.abs(real).max(initial=0) <= value.max_abs * (1 + 1e-6) + 2.0**-config.fraction_bits
    return real


def check(fn, arrays, want, bound, config, max_abs=math.inf):
  """Asserts that fn is within `bound` units of `want`; returns its result."""
  padded = [np.resize(x, _NUM) for x in arrays]
  got = clear(fn, padded, config, max_abs)[: len(want)]
  units = np.abs(got - want) * 2.0**config.fraction_bits / bound
  worst = int(np.argmax(units))
  assert units[worst] <= 1, (
    units[worst] * np.broadcast_to(bound, units.shape)[worst],
    got[worst],
    want[worst],
  )
  return got


def check_plan(fn, args, atol=0.0, owners=OWNERS, config=CONFIGS[0]):
  """Asserts that the integer model of fn's plan gives fn's outputs; returns the plan."""
  plan = mpc.plan(fn, owners, args, config, mpc.calibrate(fn, owners, [args]))
  want = jax.tree.leaves(jax.jit(fn)(*jax.tree.map(jnp.asarray, args)))
  got = jax.tree.leaves(mpc.check(plan, args))
  for i, (a, b) in enumerate(zip(got, want, strict=True)):
    assert a.dtype.kind == b.dtype.kind, (i, a.dtype, b.dtype)
    assert a.shape == b.shape, (i, a.shape, b.shape)
    a, b = (np.asarray(v, np.float64) for v in (a, b))
    np.testing.assert_allclose(a, b, 0, atol, err_msg=f"output {i}")
  return plan


def gates(plan):
  """What each gate of a plan does, in order."""
  return [op.gate.action for op in plan.circuit.operations if isinstance(op, Apply)]


def check_shapes(fn):
  """A scalar, a column and an empty array give what a row gives."""
  x, config = np.array([0.5, 1.0, 2.0]), CONFIGS[0]
  row = clear(fn, [x], config, 4.0)
  np.testing.assert_array_equal(clear(fn, [np.array(1.0)], config, 4.0), row[1])
  np.testing.assert_array_equal(clear(fn, [x.reshape(3, 1)], config, 4.0), row[:, None])
  assert clear(fn, [np.zeros((0, 2))], config, 4.0).shape == (0, 2)


def check_scales(fn, reference, slack=0):
  """The scale of a mean is finer than u and no power of two times it."""
  config = CONFIGS[0]
  x = np.random.default_rng(0).uniform(0.1, 5, 300)
  x = np.rint(x * 2**16) / 2**16
  for factor in (1 / 3, 1 / 7 / 49):
    scaled = lambda build, x, f=factor: fn(build, build.scaled(build.multiply(x, x), f))
    want = reference(x * x * factor)
    slope = (
      np.abs(reference(x * x * factor + 1e-6) - want) / 1e-6
    )  # the argument is truncated to u first
    check(scaled, [x], want, 1 + 2 * np.abs(want) + slope + slack, config, 5.0)


def both_parties(circuit, operands):
  """Both parties' shares of the outputs, [2, ...], from shares of every operand; under x64."""

  def offline(key):
    dealt = protocol.deal(circuit, key, {})
    parts = [protocol.part(dealt, party) for party in (0, 1)]
    return inference.stack(*(protocol.prepare(circuit, i, p, {}, {}) for i, p in enumerate(parts)))

  random = {i: jax.random.bits(jax.random.key(i), v.shape, v.dtype) for i, v in operands.items()}
  shares = {i: jnp.stack([random[i], v - random[i]]) for i, v in operands.items()}
  run = lambda ready, shares: protocol.run(circuit, sharing.Wire(), ready, shares)
  both = jax.jit(lambda key: jax.vmap(run, axis_name=sharing.PARTY)(offline(key), shares))
  return both(prng.random_key())


def check_both_parties(fn, comparison="tables"):
  """The parties' shares add up to the integer model's bits."""
  config = Config(48, 12, comparison=comparison)
  x = np.array([[0.25, 3.0, -1.5], [0.125, 2.5, 2.5]])
  with jax.enable_x64(True):
    circuit, operands = build(fn, [x.shape], config, 4.0), encoded([x], config)
    (want,) = integer_model.compute(circuit, operands)
    (out,) = both_parties(circuit, operands)
    np.testing.assert_array_equal(ring.reduce(out[0] + out[1], config.num_bits), want)
