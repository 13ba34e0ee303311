"""The audit's lattice by small functions; every algorithm, sum, gate and message by its types."""

import ast
import inspect
import pathlib
import types

import boundary_breaking as breaking
import federated_sites as small
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import (
  algorithms,
  boundary,
  evaluation,
  federated,
  prng,
  robust,
  secagg,
  site_privacy,
  summation,
)
from primia_jax.boundary import flow, meetings, messages, report, values
from primia_jax.mpc import planning, protocol
from primia_jax.mpc.circuit import Config
from primia_jax.privacy import adaptive, distributed

# ---- the lattice

KEY, X = jax.ShapeDtypeStruct((8,), np.uint32), jax.ShapeDtypeStruct((6,), np.uint32)


def stream(key, number=0, shape=(6,), dtype=jnp.uint32):
  return prng.bits(key, jnp.asarray([number, 0, 0], jnp.uint32), shape, dtype)


def audited(fn):
  """The report on what fn(a secret array, a secret key) returns."""
  closed = jax.make_jaxpr(fn)(X, KEY)
  walk = flow.start()
  outputs = flow.follow(walk, closed, [values.secret(["x"]), flow.key(("k",))])
  sent = [report.Sent("out", v, aval) for v, aval in zip(outputs, closed.out_avals, strict=True)]
  sent += [report.Sent("met", m.value, m.aval) for m in walk.met]
  return report.judge("", sent, [("all", lambda stream: True)])


