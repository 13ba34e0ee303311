"""Every action, comparison and truncation of the gates against integers in the clear; and the
security that gates promise.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from primia_jax import prng, ring
from primia_jax.mpc import dealing, sharing
from primia_jax.mpc.gates import elementwise
from primia_jax.mpc.gates.elementwise import RELU, SIGN, TRUNCATE, Gate
from primia_jax.mpc.gates.fss import FSS
from primia_jax.mpc.gates.tables import TABLES

NUM = 512


def width(gate):
  """x64 if the ring needs it."""
  return jax.enable_x64(True) if gate.num_bits > 32 else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=0)
def deal(gate, seeds):
  """Both parties' correlations [2, ...], and what party 1 was sent."""
  masks = elementwise.masks(gate)
  each = [dealing.expand_masks(seeds[p], 7, masks) for p in (0, 1)]
  derived = elementwise.derive(gate, {name: jnp.stack([e[name] for e in each]) for name in masks})
  sent = dealing.split(seeds[0], 7, derived)
  parties = (
    {**each[0], **dealing.expand_shares(seeds[0], 7, sent), **derived.common},
    {**each[1], **sent, **derived.common},
  )
  return jax.tree.map(lambda a, b: jnp.stack([a, b]), *parties), sent


@functools.partial(jax.jit, static_argnums=0)
def online(gate, z, correlations):
  run = lambda z, c: elementwise.run(gate, sharing.Wire(), z, c)
  return jax.vmap(run, axis_name=sharing.PARTY)(z, correlations)


def shares(gate, z, rng):
  dtype = np.uint64 if gate.num_bits > 32 else np.uint32
  first = rng.integers(0, 2**64, z.shape, np.uint64).astype(dtype)
  return jnp.stack([first, z.astype(np.int64).view(np.uint64).astype(dtype) - first])


def result(gate, z, rng):
  correlations, _ = deal(gate, jnp.stack([prng.random_key(), prng.random_key()]))
  out = online(gate, shares(gate, z, rng), correlations)
  return np.asarray(ring.signed(out[0] + out[1], gate.num_bits)).astype(np.int64)


def expected(gate, z):
  """In Python integers."""
  half = 2 ** (gate.shift - 1) if gate.shift else 0
  answer = {
    RELU: lambda v: max((v + half) >> gate.shift, 0),
    TRUNCATE: lambda v: (v + half) >> gate.shift,
    SIGN: lambda v: int(v >= 0),
  }[gate.action]
  return np.array([answer(int(v)) for v in z], np.int64)


