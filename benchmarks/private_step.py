"""What privacy adds to a step: clip, noise and SGD on a full batch of 32, beside the step without
privacy.

  python -m benchmarks.private_step --case=cnn28
  python -m benchmarks.private_step --case=resnet18_64 --rounds=10 --torch_python=ENV/bin/python \
    --jax_privacy_python=ENV3/bin/python

The CNN is that of the Opacus and jax-privacy tutorials (conv 16 8x8/2, pool, conv 32 4x4/2, pool,
dense 32, dense 10; 26 thousand parameters); the ResNet-18 has GroupNorm and 11.2 million. Both
steps run in turn in one process. Temporary memory is XLA's own figure for the compiled step. ENV:
`pip install torch==2.13.0 opacus==1.6.0`. ENV3 (Python 3.12): `pip install jax==0.12.0.1 flax
jax-privacy==2.0.0`. Their noise does not come from a cryptographic generator; ours does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import measuring
from primia_jax import local, models, prng
from primia_jax.conv import conv, max_pool
from primia_jax.privacy import plan
from primia_jax.tapped import dense
from primia_jax.types import Array, Batch, LossFn, Params

_CASE = flags.DEFINE_enum("case", "cnn28", ["cnn28", "resnet18_64"], "Model and size of image.")
_ROUNDS = flags.DEFINE_integer(
  "rounds", 10, "Rounds measured, after one to warm up.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
  "steps", None, "Steps in a round; by default 20 of the CNN, 1 of the ResNet.", lower_bound=1
)
_LIMIT = flags.DEFINE_float(
  "limit", 120.0, "Seconds after which no further round begins.", lower_bound=1
)
_CLIPPING = flags.DEFINE_enum(
  "clipping", "flat", ["flat", "per_layer", "automatic"], "How gradients are clipped."
)
_TAPS = flags.DEFINE_bool(
  "taps", True, "Norms from layers' inputs and gradients; else every gradient is formed."
)
_MICROBATCH = flags.DEFINE_integer(
  "microbatch", None, "Gradients formed at once; by default by the model's size."
)
_TORCH = flags.DEFINE_string(
  "torch_python", None, "Interpreter of an environment with torch and opacus."
)
_JAX_PRIVACY = flags.DEFINE_string(
  "jax_privacy_python", None, "Interpreter of one with flax and jax-privacy."
)
_PEERS = flags.DEFINE_list(
  "peers", "torch,hooks,ghost,full,full_dot,micro1", "Which of `OTHERS` to time beside it."
)

# name, script, and what the script is told, of each peer; see benchmarks/peers/
OTHERS = {
  "torch": ("PyTorch, not private", "private_step_opacus.py", ("plain",)),
  "hooks": ("Opacus, hooks", "private_step_opacus.py", ("hooks",)),
  "ghost": ("Opacus, ghost clipping", "private_step_opacus.py", ("ghost",)),
  "flax": ("Flax, not private", "private_step_jax_privacy.py", ("plain", "xla")),
  "flax_dot": (
    "Flax, not private, small maps by im2col",
    "private_step_jax_privacy.py",
    ("plain", "dot"),
  ),
  "full": ("jax-privacy, all at once", "private_step_jax_privacy.py", ("full", "xla")),
  "full_dot": (
    "jax-privacy, all at once, small maps by im2col",
    "private_step_jax_privacy.py",
    ("full", "dot"),
  ),
  "micro1": ("jax-privacy, one by one", "private_step_jax_privacy.py", ("micro1", "xla")),
}
BATCH, RATE = 32, 0.1
_TARGETS = {"cnn28": (None, 1.15, None), "resnet18_64": (0.45, 2.2, 150.0)}  # seconds, ratio, MiB


def cnn(key: Array) -> tuple[Params, Callable[..., tuple[Array, dict]]]:
  """The tutorials' CNN: parameters, and its apply function."""
  draw = lambda i, *shape: (
    jax.random.normal(jax.random.fold_in(key, i), shape) / np.sqrt(np.prod(shape[:-1]))
  )
  kernels = [draw(0, 8, 8, 1, 16), draw(1, 4, 4, 16, 32), draw(2, 512, 32), draw(3, 32, 10)]
  params = [{"kernel": w, "bias": jnp.zeros(w.shape[-1])} for w in kernels]

  def apply(params, model_state, images, *, train=True, key=None):
    del train, key
    first, second, hidden, head = params
    x = conv(images, first["kernel"], strides=(2, 2), padding=((3, 3), (3, 3))) + first["bias"]
    x = (
      conv(max_pool(jax.nn.relu(x), 2, 1), second["kernel"], strides=(2, 2), padding="VALID")
      + second["bias"]
    )
    x = max_pool(jax.nn.relu(x), 2, 1).reshape(images.shape[0], -1)
    x = jax.nn.relu(dense(x, hidden["kernel"]) + hidden["bias"])
    return dense(x, head["kernel"]) + head["bias"], model_state

  return params, apply


