"""Ways to break what crosses, each a function of a `MonkeyPatch`; see boundary_mutations_test."""

import functools
from collections.abc import Callable
from typing import Any

import federated_sites as small
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import algorithms, boundary, prng, ring, secagg, summation
from primia_jax.boundary import flow
from primia_jax.mpc import dealing, planning, protocol
from primia_jax.mpc.circuit import Apply, Config
from primia_jax.mpc.gates import elementwise
from primia_jax.secagg import masking, simulation
from primia_jax.types import Site

# ---- what is broken: a masked round of three sites, and an encrypted dense layer with a ReLU

K = 3
SHAPE = jax.ShapeDtypeStruct
SITE = Site(
  SHAPE((), np.int32),
  SHAPE((small.N, small.D, 1, 1), np.float32),
  SHAPE((small.N,), np.int32),
  SHAPE((), np.int32),
)
PARAMS, STATISTICS = jax.eval_shape(small.start), {"m": SHAPE((), np.float32)}
LEAVES = ("'b'", "'w'", "'m'", "weight", "loss", "correct", "num_examples", "out_of_range")
SECURE = secagg.secure_sum(K, threshold=2)


def round_report(algorithm=None, summed=None, public=()) -> boundary.Report:
  algorithm = algorithm or algorithms.fedavg(small.recipe(), keep_optimizer=True)
  summed = summed or summation.masked(SECURE)
  return boundary.audit_round(algorithm, summed, PARAMS, STATISTICS, SITE, K, public=public)


def network(weights, x):
  hidden = jax.nn.relu(x @ weights["w"] + weights["b"])
  return hidden @ weights["v"]


@functools.cache
def plan() -> planning.Plan:
  weights = {"w": np.eye(4, 3, dtype=np.float32), "b": np.ones((1, 3), np.float32)}
  args = weights | {"v": np.ones((3, 2), np.float32)}, np.ones((2, 4), np.float32)
  owners, config = ("model_owner", "data_owner"), Config(20, 4, 8, False)
  ranges = planning.calibrate(network, owners, [args])
  return planning.plan(network, owners, args, config, ranges)


def secret_report() -> boundary.Report:
  return boundary.audit_secret(plan())


# ---- mechanical: the equations of a round

Patch = pytest.MonkeyPatch


def rewritten(patch: Patch, rewrite: Callable[[Any], Any]) -> None:
  """The next round that is audited has its jaxpr rewritten."""
  follow = flow.follow

  def other(walk, closed, labels):
    return follow(walk, closed.replace(jaxpr=rewrite(closed.jaxpr)), labels)

  patch.setattr(flow, "follow", other)


def masks_of(jaxpr: Any) -> list[tuple[Any, Any]]:
  """For each leaf of the message, the equation that makes its mask and the one that adds it."""
  makers: dict[Any, Any] = {}
  found = []
  for eqn in jaxpr.eqns:
    known = [makers[v] for v in eqn.invars if not hasattr(v, "val") and v in makers]
    if eqn.params.get("name") == "_mask_sum":
      makers[eqn.outvars[0]] = eqn
    elif known and eqn.primitive.name == "add":
      found.append((known[0], eqn))
    elif known:
      makers[eqn.outvars[0]] = known[0]
  assert len(found) == len(LEAVES)
  return found


def drop_mask(leaf: int, patch: Patch) -> None:
  def rewrite(jaxpr):
    _, add = masks_of(jaxpr)[leaf]
    zero = jax.extend.core.Literal(np.zeros((), np.uint32), add.invars[1].aval)
    return changed(jaxpr, add, add.replace(invars=[add.invars[0], zero]))

  rewritten(patch, rewrite)


def repeat_stream(leaf: int, patch: Patch) -> None:
  def rewrite(jaxpr):
    found = masks_of(jaxpr)
    (make, _), (earlier, _) = found[leaf], found[leaf - 1]
    return changed(jaxpr, make, make.replace(invars=[*make.invars[:2], earlier.invars[2]]))

  rewritten(patch, rewrite)


def send_input(field: int, patch: Patch) -> None:
  """The first output is an input: of a site its images, labels, number of examples, secret."""
  fields = [i for i, v in enumerate(Site._fields) if v in ("images", "labels", "num_examples")]

  def rewrite(jaxpr):
    shared = len(jax.tree.leaves((PARAMS, STATISTICS))) + 2  # with the round and the key
    return jaxpr.replace(outvars=[jaxpr.invars[shared + fields[field]], *jaxpr.outvars[1:]])

  rewritten(patch, rewrite)


