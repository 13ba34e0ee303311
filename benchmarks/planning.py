"""Times the plan of a recurrent network, and that time's growth with the number of steps.

python -m benchmarks.planning --steps=40 --repeats=3
"""

import functools

import jax
import numpy as np
from absl import app, flags
from flax import linen

from benchmarks import measuring
from primia_jax import mpc

_STEPS = flags.DEFINE_integer("steps", 40, "Steps of the sequence; twice as many are timed too.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Plans of each, after one to warm up.", 1)

_TARGET = 10.0  # seconds
_OWNERS = ("model_owner", "data_owner")


def _plan(num_steps: int) -> None:
  """Calibrates and plans an LSTM of 16 units over a sequence of 8 features."""
  layer = linen.RNN(linen.LSTMCell(16))
  x = np.random.default_rng(0).normal(size=(1, num_steps, 8)).astype(np.float32)
  args = (layer.init(jax.random.key(0), x), x)
  with jax.enable_x64(True):
    ranges = mpc.calibrate(layer.apply, _OWNERS, [args])
    mpc.plan(layer.apply, _OWNERS, args, mpc.Config(), 2.0 ** np.ceil(np.log2(ranges + 1e-9)))


def main(_):
  lengths = (_STEPS.value, 2 * _STEPS.value)
  costs = measuring.alternate(
    {n: measuring.timed(functools.partial(_plan, n)) for n in lengths}, _REPEATS.value
  )
  targets = (_TARGET, None)
  for n, target in zip(lengths, targets, strict=True):
    measuring.report(f"plan of an LSTM: {n} steps", costs[n], target=target, unit="s")
  longer, shorter = costs[lengths[1]], costs[lengths[0]]
  measuring.report_ratio("plan of an LSTM: twice the steps", longer, shorter, target=None)


if __name__ == "__main__":
  app.run(main)
