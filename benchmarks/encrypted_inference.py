"""Encrypted inference, both parties in one process, beside plain float32 and other frameworks.

  python -m benchmarks.encrypted_inference --case=resnet18_224
  python -m benchmarks.encrypted_inference --case=relu,matmul --crypten_python=ENV/bin/python
  python -m benchmarks.encrypted_inference --case=resnet18_64 --batch=32 --rings=32fast
  python -m benchmarks.encrypted_inference --case=relu --rings=64 --failures=1000000000

The model owner holds random weights, the data owner a random image; ranges are calibrated on that
image. Rings: 32 (10 fraction bits) and 64 (16), each exact or, with "fast", within one unit.
"fitted" is the choice of `mpc.fitting` for an error of 1e-3 in a logit. The online phase runs many
times on the same correlations only for timing; using them twice on secrets would reveal these.
"""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import encrypted_work, measuring
from benchmarks.peers import networks
from primia_jax import prng, ring
from primia_jax.mpc import clear, fitting, planning, pricing
from primia_jax.mpc.circuit import Config
from primia_jax.mpc.gates import elementwise
from primia_jax.mpc.gates.elementwise import RELU, Gate

_CASE = flags.DEFINE_list("case", "lenet28", "Of resnet18_224, resnet18_64, lenet28, relu, matmul.")
_RINGS = flags.DEFINE_list(
  "rings", "32fast,32,64,fitted", "Of 32, 64, 32fast, 64fast, fitted; for relu by their bits."
)
_COMPARISON = flags.DEFINE_enum(
  "comparison", "tables", list(elementwise.COMPARISONS), "Protocol of the comparisons."
)
_BATCH = flags.DEFINE_integer(
  "batch", 1, "Images at once; a batch of one is timed beside more.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Rounds measured, after one to warm up.", lower_bound=1)
_LIMIT = flags.DEFINE_float(
  "limit", 100.0, "Seconds in a case after which no further round begins.", lower_bound=1
)
_MEMORY = flags.DEFINE_float(
  "memory", 6.0, "GiB of correlations; a case with more is not timed.", lower_bound=0
)
_GATES = flags.DEFINE_integer("gates", 2**20, "Gates at once in the case relu.", lower_bound=1)
_FAILURES = flags.DEFINE_integer("failures", 0, "Exact gates to check in the case relu.")
_CRYPTEN = flags.DEFINE_string(
  "crypten_python", None, "Interpreter of an environment with crypten."
)
_SPU = flags.DEFINE_string("spu_python", None, "Interpreter of an environment with spu.")
_SYFT = flags.DEFINE_string("syft_python", None, "Interpreter of an environment with PySyft 0.2.9.")

CONFIGS = {"32": Config(32, 10), "64": Config(64, 16)}
CONFIGS |= {
  f"{bits}fast": dataclasses.replace(config, exact=False) for bits, config in CONFIGS.items()
}
_ERROR = 1e-3  # of a logit, for "fitted"
_SYFT_GATES = 2**16

# ---- targets
_ONLINE = {
  "resnet18_224": {"32": 0.13, "32fast": 0.13, "64": 0.33, "64fast": 0.33, "fitted": 0.25},
  "resnet18_64": dict.fromkeys([*CONFIGS, "fitted"], 0.1),
  "lenet28": dict.fromkeys([*CONFIGS, "fitted"], 0.02),
}
_BOTH = {"resnet18_224": 1.0}  # seconds, offline and online
_OVER_FLOAT32 = {"resnet18_224": 3.0}  # online, on any CPU with AVX2
_SENT = {"resnet18_224": {"tables": 55.0, "fss": 40.0}}  # MB, each party
_NUM_ROUNDS = {"resnet18_224": {"tables": 105, "fss": 65}, "lenet28": {"tables": 35}}
_DEALT = {"resnet18_224": {"tables": 300.0}}  # MB, to party 1
_WAN = {"resnet18_224": {"tables": 9.0, "fss": 6.0}}  # seconds of communication
_COMPILE = 30.0
_SPEEDUP = 3.0  # images a second of a large batch over those of one
_RELU_MS, _RELU_MB, _RELU_ROUNDS = {(64, False): 12.0, (32, False): 6.0, (64, True): 25.0}, 13.8, 4
_MATMUL = {"owned": 0.09, "shared": 0.25}


