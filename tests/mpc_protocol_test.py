"""A circuit's phases: encoding within half a unit, steps that equal the whole, messages that tell
nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpc_reference import normal

from primia_jax import prng, ring
from primia_jax.mpc import clear, encoding, inference, protocol
from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Apply, Config, Linear, Offset, Open, Operand, Product
from primia_jax.mpc.maps import MULTIPLY, Map
from primia_jax.mpc.sharing import PARTY, Wire

pytestmark = pytest.mark.usefixtures("x64")
DOT = Map("dot_general", (("dimension_numbers", (((1,), (0,)), ((), ()))),))
NONCE = jnp.zeros(3, jnp.uint32)
CONFIG = Config(40, 10, 14)


def example():
  """Every kind of operation: a dense layer with its offset, a ReLU, a product of secrets; owner 0
  has w and b.
  """
  build = Builder(CONFIG)
  x = build.input(1, lambda env: env["x"], (5, 4), max_abs=4.0)
  z = build.input(None, lambda env: env["z"], (5, 3), max_abs=4.0)
  y = build.linear(x, 0, lambda env: env["w"], (4, 3), 2.0**-8, 14, DOT, max_abs=16.0)
  y = build.add_owned(y, 0, lambda env: env["b"], (1, 3), max_abs=1.0)
  y = build.relu(y)
  y = build.product(build.add_public(y, 0.5), build.local(lambda v: v[::-1], z), MULTIPLY)
  total = build.local(lambda v: v.sum(1, dtype=v.dtype), y)
  return build.circuit([total, z, np.float32(1)])


ENV = {"x": normal(0, 5, 4), "z": normal(1, 5, 3), "w": normal(2, 4, 3), "b": normal(3, 1, 3)}


def ready_for(circuit, env=ENV):
  """(both parties' correlations, operands with z's shares, operands in the clear)."""
  operands = {
    i: encoding.encode(op, jnp.asarray(op.value(env)), circuit.config)
    for i, op in enumerate(circuit.operands)
  }

  @jax.jit
  def offline(model, key, operands):
    blind = protocol.blinds(circuit, model, 0)
    dealt = protocol.deal(circuit, key, protocol.full(circuit, blind))
    published = protocol.full(circuit, protocol.publish(operands, blind))
    parts = [protocol.part(dealt, party) for party in (0, 1)]
    ready = (protocol.prepare(circuit, i, p, operands, published) for i, p in enumerate(parts))
    return inference.stack(*ready)

  ready, shared = offline(prng.random_key(), prng.random_key(), operands), dict(operands)
  for i, op in enumerate(circuit.operands):
    if op.owner is None:
      first = prng.bits(prng.random_key(), NONCE, operands[i].shape, operands[i].dtype)
      shared[i] = jnp.stack([first, operands[i] - first])
  return ready, shared, operands


@functools.cache
def prepared():
  circuit = example()
  return circuit, *ready_for(circuit)


def advanced(circuit, ready, operands, cuts):
  """The parties' env after each piece between the cuts."""
  axes = {i: 0 if op.owner is None else None for i, op in enumerate(circuit.operands)}
  envs, env = [], {}
  for first, last in zip([0, *cuts], [*cuts, len(circuit.operations)], strict=True):
    step = functools.partial(protocol.advance, circuit, Wire(), first=first, last=last)
    both = jax.vmap(step, in_axes=(0, axes, 0), axis_name=PARTY, axis_size=2)
    mine = {i: c for i, c in ready.items() if first <= i < last}
    env = both(mine, operands, env)
    envs.append(env)
  return envs


# ---- owners


@given(
  st.lists(st.floats(-900, 900, width=32), min_size=9, max_size=9),
  st.sampled_from([2.0**-10, 2.0**-4, 1 / 3]),
)
@settings(max_examples=40, deadline=None)
def test_encoding_is_off_by_half_a_unit_at_most(values, scale):
  x = jnp.asarray(values, jnp.float32)
  for config in (CONFIG, Config(32, 8, 12)):
    operand = Operand(0, lambda env: env, scale, x.shape, None, None, "")
    elements = encoding.encode(operand, x, config)
    assert elements.dtype == config.dtype
    exact = np.asarray(ring.signed(elements, config.num_bits)).astype(np.float64) * scale
    single = 900 * 2.0**-23 if config.num_bits == 32 else 0  # narrow rings are encoded in float32
    assert np.abs(exact - np.asarray(x, np.float64)).max() <= scale / 2 * (1 + 1e-6) + single
    np.testing.assert_allclose(encoding.decode(elements, scale, config), exact, rtol=1e-6)


