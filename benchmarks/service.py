"""Encrypted inference in two processes over TLS on loopback, beside both parties in one process.

  python -m benchmarks.service --case=lenet28 --rounds=30
  python -m benchmarks.service --case=resnet18_224 --rings=32fast,64fast
  python -m benchmarks.service --case=lenet28 --rings=32 --batch=8
  python -m benchmarks.service --case=resnet18_224 --rings=32 --link_mbits=100 --link_ms=20
  python -m benchmarks.service --case=load --rings=32

A model owner and a clinic, each on a core of its own, serve and ask as institutions would; what is
timed is a request, from the image to the output, with everything prepared that needs no image.
"One process" is `mpc.online` on all cores. "No carrier" are the same two programs message by
message in one process. The benchmark plays the dealer and sees everything; each inference has
correlations of its own, except in "one process" and "no carrier", which use one set again and
again only for timing. With --link_mbits the two processes meet over a link of this bandwidth, each
way, and --link_ms of delay, one way (`link`). The case "load" is LeNet with many sessions
(`service_load`).
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import encrypted_inference, encrypted_work, link, measuring, service_load
from primia_jax import mpc
from primia_jax.mpc import multiprocess, planning
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import certificates, folders, institutions
from primia_jax.service.channel import Limits

_ROLE = flags.DEFINE_enum("role", None, ["model_owner", "clinic"], "Started by the benchmark.")
_ROOT = flags.DEFINE_string("root", None, "Folder of the roles' folders; given by the benchmark.")

_MBITS = flags.DEFINE_float(
  "link_mbits", 0.0, "Megabits a second between the processes, each way; 0 for plain loopback.",
  lower_bound=0.0,
)  # fmt: skip
_DELAY = flags.DEFINE_float(
  "link_ms", 0.0, "Milliseconds of this link's delay, one way.", lower_bound=0.0
)

# ---- targets
_SECONDS = {"lenet28": 0.06}
_OVER_ONE = {"resnet18_224": {32: 3.5, 64: 2.0}}
_CLINIC, _LOAD = "clinic", "load"
_PATIENT = Limits(idle=3600.0)  # while the benchmark compiles its own contestants


# ---- the two parties


def model_owner(case: str, root: pathlib.Path) -> None:
  """Publishes, then serves until its input ends."""
  _pin(0)
  work, plan = _network(case), mpc.read(root / "plan")
  owner = mpc.ModelOwner(plan, work.args[0])
  _put(root / "tag", lambda path: path.write_text(owner.tag))
  publication = owner.publish(mpc.read(_waited(root / "blind")))
  _put(root / "publication", lambda path: mpc.write(path, publication))
  name = publication.publication
  with institutions.serve(root / "model_owner", owner, name, limits=_PATIENT) as port:
    _put(root / "port", lambda path: path.write_text(str(port)))
    sys.stdin.read()


def clinic(case: str, root: pathlib.Path) -> None:
  """Prepares and asks, each for a line of its input; prints the seconds of the request."""
  _pin(1)
  work, plan = _network(case), mpc.read(root / "plan")
  publication = mpc.read(_waited(root / "publication"))
  owner, server = mpc.DataOwner(plan, publication), root / "model_owner" / certificates.CERTIFICATE
  name, online = publication.publication, multiprocess.online(plan, DATA_OWNER)
  address = f"127.0.0.1:{_waited(root / 'link').read_text()}"
  with institutions.ask(
    root / _CLINIC, owner, name, address, server.read_bytes(), online, _PATIENT
  ) as session:
    while sys.stdin.readline():
      session.prepare()
      print("prepared", flush=True)
      sys.stdin.readline()
      start = time.perf_counter()
      got = np.asarray(session.ask(work.args[1]))
      print(time.perf_counter() - start, flush=True)
      np.save(root / "answer.npy", got)


def _network(case: str) -> encrypted_work.Work:
  return encrypted_work.network("lenet28" if case == _LOAD else case, flags.FLAGS.batch)


def _pin(core: int) -> None:
  cores = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, {cores[core % len(cores)]})


def _put(path: pathlib.Path, write) -> None:
  part = path.with_suffix(".part")
  write(part)
  part.rename(path)


def _waited(path: pathlib.Path, processes=()) -> pathlib.Path:
  while not path.exists():
    if any(process.poll() is not None for process in processes):
      raise RuntimeError("a party's process ended; its error is above")
    time.sleep(0.05)
  return path


# ---- the benchmark


def run(case: str, ring_name: str, root: pathlib.Path) -> None:
  """One network in one ring: both processes, and one."""
  work, plan = _planned(case, ring_name, root)
  rounds = flags.FLAGS.rounds
  folders.make(root / _CLINIC)
  own = certificates.create(root / _CLINIC, _CLINIC)
  shutil.copy(own, root / "model_owner" / institutions.CLINICS / f"{_CLINIC}.pem")
  processes = [_start(role, case, root) for role in ("model_owner", "clinic")]
  try:
    dealer = mpc.Dealer(plan, _waited(root / "tag", processes).read_text())
    _put(root / "blind", lambda path: mpc.write(path, dealer.blind()))
    folders.deal(dealer, rounds + 1, root / "model_owner" / _CLINIC, root / _CLINIC)
    port = int(_waited(root / "port", processes).read_text())
    if _MBITS.value:
      port = link.Link(port, _DELAY.value / 1e3, _MBITS.value * 1e6).port
    _put(root / "link", lambda path: path.write_text(str(port)))
    sides, reveal = _sides(plan, work)
    one = mpc.online(plan)
    parties = [multiprocess.online(plan, p) for p in (MODEL_OWNER, DATA_OWNER)]
    alone = lambda: multiprocess.simulate(
      *(party.start(side) for party, side in zip(parties, sides, strict=True))
    )
    contestants = {
      "one process": measuring.timed(lambda: one(*sides)),
      "no carrier": measuring.timed(alone),
      "two processes": _requests(processes),
    }
    costs = measuring.alternate(contestants, rounds, flags.FLAGS.limit)
    want, got = np.asarray(reveal(one(*sides))), np.load(root / "answer.npy")
  finally:
    for process in processes:
      process.kill()
      process.wait()
  batch = flags.FLAGS.batch
  shaped = f", {_MBITS.value:g} Mb/s, {_DELAY.value:g} ms" if _MBITS.value else ""
  what = f"{case}, {ring_name}" + (f", batch {batch}" if batch > 1 else "") + shaped
  bits = 32 if plan.config.num_bits <= 32 else 64
  for name, cost in costs.items():
    loopback = name == "two processes" and batch == 1 and not shaped
    target = _SECONDS.get(case) if loopback else None
    measuring.report(f"a request, {name}: {what}", cost, unit="s", target=target)
  measuring.report_ratio(
    f"two processes over one: {what}", costs["two processes"], costs["one process"],
    target=None if shaped or batch > 1 else _OVER_ONE.get(case, {}).get(bits),
  )  # fmt: skip
  if batch > 1:
    rates = [batch / cost.seconds for cost in costs["two processes"]]
    measuring.say(f"images a second, two processes: {what}", rates, "1/s", None)
  sizes = parties[0].sizes
  measuring.say(f"rounds: {what}", [len(sizes)], "rounds", None)
  measuring.say(f"sent by each party: {what}", [sum(sizes) / 1e6], "MB", None)
  if _MBITS.value:
    # both sides' openings travel at once
    seconds = len(sizes) * _DELAY.value / 1e3 + 8 * sum(sizes) / (_MBITS.value * 1e6)
    measuring.say(
      f"communication alone, estimated: {what}", [seconds], "s", None,
      formula="rounds x delay + 8 x bytes each way / bandwidth",
    )  # fmt: skip
  if plan.config.exact:
    measuring.say(f"bit-equal: {what}", [float(np.array_equal(got, want))], "1", 1, at_least=True)
  else:
    measuring.say(f"largest difference: {what}", [float(np.abs(got - want).max())], "1", None)


def load(ring_name: str, root: pathlib.Path) -> None:
  """Many sessions of LeNet, in a row and at once."""
  work, plan = _planned(_LOAD, ring_name, root)
  service_load.admit(root)
  server = _start("model_owner", _LOAD, root)
  try:
    dealer = mpc.Dealer(plan, _waited(root / "tag", [server]).read_text())
    _put(root / "blind", lambda path: mpc.write(path, dealer.blind()))
    service_load.deal(dealer, root)
    port = int(_waited(root / "port", [server]).read_text())
    what = f"lenet28, {ring_name}"
    service_load.run(what, plan, work.args[0], work.args[1].shape, root, port, server)
  finally:
    server.kill()
    server.wait()


def _planned(case: str, ring_name: str, root: pathlib.Path):
  """The work and its plan, which is written, and the model owner's folder."""
  work = _network(case)
  plan = encrypted_inference.make_plan(
    ring_name, work, planning.calibrate(work.fn, work.owners, [work.args])
  )
  mpc.write(root / "plan", plan)
  certificates.create(folders.make(root / "model_owner"), "model-owner")
  (root / "model_owner" / institutions.CLINICS).mkdir()
  return work, plan


