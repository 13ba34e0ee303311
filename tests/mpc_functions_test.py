"""Every function over its whole legal range and beyond, against NumPy in float64, with the bound that it states."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import prng, ring
from primia_jax.mpc import functions, gates, protocol, sharing
from primia_jax.mpc.circuit import Apply, Builder, Config

CONFIGS = [Config(64, 16), Config(48, 12), Config(40, 10), Config(32, 8)]
# Each configuration, and whether inputs are bounded by a calibration.
each_range = pytest.mark.parametrize(
  ("config", "bounded"),
  list(zip(CONFIGS, (False, True, False, True), strict=True)),
  ids=lambda v: f"{v.num_bits}-{v.fraction_bits}" if isinstance(v, Config) else "calibrated" if v else "any",
)
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.num_bits}-{c.fraction_bits}")


def build(fn, shapes, config, max_abs=math.inf):
  builder = Builder(config)
  out = fn(builder, *(builder.input(None, lambda leaves: leaves, shape, max_abs) for shape in shapes))
  return builder.circuit([out])


def encoded(arrays, config):
  integers = (np.rint(np.asarray(x, np.float64) * 2**config.fraction_bits).astype(np.int64) for x in arrays)
  return {i: jnp.asarray(v.astype(config.dtype)) for i, v in enumerate(integers)}


def clear(fn, arrays, config, max_abs=math.inf):
  """What the protocol computes, as float64; no gate may get more bits than it was built for."""
  with jax.enable_x64(True):
    circuit = build(fn, [np.shape(x) for x in arrays], config, max_abs)

    def watch(op, z):
      most = float(jnp.max(jnp.abs(z), initial=0))
      assert most < 2.0**op.gate.range_bits, (op.gate, math.log2(most))

    (out,) = protocol.clear(circuit, config, encoded(arrays, config), watch)
    (value,) = circuit.outputs
    assert out.shape == value.shape
    real = np.asarray(gates.to_signed(out, config.num_bits)).astype(np.float64) * value.scale
    assert np.abs(real).max(initial=0) <= value.max_abs * (1 + 1e-6) + 2.0**-config.fraction_bits
    return real


def spread(config, top=None, low=0.0, num=300, seed=0):
  """Numbers of both signs over all octaves, all octaves' ends, and the smallest, on the grid of the configuration."""
  unit = 2.0**-config.fraction_bits
  top = 2.0 ** (config.num_bits - 2 * config.fraction_bits - 4) if top is None else top
  rng = np.random.default_rng(seed)
  octaves = 2.0 ** np.arange(-config.fraction_bits, math.ceil(math.log2(top)) + 1)
  x = np.exp(rng.uniform(math.log(unit), math.log(top), num))
  x = np.concatenate([x, rng.uniform(0, min(8, top), num), np.arange(64) * unit, octaves, octaves - unit])
  x = np.rint(x / unit) * unit
  x = x[(x < top) & (x >= low)]
  return np.concatenate([x, -x])


def check(fn, arrays, want, bound, config, max_abs=math.inf):
  padded = [np.resize(x, 1536) for x in arrays]  # one shape, for which JAX has compiled everything before
  got = clear(fn, padded, config, max_abs)[: len(want)]
  units = np.abs(got - want) * 2.0**config.fraction_bits / bound
  worst = int(np.argmax(units))
  assert units[worst] <= 1, (units[worst] * np.broadcast_to(bound, units.shape)[worst], got[worst], want[worst])
  return got


@each_range
@pytest.mark.parametrize("name", ["logistic", "tanh", "erf", "erfc"])
def test_bounded(name, config, bounded):
  max_abs = 3.0 if bounded else math.inf
  reference = {
    "logistic": lambda x: 1 / (1 + np.exp(-np.clip(x, -700, 700))),
    "tanh": np.tanh,
    "erf": np.vectorize(math.erf),
    "erfc": np.vectorize(math.erfc),
  }[name]
  x = spread(config, min(max_abs, 2.0 ** (config.num_bits - 2 * config.fraction_bits - 4)))
  check(functions.UNARY[name], [x], reference(x), 1.0, config, max_abs)


@each_range
@pytest.mark.parametrize("name", ["exp", "exp2", "expm1"])
def test_exponentials(name, config, bounded):
  max_abs = 4.0 if bounded else math.inf
  most = 2.0 ** (config.num_bits - 2 * config.fraction_bits - 6)
  x = spread(config, None if math.isinf(max_abs) else max_abs)
  want = np.minimum(np.exp2(np.minimum(x, 50) if name == "exp2" else np.minimum(x, 50) / math.log(2)), most)
  got = check(functions.UNARY[name], [x], want - (name == "expm1"), 1 + 2 * want, config, max_abs)
  if name != "expm1":
    assert not np.any(got[x < -2.0 * config.fraction_bits])