def legal(gate, rng):
  """Values over the whole legal range, its ends and everything around the places where answers
  change.
  """
  most = 2**gate.range_bits - 1 - elementwise.slack(gate)
  edges = [0, 1, -1, most, -most, most - 1, 1 - most]
  edges += [sign * 2**b + d for b in range(gate.range_bits) for sign in (1, -1) for d in (-1, 0, 1)]
  z = np.array([v for v in edges if abs(v) <= most], np.int64)
  near = rng.integers(-4 * 2**gate.shift, 4 * 2**gate.shift, NUM // 4)
  near = near[np.abs(near) <= most]
  return np.concatenate([z, near, rng.integers(-most, most, NUM, endpoint=True)])[:NUM]


SIZES = [
  (64, 62, 16),
  (64, 40, 20),
  (44, 36, 13),
  (32, 30, 12),
  (32, 20, 1),
  (16, 14, 5),
  (64, 62, 24),
]


@pytest.mark.parametrize(("num_bits", "range_bits", "shift"), SIZES)
@pytest.mark.parametrize("action", [RELU, TRUNCATE, SIGN])
def test_an_exact_gate_equals_python_integers(action, num_bits, range_bits, shift):
  gate = Gate(action, NUM, num_bits, range_bits, 0 if action == SIGN else shift)
  rng = np.random.default_rng(num_bits + shift)
  with width(gate):
    z = legal(gate, rng)
    np.testing.assert_array_equal(result(gate, z, rng), expected(gate, z))
    clear = elementwise.clear(
      gate, jnp.asarray(z.view(np.uint64).astype(np.uint64 if num_bits > 32 else np.uint32))
    )
    np.testing.assert_array_equal(ring.signed(clear, num_bits), expected(gate, z))


@pytest.mark.parametrize("action", [RELU, TRUNCATE, SIGN])
@pytest.mark.parametrize(("num_bits", "range_bits", "shift"), [(40, 34, 14), (32, 28, 9)])
def test_function_secret_sharing_gives_the_same(action, num_bits, range_bits, shift):
  gate = Gate(action, NUM, num_bits, range_bits, 0 if action == SIGN else shift, comparison=FSS)
  rng = np.random.default_rng(1)
  with width(gate):
    z = legal(gate, rng)
    np.testing.assert_array_equal(result(gate, z, rng), expected(gate, z))


@pytest.mark.parametrize(("num_bits", "range_bits"), [(64, 62), (40, 36), (32, 30)])
def test_a_relu_without_truncation_equals_python_integers(num_bits, range_bits):
  gate = Gate(RELU, NUM, num_bits, range_bits)
  rng = np.random.default_rng(2)
  with width(gate):
    z = legal(gate, rng)
    np.testing.assert_array_equal(result(gate, z, rng), expected(gate, z))


@pytest.mark.parametrize(
  ("num_bits", "range_bits", "shift"), [(64, 62, 16), (40, 36, 13), (32, 28, 12)]
)
@pytest.mark.parametrize("action", [RELU, TRUNCATE])
def test_the_cheaper_gate_is_at_most_one_unit_off(action, num_bits, range_bits, shift):
  gate = Gate(action, NUM, num_bits, range_bits, shift, shift if action == RELU else 0, exact=False)
  rng = np.random.default_rng(3)
  with width(gate):
    z = legal(gate, rng)
    assert (
      np.abs(result(gate, z, rng) - expected(gate, z)).max() == 1
    )  # and it is not exact by chance


SHARED = Gate(RELU, 8, 32, 27, 11)
MOST = 2**27 - 1 - elementwise.slack(SHARED)  # |z| + slack < 2^27


@settings(max_examples=20, deadline=None)
@given(st.integers(-MOST, MOST), st.integers(0, 2**32 - 1))
@example(MOST, 0)
@example(-MOST, 0)
def test_any_value_under_any_sharing(value, first):
  gate = SHARED
  correlations, _ = deal(gate, jnp.stack([prng.random_key(), prng.random_key()]))
  z = np.full(8, value, np.int64).view(np.uint64).astype(np.uint32)
  out = online(
    gate, jnp.stack([jnp.full(8, first, jnp.uint32), z - np.uint32(first)]), correlations
  )
  assert set(np.asarray(ring.signed(out[0] + out[1], 32)).tolist()) == {
    max((value + 2**10) >> 11, 0)
  }


def test_a_value_beyond_its_range_is_what_goes_wrong():
  """The bound is sharp, so the tests above would notice a gate that worked by accident."""
  gate = Gate(RELU, 4, 32, 20, 4)
  z = np.array([2**21, -(2**21) - 1, 2**22, 3 * 2**20], np.int64)
  assert (result(gate, z, np.random.default_rng(0)) != expected(gate, z)).any()


@pytest.mark.parametrize(
  ("change", "reason"),
  [({"range_bits": 31}, "ring of 33 bits"), ({"shift": 30}, "shift=30"), ({"skip": 40}, "skip=40")],
)
def test_impossible_gates_are_refused(change, reason):
  with pytest.raises(ValueError, match=reason):
    elementwise.check(Gate(RELU, 4, 32, 28)._replace(**change))


# ---- what is promised


def opened(gate, z, seeds):
  """Every message that the parties open, in order, for the shares z."""
  seen = []

  class Watching(sharing.Wire):
    def open_additive(self, x, what):
      seen.append(sharing.Wire.open_additive(self, x, what))
      return seen[-1]

    def open_boolean(self, words, what):
      out = sharing.Wire.open_boolean(self, words, what)
      seen.extend(out)
      return out

  def run(z, correlations):
    seen.clear()
    elementwise.run(gate, Watching(), z, correlations)
    return list(seen)

  correlations, _ = deal(gate, seeds)
  messages = jax.jit(jax.vmap(run, axis_name=sharing.PARTY, out_axes=None))(z, correlations)
  return [np.asarray(m) for m in messages]


def byte_counts(message):
  return np.bincount(np.ascontiguousarray(message).view(np.uint8), minlength=256)


@pytest.mark.parametrize("comparison", [TABLES, FSS], ids=["tables", "fss"])
@pytest.mark.parametrize("value", [0, -1, 2**20, -(2**24) + 2**12])
def test_every_opened_value_is_uniform_whatever_the_secret_is(value, comparison):
  gate = Gate(RELU, 2**13, 32, 25, 12, comparison=comparison)
  z = shares(gate, np.full(gate.num, value, np.int64), np.random.default_rng(4))
  messages = opened(gate, z, jnp.stack([prng.random_key(), prng.random_key()]))
  assert len(messages) == (7 if comparison is TABLES else 3)
  for message in messages:
    assert stats.chisquare(byte_counts(message)).pvalue > 1e-6


def test_the_test_of_uniformity_has_teeth():
  """Without its mask, the first message of constant inputs is far from uniform."""
  gate = Gate(RELU, 2**13, 32, 25, 12)
  z = shares(gate, np.zeros(gate.num, np.int64), np.random.default_rng(4))
  correlations, _ = deal(gate, jnp.stack([prng.random_key(), prng.random_key()]))
  unmasked = {**correlations, "r": jnp.zeros_like(correlations["r"])}
  wire = sharing.Wire()
  first = jax.vmap(
    lambda z, c: wire.open_additive(z + c["r"], ""), axis_name=sharing.PARTY, out_axes=None
  )
  assert stats.chisquare(byte_counts(np.asarray(first(z, unmasked)))).pvalue < 1e-30
  assert stats.chisquare(byte_counts(np.asarray(first(z, correlations)))).pvalue > 1e-6


def test_opened_values_are_independent_of_the_secret():
  """The top bits of each opened byte have no mutual information with the sign of the secret."""
  gate = Gate(RELU, 2**14, 32, 25, 12)
  rng = np.random.default_rng(5)
  sign = rng.integers(0, 2, gate.num)
  z = shares(gate, np.where(sign == 1, 2**18, -(2**18)), rng)
  for message in opened(gate, z, jnp.stack([prng.random_key(), prng.random_key()])):
    if len(message) != gate.num:  # packed bits: element a W + w is bit a of byte w
      message = np.unpackbits(message[None], axis=0, bitorder="little").reshape(-1)
      table = np.array([np.bincount(message[sign == s], minlength=2) for s in (0, 1)])
    else:
      top = message.view(np.uint8).reshape(gate.num, -1)[:, -1] >> 4
      table = np.array([np.bincount(top[sign == s], minlength=16) for s in (0, 1)])
    assert stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue > 1e-6


def test_a_party_s_correlations_alone_are_uniform():
  gate = Gate(RELU, 2**13, 32, 25, 12)
  correlations, sent = deal(gate, jnp.stack([prng.random_key(), prng.random_key()]))
  for name, both in correlations.items():
    for party in (0, 1):
      assert stats.chisquare(byte_counts(np.asarray(both[party]))).pvalue > 1e-7, (name, party)
  assert set(sent) <= set(correlations)


def test_the_answer_s_shares_are_uniform_one_by_one():
  gate = Gate(RELU, 2**13, 32, 25, 12)
  z = shares(gate, np.full(gate.num, 2**20, np.int64), np.random.default_rng(6))
  correlations, _ = deal(gate, jnp.stack([prng.random_key(), prng.random_key()]))
  out = np.asarray(online(gate, z, correlations))
  assert (out[0] + out[1] == 2**8).all()
  for party in (0, 1):
    assert stats.chisquare(byte_counts(out[party])).pvalue > 1e-6


@pytest.mark.parametrize(
  ("gate", "num_bytes", "rounds"),
  [
    (Gate(RELU, 2**20, 64, 62, 16), 105 / 8 * 2**20, 4),
    (Gate(RELU, 2**20, 32, 28, 12, 12, exact=False), 65 / 8 * 2**20, 3),
    (Gate(RELU, 2**20, 64, 40, 16, comparison=FSS), 66 / 8 * 2**20, 2),
  ],
)
def test_bytes_and_rounds(gate, num_bytes, rounds):
  with width(gate):
    log = []
    run = lambda z, c: elementwise.run(gate, sharing.Wire(log=log), z, c)
    correlations = jax.eval_shape(
      functools.partial(deal, gate), jax.ShapeDtypeStruct((2, 8), jnp.uint32)
    )[0]
    z = jax.ShapeDtypeStruct((2, gate.num), np.uint64 if gate.num_bits > 32 else np.uint32)
    jax.eval_shape(jax.vmap(run, axis_name=sharing.PARTY), z, correlations)
    assert (sum(m.num_bytes for m in log), len(log)) == (num_bytes, rounds)


@pytest.mark.parametrize("comparison", [TABLES, FSS], ids=lambda c: c.name)
@pytest.mark.parametrize(("num_bits", "shift"), [(64, 40), (32, 13), (30, 5), (20, 17)])
def test_a_clamp_takes_any_ring_element_into_its_range(num_bits, shift, comparison):
  """In Python integers, over the whole ring, and at every place where it wraps around."""
  gate = Gate("clamp", NUM, num_bits, shift + 1, shift, comparison=comparison, exact=shift % 2 == 0)
  half, rng = 2 ** (shift - 1), np.random.default_rng(shift)
  ends = [sign * half + d for sign in (1, -1) for d in (-1, 0, 1)]
  z = [*ends, 0, -1, 2 ** (num_bits - 1) - 1, -(2 ** (num_bits - 1))]
  z = np.array([*z, *rng.integers(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1), NUM - len(z))])
  want = np.array([(int(v) + half) % 2**shift - half for v in z])
  with width(gate):
    np.testing.assert_array_equal(result(gate, z, rng), want)
    elements = jnp.asarray(z.view(np.uint64).astype(ring.storage(num_bits)))
    clear = ring.signed(elementwise.clear(gate, elements), num_bits)
    np.testing.assert_array_equal(np.asarray(clear).astype(np.int64), want)
  inside = (z < half) & (z > -half)
  np.testing.assert_array_equal(want[inside], z[inside])
  assert inside.any()
  assert not inside.all()
