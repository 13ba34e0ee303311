"""Flower on one machine, for a trial: SuperLink, and a SuperNode for each site.

Everything runs on loopback, with TLS and node authentication as between machines; docs/flower.md
has the commands for hospitals apart. In a simulation Flower's own engine takes the SuperNodes'
place: the same apps run in it, and the sites' programs beside it. All processes end with the run,
however it ends.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import primia_jax

from . import trial_keys
from .processes import own_folder

APP = pathlib.Path(primia_jax.__file__).parent / "flower" / "app"
COORDINATOR, FLOWER, LOG = "coordinator", "flower", "log"  # folders, and a site's output
_START = 60.0  # seconds for a server to listen
_LOOK, _LONGEST = 15.0, 240.0  # seconds until Flower is asked for its run, and between later looks
_ENDING = "ending.json"  # of the coordinator, as primia_jax.flower.coordinating writes it


class Deployment(NamedTuple):
  """What a trial consists of.

  Attributes:
    folder: of the run; the coordinator's and Flower's lie in it.
    sites: the sites' own folders.
    processes: name to process, of SuperLink, SuperNodes and sites.
    port: of the SuperLink.
    is_simulated: Flower's simulation engine runs the sites' app; there are no SuperNodes.
  """

  folder: pathlib.Path
  sites: list[pathlib.Path]
  processes: dict[str, subprocess.Popen]
  port: int
  is_simulated: bool = False

  @property
  def flower(self) -> pathlib.Path:
    return self.folder / FLOWER

  def log(self, name: str) -> pathlib.Path:
    """Where a process's output goes."""
    if name.startswith("site "):
      return self.sites[int(name.split()[1])] / LOG
    return self.flower / f"{name.replace(' ', '_')}.log"


def check_installed(is_simulated: bool = False) -> None:
  """Refuses to start without Flower, or a simulation without the engine's Ray.

  Raises:
    ValueError: it is not installed.
  """
  if shutil.which("flower-superlink", path=_path()) is None:
    raise ValueError(
      "placement=flower needs Flower (flower-superlink): pip install 'primia-jax[flower]'"
    )
  if is_simulated and importlib.util.find_spec("ray") is None:
    raise ValueError(
      "flower_simulation=True needs Ray, on which Flower's simulation engine runs: "
      "pip install 'primia-jax[flower-simulation]'"
    )


def launch(
  module: str,
  arguments: Sequence[str],
  num_sites: int,
  folder: pathlib.Path,
  own: pathlib.Path,
  timeout: float,
  named: str = "run_dir",
  is_simulated: bool = False,
) -> None:
  """Runs a trial to its end; shows the output of site 0.

  A site whose process ends is lost to the run, which goes on while enough sites are left.

  Args:
    module: of the binary.
    arguments: of each site's process.
    num_sites: how many.
    folder: of the run.
    own: where the sites' own folders lie.
    timeout: seconds that a stage may take.
    named: the flag by which a site's process is told its own folder.
    is_simulated: Flower's simulation engine takes the SuperNodes' place.

  Raises:
    RuntimeError: the run failed; the message says why and names the logs.
    ValueError, FileNotFoundError: as `trial_keys.introduce`.
  """
  with deployed(num_sites, folder, own, is_simulated) as trial:
    trial_keys.introduce(trial.folder / COORDINATOR, trial.sites)
    start_sites(trial, module, arguments, named)
    start_run(trial, timeout)
    lost = watch(trial)
  if lost:
    print(
      f"warning: sites {lost} were lost and took no part in later rounds; see "
      f"{', '.join(str(trial.sites[i] / LOG) for i in lost)}. They take part again when the run is "
      "started again",
      file=sys.stderr,
    )


@contextlib.contextmanager
def deployed(
  num_sites: int, folder: pathlib.Path, own: pathlib.Path, is_simulated: bool = False
) -> Iterator[Deployment]:
  """A SuperLink, and SuperNodes whose keys it knows, or the simulation engine in their place; at
  the end every process is stopped.
  """
  sites = [own_folder(own, i).resolve() for i in range(num_sites)]
  trial = Deployment(folder.resolve(), sites, {}, free_port(), is_simulated)
  trial.flower.mkdir(mode=0o700, exist_ok=True)
  # so that nothing is left behind
  before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  try:
    _start_superlink(trial)
    for i in range(0 if is_simulated else num_sites):
      register(trial, i)
      start_supernode(trial, i)
    yield trial
  finally:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not leave anything behind
    _stop(trial)
    signal.signal(signal.SIGTERM, before)