def has_taps(params: Params) -> Params:
  """True for kernels."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def work(case: str) -> tuple[Params, LossFn, Batch]:
  """Parameters, loss and a batch of random images."""
  keys = jax.random.split(jax.random.key(0), 3)
  shape, num_classes = {"cnn28": ((28, 28, 1), 10), "resnet18_64": ((64, 64, 3), 3)}[case]
  if case == "cnn28":
    params, apply = cnn(keys[0])
  else:
    model = models.build(models.ModelConfig("resnet18", num_classes, shape, norm="group"))
    (params, _), apply = model.init(keys[0]), model.apply
  labels = jax.random.randint(keys[1], (BATCH,), 0, num_classes, jnp.int32)
  numbers = jnp.arange(BATCH, dtype=jnp.int32)
  batch = Batch(jax.random.normal(keys[2], (BATCH, *shape)), labels, jnp.ones(BATCH), numbers)
  return (
    params,
    local.classification_loss(apply, lambda key, images, targets: (images, targets), num_classes),
    batch,
  )


def beside(
  case: str, per_round: int
) -> dict[str, contextlib.AbstractContextManager[measuring.Peer]]:
  """The peers whose environments are given; the others are reported as skipped."""
  peers = {}
  for name in _PEERS.value:
    told, script, how = OTHERS[name]
    flag = _TORCH if "opacus" in script else _JAX_PRIVACY
    if flag.value is None:
      measuring.skip(told, f"no --{flag.name} given")
      continue
    threads = (os.cpu_count(),) if flag is _TORCH else ()
    peers[name] = measuring.peer(
      flag.value, script, _ROUNDS.value + 1, case, *how, per_round, *threads
    )
  return peers


def main(_):
  case = _CASE.value
  params, loss_fn, batch = work(case)
  made = plan.dp_sgd(
    loss_fn,
    num_units=BATCH,
    sampling_rate=1.0,
    steps=1,
    rounds=1,
    delta=1 / BATCH,
    noise_multiplier=1.0,
    clipping=_CLIPPING.value,
    microbatch=_MICROBATCH.value,
    has_taps=has_taps if _TAPS.value else None,
  )
  plain, key, secret = local.gradients(loss_fn), jax.random.key(1), prng.random_key()
  descend = lambda params, grads: jax.tree.map(lambda p, g: p - RATE * g, params, grads)

  def plain_step(params, batch, step):
    return descend(params, plain(params, {}, batch, jax.random.fold_in(key, step))[0])

  def private_step(params, batch, step):
    total, _ = made.grad_fn(params, {}, batch, jax.random.fold_in(key, step))
    numbers = {"secret": secret, "step": step, "num_units": jnp.int32(BATCH)}
    return descend(params, made.privatizer.update(total, (), params, **numbers)[0])

  steps = {"plain": plain_step, "private": private_step}
  compiled = {
    name: jax.jit(step).lower(params, batch, jnp.uint32(0)).compile()
    for name, step in steps.items()
  }
  per_round = _STEPS.value or {"cnn28": 20, "resnet18_64": 1}[case]

  def several(step):
    state, done = params, 0

    def run():
      nonlocal state, done
      for _ in range(per_round):
        state = jax.block_until_ready(step(state, batch, jnp.uint32(done)))
        done += 1

    return run

  contestants = {name: measuring.timed(several(step)) for name, step in compiled.items()}
  with contextlib.ExitStack() as stack:
    peers = {name: stack.enter_context(peer) for name, peer in beside(case, per_round).items()}
    contestants |= {name: peer.rounds for name, peer in peers.items()}
    costs = measuring.alternate(contestants, _ROUNDS.value, _LIMIT.value)
  seconds, ratio, mebibytes = _TARGETS[case]
  what = f"{case}, {models.num_parameters(params)} parameters, batch {BATCH}"
  scale = 1 / per_round
  measuring.report(f"step: {what}, not private", costs["plain"], unit="s/step", scale=scale)
  name = f"step: {what}, private, {made.clipping.kind}"
  measuring.report(name, costs["private"], target=seconds, unit="s/step", scale=scale)
  measuring.report_ratio(
    f"private over not private: {what}, {made.clipping.kind}",
    costs["private"],
    costs["plain"],
    target=ratio,
  )
  for peer, (_, versions) in peers.items():
    told = f"{what}, {OTHERS[peer][0]}"
    measuring.report(f"step: {told}", costs[peer], unit="s/step", scale=scale, peer=versions)
    measuring.report_ratio(
      f"private over: {told}", costs["private"], costs[peer], target=None, peer=versions
    )
  analysis = compiled["private"].memory_analysis()
  assert analysis is not None
  temporary = analysis.temp_size_in_bytes / 2**20
  told = f"temporary memory of a private step: {what}, {made.clipping.kind}"
  measuring.say(told, [temporary], "MiB", mebibytes)


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
