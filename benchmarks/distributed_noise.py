"""What distributed noise costs one site: milliseconds of each step, and what rounding costs in
privacy.

python -m benchmarks.distributed_noise
python -m benchmarks.distributed_noise --parameters=11178051 --bits=16
"""

import jax
import jax.numpy as jnp
from absl import app, flags, logging

from benchmarks import measuring
from primia_jax import prng
from primia_jax.privacy import discrete, distributed, rotation

_PARAMETERS = flags.DEFINE_integer("parameters", 1_199_882, "Numbers in an update.", lower_bound=1)
_SITES = flags.DEFINE_integer(
  "sites", 10, "Sites in a sum, of which one may be lost.", lower_bound=2
)
_BITS = flags.DEFINE_integer("bits", 16, "Of the ring.", lower_bound=2)
_RUNS = flags.DEFINE_integer("runs", 10, "Runs measured, after one to warm up.", lower_bound=1)


def main(_):
  dim, num_sites = _PARAMETERS.value, _SITES.value
  key, rotation_key = prng.random_key(), jax.random.key(0)
  update = jax.random.normal(rotation_key, (dim,), jnp.float32)
  contestants, configs = {}, {}
  for kind in ("discrete_gaussian", "skellam"):
    config = distributed.DistributedNoise(
      dim, num_sites, num_sites - 1, 1.0, 1.0, _BITS.value, kind=kind
    )
    configs[kind] = config
    size, stddev = config.size, config.grid_stddev
    sample = jax.jit(
      lambda key, size=size, stddev=stddev, kind=kind: discrete.sample(key, (size,), stddev, kind)
    )
    encode = jax.jit(
      lambda x, key, config=config: distributed.encode(x, rotation_key, key, (0,), config)
    )
    contestants[f"noise, {kind}"] = measuring.timed(lambda f=sample: f(key))
    contestants[f"encode, {kind}"] = measuring.timed(lambda f=encode: f(update, key))
  config = configs["discrete_gaussian"]
  total = distributed.encode(update, rotation_key, key, (1,), config)
  rotate = jax.jit(lambda x: rotation.rotate(x, rotation_key, config.chunk))
  rounding = jax.jit(lambda x, key: distributed.round_clipped(x, rotation_key, key, config))
  decode = jax.jit(lambda total: distributed.decode(total, rotation_key, config))
  contestants["rotation"] = measuring.timed(lambda: rotate(update))
  contestants["clip, rotation, rounding"] = measuring.timed(lambda: rounding(update, key))
  contestants["decode"] = measuring.timed(lambda: decode(total))
  for name, costs in measuring.alternate(contestants, _RUNS.value).items():
    measuring.report(f"{name}: {dim} parameters, {_BITS.value} bits", costs, unit="ms", scale=1e3)
  for kind, config in configs.items():
    measuring.say(
      f"inflation of sensitivity: {kind}, {dim} parameters, {_BITS.value} bits, {num_sites} sites",
      [config.sensitivity_inflation],
      "ratio",
      None,
      sampler_error=config.sampler_error,
    )


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