@contextlib.contextmanager
def peers(case: str, batch: int, want: np.ndarray):
  """The peers whose interpreters are given: contestants and descriptions by name."""
  scripts = {
    "CrypTen": (_CRYPTEN.value, "crypten_inference.py", "total"),
    "CrypTen online": (_CRYPTEN.value, "crypten_inference.py", "online"),
    "SPU SEMI2K": (_SPU.value, "spu_inference.py", "SEMI2K"),
    "SPU ABY3": (_SPU.value, "spu_inference.py", "ABY3"),
  }
  if case in ("lenet28", "relu"):
    scripts["PySyft FSS"] = (_SYFT.value, "syft_inference.py")
  contestants, about = {}, {}
  with contextlib.ExitStack() as stack:
    path = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())) / "want.npy"
    for name, (python, script, *how) in scripts.items():
      if python is None:
        measuring.skip(name, f"no --{script.split('_')[0]}_python given")
        continue
      size = min(_SYFT_GATES, _GATES.value) if name == "PySyft FSS" else _GATES.value
      small = path.with_name(f"{script}.npy")
      np.save(small, want[:size] if case == "relu" else want)
      arguments = (_ROUNDS.value + 1, case, batch, size, small, *how)
      contestants[name], about[name] = stack.enter_context(
        measuring.peer(python, script, *arguments)
      )
    yield contestants, about


def report_peers(what: str, ours: str, costs: dict, about: dict) -> None:
  """A line for each peer, and one for the ratio to ours."""
  for name, said in about.items():
    measuring.report(f"{name}: {what}", costs[name], unit="s", peer=said)
    against = (
      costs[ours]
      if name.endswith("online")
      else costs.get(f"{ours}, offline and online", costs[ours])
    )
    measuring.report_ratio(
      f"{ours} over {name}: {what}", against, costs[name], target=None, peer=said
    )


# ---- networks


def network(case: str) -> None:
  batch, comparison = _BATCH.value, _COMPARISON.value
  work = encrypted_work.network(case, batch)
  what = f"{case}, batch {batch}" + (", fss" if comparison == "fss" else "")
  plain = jax.jit(work.plain)
  want = np.asarray(plain(*work.args))
  ranges = planning.calibrate(work.fn, work.owners, [work.args])
  contestants = {"float32": measuring.timed(lambda: plain(*work.args))}
  timed = []
  for ring_name in _RINGS.value:
    plan = make_plan(ring_name, work, ranges)
    name = f"{what}, {ring_name}"
    report_plan(name, case, plan)
    if 2 * encrypted_work.num_bytes(pricing.ready_shapes(plan.circuit)) > _MEMORY.value * 2**30:
      measuring.skip(
        f"online: {name}", f"its correlations take more than --memory={_MEMORY.value} GiB"
      )
      continue
    run = encrypted_work.prepared(plan, work.args)
    report_answer(name, plan, work, run, want)
    contestants |= {(ring_name, phase): measuring.timed(fn) for phase, fn in run.phases.items()}
    if batch > 1:
      one = encrypted_work.network(case)
      run = encrypted_work.prepared(make_plan(ring_name, one, None), one.args)
      contestants[ring_name, "one image"] = measuring.timed(run.phases["online"])
    timed.append(ring_name)
  with peers(case, batch, want) as (others, about):
    costs = measuring.alternate({**contestants, **others}, _ROUNDS.value, _LIMIT.value)
  jax.clear_caches()
  report_times(case, what, timed, costs)
  for ring_name in timed[:1]:
    ours = f"primia_jax {ring_name}"
    costs |= {
      ours: costs[ring_name, "online"],
      f"{ours}, offline and online": together(costs, all_phases(ring_name)),
    }
    report_peers(what, ours, costs, about)


def make_plan(
  ring_name: str, work: encrypted_work.Work, ranges: np.ndarray | None
) -> planning.Plan:
  """The plan in a ring of `CONFIGS`, or in the fitted one."""
  if ring_name == "fitted":
    return fitting.fit(
      work.fn, work.owners, [work.args], _ERROR, Config(comparison=_COMPARISON.value)
    )
  config = dataclasses.replace(CONFIGS[ring_name], comparison=_COMPARISON.value)
  if ranges is None:
    ranges = planning.calibrate(work.fn, work.owners, [work.args])
  return planning.plan(work.fn, work.owners, work.args, config, ranges)


