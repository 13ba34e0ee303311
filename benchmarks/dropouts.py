"""What the whole double-masked protocol costs when sites are lost during a round, stage by stage.

  python -m benchmarks.dropouts
  python -m benchmarks.dropouts --sites=1000 --model=mlp --peers=20 --threshold=11
  python -m benchmarks.dropouts --rounds=3 --limit=300 --torch_python=ENV/bin/python

All sites are played by one process: X25519 keys and Shamir shares for everybody, each site's masks,
the sum over those whose message comes, the recovery from shares of what the lost left in it, and
its removal. Sites do not train. A third of the lost are lost before they mask, a third during, and
a third after; every round loses others. With too few peers for the number of sites a round is
aborted, and the benchmark with it.

Flower's SecAgg+ (ENV: `pip install "flwr[simulation]==1.42.0"`) stands beside it with as many idle
clients and peers; its lost are all lost when they are to send the masked model, because one lost
earlier ends its round in a `KeyError`. Its rounds go through Ray, ours through no transport at all,
so that it is also shown less its plain round.
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import measuring, work
from primia_jax import models, native, prng, secagg, sites, summation

_SITES = flags.DEFINE_integer("sites", 100, "Sites in a round.", lower_bound=3)
_PEERS = flags.DEFINE_integer("peers", 10, "Peers of each site.", lower_bound=2)
_THRESHOLD = flags.DEFINE_integer("threshold", 6, "Of a site and its peers, how many must answer.")
_RATE = flags.DEFINE_float("dropout_rate", 0.1, "Share of the sites that is lost in a round.", 0, 1)
_MODEL = flags.DEFINE_enum(
  "model", "leaf_cnn", ["leaf_cnn", "mlp"], "Whose parameters are sent: 1.2 M or 25 k."
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

_SECONDS = 1.5  # a round of 100 sites with 1.2 M parameters
_NANOSECONDS = 2.2  # a masked parameter and peer


def draw_dropouts(rng: np.random.Generator, num_sites: int, rate: float) -> secagg.Dropouts:
  """Loses `rate` of the sites, spread over the three stages."""
  order, each = rng.permutation(num_sites), rate * num_sites / 3
  stage = lambda i: np.isin(np.arange(num_sites), order[round(i * each) : round((i + 1) * each)])
  return secagg.Dropouts(*map(stage, range(3)))


def stages(
  config: secagg.SecureSum, placement: sites.Placement, params
) -> Mapping[str, Callable[[], Any]]:
  """Makes the functions that run one stage of a round each, each from what the last left."""
  num_sites = config.num_sites
  ids, rng = np.arange(num_sites, dtype=np.int32), np.random.default_rng(0)
  placed, now = placement.replicate(params), {"round": 0}
  drawn = lambda round, purpose, ids: draw_dropouts(rng, num_sites, _RATE.value)
  how = summation.losing(summation.masked(config), drawn)

  def site(params, inputs):
    site_id, row = inputs
    message = jax.tree.map(lambda a: a * site_id.astype(jnp.float32) / num_sites, params)
    return how.send(message, row), ()

  run = placement.sum_over_sites(site)

  def begin():
    now["round"] += 1
    now["session"] = how.begin(now["round"], summation.Purpose.TRAINING, ids)
    now["rows"] = placement.put((ids, now["session"].rows(ids)))
    return now["rows"]

  def send():
    now["total"], _ = run(placed, now["rows"])
    return now["total"]

  def end():
    message, outcome = how.end(now["session"], now["total"])
    return message, outcome.out_of_range

  return {"keys, shares and their recovery": begin, "masks and sum": send, "unmask and decode": end}


def mask_speed(params, kernel: str) -> Sequence[measuring.Cost]:
  """One site's masks, its own among them, by the C form or in plain JAX."""
  before = os.environ.get("PRIMIA_NATIVE", "1")
  os.environ["PRIMIA_NATIVE"] = "1" if kernel == "C" else "0"
  config = secagg.secure_sum(_SITES.value, num_peers=_PEERS.value, threshold=_THRESHOLD.value)
  row = work.row(_PEERS.value, prng.random_key())
  protect = jax.jit(
    lambda params, number: secagg.mask(secagg.encode(params, config), row, (number, 0), config)
  )
  counter = iter(range(10**9))
  costs = measuring.alternate(
    {0: measuring.timed(lambda: protect(params, np.uint32(next(counter))))}, 10
  )[0]
  os.environ["PRIMIA_NATIVE"] = before
  return costs