@each_range
@pytest.mark.parametrize("name", ["log", "log1p"])
def test_logarithms(name, config, bounded):
  max_abs = 9.0 if bounded else math.inf
  x = np.abs(spread(config, None if math.isinf(max_abs) else max_abs))
  x = x[x > 0]
  check(functions.UNARY[name], [x], getattr(np, name)(x), 2.0, config, max_abs)


@each_range
@pytest.mark.parametrize("name", ["sqrt", "rsqrt", "cbrt", "reciprocal", "power"])
def test_roots_and_reciprocals(name, config, bounded):
  max_abs = 9.0 if bounded else math.inf
  fn, reference, relative = {
    "sqrt": (functions.sqrt, np.sqrt, 0.5),
    "rsqrt": (functions.rsqrt, lambda x: x**-0.5, 0.5),
    "cbrt": (functions.cbrt, np.cbrt, 0.5),
    "reciprocal": (functions.reciprocal, lambda x: 1 / x, 1.0),
    "power": (functools.partial(functions.power, exponent=0.75), lambda x: x**0.75, 1.0),
  }[name]
  x = spread(config, None if math.isinf(max_abs) else max_abs)
  x = x[(x != 0) if name in ("cbrt", "reciprocal") else (x > 0)]
  want = reference(x)
  check(fn, [x], want, 1 + relative * np.abs(want), config, max_abs)


@pytest.mark.parametrize("config", CONFIGS[1:3], ids=["48-12", "40-10"])
def test_outside_of_the_domain(config):
  x = np.array([0.0, -1.0, -(2.0**-config.fraction_bits), -3.7])
  for fn in (functions.sqrt, functions.rsqrt, functools.partial(functions.power, exponent=0.75)):
    assert not np.any(clear(fn, [x], config))
  unit = 2.0**-config.fraction_bits
  np.testing.assert_allclose(clear(functions.log, [x], config), math.log(0.75 * unit), atol=2 * unit)
  zero = np.zeros(1536)
  assert not np.any(clear(functions.reciprocal, [zero], config))
  assert not np.any(clear(functions.divide, [zero + 1, zero], config))


@each_range
def test_divide(config, bounded):
  max_abs = 20.0 if bounded else math.inf
  top = None if math.isinf(max_abs) else max_abs
  a, b = spread(config, top), spread(config, top, seed=1)
  a = np.random.default_rng(2).permutation(a)[: len(b)]
  b = b[: len(a)]
  fits = (b != 0) & (np.abs(a) < 2.0 ** (config.fraction_bits + 1) * np.abs(b))
  a, b = a[fits], b[fits]
  bound = 2 + np.abs(a / b) / 2
  check(functions.divide, [a, b], a / b, bound, config, max_abs)
  positive = functools.partial(functions.divide, positive=True)
  check(positive, [a, np.abs(b)], a / np.abs(b), bound, config, max_abs)


@pytest.mark.parametrize("config", CONFIGS[::3], ids=["64-16", "32-8"])
def test_divide_public_numerators_and_shapes(config):
  b = np.random.default_rng(0).uniform(0.5, 5, (3, 1, 2))
  b = np.rint(b * 2**config.fraction_bits) / 2**config.fraction_bits
  unit = 2.0**-config.fraction_bits
  for a in (np.float64(-3.25), np.float64(0.0), np.array([[0.5, -2.0]]), np.full((4, 1), 1.5)):
    got = clear(lambda build, b, a=a: functions.divide(build, a, b), [b], config)
    np.testing.assert_allclose(got, a / b, atol=(2 + 4) * unit)
  a = np.rint(np.random.default_rng(1).normal(size=(3, 5, 2)) / unit) * unit
  np.testing.assert_allclose(clear(functions.divide, [a, b], config), a / b, atol=4 * unit)
  with jax.enable_x64(True):  # the denominator is normalised before it is broadcast
    circuit = build(functions.divide, [a.shape, b.shape], config, 8.0)
  assert max(op.gate.num for op in circuit.operations if isinstance(op, Apply) and op.gate.action == "sign") <= 6 * 40


@each_config
@pytest.mark.parametrize("exponent", [0, 1, 3, 5, -2])
def test_power(exponent, config):
  x = spread(config, 2.0, low=0.5, num=200)
  tolerance = 1 + 2 * np.abs(x) ** max(0, exponent) * abs(exponent) if exponent >= 0 else 1 + 3 * x**-4.0
  fn = functools.partial(functions.power, exponent=exponent)
  check(fn, [x], x**exponent, tolerance, config, 2.0)