def _start_superlink(trial: Deployment) -> None:
  trial_keys.make_certificates(trial.flower)
  at = {name: str(trial.flower / f"{name}.pem") for name in ("certificate", "key", "authority")}
  home = trial.flower / "home"
  home.mkdir(exist_ok=True)
  (home / "config.toml").write_text(
    f'[superlink]\ndefault = "trial"\n\n[superlink.trial]\naddress = "127.0.0.1:{trial.port}"\n'
    f"root-certificates = {json.dumps(at['authority'])}\n"
  )
  start(
    trial,
    "superlink",
    [
      *("flower-superlink", "--host", "127.0.0.1", "--port", str(trial.port)),
      *("--ssl-certfile", at["certificate"], "--ssl-keyfile", at["key"]),
      *("--ssl-ca-certfile", at["authority"]),
      "--simulation" if trial.is_simulated else "--enable-supernode-auth",
      "--disable-runtime-dependency-installation",
    ],
    home,
  )
  wait_for(trial, "superlink", trial.port)


def register(trial: Deployment, site: int) -> None:
  """Makes a site's node key, and registers its public half, as the coordinator's operator does."""
  (trial.sites[site] / FLOWER).mkdir(mode=0o700, exist_ok=True)
  public = trial_keys.make_node_key(trial.sites[site] / FLOWER / "node_key")
  command = ["flwr", "supernode", "register", str(public), "trial"]
  flwr(trial, command)


def start_supernode(trial: Deployment, site: int) -> None:
  """Starts a site's SuperNode, which knows nothing but its key, the authority and its folder."""
  own, name = trial.sites[site], f"supernode {site}"
  command = [
    *("flower-supernode", "--superlink", f"127.0.0.1:{trial.port}"),
    *("--root-certificates", str(trial.flower / "authority.pem")),
    *("--auth-supernode-private-key", str(own / FLOWER / "node_key")),
    *("--host", "127.0.0.1", "--port", str(free_port())),
    *("--node-config", f"site-folder={json.dumps(str(own))}"),
  ]
  start(trial, name, command, own / FLOWER)


def start_sites(
  trial: Deployment, module: str, arguments: Sequence[str], named: str = "run_dir"
) -> None:
  """Starts each hospital's own process; arguments as `launch`."""
  for i in range(len(trial.sites)):
    start_site(trial, i, module, arguments, named)


def start_site(
  trial: Deployment, i: int, module: str, arguments: Sequence[str], named: str = "run_dir"
) -> None:
  """Starts one hospital's own process, also while a run goes on, if it has ended."""
  own = trial.sites[i]
  command = [sys.executable, "-m", module, *arguments, f"--{named}={own}", f"--site={i}"]
  with contextlib.ExitStack() as files:
    output = files.enter_context((own / LOG).open("a")) if i else None
    errors = output and subprocess.STDOUT
    trial.processes[f"site {i}"] = subprocess.Popen(
      command, stdout=output, stderr=errors, start_new_session=True
    )


def start_run(trial: Deployment, timeout: float) -> None:
  """Starts the coordinator's app, which begins when all SuperNodes are connected."""
  folder = trial.folder / COORDINATOR
  (folder / _ENDING).unlink(missing_ok=True)
  settings = f"folder={json.dumps(str(folder))} num-sites={len(trial.sites)} timeout={timeout!r}"
  command = ["flwr", "run", str(APP), "trial", "--run-config"]
  if not trial.is_simulated:
    flwr(trial, [*command, settings])
    return
  settings += f" sites={json.dumps(str(trial.sites[0].parent))}"
  num = len(trial.sites)  # a worker for each: all wait for their site's program most of the time
  engine = f"num-supernodes={num} init-args-num-cpus={num} client-resources-num-cpus=1"
  flwr(trial, [*command, settings, "--federation-config", engine])


def watch(trial: Deployment) -> list[int]:
  """Waits for the end of a run; returns the sites that were lost; raises as `launch`."""
  ending = trial.folder / COORDINATOR / _ENDING
  lost: list[int] = []
  pause, look = _LOOK, time.monotonic() + _LOOK
  while not ending.is_file():
    if time.monotonic() > look:
      if (run := _ended_run(trial)) and not ending.is_file():
        log = trial.log("run")
        log.write_text(flwr(trial, ["flwr", "log", run, "trial", "--show"]))
        raise RuntimeError(f"Flower's run has ended, and the coordinator said nothing; see {log}")
      pause = min(2 * pause, _LONGEST)
      look = time.monotonic() + pause
    for name, process in trial.processes.items():
      site = int(name.split()[-1]) if name != "superlink" else -1
      if (
        site in lost or process.poll() is None or (name.startswith("site ") and not process.poll())
      ):
        continue
      print(
        f"\n{name} has ended, code {process.returncode}; see {trial.log(name)}", file=sys.stderr
      )
      if name == "superlink":
        raise RuntimeError(f"the coordinator's SuperLink has ended; see {trial.log(name)}")
      lost.append(site)
    if len(lost) == len(trial.sites):
      break
    time.sleep(0.1)
  sites = [trial.processes[f"site {i}"] for i in range(len(trial.sites))]
  while any(one.poll() is None for one in sites) and not _failed(ending):  # they still score
    time.sleep(0.1)
  logs = ", ".join(str(trial.log(f"site {i}")) for i in range(1, len(trial.sites)))
  seen = f"see above, {logs} and {trial.log('superlink')}"
  again = "Start again with the same --run_dir to continue from the last saved round"
  if why := _failed(ending):
    raise RuntimeError(f"the run has failed: {why}. For more {seen}. {again}")
  codes = [one.poll() for one in sites]
  if all(codes):
    raise RuntimeError(f"all sites have ended with an error; {seen}. {again}")
  return [i for i, code in enumerate(codes) if code != 0]


