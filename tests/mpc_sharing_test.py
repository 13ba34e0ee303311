import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax.mpc import sharing
from primia_jax.mpc.sharing import PARTY, Sent, Wire

A = jnp.arange(6, dtype=jnp.uint32).reshape(2, 3) * jnp.uint32(2**30 + 1)


def on_devices(fn, *args):
  mesh = sharing.party_mesh()
  spec = jax.sharding.PartitionSpec(PARTY)
  body = lambda *args: jax.tree.map(lambda v: v[None], fn(*(v[0] for v in args)))
  return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
    *args
  )


def test_both_wires_open_the_same():
  total, both = A[0] + A[1], A[0] ^ A[1]
  add = jax.vmap(lambda x: Wire().open_additive(x, ""), axis_name=PARTY, out_axes=None)(A)
  (xor,) = jax.vmap(lambda x: Wire().open_boolean([x], ""), axis_name=PARTY, out_axes=None)(A)
  np.testing.assert_array_equal(add, total)
  np.testing.assert_array_equal(xor, both)
  np.testing.assert_array_equal(
    on_devices(lambda x: Wire(swap=True).open_additive(x, ""), A), jnp.stack([total] * 2)
  )
  np.testing.assert_array_equal(
    on_devices(lambda x: Wire(swap=True).open_boolean([x], "")[0], A), jnp.stack([both] * 2)
  )


def test_a_message_is_noted_with_its_bytes():
  log = []
  wire = Wire(log=log)
  jax.vmap(lambda x: (wire.open_additive(x, "a"), wire.open_boolean([x, x], "b")), axis_name=PARTY)(
    A
  )
  assert log == [Sent("a", 12), Sent("b", 24)]


@pytest.mark.parametrize("party", [0, 1])
def test_what_one_party_holds_or_computes(party):
  mine = jax.vmap(lambda x: sharing.at(party, x), axis_name=PARTY)(A)
  np.testing.assert_array_equal(mine[party], A[party])
  assert not mine[1 - party].any()
  calls = []

  def work():
    calls.append(0)
    return A[0] * jnp.uint32(3)

  alone = jax.vmap(lambda x: sharing.compute_at(party, work, Wire()) + x, axis_name=PARTY)(
    jnp.zeros_like(A)
  )
  np.testing.assert_array_equal(alone[party], A[0] * jnp.uint32(3))
  assert not alone[1 - party].any()
  np.testing.assert_array_equal(
    on_devices(lambda x: sharing.compute_at(party, lambda: x, Wire(swap=True)), A)[party], A[party]
  )


def test_two_parties_need_two_devices():
  with pytest.raises(ValueError, match="jax_num_cpu_devices=2"):
    sharing.party_mesh(jax.devices()[:1])
