"""What a model's first encrypted inference takes, from an empty cache, and what the next one does.

  python -m benchmarks.first_inference

The programs of vendor, dealer and hospital run as in docs/service.md, each in a process of its own,
on a small CNN of 28 px that was barely trained. "Together" is all that follows training: plan,
deal, publish, start the server, ask. Compiled programs are then kept, and server and hospital start
anew.
"""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl import app, flags
from PIL import Image

from benchmarks import measuring
from benchmarks.measuring import Cost

_MODEL = flags.DEFINE_string("model", "cnn", "Network, as of primia-train.")
_SIZE = flags.DEFINE_integer("size", 28, "Height and width of images.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Requests with a full cache, each of new processes.")
_TOGETHER, _AFTERWARDS = 60.0, 5.0  # seconds on two quiet cores
_NAME = "--model=first"


class Programs:
  """Runs the programs of the roles below a folder, and measures them."""

  def __init__(self, root: pathlib.Path):
    self.root = root
    self._env = dict(os.environ, XDG_CACHE_HOME=str(root / "cache"))
    self._env.pop("JAX_COMPILATION_CACHE_DIR", None)

  def command(self, role: str, module: str, *arguments: str) -> list[str]:
    folder = [f"--folder={self.root / role}"] if role else []
    return [sys.executable, "-m", f"experiments.{module}", *folder, *arguments]

  def run(self, role: str, module: str, *arguments: str) -> Cost:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = self.command(role, module, *arguments)
    subprocess.run(command, check=True, env=self._env, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, cpu)

  def send(self, sender: str, to: str, receiver: str, of: str) -> None:
    outbox, inbox = self.root / sender / "outbox" / to, self.root / receiver / "inbox" / of
    shutil.copytree(outbox, inbox, dirs_exist_ok=True)
    shutil.rmtree(outbox)

  def asked(self) -> tuple[Cost, Cost]:
    """A server starts, and a hospital asks about an image: what each took."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    server = subprocess.Popen(
      self.command("vendor", "serve_encrypted", "--address=127.0.0.1:0"),
      env=self._env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
      lines = (json.loads(line) for line in server.stderr)
      address = next(line["address"] for line in lines if line["event"] == "serving")
      starting = time.perf_counter() - start
      image = f"--images={self.root / 'image.png'}"
      ask = self.run("hospital", "infer_encrypted", f"--connect={address}", _NAME, image)
      server.send_signal(signal.SIGTERM)
      server.communicate(timeout=60)
    finally:
      server.kill()
      server.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    both = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(starting, both - ask.cpu), ask


def prepared(programs: Programs) -> None:
  """A run, certificates and folders."""
  programs.run(
    "", "train_pooled", f"--run_dir={programs.root / 'run'}", f"--model={_MODEL.value}",
    f"--image_size={_SIZE.value}", "--phantom_images=96", "--phantom_test_images=24", "--rounds=1",
    "--norm=batch",
  )  # fmt: skip
  for role in ("vendor", "hospital"):
    programs.run(role, "certificate", f"--name={role}")
  certificate = programs.root / "hospital" / "certificate.pem"
  programs.run("vendor", "certificate", f"--clinic={certificate}")
  (programs.root / "dealer").mkdir(0o700)
  Image.new("L", (_SIZE.value, _SIZE.value), 128).save(programs.root / "image.png")


def main(_):
  with tempfile.TemporaryDirectory() as scratch:
    programs = Programs(pathlib.Path(scratch))
    prepared(programs)
    costs = {}
    run = f"--checkpoint={programs.root / 'run'}"
    costs["plan"] = programs.run("vendor", "publish", _NAME, run)
    programs.send("vendor", "dealer", "dealer", "model_owner")
    count = f"--images={1 + _ROUNDS.value}"
    costs["deal"] = programs.run("dealer", "deal", _NAME, "--clinic=hospital", count)
    programs.send("dealer", "model_owner", "vendor", "dealer")
    programs.send("dealer", "hospital", "hospital", "dealer")
    costs["publish"] = programs.run("vendor", "publish", _NAME)
    programs.send("vendor", "clinics", "hospital", "model_owner")
    costs["serve"], costs["ask"] = programs.asked()
    what = f"{_MODEL.value}, {_SIZE.value} px"
    for name, cost in costs.items():
      measuring.report(f"first inference, {name}: {what}", [cost], unit="s")
    together = Cost(*map(sum, zip(*costs.values(), strict=True)))
    measuring.report(f"first inference, together: {what}", [together], unit="s", target=_TOGETHER)
    again = [programs.asked() for _ in range(_ROUNDS.value)]
    measuring.report(f"server starts again: {what}", [cost for cost, _ in again], unit="s")
    asks = [cost for _, cost in again]
    measuring.report(f"a hospital's program again: {what}", asks, unit="s", target=_AFTERWARDS)


if __name__ == "__main__":
  app.run(main)
