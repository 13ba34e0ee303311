"""What secure aggregation costs: nanoseconds a parameter and peer at one site, and seconds that it
adds to a round.

  python -m benchmarks.masking --sites=10
  python -m benchmarks.masking --sites=100 --rounds=3 --torch_python=ENV/bin/python

The sites do not train, they send the model of `leaf_cnn` (1.2 M parameters) as it is, so that only
the protocol is timed. Flower's SecAgg+ (ENV: `pip install torch==2.13.0
"flwr[simulation]==1.42.0"`) is timed in the same way; it does more: it agrees on keys, shares them,
and would survive dropouts.
"""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import measuring, work
from primia_jax import federated, models, native, prng, secagg, sites, summation
from primia_jax.types import Site

_SITES = flags.DEFINE_integer(
  "sites", 10, "Sites in a round, each with all others as peers up to 11 sites, else ten."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds measured, after one to warm up.", lower_bound=1)
_LIMIT = flags.DEFINE_float(
  "limit", 120.0, "Seconds after which no further round begins.", lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
  "devices", 2, "CPU devices for the mesh (no effect on accelerators).", lower_bound=1
)
_PLACEMENT = flags.DEFINE_string("placement", "auto", "Where the site axis runs.")
_TORCH = flags.DEFINE_string(
  "torch_python", None, "Interpreter of an environment with flwr, for SecAgg+."
)

_NANOSECONDS = 2.2  # a parameter and peer
_SECONDS = {10: 0.12, 100: 1.2}  # added to a round, by sites


def idle_round(how: summation.Summation, placement: sites.Placement, params, num_sites: int):
  """Makes the function that runs a round in which every site sends `params` times its number."""
  scaled = lambda shared, kept, site: (
    jax.tree.map(lambda a: a * site.id.astype(jnp.float32) / num_sites, shared),
    kept,
  )
  run = federated.over_sites(scaled, how, placement, summation.Purpose.TRAINING)
  ids = np.arange(num_sites, dtype=np.int32)
  nothing = np.zeros((num_sites, 1), np.int32)
  placed = placement.put(Site(ids, nothing, nothing, ids))
  params, everybody = placement.replicate(params), federated.Sites(ids, lambda ids: placed)
  rounds = itertools.count()

  def one_round():
    total, _, outcome = run(params, next(rounds), everybody)
    return total, outcome.out_of_range

  return one_round


def main(_):
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  num_sites, placement = _SITES.value, sites.parse_placement(_PLACEMENT.value)
  num_peers = num_sites - 1 if num_sites <= 11 else 10
  params, _ = work.model("leaf_cnn").init(jax.random.key(0))
  size = models.num_parameters(params)

  config = secagg.secure_sum(num_sites, num_peers=num_peers)
  row = work.row(num_peers, prng.random_key())
  protect = jax.jit(
    lambda params, number: secagg.mask(secagg.encode(params, config), row, (number, 0), config)
  )
  counter = iter(range(10**9))
  site = measuring.alternate(
    {"site": measuring.timed(lambda: protect(params, np.uint32(next(counter))))}, 20
  )["site"]
  scale = 1e9 / (size * num_peers)
  name = f"protect: one site, {size} parameters, {num_peers} peers, per parameter and peer"
  kernel = "C" if native.available() else "JAX"
  measuring.report(name, site, target=_NANOSECONDS, unit="ns", scale=scale, kernel=kernel)

  rules = ("clear", "encoded", "masked")
  contestants = {
    rule: measuring.timed(idle_round(work.summed(rule, num_sites), placement, params, num_sites))
    for rule in rules
  }
  versions = None
  with contextlib.ExitStack() as stack:
    if _TORCH.value is None:
      measuring.skip("Flower SecAgg+", "no --torch_python given")
    else:
      for how in ("plain", "secagg"):
        arguments = (_ROUNDS.value + 1, how, num_sites, num_peers, _DEVICES.value)
        peer = stack.enter_context(measuring.peer(_TORCH.value, "flower_secagg.py", *arguments))
        contestants[how], versions = peer
    costs = measuring.alternate(contestants, _ROUNDS.value, _LIMIT.value)
  what = f"{num_sites} idle sites, {size} parameters"
  for rule in rules:
    measuring.report(f"round: {what}, {placement.name}, {rule}", costs[rule])
  added = f"{what}, {num_peers} peers each, {placement.name}"
  measuring.report_difference(
    f"masked less clear: {added}", costs["masked"], costs["clear"], target=_SECONDS.get(num_sites)
  )
  measuring.report_difference(
    f"encoded less clear: {what}, {placement.name}", costs["encoded"], costs["clear"], target=None
  )
  if versions is not None:
    for how in ("plain", "secagg"):
      measuring.report(f"round: {what}, Flower {how}", costs[how], peer=versions)
    name = f"SecAgg+ less plain: {what}, {num_peers} peers each, Flower"
    measuring.report_difference(name, costs["secagg"], costs["plain"], target=None, peer=versions)


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
