"""Seconds a federated round takes under each placement and summation, beside other frameworks in
the same run.

  python -m benchmarks.federated_round --sites=100 --sampled=10
  python -m benchmarks.federated_round --sites=100 --sampled=100 --rounds=3 \\
    --torch_python=ENV/bin/python
  python -m benchmarks.federated_round --model=mlp --sampled=100 --rounds=30 \\
    --fedjax_python=ENV2/bin/python

ENV: `pip install torch==2.13.0 pfl==0.6.0 "flwr[simulation]==1.42.0"`. ENV2 (Python 3.11): `pip
install "jax==0.4.13" "jaxlib==0.4.13" "dm-haiku==0.0.10" "fedjax==0.0.17" "numpy<1.27"
"scipy<1.12"`.
"""

import contextlib
import pathlib
import tempfile

import jax
from absl import app, flags, logging

from benchmarks import measuring, work
from primia_jax import models, sites

_MODEL = flags.DEFINE_enum("model", "leaf_cnn", ["leaf_cnn", "mlp"], "What the sites train.")
_SITES = flags.DEFINE_integer("sites", 100, "Sites, of 64 images each.", lower_bound=2)
_SAMPLED = flags.DEFINE_integer("sampled", 10, "Sites that take part in a round.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer(
  "rounds", 10, "Rounds measured, after one to warm up.", lower_bound=1
)
_LIMIT = flags.DEFINE_float(
  "limit", 150.0, "Seconds after which no further round begins.", lower_bound=1
)
_DEVICES = flags.DEFINE_integer(
  "devices", 2, "CPU devices for the mesh (no effect on accelerators).", lower_bound=1
)
_PLACEMENTS = flags.DEFINE_list(
  "placements", "mesh,loop,scan,vmap,chunk=5", "What to time; peers meet the first."
)
_AGGREGATORS = flags.DEFINE_list(
  "summations",
  "clear,encoded,masked",
  "What to time under the first placement: clear, encoded (without masks), masked.",
)
_PEERS = flags.DEFINE_list(
  "peers", "torch2,torch1,pfl,fedjax,flower", "What to time beside it, where its flag is given."
)
_TORCH = flags.DEFINE_string(
  "torch_python", None, "Interpreter of an environment with torch, pfl and flwr."
)
_FEDJAX = flags.DEFINE_string("fedjax_python", None, "Interpreter of an environment with fedjax.")

# script, then what it is told, of each peer
_SCRIPTS = {
  "torch2": ("torch_loop.py", 2),
  "torch1": ("torch_loop.py", 1),
  "pfl": ("pfl_rounds.py", 2),
  "fedjax": ("fedjax_rounds.py", 2),
  "flower": ("flower_rounds.py", 2),
}
# The peers that a round must not be slower than, by model and the number of sites that take part.
_NO_SLOWER = {
  ("leaf_cnn", 10): ("torch2", "torch1", "pfl"),
  ("leaf_cnn", 100): ("pfl",),
  ("mlp", 100): ("pfl", "fedjax", "flower"),
}
_SECONDS = {("mlp", 100): 0.025}
_SPREAD, _ENCODING = 1.3, 1.05  # slowest over fastest placement; encoded over clear


def main(_):
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  setting = (_MODEL.value, _SAMPLED.value)
  what = f"{_MODEL.value}, {_SAMPLED.value} of {_SITES.value} sites"
  first = _PLACEMENTS.value[0]
  runs = dict.fromkeys([(placement, "clear") for placement in _PLACEMENTS.value])
  runs |= dict.fromkeys([(first, summation) for summation in _AGGREGATORS.value])
  everybody = {}
  contestants, versions = {}, {}
  for placement, summation in runs:
    where = sites.parse_placement(placement)
    on_mesh = where.name == "mesh"
    if on_mesh not in everybody:
      everybody[on_mesh] = work.resident(_SITES.value, where)
    how = work.summed(summation, _SAMPLED.value)
    run = work.rounds(_MODEL.value, _SAMPLED.value, how, where, everybody[on_mesh])
    contestants[placement, summation] = measuring.timed(run)

  with contextlib.ExitStack() as stack:
    data = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "data.npz"
    work.save(data, _SITES.value)
    for name in _PEERS.value:
      python = _FEDJAX.value if name == "fedjax" else _TORCH.value
      if python is None:
        measuring.skip(name, f"no --{'fedjax' if name == 'fedjax' else 'torch'}_python given")
        continue
      script, threads = _SCRIPTS[name]
      peer = stack.enter_context(
        measuring.peer(
          python, script, _ROUNDS.value + 1, data, _MODEL.value, _SAMPLED.value, threads
        )
      )
      contestants[name], versions[name] = peer
    costs = measuring.alternate(contestants, _ROUNDS.value, _LIMIT.value)

  size = models.num_parameters(jax.eval_shape(work.model(_MODEL.value).init, jax.random.key(0))[0])
  for placement, summation in runs:
    target = _SECONDS.get(setting) if (placement, summation) == (first, "clear") else None
    name = f"round: {what}, {placement}, {summation}"
    measuring.report(name, costs[placement, summation], target=target, parameters=size)
  in_clear = {placement: costs[placement, "clear"] for placement in _PLACEMENTS.value}
  if len(in_clear) > 1:
    middle = {
      placement: sorted(c.seconds for c in cost)[len(cost) // 2]
      for placement, cost in in_clear.items()
    }
    slowest, fastest = max(middle, key=middle.__getitem__), min(middle, key=middle.__getitem__)
    more = {"slowest": slowest, "fastest": fastest}
    name = f"slowest over fastest placement: {what}"
    measuring.report_ratio(name, in_clear[slowest], in_clear[fastest], target=_SPREAD, **more)
  if (first, "encoded") in runs:
    name = f"encoded over clear: {what}, {first}"
    measuring.report_ratio(name, costs[first, "encoded"], costs[first, "clear"], target=_ENCODING)
  if (first, "masked") in runs:
    name = f"masked less clear: {what}, {first}"
    measuring.report_difference(name, costs[first, "masked"], costs[first, "clear"], target=None)
  for name in _PEERS.value:
    if name in costs:
      measuring.report(f"round: {what}, {name}", costs[name], peer=versions[name])
      target = 1.0 if name in _NO_SLOWER.get(setting, ()) else None
      measuring.report_ratio(
        f"{first} over {name}: {what}",
        costs[first, "clear"],
        costs[name],
        target=target,
        peer=versions[name],
      )


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