def _sides(plan: planning.Plan, work: encrypted_work.Work):
  """Both sides of one inference, in this process."""
  owner = mpc.ModelOwner(plan, work.args[0])
  dealer = mpc.Dealer(plan, owner.tag)
  data_owner = mpc.DataOwner(plan, owner.publish(dealer.blind()))
  first, second = dealer.deal()
  asked, question = data_owner.ask(data_owner.prepare(second), work.args[1])
  return (owner.answer(owner.prepare(first), question), asked), data_owner.reveal


def _start(role: str, case: str, root: pathlib.Path) -> subprocess.Popen:
  command = [sys.executable, "-m", "benchmarks.service", f"--role={role}", f"--root={root}"]
  return subprocess.Popen(
    [*command, f"--case={case}", f"--batch={flags.FLAGS.batch}"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def _requests(processes: list[subprocess.Popen]) -> measuring.Contestant:
  asking: Any = processes[1]

  def step() -> str:
    asking.stdin.write("go\n")
    asking.stdin.flush()
    line = asking.stdout.readline()
    if not line:
      raise RuntimeError("the clinic's process ended; its error is above")
    return line

  while True:
    step()
    before = _cpu(processes)
    yield measuring.Cost(float(step()), _cpu(processes) - before)


def _cpu(processes: list[subprocess.Popen]) -> float:
  """CPU seconds of processes until now."""
  each = [pathlib.Path(f"/proc/{p.pid}/stat").read_text().rsplit(")", 1)[1] for p in processes]
  ticks = sum(int(v) for fields in each for v in fields.split()[11:13])
  return ticks / os.sysconf("SC_CLK_TCK")


def main(_):
  jax.config.update("jax_enable_x64", True)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  roles = {"model_owner": model_owner, "clinic": clinic}
  for case in flags.FLAGS.case:
    if _ROLE.value:
      roles[_ROLE.value](case, pathlib.Path(_ROOT.value))
      return
    for ring_name in flags.FLAGS.rings:
      with tempfile.TemporaryDirectory() as root:
        if case == _LOAD:
          load(ring_name, pathlib.Path(root))
        else:
          run(case, ring_name, pathlib.Path(root))


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