@each_config
def test_sign(config):
  x = spread(config)
  check(functions.sign, [x], np.sign(x), 1e-9, config)


@pytest.mark.parametrize("n", [1, 2, 7, 17, 130])
@pytest.mark.parametrize("axis", [0, 2])
def test_argmax_and_tournament(n, axis):
  config = CONFIGS[1]
  shape = [2, 3]
  shape.insert(axis, n)
  x = np.random.default_rng(n).integers(-3, 3, shape) / 4  # with many ties
  got = clear(functools.partial(functions.argmax, axis=axis), [x], config)
  np.testing.assert_array_equal(got, x.argmax(axis))
  np.testing.assert_array_equal(clear(functools.partial(functions.tournament, axis=axis), [x], config), x.max(axis))
  wide = np.sort(x, axis) * 2.0 ** (config.num_bits - 2 * config.fraction_bits - 3)
  np.testing.assert_array_equal(
    clear(functools.partial(functions.argmax, axis=axis), [wide], config), wide.argmax(axis)
  )


def test_argmax_sees_every_bit():
  """Of products, which are finer than activations, the low bits count."""
  x = np.array([[1.0, 1.0], [1 + 2.0**-16, 1.0], [1.0, 1 + 2.0**-16]])
  square = lambda build, x: functions.argmax(build, build.scaled(build.multiply(x, x), 2.0**-8), 1)
  np.testing.assert_array_equal(clear(square, [x], CONFIGS[0], 4.0), [0, 0, 1])


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "sign"])
def test_shapes(name):
  fn = functions.UNARY[name]
  x = np.array([0.5, 1.0, 2.0])
  config = CONFIGS[0]
  row = clear(fn, [x], config, 4.0)
  np.testing.assert_array_equal(clear(fn, [np.array(1.0)], config, 4.0), row[1])
  np.testing.assert_array_equal(clear(fn, [x.reshape(3, 1)], config, 4.0), row[:, None])
  assert clear(fn, [np.zeros((0, 2))], config, 4.0).shape == (0, 2)


def test_scales_that_are_no_powers_of_two():
  """A mean's scale is finer than u, and none of its binary fractions."""
  config = CONFIGS[0]
  x = np.random.default_rng(0).uniform(0.1, 5, 300)
  x = np.rint(x * 2**16) / 2**16
  for name, reference in {"exp": np.exp, "log": np.log, "rsqrt": lambda x: x**-0.5, "tanh": np.tanh}.items():
    for factor in (1 / 3, 1 / 7 / 49):
      scaled = lambda build, x, f=factor, n=name: functions.UNARY[n](build, build.scaled(build.multiply(x, x), f))
      want = reference(x * x * factor)
      # the argument is truncated to u first
      slope = np.abs(reference(x * x * factor + 1e-6) - want) / 1e-6
      check(scaled, [x], want, 1 + 2 * np.abs(want) + slope + (name == "log"), config, 5.0)


@pytest.mark.parametrize(
  ("name", "comparison"), [("logistic", "tables"), ("rsqrt", "tables"), ("divide", "tables"), ("argmax", "fss")]
)
def test_both_parties_get_the_same_bits(name, comparison):
  config = Config(48, 12, comparison=comparison)
  fn = {"argmax": functools.partial(functions.argmax, axis=1), "divide": lambda build, x: functions.divide(build, x, x)}
  fn = fn.get(name) or functions.UNARY[name]
  x = np.array([[0.25, 3.0, -1.5], [0.125, 2.5, 2.5]])
  with jax.enable_x64(True):
    circuit = build(fn, [x.shape], config, 4.0)
    operands = encoded([x], config)
    (want,) = protocol.clear(circuit, config, operands)
    dealt = jax.jit(lambda key: protocol.deal(circuit, config, key, {}))(prng.random_key())
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), dealt.sent)
    parts = [protocol.prepare(circuit, config, p, protocol.part(dealt, p), {}, {}, shapes) for p in (0, 1)]
    ready = jax.tree.map(lambda a, b: jnp.stack([a, b]), *parts)
    share = jax.random.bits(jax.random.key(0), x.shape, config.dtype)
    shares = {0: jnp.stack([share, operands[0] - share])}
    run = lambda ready, shares: protocol.run(circuit, config, sharing.Wire(), ready, shares)
    (out,) = jax.jit(jax.vmap(run, axis_name="party"))(ready, shares)
    np.testing.assert_array_equal(ring.reduce(out[0] + out[1], config.num_bits), want)