HIDDEN = {
  "a sum": lambda x, k: x + stream(k),
  "a difference": lambda x, k: stream(k) - x,
  "an exclusive or": lambda x, k: x ^ stream(k),
  "of a function of x": lambda x, k: jnp.sum(x * x, dtype=x.dtype) + stream(k)[:1],
  "of low bits": lambda x, k: (x + (stream(k) & np.uint32(255))) & np.uint32(255),
  "of low bits again": lambda x, k: (x + stream(k)) & np.uint32(7),
  "a public function of it": lambda x, k: (x + stream(k)).astype(jnp.float32) / 3,
  "moved": lambda x, k: (x + stream(k)).reshape(2, 3).T[::-1] + np.uint32(1),
  "two streams": lambda x, k: (x + stream(k), x - stream(k, 1)),
  "of a derived key": lambda x, k: (x + stream(k), x + stream(prng.derive(k, 0))),
  "twice the same": lambda x, k: (lambda v: (v, v[1:3], v + np.uint32(1)))(x + stream(k)),
  "side by side": lambda x, k: jnp.concatenate([x, x + x]) + jnp.concatenate(
    [stream(k), stream(k, 1)]),
  "in a branch that is known": lambda x, k: jnp.where(np.True_, x + stream(k), x),
  "in a jitted function": lambda x, k: jax.jit(lambda a, b: a + b)(x, stream(k)),
  "bytes": lambda x, k: x.astype(jnp.uint8) ^ jax.lax.bitcast_convert_type(
    stream(k), jnp.uint8).reshape(-1)[:6],
  "nothing secret": lambda x, k: jnp.arange(3),
}  # fmt: skip
OPEN = {
  "x": lambda x, k: x,
  "a product": lambda x, k: x * stream(k),
  "an or": lambda x, k: x | stream(k),
  "a maximum": lambda x, k: jnp.maximum(x, stream(k)),
  "a sum of floats": lambda x, k: x.astype(jnp.float32) + stream(k).astype(jnp.float32),
  "a stream twice": lambda x, k: (x + stream(k), x * x + stream(k)),
  "its mask beside it": lambda x, k: (x + stream(k), stream(k)),
  "a shorter prefix of its mask": lambda x, k: (x + stream(k), stream(k, 0, (3,))),
  "its key beside it": lambda x, k: (x + stream(k), k[:1]),
  "a key that its own is derived from": lambda x, k: (x + stream(prng.derive(k, 0)), k),
  "a mask taken off": lambda x, k: x + stream(k) - stream(k),
  "a mask that depends on it": lambda x, k: x + stream(k) + stream(k),
  "high bits": lambda x, k: x + (stream(k) & np.uint32(255)),
  "one word for all": lambda x, k: x + stream(k)[:1],
  "a shuffled word": lambda x, k: x + stream(k)[jnp.zeros(6, jnp.int32)],
  "a stream in a loop": lambda x, k: jax.lax.map(lambda v: v + stream(k, 0, ()), x),
  "a nonce that is secret": lambda x, k: x + prng.bits(k, x[:3], (6,)),
  "the public key's stream": lambda x, k: x + stream(jnp.zeros(8, jnp.uint32)),
  "a secret branch": lambda x, k: jax.lax.cond(x[0] > 0, lambda: x + stream(k), lambda: x),
  "a secret choice": lambda x, k: jnp.where(x > 0, x + stream(k), stream(k, 1)),
  "half a mask, half zeros": lambda x, k: (
    x + jnp.concatenate([stream(k)[:3], jnp.zeros_like(x[:3])])
  ),
  "a padded mask": lambda x, k: x + jnp.pad(stream(k)[:3], (0, 3)),
  "a mask stacked on zeros": lambda x, k: (
    x + jnp.stack([stream(k)[:3], jnp.zeros(3, jnp.uint32)]).reshape(6)
  ),
  "an and with -1": lambda x, k: (
    (x.astype(jnp.int32) + (stream(k) & np.uint32(1)).astype(jnp.int32)) & np.int32(-1)
  ),
  "a print": lambda x, k: (jax.debug.print("{}", x), stream(k))[1],
  "a call of the host": lambda x, k: jax.pure_callback(lambda v: v, x, x) + stream(k),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_hidden_passes(name):
  audited(HIDDEN[name]).check()


@pytest.mark.parametrize("name", OPEN)
def test_what_lies_open_is_found(name):
  with pytest.raises(boundary.Unmasked):
    audited(OPEN[name]).check()


# ---- what meets


def test_every_collective_crosses_or_is_said_to_stay():
  """One that a later JAX may bring crosses, too: by its axis, whatever its name is."""
  core = jax.extend.core
  of = lambda primitive: types.SimpleNamespace(
    primitive=primitive, params={"axis_name": ("party",)}, effects=set()
  )
  of_jax = inspect.unwrap(jax.lax.psum).__globals__.values()  # the module of all collectives
  found = {v.name: v for v in of_jax if isinstance(v, core.Primitive)}
  staying = {name for name, v in found.items() if not meetings.crosses(of(v))}
  assert len(found) > 10
  assert staying <= meetings.STAYING
  assert meetings.crosses(of(core.Primitive("a later one")))


# ---- rounds

MASKED = summation.masked(breaking.SECURE)
ALGORITHMS = {
  "fedavg": lambda: algorithms.fedavg(small.recipe()),
  "fedprox": lambda: algorithms.fedprox(small.recipe(), 0.1),
  "fedopt": lambda: algorithms.fedopt(small.recipe(), optax.adam(0.1)),
  "fedbn": lambda: algorithms.fedbn(small.recipe(), lambda path: path == "b"),
  "scaffold": lambda: algorithms.scaffold(small.recipe(momentum=0), breaking.K),
  "fednova": lambda: algorithms.fednova(small.recipe(), momentum=0.9),
  "averaged": lambda: algorithms.averaged(algorithms.fedavg(small.recipe()), 0.9),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_sends_masked_values_only(name):
  found = breaking.round_report(ALGORITHMS[name]())
  found.check()
  assert {c.status for c in found.crossings} == {"masked"}
  assert all(c.dtype == "uint32" and c.line for c in found.crossings)
  names = " ".join(c.what for c in found.crossings)
  assert ("'b'" in names) == (name != "fedbn")  # its normalisation stays at the site
  assert f"{len(found.crossings)} crossings" in str(found)


@pytest.mark.parametrize(
  "summed",
  [
    summation.clear(),
    summation.by_rule("median", robust.median()),
    summation.masked(secagg.secure_sum(breaking.K, masked=False)),
  ],
  ids=["clear", "rule", "without masks"],
)
def test_sums_without_masks_are_reported_with_their_lines(summed):
  algorithm = algorithms.fedavg(small.recipe(), weighting="uniform")
  found = boundary.audit_round(algorithm, summed, breaking.PARAMS, {}, breaking.SITE, breaking.K)
  unmasked = [c for c in found.crossings if c.status == "unmasked"]
  assert len(unmasked) == len(found.violations) >= 5
  with pytest.raises(boundary.Unmasked, match=r"\.py:\d+: sent.*it tells site\.images"):
    found.check()


def test_noise_of_sites_is_masked_too():
  """Distributed noise has an encoding of its own; the clip's bit crosses beside the update."""
  clip = adaptive.Clip(1.0, target_quantile=0.5, count_stddev=2.0)
  secure = secagg.secure_sum(breaking.K, threshold=2, num_bits=12)
  noise = distributed.DistributedNoise(21, breaking.K, 2, 1.0, 1.0, num_bits=12)
  params = small.start()
  coding = site_privacy.distributed_noise(noise, secure, params, {}, clip)
  algorithm = site_privacy.bounded(algorithms.fedavg(small.recipe(), weighting="uniform"), clip)
  found = boundary.audit_round(
    algorithm, summation.masked(secure, coding), params, {}, breaking.SITE, breaking.K
  )
  found.check()
  assert [c.status for c in found.crossings] == ["masked"] * 4


def test_sums_of_counts_and_scores_are_audited_as_they_are_formed():
  of_patients = breaking.SITE._replace(units=breaking.SITE.labels)
  stacked, by_patient = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((breaking.K, *a.shape), a.dtype), (breaking.SITE, of_patients)
  )
  sites = federated.Sites(np.arange(breaking.K), lambda ids: stacked)
  for each, noise in ((stacked, 0.0), (stacked, 1.0), (by_patient, 0.0), (by_patient, 1.0)):
    given = sites._replace(load=lambda ids, each=each: each)
    boundary.audit(
      lambda where, given=given, noise=noise: evaluation.class_counting(
        small.L, MASKED, where, noise
      )(given)
    ).check()
  scores = {"table": np.zeros((breaking.K, small.L), np.float32)}
  summed = lambda where: evaluation.count_summing(MASKED, where)(range(breaking.K), scores)
  boundary.audit(summed).check()
  algorithm = ALGORITHMS["fedavg"]()
  own = jax.eval_shape(algorithm.init_site, breaking.PARAMS, {})
  state = federated.State(breaking.PARAMS, {}, (), own, np.int32(7))
  same = lambda images: images
  validate = lambda where: evaluation.validation(
    algorithm, small.apply_fn, same, small.L, MASKED, where
  )(jax.eval_shape(lambda: jax.random.key(0)), state, sites)
  found = boundary.audit(validate)
  found.check()
  assert {c.round for c in found.crossings} == {7}
  with pytest.raises(ValueError, match="formed no sum"):
    boundary.audit(lambda where: None)


# ---- inference


def planned(fn, config, *args):
  owners = ("model_owner", "data_owner")
  return planning.plan(fn, owners, args, config, planning.calibrate(fn, owners, [args]))


def check_secret(plan):
  found = boundary.audit_secret(plan)
  found.check()
  with plan.config.scope():
    sent = protocol.messages(plan.circuit)
  for who in ("model owner", "data owner"):
    opened = [c for c in found.crossings if f"{who} opens" in c.what]
    assert sum(c.num_bytes for c in opened) == sum(s.num_bytes for s in sent)
    assert max(c.round for c in opened) == len(sent)
  return {c.status for c in found.crossings}


W, IMAGE = np.eye(3, dtype=np.float32), np.ones((2, 3), np.float32)


def every_gate(w, x):
  hidden = jax.nn.relu(x @ w)
  return jnp.argmax(hidden * hidden, axis=1), hidden * x  # a product, signs, and the image's blind


@pytest.mark.parametrize(
  "config", [Config(48, 12), Config(32, 6, 8, exact=False)], ids=["exact", "fast"]
)
def test_every_gate_opens_masked_values_only(config):
  assert check_secret(planned(every_gate, config, W, IMAGE)) == {"masked", "key", "output"}


def test_a_clamp_opens_masked_values_only():
  """The image of a client that may lie enters the ring through a gate."""
  plan = planned(lambda w, x: x @ w, Config(20, 4, 8, client="sharing"), W, IMAGE)
  assert any(
    getattr(op, "gate", None) and op.gate.action == "clamp" for op in plan.circuit.operations
  )
  assert check_secret(plan) == {"masked", "key", "output"}


@pytest.mark.slow  # function secret sharing grows its trees inside the trace
def test_function_secret_sharing_opens_masked_values_only():
  plan = planned(lambda w, x: jax.nn.relu(x @ w), Config(32, 6, 8, comparison="fss"), W, IMAGE)
  assert check_secret(plan) == {"masked", "key", "output", "assumed"}


def test_shared_arguments_are_refused():
  plan = planning.plan(jnp.matmul, ("shared", "data_owner"), (W, W), Config(32, 8))
  with pytest.raises(ValueError, match='owner "shared"'):
    boundary.audit_secret(plan)


# ---- messages


def test_every_field_of_every_message_is_listed():
  messages.check()
  without = {k: v for k, v in messages.FIELDS.items() if k is not secagg.messages.Answer}
  with pytest.raises(boundary.Unmasked, match=r"Answer\.site leaves its process, unlisted"):
    messages.check(without)
  bare = dict(messages.FIELDS[secagg.messages.MaskedInput], vectors="public")
  with pytest.raises(boundary.Unmasked, match=r"MaskedInput\.vectors holds arrays and is public"):
    messages.check(messages.FIELDS | {secagg.messages.MaskedInput: bare})


def test_carriers_take_encoded_messages_only():
  """All that is said to a carrier is the encoding of a message, or nothing."""
  root, found, senders = pathlib.Path(secagg.__file__).parents[1], set(), set()
  for path in root.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "say":
        found.add(ast.unparse(node.args[0]).split("(")[0])
      if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("sendall", "send_bytes"):
        senders.add(path.name)
  assert found == {"msg.encode", "b''"}
  assert senders == {"channel.py"}
