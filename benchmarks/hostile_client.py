"""What it costs to serve a client that need not be trusted, beside one that must be.

  python -m benchmarks.hostile_client --case=lenet28,cnn28

"trusted" is the semi-honest protocol, "checked" the same with the dealer's tags on the client's
openings, and "sharing" that of a helper in the client's place. Both parties run message by message
in one process, each inference has correlations of its own, and the phases are timed apart: deal,
prepare (both parties, before the image exists), and the request. Beside them are the bytes that the
plan names.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import encrypted_work, measuring
from primia_jax import mpc
from primia_jax.models import ModelConfig, build
from primia_jax.mpc import helping, inference, multiprocess, planning, pricing
from primia_jax.mpc.circuit import CHECKED, CLIENTS, SHARING, Config
from primia_jax.mpc.messages import Question
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER

_CASE = flags.DEFINE_list("case", "lenet28,cnn28", "Of lenet28 and cnn28.")
_CLIENTS = flags.DEFINE_list("clients", list(CLIENTS), "Of trusted, checked and sharing.")
_ROUNDS = flags.DEFINE_integer(
  "rounds", 20, "Rounds measured, after one to warm up.", lower_bound=1
)
_PHASES = ("deal", "prepare", "request")


def work(case: str) -> encrypted_work.Work:
  """A function of weights and an image, and both."""
  if case == "lenet28":
    return encrypted_work.network(case)
  model = build(ModelConfig("cnn", 3, (28, 28, 1), norm="batch"))
  image = jax.random.normal(jax.random.key(1), (1, 28, 28, 1))
  fn = lambda weights, image: model.apply(*weights, image)[0]
  return encrypted_work.Work(fn, fn, encrypted_work.OWNERS, (model.init(jax.random.key(0)), image))


class Client:
  """All roles of one kind of client; `inference` runs one and notes the seconds of its phases."""

  def __init__(self, plan: planning.Plan, args: tuple[Any, ...]):
    self.plan, self.args = plan, args
    self.model_owner = mpc.ModelOwner(plan, args[0])
    self.dealer = mpc.Dealer(plan, self.model_owner.tag)
    publication = self.model_owner.publish(self.dealer.blind())
    sharing = plan.config.client == SHARING
    self.party: Any = (helping.Helper if sharing else mpc.DataOwner)(plan, publication)
    self.online = [multiprocess.online(plan, party) for party in (MODEL_OWNER, DATA_OWNER)]

  def inference(self) -> tuple[list[measuring.Cost], Any]:
    costs: list[measuring.Cost] = []
    first, second = self._timed(costs, self._deal)
    prepared = self._timed(costs, lambda: self._prepare(first, second))
    return costs, self._timed(costs, lambda: self._request(*prepared))

  def _timed(self, costs: list[measuring.Cost], run: Any) -> Any:
    wall, cpu = time.perf_counter(), time.process_time()
    out = run()
    costs.append(measuring.Cost(time.perf_counter() - wall, time.process_time() - cpu))
    return out

  def _deal(self) -> Any:
    return [part.block_until_ready() for part in self.dealer.deal()]

  def _prepare(self, first: Any, second: Any) -> Any:
    made = self.model_owner.prepare(first), self.party.prepare(second)
    return [v.block_until_ready() for v in made]

  def _request(self, first: Any, second: Any) -> Any:
    if self.plan.config.client == SHARING:
      given = self._shares()
      asked = self.party.assist(second, {i: v[1] for i, v in given.items()})
      own = {i: v[0] for i, v in given.items()}
      answered = self.model_owner.answer(first, Question(first.inference, {}), own)
    else:
      asked, question = self.party.ask(second, self.args[1])
      answered = self.model_owner.answer(first, question)
    shares = multiprocess.simulate(self.online[0].start(answered), self.online[1].start(asked))
    return np.asarray(jax.tree.leaves(inference.reveal(self.plan, shares))[0])

  def _shares(self) -> dict[int, Any]:
    (i,) = helping.numbers(self.plan)
    whole = np.rint(np.asarray(self.args[1], np.float64) / self.plan.circuit.operands[i].scale)
    whole = whole.astype(np.int64).astype(self.plan.config.dtype)
    first = np.random.default_rng().integers(0, 2**32, whole.shape, whole.dtype)
    return {i: (first, whole - first)}


def run(case: str) -> None:
  """One network, with each kind of client."""
  given = work(case)
  ranges = planning.calibrate(given.fn, given.owners, [given.args])
  clients = {}
  for name in _CLIENTS.value:
    config = dataclasses.replace(Config(32, 10, comparison="tables"), client=name)
    owners = ("model_owner", "shared") if name == SHARING else given.owners
    plan = planning.plan(given.fn, owners, given.args, config, ranges)
    clients[name] = Client(plan, given.args)
    rows = pricing.rows(plan.circuit)
    for what in ("dealt", "sent"):
      total = sum(getattr(row, what) for row in rows) / 1e6
      measuring.say(f"{what}: {case}, {name}", [total], "MB", None)
    measuring.say(f"rounds: {case}, {name}", [len(clients[name].online[0].sizes)], "rounds", None)
    if name == CHECKED:
      measuring.say(f"tags: {case}", [(pricing.tag_bytes(plan.circuit) or 0) / 1e6], "MB", None)
  costs: dict[Any, list[measuring.Cost]] = {(n, p): [] for n in clients for p in _PHASES}
  for round in range(_ROUNDS.value + 1):
    for name, client in clients.items():
      each, answer = client.inference()
      exact = np.asarray(jax.tree.leaves(mpc.check(client.plan, given.args))[0])
      if not np.array_equal(answer, exact):
        raise ValueError(f"{case}, {name}: the answer is not the integer model's")
      for phase, cost in zip(_PHASES, each, strict=True):
        if round:
          costs[name, phase].append(cost)
  for (name, phase), found in costs.items():
    measuring.report(f"{phase}: {case}, {name}", found, unit="s")
    if name != _CLIENTS.value[0]:
      base = costs[_CLIENTS.value[0], phase]
      what = f"{phase}, {name} over {_CLIENTS.value[0]}: {case}"
      measuring.report_ratio(what, found, base, target=None)


def main(_):
  for case in _CASE.value:
    run(case)


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