def changed(jaxpr: Any, old: Any, new: Any) -> Any:
  return jaxpr.replace(eqns=[new if eqn is old else eqn for eqn in jaxpr.eqns])


def with_keys(patch: Patch, change: Callable[[Any, Any], tuple[Any, Any]]) -> None:
  masks = masking.leaf_masks
  patch.setattr(
    masking, "leaf_masks", lambda keys, signs, *rest: masks(*change(keys, signs), *rest)
  )


def drop_key(number: int, patch: Patch) -> None:
  without = lambda signs: [signs[i : i + 1] * int(i != number) for i in range(K)]
  with_keys(patch, lambda keys, signs: (keys, jnp.concatenate(without(signs))))


def swap_key(number: int, patch: Patch) -> None:
  rows = [(number + 1) % K if i == number else i for i in range(K)]
  with_keys(patch, lambda keys, signs: (jnp.stack([keys[i] for i in rows]), signs))


# ---- mechanical: the masks of an inference, by number within a gate


def gate_masks() -> list[str]:
  gates = [op.gate for op in plan().circuit.operations if isinstance(op, Apply)]
  return sorted(elementwise.masks(gates[0]))


def drop_gate_mask(number: int, patch: Patch) -> None:
  with_uniform(patch, lambda u, key, gate, i, *rest: zero_if(i == number, u, key, gate, i, *rest))


def repeat_gate_mask(number: int, patch: Patch) -> None:
  with_uniform(
    patch, lambda u, key, gate, i, *rest: u(key, gate, i - 1 if i == number else i, *rest)
  )


def with_uniform(patch: Patch, change: Callable) -> None:
  patch.setattr(dealing, "uniform", functools.partial(change, dealing.uniform))


def zero_if(is_zero: bool, uniform: Callable, *args: Any) -> Any:
  found = uniform(*args)
  return jnp.zeros_like(found) if is_zero else found


# ---- by hand: a round


def with_send(patch: Patch, change: Callable) -> summation.Summation:
  """Other things than the masked message are sent: (message, row, masked) -> what is sent."""
  sound = summation.masked(SECURE)
  broken = sound._replace(send=lambda m, row: change(m, row, sound.send(m, row)))
  patch.setattr(summation, "masked", lambda config: broken)


def with_mask(patch: Patch, change: Callable) -> None:
  masks = masking.leaf_masks
  patch.setattr(masking, "leaf_masks", lambda *args: [change(m) for m in masks(*args)])


def doubled(patch: Patch) -> None:
  with_mask(patch, lambda mask: mask + mask)


def narrow(patch: Patch) -> None:
  with_mask(patch, lambda mask: mask & np.uint32(0xFFFF))


def shifted(patch: Patch) -> None:
  with_mask(patch, lambda mask: mask >> np.uint32(1))


def one_for_all(patch: Patch) -> None:
  with_mask(
    patch, lambda mask: jnp.broadcast_to(mask.reshape(-1)[:1], (mask.size,)).reshape(mask.shape)
  )


def in_floats(patch: Patch) -> None:
  with_send(
    patch,
    lambda m, row, sent: jax.tree.map(lambda a, v: a + v.astype(jnp.float32), m, sent.message),
  )


def taken_off(patch: Patch) -> None:
  def change(m, row, sent):
    left = secagg.Residue(row[0].keys, -jnp.sign(row[0].site - row[0].peers))
    return masking.unmask(sent, left, (row[2][0], row[2][1]), SECURE)

  with_send(patch, change)


def site_metric(patch: Patch) -> None:
  with_send(patch, lambda m, row, sent: (sent, m.metrics.loss))


def statistics(patch: Patch) -> None:
  with_send(patch, lambda m, row, sent: (sent, m.update[1]))


def largest_change(patch: Patch) -> None:
  with_send(patch, lambda m, row, sent: sent._replace(out_of_range=jnp.argmax(m.update[0]["w"])))


def both(patch: Patch) -> None:
  with_send(
    patch,
    lambda m, row, sent: (
      sent,
      secagg.mask(secagg.encode(m.metrics, SECURE), row[0], (row[2][0], row[2][1]), SECURE),
    ),
  )


def noise_key(patch: Patch) -> None:
  with_send(patch, lambda m, row, sent: (sent, row[0].noise))


def mask_key(patch: Patch) -> None:
  with_send(patch, lambda m, row, sent: (sent, row[0].self_mask))


def if_the_loss_is_low(patch: Patch) -> None:
  with_send(
    patch,
    lambda m, row, sent: jax.tree.map(
      lambda a: jnp.where(m.metrics.loss < 1, a, jnp.zeros_like(a)), sent
    ),
  )


