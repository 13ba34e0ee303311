"""Fused circuits: the same bits in fewer rounds; what is equal is published and lowered once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpc_reference import OWNERS, both_parties, build, encoded, normal

from primia_jax import mpc, prng
from primia_jax.mpc import clear, dealing, fusing, protocol, sharing
from primia_jax.mpc.circuit import Apply, Config, Local, Open, Product
from primia_jax.mpc.lowering import lower
from primia_jax.mpc.lowering.program import evaluate, trace
from primia_jax.mpc.lowering.repeats import without_repeats

CONFIG = Config(48, 12)


def rounds(circuit):
  """Openings and gates; each gate takes the same few rounds."""
  return sum(isinstance(op, Open | Apply) for op in circuit.operations)


def chain(build, a, b):
  """Five operations that wait for each other, of every kind; shapes are broadcast."""
  a = build.relu(build.multiply(build.scaled(a, 0.5), b))
  return build.multiply(build.positive_part(build.add(a, b)), build.sign(a))


def branches(count, build, *values):
  """Chains that do not wait for each other, with ranges and shifts of their own."""
  outs = []
  for i in range(count):
    a = build.scaled(values[i]._replace(max_abs=2.0 + i), 2.0**-i)
    outs.append(chain(build, a, values[(i + 1) % len(values)]))
  flat = [build.local(lambda v: v.reshape(-1), build.narrow(v)) for v in outs]
  return functools.reduce(build.add, [build.local(lambda v: v.sum(dtype=v.dtype), v) for v in flat])


@pytest.mark.parametrize(
  "config", [CONFIG, Config(32, 8), Config(64, 16, comparison="fss")], ids=["48", "32", "fss"]
)
def test_branches_take_the_rounds_of_one_and_give_the_same_bits(config):
  arrays = [1.5 * normal(i, *shape) for i, shape in enumerate([(3, 2), (1, 2), (3, 1), (1, 2)])]
  shapes = [x.shape for x in arrays]
  with jax.enable_x64(True):
    one, all_of_them = (
      build(functools.partial(branches, n), shapes, config, 4.0) for n in (1, len(arrays))
    )
    fused, operands = fusing.fuse(all_of_them), encoded(arrays, config)
    assert rounds(all_of_them) > 3 * rounds(one)
    assert rounds(fused) == rounds(fusing.fuse(one)) <= rounds(one)
    (want,), (got,) = (clear.compute(c, operands) for c in (all_of_them, fused))
    assert int(want) != 0
    np.testing.assert_array_equal(got, want)
    if config is CONFIG:
      (shares,) = both_parties(fused, operands)
      np.testing.assert_array_equal((shares[0] + shares[1]) % 2**48, want)


def test_gates_join_at_the_largest_range_and_the_longest_shift():
  def fn(build, x, y):
    fine = build.multiply(x, y)
    finer = build.scaled(fine, 2.0**-3)
    product = build.multiply_public(finer, np.array([[1.0, 0.7, 0.3]]))
    return build.add(build.narrow(fine), build.narrow(product))

  with jax.enable_x64(True):
    circuit = build(fn, [(2, 3), (2, 3)], CONFIG, 4.0)
    gates = [op.gate for op in fusing.fuse(circuit).operations if isinstance(op, Apply)]
  before = [op.gate for op in circuit.operations if isinstance(op, Apply)]
  first = [g for g in gates if g.num == 12]
  assert (len(before), len(gates), len(first)) == (3, 2, 1)
  shift = first[0].shift
  assert shift == max(g.shift for g in before[:2]) > min(g.shift for g in before[:2])
  assert first[0].range_bits == max(g.range_bits + shift - g.shift for g in before[:2])


def test_what_the_ring_has_no_room_for_stays_apart():
  def fn(build, x, y):
    x = x._replace(max_abs=2.0**33 * x.scale)  # 45 bits of 48, shifted by 3
    shifted = build.narrow(build.scaled(y, 2.0**-30)._replace(max_abs=2.0**-26))
    return build.add(build.narrow(build.scaled(x, 2.0**-3)), shifted)

  with jax.enable_x64(True):
    circuit = build(fn, [(3,), (3,)], Config(48, 12), 4.0)
  assert fusing.fuse(circuit) == circuit


def test_large_operations_stay_as_they_are():
  with jax.enable_x64(True):
    circuit = build(functools.partial(branches, 2), [(3, 2)] * 2, CONFIG, 4.0)
  assert fusing.fuse(circuit, most=6) == circuit
  fused = fusing.fuse(circuit, most=12)
  joined = [op for op in fused.operations if isinstance(op, Open | Apply | Product)]
  assert max(np.prod(op.shape) for op in joined) == 12


def test_no_keystream_serves_twice_and_nothing_idle_is_left(monkeypatch):
  def fn(build, *values):
    branches(1, build, *values)  # leads nowhere
    return branches(3, build, *values)

  used = []
  uniform = dealing.uniform
  with jax.enable_x64(True):
    circuit = build(fn, [(2, 2)] * 4, CONFIG, 4.0)
    fused = fusing.fuse(circuit)
    monkeypatch.setattr(
      dealing,
      "uniform",
      lambda key, *where: used.append((id(key), *where[:2])) or uniform(key, *where),
    )
    jax.eval_shape(lambda key: protocol.deal(fused, key, {}), prng.random_key())
  assert len(used) == len(set(used)) > 20
  outs = [op.out for op in fused.operations]
  assert len(outs) == len(set(outs))
  read = {i for op in fused.operations for i in fusing.read(op)} | {fused.outputs[0].number}
  slices = {op.out for op in fused.operations if isinstance(op, Local)}
  assert set(outs) - read <= slices  # parts of a joint result that only idle chains would read
  assert rounds(fused) == rounds(fusing.fuse(build_one()))


@pytest.mark.parametrize("comparison", ["tables", "fss"])
def test_the_messages_of_a_run_are_those_foretold(comparison):
  log, config = [], dataclasses.replace(CONFIG, comparison=comparison)
  with jax.enable_x64(True):
    circuit = fusing.fuse(build(functools.partial(branches, 2), [(2, 2)] * 4, config, 4.0))
    dealt = jax.eval_shape(lambda key: protocol.deal(circuit, key, {}), prng.random_key())
    for made, foretold in zip(dealt, protocol.dealt_shapes(circuit), strict=True):
      shape = lambda v: (v.shape, np.dtype(v.dtype))
      assert jax.tree.map(shape, made) == jax.tree.map(shape, foretold)
    part = jax.eval_shape(lambda dealt: protocol.part(dealt, 1), dealt)
    ready = jax.eval_shape(lambda part: protocol.prepare(circuit, 1, part, {}, {}), part)
    shares = {i: jax.ShapeDtypeStruct((2, 2), config.dtype) for i in range(4)}
    run = functools.partial(protocol.run, circuit, sharing.Wire(log=log))
    both = jax.vmap(run, in_axes=(None, None), axis_name=sharing.PARTY, axis_size=2)
    jax.eval_shape(both, ready, shares)
    assert log == protocol.messages(circuit)


def build_one():
  with jax.enable_x64(True):
    return build(functools.partial(branches, 1), [(2, 2)] * 4, CONFIG, 4.0)


def test_joint_layers_are_named_by_what_they_share():
  def fn(build, x, y):
    build.layer = "Cell/hi"
    a = build.relu(x)
    build.layer = "Cell/hf"
    return build.add(a, build.relu(y))

  fused = fusing.fuse(build(fn, [(2,), (2,)], Config(32, 8), 4.0))
  assert [op.layer for op in fused.operations if isinstance(op, Apply)] == ["Cell"]


# ---- a recurrent network

UNITS, STEPS = 3, 2


def lstm(weights, xs):
  """An LSTM that folds a scale into its weights at every step; the four gates are side by side."""

  def step(carry, x):
    h, c = carry
    z = x @ weights["x"] + (h @ weights["h"]) * weights["scale"] + weights["b"]
    i, f, g, o = jnp.split(z, 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h

  zeros = jnp.zeros(UNITS, xs.dtype)
  return jax.lax.scan(step, (zeros, zeros), xs)[1]


def lstm_arguments():
  wide = 4 * UNITS
  weights = {"x": normal(0, 2, wide), "h": normal(1, UNITS, wide), "b": normal(2, wide)}
  return weights | {"scale": np.abs(normal(3, wide))}, 2 * normal(4, STEPS, 2)


@functools.cache
def lstm_plans():
  """The plan without and with fusing."""
  args = lstm_arguments()
  with jax.enable_x64(True):
    ranges = mpc.calibrate(lstm, OWNERS, [args])
    fused = mpc.plan(lstm, OWNERS, args, Config(64, 16), ranges)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(lower.fusing, "fuse", lambda circuit: circuit)
      return mpc.plan(lstm, OWNERS, args, Config(64, 16), ranges), fused


def test_a_recurrent_network_gives_the_same_bits_in_fewer_rounds():
  args = lstm_arguments()
  plain, fused = lstm_plans()
  with jax.enable_x64(True):
    got = mpc.check(fused, args)
    np.testing.assert_array_equal(got, mpc.check(plain, args))
    want = np.asarray(lstm(*jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), args)))
  np.testing.assert_allclose(got, want, atol=1e-3)
  assert np.abs(want).max() > 0.3
  assert rounds(fused.circuit) <= 18 * STEPS < rounds(plain.circuit) / 2


def test_weights_are_published_once_for_all_steps():
  plain, fused = lstm_plans()
  weights, _ = lstm_arguments()
  matrices = sum(weights[name].size for name in ("x", "h"))
  published = lambda plan: sum(np.prod(o.shape) for o in plan.circuit.operands if o.map)
  for plan in (plain, fused):
    assert published(plan) == matrices
    linear = [op for op in plan.circuit.operations if type(op).__name__ == "Linear"]
    assert len(linear) == 2 * STEPS - 1
    assert len({op.operand for op in linear}) == 2


@pytest.mark.slow
def test_a_recurrent_network_is_encrypted_as_its_integer_model():
  args = lstm_arguments()
  _, plan = lstm_plans()
  with jax.enable_x64(True):
    np.testing.assert_array_equal(mpc.infer(plan, *args), mpc.check(plan, args))


# ---- repeated equations


def test_repeated_equations_are_lowered_once():
  def fn(w, x):
    y = jnp.exp(x) * (w * 2.0) + jnp.exp(x) * (w * 3.0)
    for axis in (0, 1, 0):
      y = y + x.sum(axis, keepdims=True) + jax.random.normal(jax.random.key(axis), x.shape)
    return y, x.sum(0, keepdims=True)

  w, x = normal(0, 2, 3), normal(1, 2, 3)
  program = trace(fn, (w, x), OWNERS)
  fewer = without_repeats(program)
  count = lambda program, name: sum(e.name == name for e in program.equations)
  assert (count(program, "exp"), count(fewer, "exp")) == (2, 1)
  assert (count(program, "reduce_sum"), count(fewer, "reduce_sum")) == (4, 2)
  assert count(fewer, "mul") == count(program, "mul") == 4
  for a, b in zip(outputs(program, (w, x)), outputs(fewer, (w, x)), strict=True):
    np.testing.assert_array_equal(a, b)


def test_repeats_are_found_by_content_not_by_identity():
  """Parties who read the program from a file have other objects."""

  def fn(w, x):
    table, again = (jnp.asarray(np.arange(2000.0, dtype=np.float32)) for _ in range(2))
    first, second = (x.at[jnp.array([0])].add(1.0) for _ in range(2))
    return jnp.exp(x * table) + jnp.exp(x * again) * w, first * second

  program = trace(fn, (np.float32(2), np.ones(2000, np.float32)), OWNERS)
  fewer = without_repeats(program)
  count = lambda program, name: sum(e.name == name for e in program.equations)
  assert (count(program, "exp"), count(fewer, "exp")) == (2, 1)
  scatters = [name for name in {e.name for e in program.equations} if "scatter" in name]
  assert [count(fewer, name) for name in scatters] == [2]  # it has a jaxpr, which is not compared


def outputs(program, leaves):
  """The program's outputs in plain JAX."""
  env = evaluate(program, leaves)
  return [env[v.number] for v in program.outputs]


def test_a_fused_plan_is_a_plan():
  plain, fused = lstm_plans()
  again = dataclasses.replace(plain, circuit=fusing.fuse(plain.circuit))
  assert rounds(again.circuit) == rounds(fused.circuit)
  assert fusing.fuse(fused.circuit) == fused.circuit
