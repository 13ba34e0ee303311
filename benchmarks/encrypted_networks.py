"""What encrypted inference of the networks of the literature costs, at full size and at 64 px.

  python -m benchmarks.encrypted_networks --rings=32
  python -m benchmarks.encrypted_networks --networks=ResNet-18 --rings=32,64 --time_at=224

Bytes and rounds are those of the messages that the parties send each other
(`mpc.multiprocess.sizes`), at 224 x 224 x 3 with 1,000 classes; nothing is dealt or sent for them.
Times are of an image of `--time_at` pixels, by phase: the dealer's work, and both parties online in
one process, on all cores. Weights are random, statistics of norms are measured, ranges are
calibrated on the image. One set of correlations serves again and again, only for timing.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import encrypted_inference, encrypted_work, measuring, networks
from benchmarks.encrypted_work import OWNERS, Work
from primia_jax.mpc import multiprocess, planning, pricing
from primia_jax.types import PyTree

_RESNET18 = "ResNet-18"
_NETWORKS = flags.DEFINE_list(
  "networks", [_RESNET18, "ResNet-50", "VGG-16", "DenseNet-121", "EfficientNet-Lite0"], "Which."
)
_TIME_AT = flags.DEFINE_integer(
  "time_at", 64, "Pixels of the image that is timed; 0 times none.", lower_bound=0
)
_FULL = 224

# ---- targets, for ResNet-18 at full size, by bits of the ring
_DEALT = {32: 130.0, 64: 225.0}  # MB, to party 1
_DEAL = 0.5  # seconds of the dealer on two cores: twice as many of CPU


def work(name: str, size: int) -> Work:
  """A network at its full width on one image."""
  x = np.random.default_rng(0).standard_normal((1, size, size, 3)).astype(np.float32)
  if name == _RESNET18:
    made = encrypted_work.network("resnet18_224")
    return made._replace(args=(made.args[0], jnp.asarray(x)))
  network = (networks.NETWORKS | networks.OTHERS)[name]
  module, measure = network.module(), network.module(measure=True)
  drawn = _drawn(jax.eval_shape(module.init, jax.random.key(0), x))
  if "batch_stats" in drawn:
    several = np.random.default_rng(1).standard_normal((2, *x.shape[1:])).astype(np.float32)
    run = jax.jit(functools.partial(measure.apply, mutable=["batch_stats"]))
    drawn = {**drawn, **run(drawn, several)[1]}
  return Work(module.apply, module.apply, OWNERS, (drawn, jnp.asarray(x)))


def _drawn(shapes: PyTree) -> PyTree:
  """Random variables, much as the module's own, which take XLA minutes to compile."""
  rng = np.random.default_rng(3)

  def draw(path, leaf) -> np.ndarray:
    normal = rng.standard_normal(leaf.shape, np.float32)
    match path[-1].key:
      case "kernel":
        return normal * np.float32(np.sqrt(2 / math.prod(leaf.shape[:-1])))
      case "scale":
        return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
      case "bias":
        return np.float32(0.3) * normal
    return np.ones(leaf.shape, np.float32)  # statistics, which are measured

  return jax.tree_util.tree_map_with_path(draw, shapes)


def planned(made: Work, ring_name: str) -> planning.Plan:
  """A plan, calibrated on the image itself."""
  ranges = planning.calibrate(made.fn, made.owners, [made.args])
  return encrypted_inference.make_plan(ring_name, made, ranges)


def costs(name: str, ring_name: str) -> None:
  """Bytes and rounds at full size."""
  plan = planned(work(name, _FULL), ring_name)
  sizes, rows = multiprocess.sizes(plan), pricing.rows(plan.circuit)
  what = f"{name}, {_FULL} px, {ring_name}"
  measuring.say(f"rounds: {what}", [len(sizes)], "rounds", None)
  measuring.say(f"sent by each party: {what}", [sum(sizes) / 1e6], "MB", None)
  published = pricing.published_bytes(plan.circuit)
  measuring.say(
    f"dealt to party 1: {what}", [sum(row.dealt for row in rows) / 1e6], "MB",
    _DEALT[_bits(plan)] if name == _RESNET18 else None, published_once_mb=published / 1e6,
  )  # fmt: skip


def times(name: str, ring_name: str, size: int) -> None:
  """Seconds of each phase of an image of a size."""
  made = work(name, size)
  plan = planned(made, ring_name)
  run, rounds = encrypted_work.prepared(plan, made.args), flags.FLAGS.rounds
  error = float(
    np.abs(np.asarray(run.outputs()) - np.asarray(jax.jit(made.plain)(*made.args))).max()
  )
  contestants = {phase: measuring.timed(fn) for phase, fn in run.phases.items()}
  found = measuring.alternate(contestants, rounds, flags.FLAGS.limit)
  what = f"{name}, {size} px, {ring_name}"
  full = name == _RESNET18 and size == _FULL
  for phase, each in found.items():
    target = _DEAL if full and phase == "deal" else None
    measuring.report(f"{phase}: {what}", each, unit="s", target=target)
  measuring.say(f"logit error: {what}", [error], "1", None, compile=round(run.compile, 1))


def _bits(plan: planning.Plan) -> int:
  return 32 if plan.config.num_bits <= 32 else 64


def main(_):
  jax.config.update("jax_enable_x64", True)
  for name in _NETWORKS.value:
    for ring_name in flags.FLAGS.rings:
      costs(name, ring_name)
      if _TIME_AT.value:
        times(name, ring_name, _TIME_AT.value)


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