def printed(patch: Patch) -> None:
  def change(m, row, sent):
    jax.debug.print("{}", m.metrics.loss)
    return sent

  with_send(patch, change)


def called_back(patch: Patch) -> None:
  def change(m, row, sent):
    log = lambda loss: None
    jax.lax.fori_loop(0, 2, lambda i, x: (jax.debug.callback(log, x), x)[1], m.metrics.loss)
    return sent

  with_send(patch, change)


def public_keys(patch: Patch) -> None:
  with_keys(patch, lambda keys, signs: (jnp.zeros_like(keys), signs))


def one_own_mask_for_all(patch: Patch) -> None:
  agreed = simulation._agreed

  def same(*args):
    numbers, peers, keys, own, noise = agreed(*args)
    return numbers, peers, keys, np.broadcast_to(own[:1], own.shape), noise

  patch.setattr(simulation, "_agreed", same)


def own_mask_for_noise(patch: Patch) -> None:
  agreed = simulation._agreed

  def same(*args):
    numbers, peers, keys, own, _ = agreed(*args)
    return numbers, peers, keys, own, own

  patch.setattr(simulation, "_agreed", same)


def not_encoded(patch: Patch) -> None:
  patch.setattr(ring, "encode", lambda x, fixed: jax.lax.bitcast_convert_type(x, jnp.uint32))


def no_round_in_the_nonce(patch: Patch) -> None:
  masks = masking.leaf_masks
  zero = np.uint32(0)
  patch.setattr(
    masking, "leaf_masks", lambda keys, signs, words, *rest: masks(keys, signs, (zero, zero), *rest)
  )


def signs_swapped(patch: Patch) -> None:
  with_keys(patch, lambda keys, signs: (keys, -signs))


# ---- by hand: an inference


def with_gate(patch: Patch, change: Callable) -> None:
  run = elementwise.run
  patch.setattr(elementwise, "run", lambda gate, wire, z, c: change(run, gate, wire, z, c))


def share_opened(patch: Patch) -> None:
  with_gate(patch, lambda run, gate, wire, z, c: run(gate, wire, wire.open_additive(z, "z"), c))


def answer_opened(patch: Patch) -> None:
  with_gate(patch, lambda run, gate, wire, z, c: wire.open_additive(run(gate, wire, z, c), "y"))


def opened_twice(patch: Patch) -> None:
  def change(run, gate, wire, z, c):
    wire.open_additive(z + z + c["r"], "again")
    return run(gate, wire, z, c)

  with_gate(patch, change)


def dealt_value_opened(patch: Patch) -> None:
  def change(run, gate, wire, z, c):
    wire.open_additive(c["rho"], "rho")
    return run(gate, wire, z, c)

  with_gate(patch, change)


def weights_published(patch: Patch) -> None:
  patch.setattr(
    protocol, "publish", lambda operands, blind: {i: operands[i].elements for i in blind}
  )


def blinds_halved(patch: Patch) -> None:
  publish = protocol.publish
  half = lambda blind: {i: b >> np.uint32(1) for i, b in blind.items()}
  patch.setattr(protocol, "publish", lambda operands, blind: publish(operands, half(blind)))


def one_blind_for_all(patch: Patch) -> None:
  with_uniform(
    patch,
    lambda u, key, gate, i, shape, dtype: u(
      key, 0 if isinstance(gate, int) and len(shape) == 2 else gate, i, shape, dtype
    ),
  )


def same_seed(patch: Patch) -> None:
  derive = prng.derive
  patch.setattr(
    prng, "derive", lambda key, *words: derive(key, *words[:1], *(0 for _ in words[1:]))
  )


def shares_undivided(patch: Patch) -> None:
  patch.setattr(dealing, "split", lambda key, gate, derived: derived.additive | derived.boolean)


def split_by_the_other_seed(patch: Patch) -> None:
  deal_gate = protocol.deal_gate
  patch.setattr(protocol, "deal_gate", lambda gate, seeds, n: deal_gate(gate, seeds[::-1], n))


def same_masks_in_all_gates(patch: Patch) -> None:
  with_uniform(patch, lambda u, key, gate, i, *rest: u(key, 0, i, *rest))


def short_masks(patch: Patch) -> None:
  def change(u, *args):
    found = u(*args)
    return found & found.dtype.type(1) if found.dtype == np.uint32 else found

  with_uniform(patch, change)


def weights_added_twice(patch: Patch) -> None:
  offset = protocol.offset
  patch.setattr(protocol, "offset", lambda *args: 2 * offset(*args))