def report_plan(name: str, case: str, plan: planning.Plan) -> None:
  """The plan's bytes, rounds, communication time, and the range of every gate."""
  rows, comparison = pricing.rows(plan.circuit), plan.config.comparison
  sent, dealt = (sum(getattr(row, field) for row in rows) for field in ("sent", "dealt"))
  rounds = pricing.rounds(plan.circuit)
  target = lambda targets: targets.get(case, {}).get(comparison) if _BATCH.value == 1 else None
  bits = {"num_bits": plan.config.num_bits, "fraction_bits": plan.config.fraction_bits}
  measuring.say(f"sent by each party: {name}", [sent / 1e6], "MB", target(_SENT), **bits)
  measuring.say(f"rounds: {name}", [rounds], "rounds", target(_NUM_ROUNDS), **bits)
  measuring.say(f"dealt to party 1: {name}", [dealt / 1e6], "MB", target(_DEALT), **bits)
  seconds = pricing.WAN.seconds(rounds, sent)
  measuring.say(f"communication at 100 Mb/s, 40 ms: {name}", [seconds], "s", target(_WAN), **bits)
  layers = [[row.layer, row.what, row.range_bits, row.shift] for row in rows if row.range_bits]
  print(
    json.dumps({"name": f"layer, gate, bits of its range, bits cut: {name}", "value": layers}),
    flush=True,
  )


def report_answer(
  name: str,
  plan: planning.Plan,
  work: encrypted_work.Work,
  run: encrypted_work.Inference,
  want: np.ndarray,
) -> None:
  """The error of the answer, and the time to compile the online phase."""
  got = np.asarray(run.outputs())
  error = float(np.abs(got - want).max())
  target = _ERROR if name.endswith("fitted") else None
  measuring.say(
    f"largest logit error: {name}", [error], "1", target, largest_logit=float(np.abs(want).max())
  )
  if plan.config.exact:
    equal = np.array_equal(got, np.asarray(clear.check(plan, work.args)))
    measuring.say(
      f"bit-equal to the integer model: {name}", [float(equal)], "1", 1.0, at_least=True
    )
  measuring.say(f"compile, online: {name}", [run.compile], "s", _COMPILE)
  measuring.say(f"compile, online, with a warm cache: {name}", [run.compile_again], "s", None)


def together(costs: dict, phases: Iterable) -> list[measuring.Cost]:
  """The phases of a round, one after the other."""
  rounds = zip(*(costs[phase] for phase in phases), strict=True)
  return [measuring.Cost(sum(c.seconds for c in each), sum(c.cpu for c in each)) for each in rounds]


def all_phases(name: str) -> list[tuple[str, str]]:
  return [(name, phase) for phase in encrypted_work.PHASES]


def report_times(case: str, what: str, timed: list[str], costs: dict) -> None:
  """The time of each phase, and its ratio to plain float32."""
  single = _BATCH.value == 1
  goal = single and _COMPARISON.value == "tables"
  measuring.report(f"float32: {what}", costs["float32"], unit="s")
  for ring_name in timed:
    name = f"{what}, {ring_name}"
    for phase in encrypted_work.PHASES:
      target = _ONLINE[case].get(ring_name) if goal and phase == "online" else None
      measuring.report(f"{phase}: {name}", costs[ring_name, phase], unit="s", target=target)
    target = _BOTH.get(case) if single else None
    measuring.report(
      f"offline and online: {name}", together(costs, all_phases(ring_name)), unit="s", target=target
    )
    online = costs[ring_name, "online"]
    target = _OVER_FLOAT32.get(case) if goal else None
    measuring.report_ratio(f"online over float32: {name}", online, costs["float32"], target=target)
    if not single:
      one = costs[ring_name, "one image"]
      pairs = [_BATCH.value * a.seconds / b.seconds for a, b in zip(one, online, strict=True)]
      medians = [statistics.median(c.seconds for c in each) for each in (one, online)]
      measuring.say(
        f"images a second: {name}", [_BATCH.value / c.seconds for c in online], "1/s", None
      )
      measuring.say(
        f"images a second over those of batch 1: {name}", pairs, "ratio", _SPEEDUP,
        value=_BATCH.value * medians[0] / medians[1], at_least=True,
      )  # fmt: skip


# ---- the gate and the product alone