def main(_):
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  placement = sites.parse_placement(_PLACEMENT.value)
  params, _ = work.model(_MODEL.value).init(jax.random.key(0))
  size = models.num_parameters(params)
  config = secagg.secure_sum(_SITES.value, num_peers=_PEERS.value, threshold=_THRESHOLD.value)

  for kernel in ("C", "JAX") if native.available() else ("JAX",):
    name = (
      f"protect: one site, {size} parameters, {_PEERS.value} peers and itself, per parameter "
      f"and mask"
    )
    scale = 1e9 / (size * (_PEERS.value + 1))
    in_use = kernel == "C" or not native.available()
    target = _NANOSECONDS if in_use and _MODEL.value == "leaf_cnn" else None
    measuring.report(
      name, mask_speed(params, kernel), target=target, unit="ns", scale=scale, kernel=kernel
    )

  contestants = {
    name: measuring.timed(run) for name, run in stages(config, placement, params).items()
  }
  ours, versions, num_lost = list(contestants), "", round(_RATE.value * _SITES.value)
  with contextlib.ExitStack() as stack:
    if _TORCH.value is None or _MODEL.value != "leaf_cnn":
      measuring.skip(
        "Flower SecAgg+",
        "no --torch_python given" if _TORCH.value is None else "it sends leaf_cnn only",
      )
    else:
      for how, lost in (("plain", 0), ("secagg", num_lost)):
        arguments = (_ROUNDS.value + 1, how, _SITES.value, _PEERS.value, _DEVICES.value, lost)
        peer = stack.enter_context(measuring.peer(_TORCH.value, "flower_secagg.py", *arguments))
        contestants[how], versions = peer
    costs = measuring.alternate(contestants, _ROUNDS.value, _LIMIT.value)
  what = (
    f"{_SITES.value} sites, {size} parameters, {_PEERS.value} peers, {_RATE.value:.0%} lost, "
    f"{placement.name}"
  )
  for name in ours:
    measuring.report(f"{name}: {what}", costs[name])
  whole = [
    measuring.Cost(*map(sum, zip(*parts, strict=True)))
    for parts in zip(*(costs[name] for name in ours), strict=True)
  ]
  target = _SECONDS if (_SITES.value, _MODEL.value) == (100, "leaf_cnn") else None
  measuring.report(f"whole protocol: {what}", whole, target=target)
  if versions:
    what = f"{_SITES.value} idle sites, {size} parameters, {_PEERS.value} peers"
    told = f"Flower SecAgg+, {num_lost} lost while masking"
    measuring.report(f"round: {what}, Flower plain, none lost", costs["plain"], peer=versions)
    measuring.report(f"round: {what}, {told}", costs["secagg"], peer=versions)
    measuring.report_difference(
      f"SecAgg+ less plain: {what}, {told}",
      costs["secagg"],
      costs["plain"],
      target=None,
      peer=versions,
    )
    measuring.report_ratio(
      f"whole protocol over round: {what}, {told}", whole, costs["secagg"], target=None
    )
    pairs = zip(costs["secagg"], costs["plain"], strict=True)
    added = [measuring.Cost(a.seconds - b.seconds, a.cpu - b.cpu) for a, b in pairs]
    measuring.report_ratio(
      f"whole protocol over SecAgg+ less plain: {what}, {told}", whole, added, target=None
    )


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
