"""A training step of EfficientNet-Lite0 with all layers trained and BatchNorm's statistics fixed,
beside PyTorch's: loss, gradients and AdamW on one batch.

  python -m benchmarks.fine_tuning --torch_python=ENV/bin/python

ENV: `pip install torch==2.13.0 efficientnet-lite-pytorch==0.1.0`. PyTorch gets three equal
channels, in its channels-last format, and --threads. Weights are random: they do not change the
time.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

from benchmarks import measuring
from primia_jax import models

_SIZE = flags.DEFINE_integer("size", 160, "Height and width of the images.", lower_bound=32)
_BATCH = flags.DEFINE_integer("batch", 32, "Images in the batch.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Measured steps, after a warm-up.", lower_bound=1)
_LIMIT = flags.DEFINE_float("limit", 120.0, "Seconds after which no further round starts.")
_THREADS = flags.DEFINE_integer("threads", 2, "PyTorch's threads.", lower_bound=1)
_TORCH = flags.DEFINE_string(
  "torch_python", None, "Interpreter of an environment with PyTorch and the network's package."
)


def ours() -> measuring.Contestant:
  """The step, compiled."""
  config = models.ModelConfig("efficientnet_lite0", 3, (_SIZE.value, _SIZE.value, 1), norm="affine")
  model = models.build(config)
  params, _ = model.init(jax.random.key(0))
  optimizer = optax.adamw(5e-4)
  shape = (_BATCH.value, *config.image_shape)
  images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  labels = jnp.arange(_BATCH.value) % 3

  def step(params, state, images):
    def loss(params):
      logits, _ = model.apply(params, {}, images, train=True)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  run = jax.jit(step).lower(params, state, images).compile()
  return measuring.timed(functools.partial(run, params, state, images))


def main(_):
  what = f"a step of Lite0, {_BATCH.value} images of {_SIZE.value} px"
  with contextlib.ExitStack() as stack:
    contestants = {"ours": ours()}
    if _TORCH.value:
      numbers = (_BATCH.value, _SIZE.value, _THREADS.value)
      peer = stack.enter_context(
        measuring.peer(_TORCH.value, "fine_tuning_torch.py", _ROUNDS.value + 1, *numbers)
      )
      contestants["PyTorch"] = peer.rounds
    else:
      measuring.skip(f"PyTorch: {what}", "no --torch_python")
    costs = measuring.alternate(contestants, _ROUNDS.value, _LIMIT.value)
  for name, rounds in costs.items():
    measuring.report(f"{name}: {what}", rounds, unit="s")
  if "PyTorch" in costs:
    measuring.report_ratio(
      f"ours over PyTorch's: {what}",
      costs["ours"],
      costs["PyTorch"],
      target=1.0,
      peer=peer.versions,
    )


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