def relu(case: str) -> None:
  """ReLU with truncation on random numbers of the whole range, by ring, exactness and range."""
  contestants, sent, size = {}, {}, _GATES.value
  comparison = elementwise.COMPARISONS[_COMPARISON.value]
  settings = [
    Gate(RELU, size, bits, range_bits, shift, 0 if exact else shift, exact, comparison)
    for bits, shift, some in ((64, 16, 40), (32, 12, 28))
    if any(r.startswith(str(bits)) for r in _RINGS.value)
    for range_bits in (bits - 2, some)
    for exact in (True, False)
  ]
  name = lambda gate: (
    f"relu, {gate.num} gates, {gate.num_bits} bits, range {gate.range_bits}, "
    f"{'exact' if gate.exact else 'within one unit'}{', fss' * (gate.comparison.name == 'fss')}"
  )
  for gate in settings:
    run, key = encrypted_work.gate_run(gate), prng.random_key()
    z = encrypted_work.numbers(gate, key)
    first = prng.bits(key, jnp.zeros(3, jnp.uint32), z.shape, z.dtype)
    shares, correlation = jnp.stack([first, z - first]), run.offline(key)
    got = run.online(shares, correlation)
    off = ring.signed(
      ring.reduce(got[0] + got[1] - elementwise.clear(gate, z), gate.num_bits), gate.num_bits
    )
    measuring.say(
      f"largest error in units: {name(gate)}",
      [int(jnp.abs(off).max())],
      "1",
      0 if gate.exact else 1,
    )
    contestants[gate] = measuring.timed(lambda run=run, s=shares, c=correlation: run.online(s, c))
    contestants[gate, "offline"] = measuring.timed(lambda run=run, key=key: run.offline(key))
    sent[gate] = run.sent
  want = np.maximum(networks.inputs(case, 1, size)[0], 0)
  with peers(case, 1, want) as (others, about):
    costs = measuring.alternate({**contestants, **others}, _ROUNDS.value, _LIMIT.value)
  for gate in settings:
    full = size == 2**20 and gate.comparison.name == "tables"
    measuring.report(
      f"online: {name(gate)}", costs[gate], unit="ms", scale=1e3,
      target=_RELU_MS.get((gate.num_bits, gate.exact)) if full else None,
    )  # fmt: skip
    measuring.report(
      f"offline, dealer and both parties: {name(gate)}",
      costs[gate, "offline"],
      unit="ms",
      scale=1e3,
    )
    num_bytes = sum(message.num_bytes for message in sent[gate])
    measuring.say(
      f"sent by each party: {name(gate)}", [num_bytes / 1e6], "MB", _RELU_MB if full else None
    )
    measuring.say(f"rounds: {name(gate)}", [len(sent[gate])], "rounds", _RELU_ROUNDS)
  if settings:
    ours = f"primia_jax, {name(settings[0])}"
    phases = ((settings[0], "offline"), settings[0])
    costs |= {ours: costs[settings[0]], f"{ours}, offline and online": together(costs, phases)}
    report_peers(f"relu, {size} gates", ours, costs, about)
  for gate in settings:
    if _FAILURES.value and gate.exact and gate.range_bits == gate.num_bits - 2:
      report_failures(name(gate), gate)


def report_failures(name: str, gate: Gate) -> None:
  """Counts wrong answers of exact gates on random numbers, with fresh correlations in each run."""
  count, wrong, done, start = encrypted_work.failures(gate), 0, 0, time.perf_counter()
  while done < _FAILURES.value:
    wrong, done = wrong + int(count(prng.random_key())), done + gate.num
  seconds = time.perf_counter() - start
  measuring.say(f"wrong answers: {name}", [wrong], "1", 0, checked=done, seconds=round(seconds, 1))


def matmul(case: str) -> None:
  """A product of two matrices 1024 x 1024: one owned by each party, or both given as shares."""
  works = {
    "owned": encrypted_work.matmul(encrypted_work.OWNERS),
    "shared": encrypted_work.matmul((planning.SHARED, planning.SHARED)),
  }
  plain = jax.jit(works["owned"].plain)
  want = np.asarray(plain(*works["owned"].args))
  contestants = {"float32": measuring.timed(lambda: plain(*works["owned"].args))}
  for how, work in works.items():
    ranges = planning.calibrate(work.fn, work.owners, [work.args])
    plan = planning.plan(work.fn, work.owners, work.args, Config(44, 16), ranges)
    run = encrypted_work.prepared(plan, work.args)
    error = float(np.abs(np.asarray(run.outputs()) - want).max())
    measuring.say(
      f"largest error: matmul 1024, {how}", [error], "1", None, largest=float(np.abs(want).max())
    )
    contestants |= {(how, phase): measuring.timed(fn) for phase, fn in run.phases.items()}
  with peers(case, 1, want) as (others, about):
    costs = measuring.alternate({**contestants, **others}, _ROUNDS.value, _LIMIT.value)
  measuring.report("float32: matmul 1024", costs["float32"], unit="s")
  for how in works:
    for phase in encrypted_work.PHASES:
      target = _MATMUL[how] if phase == "online" else None
      measuring.report(f"{phase}: matmul 1024, {how}", costs[how, phase], unit="s", target=target)
    ours = f"primia_jax {how}"
    costs |= {
      ours: costs[how, "online"],
      f"{ours}, offline and online": together(costs, all_phases(how)),
    }
  report_peers("matmul 1024", "primia_jax shared", costs, about)


def main(_):
  jax.config.update("jax_enable_x64", True)
  with tempfile.TemporaryDirectory() as cache:
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for case in _CASE.value:
      {"relu": relu, "matmul": matmul}.get(case, network)(case)


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
