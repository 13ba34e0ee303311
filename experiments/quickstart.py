"""Shows encrypted inference between institutions: three roles, three processes, three folders.

  primia-quickstart --output_dir=quickstart
  primia-quickstart --output_dir=quickstart --client=sharing

It trains a small model on synthetic images, and then plays what operators do: a vendor publishes
it, a dealer deals, the vendor serves on loopback, and a hospital asks about images over TLS. Each
command is printed before it runs in a process of its own; what it copies between the folders is
what institutions would send each other. With --client=sharing a fourth institution, the helper,
serves beside the vendor, and the hospital only shares its images between both. docs/service.md has
both for terminals.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from absl import flags
from PIL import Image

from primia_jax.data import phantom
from primia_jax.mpc.circuit import CLIENTS, SHARING, TRUSTED

from . import refusals, running, settings

_VENDOR, _DEALER, _HOSPITAL, _HELPER = "vendor-b", "dealer-c", "hospital-a", "helper-d"
_MODEL = "demo-1"
_PATIENCE = 600.0  # seconds for the server to begin
_TRAINING = (
  "--phantom_images=300", "--phantom_test_images=60", "--rounds=8", "--model=mlp",
  "--image_size=32", "--seed=1",
)  # fmt: skip
_PLAN = "--ring_bits=32", "--fraction_bits=10", "--calibration_images=16", "--margin=4"
# Commands that pip installs, by module: how the reader would call it.
_COMMANDS = {
  "train_pooled": "primia-pooled", "certificate": "primia-certificate",
  "publish": "primia-publish", "deal": "primia-deal", "serve_encrypted": "primia-serve",
  "infer_encrypted": "primia-infer", "ask_servers": "primia-ask",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Quickstart:
  """Where, and with what."""

  output_dir: str = settings.setting(
    "", "new folder, which gets a folder for each role, the images and the answers"
  )
  checkpoint: str = settings.setting("", "folder of a training run; empty trains a small model")
  images: int = settings.setting(3, "synthetic images that the hospital asks about")
  client: str = settings.setting(TRUSTED, "as in primia-publish: trusted, checked or sharing")
  only_checked: bool = settings.setting(
    False, "have the dealer account for half of what it deals, before anything is used"
  )


settings.define_flags(Quickstart)
flags.adopt_module_key_flags(settings)


def main() -> None:
  s = settings.from_flags(Quickstart)
  if not s.output_dir:
    raise ValueError("output_dir is empty; name a new folder, such as --output_dir=quickstart")
  root = refusals.folder("output_dir", s.output_dir)
  if root.exists() and any(root.iterdir()):
    raise ValueError(f"output_dir={s.output_dir} is not empty; name a new folder")
  if not 0 < s.images <= 100:
    raise ValueError(f"images={s.images}; use 1 to 100")
  if s.checkpoint and not (pathlib.Path(s.checkpoint).expanduser() / "model.json").is_file():
    raise FileNotFoundError(f"checkpoint={s.checkpoint} holds no model.json; name a finished run")
  settings.choose("client", s.client, CLIENTS)
  root.mkdir(parents=True, exist_ok=True)
  vendor, dealer, hospital = (root / name for name in (_VENDOR, _DEALER, _HOSPITAL))
  is_shared, helper = s.client == SHARING, root / _HELPER
  other = helper if is_shared else hospital  # who computes with the vendor

  checkpoint = s.checkpoint or str(root / "run")
  if not s.checkpoint:
    _say("A model, trained on synthetic images")
    _run("train_pooled", f"--run_dir={checkpoint}", *_TRAINING)
  _say("Certificates, which the institutions exchange once")
  servers = [vendor, helper] if is_shared else [vendor]
  for folder in (*servers, hospital):
    _run("certificate", f"--folder={folder}", f"--name={folder.name}")
  for folder in servers:
    _run("certificate", f"--folder={folder}", f"--clinic={hospital / 'certificate.pem'}")
  if is_shared:
    _run("certificate", f"--folder={vendor}", f"--helper={helper / 'certificate.pem'}")
  dealer.mkdir(0o700)

  _say("The vendor plans; the dealer, who sees plan and tag only, deals; the vendor publishes")
  publish = [f"--folder={vendor}", f"--model={_MODEL}"]
  of_dealer = f"--folder={dealer}", f"--model={_MODEL}", f"--clinic={other.name}"
  addresses = [f"127.0.0.1:{port}" for port in _free_ports(2)]
  if s.client != TRUSTED:
    publish.append(f"--client={s.client}")
  plan = () if s.checkpoint else _PLAN
  _run("publish", *publish, f"--checkpoint={checkpoint}", *plan)
  _send(vendor, "dealer", dealer, "model_owner")
  count = s.images * (2 if s.only_checked else 1)
  _run("deal", *of_dealer, f"--images={count}", *["--checked"] * s.only_checked)
  _send(dealer, "model_owner", vendor, "dealer")
  reached = [f"--address={addresses[0]}", f"--helper_address={addresses[1]}"] * is_shared
  _run("publish", *publish, *reached)
  if s.only_checked:
    _say("The vendor has the dealer account for half of what it dealt")
    _run("publish", *publish, f"--check_dealer={other.name}")
    _send(vendor, "dealer", dealer, "model_owner")
    _run("deal", *of_dealer, "--open")
    _send(dealer, "model_owner", vendor, "dealer")
    _run("publish", *publish, f"--check_dealer={other.name}")
  _send(dealer, other.name, other, "dealer")
  _send(vendor, "helper" if is_shared else "clinics", other, "model_owner")
  _images(hospital / "images", s.images, checkpoint)
  served = [f"--folder={vendor}", f"--address={addresses[0]}", *["--only_checked"] * s.only_checked]
  asked = [
    f"--folder={hospital}", f"--images={hospital / 'images'}",
    f"--output_dir={hospital / 'answers'}",
  ]  # fmt: skip
  if is_shared:
    _say("Vendor and helper serve, and the hospital asks: this needs no JAX")
    card = hospital / f"{_MODEL}.json"
    print(f"$ cp {vendor / 'outbox' / 'cards' / card.name} {card}", flush=True)
    shutil.copyfile(vendor / "outbox" / "cards" / card.name, card)
    helps = [f"--folder={helper}", f"--address={addresses[1]}", f"--model_owner={addresses[0]}"]
    with _serving(served), _serving(helps):
      _run("ask_servers", f"--card={card}", *asked)
  else:
    _say("The vendor serves, and the hospital asks")
    with _serving(served) as address:
      _run("infer_encrypted", f"--connect={address}", f"--model={_MODEL}", *asked)
  print(f"\nEach role's folder is in {root}; {vendor / 'audit.jsonl'} is the vendor's log.")


def _free_ports(count: int) -> list[int]:
  """Ports that nobody listens at now."""
  with contextlib.ExitStack() as stack:
    found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
    return [one.getsockname()[1] for one in found]


def _say(text: str) -> None:
  print(f"\n== {text}\n", flush=True)


def _command(module: str, arguments: Sequence[str]) -> list[str]:
  print(f"$ {_COMMANDS[module]} {' '.join(arguments)}", flush=True)
  return [sys.executable, "-m", f"{__package__}.{module}", *arguments]


def _run(module: str, *arguments: str) -> None:
  found = subprocess.run(_command(module, arguments), check=False, env=_environment())
  if found.returncode:
    raise RuntimeError(f"{_COMMANDS[module]} ended with exit code {found.returncode}; see above")


def _environment() -> dict[str, str]:
  """So that the programs are found wherever this one was started from."""
  top = str(pathlib.Path(__file__).parents[1])
  path = os.pathsep.join(filter(None, [top, os.environ.get("PYTHONPATH")]))
  return dict(os.environ, PYTHONPATH=path)


def _send(sender: pathlib.Path, to: str, receiver: pathlib.Path, of: str) -> None:
  """What lies in a role's outbox goes into the receiver's inbox; what serves once is moved."""
  outbox, inbox = sender / "outbox" / to, receiver / "inbox" / of
  is_moved = to != "clinics"  # for every clinic
  print(f"$ rsync -a {'--remove-source-files ' * is_moved}{outbox}/ {inbox}/", flush=True)
  shutil.copytree(outbox, inbox, dirs_exist_ok=True)
  if is_moved:
    shutil.rmtree(outbox)


def _images(folder: pathlib.Path, count: int, checkpoint: str) -> None:
  """Test images of the phantom, of the size and channels that the model takes."""
  about = settings.read_json(pathlib.Path(checkpoint).expanduser() / "model.json")["model"]
  size, _, channels = about["image_shape"]
  folder.mkdir(0o700)
  images = phantom.phantom(count, size=size, seed=5).images
  for i, image in enumerate(np.asarray(images)):
    grey = Image.fromarray(image[..., 0])
    (grey if channels == 1 else grey.convert("RGB")).save(folder / f"image_{i}.png")


@contextlib.contextmanager
def _serving(arguments: Sequence[str]) -> Iterator[str]:
  """A server, until the context ends: its address."""
  process = subprocess.Popen(
    _command("serve_encrypted", arguments), stderr=subprocess.PIPE, text=True, env=_environment()
  )
  timer = threading.Timer(_PATIENCE, process.kill)
  timer.start()
  try:
    said = process.stderr
    assert said is not None
    address, rest = "", list[str]()
    for line in said:
      print(f"  {line}", end="", flush=True)
      if '"serving"' in line:
        address = line.rpartition('"address": "')[2].partition('"')[0]
        break
    timer.cancel()
    if not address:
      raise RuntimeError("primia-serve ended before it served; see above")
    reader = threading.Thread(target=lambda: rest.extend(said), daemon=True)
    reader.start()  # a pipe that nobody reads would stop the server
    yield address
    process.send_signal(signal.SIGTERM)
    process.wait(_PATIENCE)
    reader.join(_PATIENCE)
    print(f"\nThe log of {address}:")
    print("".join(f"  {line}" for line in rest), end="", flush=True)
  finally:
    timer.cancel()
    process.kill()
    process.wait()


if __name__ == "__main__":
  running.start(main)