def _ended_run(trial: Deployment) -> str:
  """The run, if Flower says that it has ended, such as for a failure before the coordinator began;
  empty if it has not, or does not answer.
  """
  with contextlib.suppress(RuntimeError):
    listed = json.loads(flwr(trial, ["flwr", "list", "trial", "--format", "json"]))["runs"]
    if all(str(one["status"]).startswith("finished") for one in listed):
      return str(listed[-1]["run-id"]) if listed else ""
  return ""


def _failed(ending: pathlib.Path) -> str:
  return str(json.loads(ending.read_text())["failed"]) if ending.is_file() else ""


def start(trial: Deployment, name: str, command: Sequence[str], home: pathlib.Path) -> None:
  """Starts one of Flower's processes, in a session of its own."""
  with trial.log(name).open("w") as output:
    trial.processes[name] = subprocess.Popen(
      command, stdout=output, stderr=subprocess.STDOUT, env=_environment(home),
      start_new_session=True,
    )  # fmt: skip


def flwr(trial: Deployment, command: Sequence[str]) -> str:
  """One of the operator's commands to the SuperLink; returns what it prints.

  Raises:
    RuntimeError: it failed.
  """
  home = trial.flower / "home"
  done = subprocess.run(
    command, env=_environment(home), capture_output=True, text=True, check=False
  )
  if done.returncode:
    said = " ".join((done.stdout + done.stderr).split())
    raise RuntimeError(f"{' '.join(command[:3])} failed: {said}; see {trial.log('superlink')}")
  return done.stdout


def wait_for(trial: Deployment, name: str, port: int) -> None:
  """Waits until a server listens.

  Raises:
    RuntimeError: it has ended, or does not listen in time.
  """
  end = time.monotonic() + _START
  while trial.processes[name].poll() is None and time.monotonic() < end:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
      return
    time.sleep(0.1)
  raise RuntimeError(f"the {name} does not listen at 127.0.0.1:{port}; see {trial.log(name)}")


def free_port() -> int:
  """A port on loopback that nobody uses now."""
  with socket.create_server(("127.0.0.1", 0)) as probe:
    return probe.getsockname()[1]


def _stop(trial: Deployment) -> None:
  """Ends all processes with all that they have started, also in sessions of their own."""
  started = _below({process.pid for process in trial.processes.values()})
  for process in trial.processes.values():
    if process.poll() is None:  # it leads a group, of what has stayed in its session
      os.killpg(process.pid, signal.SIGKILL)
  for pid in started:
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
  for process in trial.processes.values():
    process.wait()


def _below(roots: set[int]) -> set[int]:
  """All processes that these have started, and those that they have."""
  parents, found = _parents(), set[int]()
  while more := {pid for pid, parent in parents.items() if parent in roots | found} - found:
    found |= more
  return found


def _parents() -> dict[int, int]:
  """The parent of each process: from /proc, or from `ps` where there is none, as on macOS; empty
  without both.
  """
  out = {}
  for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # it has ended
      fields = status.read_bytes().rpartition(b")")[2]  # behind the name, which holds anything
      out[int(status.parent.name)] = int(fields.split()[1])
  if out:
    return out
  try:
    command = ["ps", "-A", "-o", "pid=,ppid="]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  except (OSError, subprocess.SubprocessError):
    return {}
  pairs = (line.split() for line in listed.splitlines())
  return {int(pid): int(parent) for pid, parent in pairs}


def _path() -> str:
  """Where programs are looked for: first beside this Python."""
  return os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])


def _environment(home: pathlib.Path) -> dict[str, str]:
  """Of Flower's processes: a home of their own, no telemetry, and this copy of the library."""
  root = str(pathlib.Path(primia_jax.__file__).parents[1])
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  return os.environ | {
    "FLWR_HOME": str(home),
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "JAX_PLATFORMS": "cpu",
    "RAY_AUTH_MODE": "token",  # else whoever reaches Ray's ports can run code
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "PATH": _path(),
    "PYTHONPATH": path,
  }