def test_a_blank_has_the_shapes_of_what_it_stands_for():
  circuit = example()
  for operand in circuit.operands:
    full = encoding.encode(operand, jnp.asarray(operand.value(ENV)), CONFIG)
    blank = encoding.blank(operand, CONFIG)
    assert jax.tree.structure(full) == jax.tree.structure(blank)
    jax.tree.map(
      lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail("shapes"), full, blank
    )
    assert not any(np.any(v) for v in jax.tree.leaves(blank))


def test_what_is_published_is_the_weight_under_the_dealers_blind():
  """D + B = W exactly; only a linear layer's operand is published, and without B it is uniform
  whatever W is.
  """
  circuit, _, _, operands = prepared()
  blind = protocol.blinds(circuit, prng.random_key(), 0)
  published = protocol.publish(operands, blind)
  (number,) = published
  assert circuit.operands[number].map == DOT
  np.testing.assert_array_equal(published[number] + blind[number], operands[number].elements)

  build = Builder(CONFIG)
  x = build.input(1, lambda env: env, (1, 64))
  build.linear(x, 0, lambda env: env, (64, 64), 2.0**-8, 14, DOT, max_abs=1.0)
  wide = build.circuit([])
  for value in (0.0, 1.0):
    weight = {1: encoding.encode(wide.operands[1], jnp.full((64, 64), value), CONFIG)}
    (d,) = protocol.publish(weight, protocol.blinds(wide, prng.random_key(), 0)).values()
    assert_uniform(d)


def assert_uniform(words):
  """Chi-square of the bytes that lie within the ring, 255 degrees: 400 has a chance of 1e-8."""
  octets = np.asarray(words).reshape(-1, 1).view(np.uint8)[:, : CONFIG.num_bits // 8]
  counts = np.bincount(octets.ravel(), minlength=256)
  assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 400


# ---- the parties


def test_the_protocol_has_the_integer_models_bits():
  circuit, ready, shared, operands = prepared()
  assert {type(op) for op in circuit.operations} >= {Linear, Offset, Open, Product, Apply}
  (env,) = advanced(circuit, ready, shared, [])
  shares = protocol.outputs(circuit, env)
  want = clear.compute(circuit, operands)
  assert len(shares) == len(want) == 2  # a public output is none
  for share, elements in zip(shares, want, strict=True):
    np.testing.assert_array_equal(ring.reduce(share[0] + share[1], CONFIG.num_bits), elements)
  y = np.maximum(ENV["x"] @ ENV["w"] + ENV["b"], 0) + 0.5
  np.testing.assert_allclose(
    encoding.decode(want[0], circuit.outputs[0].scale, CONFIG),
    (y * ENV["z"][::-1]).sum(1),
    atol=0.05,
  )


def test_pieces_are_the_whole_and_carry_only_what_is_read_again():
  circuit, ready, shared, _ = prepared()
  (whole,) = advanced(circuit, ready, shared, [])
  every = list(range(1, len(circuit.operations)))
  for cuts in (every, every[1::3], [len(every) // 2]):
    envs = advanced(circuit, ready, shared, cuts)
    for cut, env in zip(cuts, envs, strict=False):
      assert list(env) == protocol.live(circuit, cut)
    jax.tree.map(np.testing.assert_array_equal, envs[-1], whole)


def test_what_lives_is_what_later_operations_read():
  """`live` is exactly what later operations and the outputs read."""
  circuit = example()
  operations = circuit.operations
  reads = lambda op: getattr(op, "inputs", None) or ([op.input] if hasattr(op, "input") else [])
  results = [v.number for v in circuit.outputs if hasattr(v, "number")]
  for number in range(len(operations) + 1):
    later = {i for op in operations[number:] for i in reads(op)} | set(results)
    assert protocol.live(circuit, number) == sorted({op.out for op in operations[:number]} & later)
  assert protocol.live(circuit, 0) == []


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_every_masked_value_is_uniform_whatever_it_hides(value):
  """Under its mask it is uniform; without, it is the secret."""
  build = Builder(CONFIG)
  x = build.input(None, lambda env: env, (4096,))
  number = build.open(x)
  circuit = build.circuit([x._replace(number=number)])
  ready, shared, operands = ready_for(circuit, np.full(4096, value, np.float32))
  (env,) = advanced(circuit, ready, shared, [])
  masked, masks = env[number]
  np.testing.assert_array_equal(masked[0], masked[1])
  assert_uniform(masked[0])
  assert_uniform(masks[0])
  np.testing.assert_array_equal(
    ring.reduce(masked[0] - masks[0] - masks[1], CONFIG.num_bits), operands[0]
  )
  unmasked = {i: {"r": jnp.zeros_like(c["r"])} for i, c in ready.items()}
  (env,) = advanced(circuit, unmasked, shared, [])
  assert np.unique(np.asarray(env[number][0])).size == 1
