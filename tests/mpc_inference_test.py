"""Whole functions and networks under encryption: bit-equal to the integer model, close to float32,
and as planned.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, normal

from primia_jax import models, prng
from primia_jax.mpc import clear, encoding, inference, planning, pricing, protocol, roles, sharing
from primia_jax.mpc.circuit import Config

pytestmark = pytest.mark.usefixtures("x64")
WIDE = Config(64, 16, 18)


def planned(fn, args, config=WIDE, owners=OWNERS):
  return planning.plan(fn, owners, args, config, planning.calibrate(fn, owners, [args]))


def phases(plan, args):
  """Both parties' correlations, and everybody's operands."""
  key = prng.random_key()
  operands = inference.share_inputs(plan, inference.encode(plan, args), key)
  return jax.jit(functools.partial(inference.offline, plan))(key, operands), operands


def run_encrypted(plan, operands):
  """All phases in one program, which compiles the dealer's and the parties' expansions once."""

  @jax.jit
  def everything(key, operands):
    operands = inference.share_inputs(plan, operands, key)
    return inference.simulate(plan, inference.offline(plan, key, operands), operands)

  return inference.reveal(plan, everything(prng.random_key(), operands))


def assert_faithful(fn, args, config=WIDE, atol=1e-3, owners=OWNERS):
  """The exact protocol equals the integer model bit for bit; both are near the function itself."""
  plan = planned(fn, args, config, owners)
  operands = inference.encode(plan, args)
  exact = clear.operands_checker(plan)(operands)
  got = run_encrypted(plan, operands)
  wanted = jax.jit(fn)(*args)
  for a, b, want in zip(*map(jax.tree.leaves, (got, exact, wanted)), strict=True):
    if config.exact:
      np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(a, np.asarray(want, np.float32), atol=atol)
  return plan


def network(name, size, **options):
  config = models.ModelConfig(name, image_shape=(size, size, 1), **options)
  model = models.build(config)
  params, state = model.init(jax.random.key(0))
  images = normal(1, 1, size, size, 1)
  if state:  # statistics as training leaves them
    train = jax.jit(lambda state, images: model.apply(params, state, images, train=True)[1])
    for _ in range(20):
      state = train(state, normal(2, 8, size, size, 1))
  return lambda variables, images: model.apply(*variables, images)[0], ((params, state), images)


@pytest.mark.parametrize(
  ("name", "size", "options"),
  [
    ("cnn", 16, {"norm": "batch"}),
    pytest.param(
      "cnn",
      16,
      {"norm": "group", "pool": "mean", "weight_standardisation": True},
      marks=pytest.mark.slow,
    ),
    pytest.param(
      "resnet18", 32, {"norm": "batch", "width": 0.125, "stem": "7x7"}, marks=pytest.mark.slow
    ),
    pytest.param("leaf_cnn", 14, {}, marks=pytest.mark.slow),
    pytest.param(
      "resnet18", 64, {"norm": "group", "width": 0.125, "stem": "3x3/2"}, marks=pytest.mark.slow
    ),
    pytest.param("vgg16", 32, {"width": 0.125, "head": "mean"}, marks=pytest.mark.slow),
    pytest.param(
      "efficientnet_lite0", 32, {"norm": "affine", "width": 0.125}, marks=pytest.mark.slow
    ),
  ],
)
def test_the_library_s_networks(name, size, options):
  fn, args = network(name, size, **options)
  plan = assert_faithful(fn, args, Config(64, 14, 18), atol=4e-3)
  if (
    options.get("norm") == "batch"
  ):  # folded by its owner: no product of shared values, no extra opening
    kinds = [row.what for row in pricing.rows(plan.circuit)]
    assert kinds.count("open") == kinds.count("linear") - (3 if name == "resnet18" else 0)
    assert "product" not in kinds
    assert kinds.count("truncate") == 1  # of the output


class UNet(nn.Module):
  """An encoder and a decoder with skips: transposed convolutions, concatenation, a map of
  logits.
  """

  @nn.compact
  def __call__(self, x):
    first = nn.relu(nn.Conv(4, (3, 3))(x))
    second = nn.relu(nn.Conv(8, (3, 3))(nn.max_pool(first, (2, 2), (2, 2))))
    up = nn.ConvTranspose(4, (2, 2), (2, 2))(second)
    both = nn.relu(nn.Conv(4, (3, 3))(jnp.concatenate([first, up], -1)))
    return nn.Conv(2, (1, 1))(both)


def test_an_encoder_decoder_and_any_flax_module():
  module, x = UNet(), normal(0, 2, 8, 8, 1)
  variables = jax.jit(module.init)(jax.random.key(0), x)
  assert_faithful(module.apply, (variables, x))


def test_layer_norm_attention_and_gelu():
  """A transformer block: softmax, products of secrets, LayerNorm, GELU."""

  class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
      y = nn.LayerNorm()(x)
      x = x + nn.MultiHeadDotProductAttention(2)(y, y)
      return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))

  module, x = Block(), normal(0, 1, 5, 8)
  variables = jax.jit(module.init)(jax.random.key(0), x)
  assert_faithful(module.apply, (variables, x), Config(64, 18, 20), atol=2e-3)


def small(w, x):
  y = jax.nn.relu(x @ w[0] + w[1][None])
  return y @ w[2]


SMALL = ((normal(0, 6, 16), normal(1, 16), normal(2, 16, 3)), normal(3, 4, 6))


@pytest.mark.parametrize(
  "config",
  [
    Config(32, 10, 14),
    Config(32, 10, 14, exact=False),
    Config(40, 12, 16),
    Config(64, 16, 18, exact=False),
    Config(48, 14, 16, comparison="fss"),
  ],
)
def test_rings_and_modes(config):
  assert_faithful(small, SMALL, config, atol=0.05 if config.num_bits == 32 else 5e-3)


@pytest.mark.parametrize(
  "owners", [("shared", "shared"), ("shared", "data_owner"), ("model_owner", "model_owner")]
)
def test_other_owners(owners):
  assert_faithful(small, SMALL, owners=owners)


def test_public_arguments_cost_nothing():
  fn = lambda w, x, scale: small(w, x * scale)
  plan = assert_faithful(fn, (*SMALL, np.float32(0.5)), owners=(*OWNERS, "public"))
  assert len(protocol.messages(plan.circuit)) == len(
    protocol.messages(planned(small, SMALL).circuit)
  )


def test_one_process_steps_and_two_devices_open_the_same_bits():
  plan = planned(small, SMALL, Config(32, 10, 14))
  ready, operands = phases(plan, SMALL)
  together = jax.jit(functools.partial(inference.simulate, plan))(ready, operands)
  env = {}
  for step in inference.simulate_steps(plan):
    env = step.fn(ready, operands, env)
  each = [
    {i: v for i, v in operands.items() if plan.circuit.operands[i].owner == party}
    for party in (0, 1)
  ]
  filled = inference.stack(*(inference.filled(plan, own) for own in each))
  on_devices = jax.jit(functools.partial(inference.on_mesh, plan, sharing.party_mesh()))
  results = together, protocol.outputs(plan.circuit, env), on_devices(ready, filled)
  for a, b, c in zip(*results, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)


def test_jit_and_no_jit():
  plan = planned(lambda w, x: jnp.maximum(w @ x, 0), (normal(0, 3, 4), normal(1, 4)))
  ready, operands = phases(plan, (normal(0, 3, 4), normal(1, 4)))
  with jax.disable_jit():
    eager = inference.simulate(plan, ready, operands)
  np.testing.assert_array_equal(
    eager[0], jax.jit(functools.partial(inference.simulate, plan))(ready, operands)[0]
  )


# ---- what is promised


def test_what_crosses_is_masked_afresh_and_is_what_was_planned():
  """Reads the two-device program: every value that leaves a device, its bytes and its round."""
  args = SMALL
  plan = planned(small, args)
  ready = jax.eval_shape(lambda: phases(plan, args)[0])
  blanks = inference.filled(plan, {})
  run = functools.partial(inference.on_mesh, plan, sharing.party_mesh())
  jaxpr = jax.make_jaxpr(run)(ready, inference.stack(blanks, blanks))
  sent = [
    v.aval
    for eqn in equations(jaxpr.jaxpr)
    if eqn.primitive.name in COLLECTIVES
    for v in eqn.invars
  ]
  assert {eqn.primitive.name for eqn in equations(jaxpr.jaxpr)} & COLLECTIVES == {"ppermute"}
  planned_bytes = sum(row.sent for row in pricing.rows(plan.circuit)[:-1])
  assert sum(a.size * a.dtype.itemsize for a in sent) == planned_bytes
  assert (
    sum(row.rounds for row in pricing.rows(plan.circuit))
    == len(protocol.messages(plan.circuit)) + 1
  )


COLLECTIVES = {
  "ppermute",
  "psum",
  "psum_invariant",
  "all_gather",
  "all_to_all",
  "pgather",
  "reduce_scatter",
  "pmax",
}


def equations(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      for sub in value if isinstance(value, tuple | list) else [value]:
        if hasattr(sub, "eqns") or hasattr(sub, "jaxpr"):
          yield from equations(getattr(sub, "jaxpr", sub))


def test_masks_are_used_once():
  """Every array that is expanded from a seed has its own (nonce, key)."""
  plan = planned(small, SMALL)
  names = [
    (number, name)
    for number, op in enumerate(plan.circuit.operations)
    for name in protocol.masks(op, plan.config)
  ]
  assert len(names) == len(set(names))
  keys = [prng.random_key() for _ in range(2)]
  blind = protocol.full(plan.circuit, protocol.blinds(plan.circuit, keys[0], 0))
  deal, arrays = jax.jit(functools.partial(protocol.deal, plan.circuit)), []
  for key in keys:
    dealt = deal(key, blind)
    arrays += [bytes(np.asarray(v)) for v in jax.tree.leaves(dealt.sent)] + [
      bytes(np.asarray(dealt.seeds[0]))
    ]
  assert len(arrays) == len(set(arrays))


def test_the_published_weights_tell_nothing():
  """D = W - B has the same distribution for weights of zeros and of ones."""
  fn = lambda w, x: x @ w
  for value in (0.0, 1.0):
    args = (np.full((64, 64), value, np.float32), normal(0, 2, 64))
    plan = planned(fn, (normal(1, 64, 64), args[1]))
    blind = protocol.blinds(plan.circuit, prng.random_key(), 0)
    (d,) = protocol.publish(inference.encode(plan, args), blind).values()
    counts = np.bincount(np.asarray(d).reshape(-1).view(np.uint8), minlength=256)
    assert (
      (counts - counts.mean()) ** 2 / counts.mean()
    ).sum() < 400  # chi-square of 255 degrees: 99.9 % below 330


def test_shares_alone_carry_nothing():
  x = np.full(4096, 1.25, np.float32)
  both = np.asarray(encoding.share(x, prng.random_key(), WIDE))
  assert ((both[0] + both[1]).view(np.int64) == round(1.25 * 2**16)).all()
  for party in (0, 1):
    counts = np.bincount(both[party].view(np.uint8), minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 400


# ---- bad input


def test_a_value_out_of_range_is_found_and_named():
  plan = planned(small, SMALL)
  w, x = SMALL
  with pytest.raises(ValueError, match="leaves its planned range"):
    clear.check(plan, (w, 100 * x))


@pytest.mark.parametrize(
  ("call", "error", "reason"),
  [
    (
      lambda: inference.encode(planned(small, SMALL), (SMALL[0], SMALL[1] * 1e18)),
      ValueError,
      "does not fit",
    ),
    (lambda: planned(small, SMALL, Config(16, 7, 8)), ValueError, "wider ring"),
    (lambda: planned(small, SMALL, owners=("hospital", "data_owner")), ValueError, "hospital"),
    (
      lambda: planned(small, SMALL, owners=("model_owner",)),
      ValueError,
      "1 owners for 2 arguments",
    ),
    (
      lambda: planned(lambda w, x: lax.lgamma(x @ w[0]), SMALL),
      NotImplementedError,
      r"lgamma of a secret value .*mpc_inference_test",
    ),
    (
      lambda: planned(lambda w, x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), SMALL),
      NotImplementedError,
      "jnp.where",
    ),
    (
      lambda: encoding.share(np.full(3, 1e30, np.float32), prng.random_key(), WIDE),
      ValueError,
      "does not fit",
    ),
  ],
)
def test_bad_input_is_refused(call, error, reason):
  with pytest.raises(error, match=reason):
    call()


def test_x64_is_scoped():
  """A wide ring works where x64 is off, and leaves it off."""
  with jax.enable_x64(False):
    plan = planned(small, SMALL, Config(40, 12, 16))
    np.testing.assert_array_equal(roles.infer(plan, *SMALL), clear.check(plan, SMALL))
    assert (jnp.ones(1) + np.float64(1)).dtype == jnp.float32


def test_a_narrow_ring_needs_no_x64():
  with jax.enable_x64(False):
    assert_faithful(small, SMALL, Config(32, 10, 14), atol=0.05)
