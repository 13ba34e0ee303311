"""The programs of the three roles as real processes on loopback, each with its own folder alone."""

import contextlib
import csv
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import scipy.special
from experiments_runs import TINY
from PIL import Image

from experiments import encrypted, inputs, model_files, report, scored
from experiments.configs.data import Data
from experiments.configs.model import normalise
from primia_jax import evaluation, metrics, models, mpc
from primia_jax.service import folders

ROOT = pathlib.Path(__file__).parents[1]
PATIENCE = 300.0  # seconds for a step on a busy machine
MODEL = "chest-1"
NAMES = ("normal", "bacterial", "viral")
FLAGS = ("--calibration=phantom", "--ring_bits=64", "--fraction_bits=14", "--margin=8")


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as probe:
    return probe.getsockname()[1]


class Programs:
  """Starts programs, and knows which files each role has opened."""

  def __init__(self, root):
    self.root = root
    roles = "vendor", "dealer", "hospital", "helper"
    self.folders = {role: root / role for role in roles}

  def start(self, role, module, *flags, **options):
    log = self.root / f"{role}.log"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
      [sys.executable, str(ROOT / "tests" / "experiments_hooked.py"), str(log),
       f"experiments.{module}", f"--folder={self.folders[role]}", *flags],
      text=True, env=dict(os.environ, PYTHONPATH=path, JAX_PLATFORMS="cpu"), **options,
    )  # fmt: skip

  def run(self, role, module, *flags, code=0):
    process = self.start(role, module, *flags, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == code, said
    return said

  @contextlib.contextmanager
  def serving(self, role, *flags):
    """A server, until the context ends: the process, and where it listens."""
    server = self.start(role, "serve_encrypted", *flags, stderr=subprocess.PIPE)
    timer = threading.Timer(PATIENCE, server.kill)
    timer.start()
    try:
      events = (json.loads(line) for line in server.stderr)
      yield server, next(event["address"] for event in events if event["event"] == "serving")
      if server.poll() is None:  # the test has not killed it
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0
    finally:
      timer.cancel()
      server.kill()
      server.wait()

  def send(self, sender, to, receiver, of):
    inbox = self.folders[receiver] / "inbox"
    inbox.mkdir(exist_ok=True)
    (self.folders[sender] / "outbox" / to).rename(inbox / of)

  def foreign(self, role, *others):
    """What a role has opened of this test that is neither its own nor one of `others`."""
    paths = map(pathlib.Path, (self.root / f"{role}.log").read_text().splitlines())
    mine = [self.folders[role], *others]
    return {
      str(path)
      for path in paths
      if path.is_relative_to(self.root) and not any(path.is_relative_to(own) for own in mine)
    }


@pytest.fixture
def programs(tmp_path):
  """A run of an untrained model, and certificates that vendor and hospital have exchanged."""
  found, run = Programs(tmp_path), tmp_path / "run"
  config = TINY.model.config(TINY.data, 3)
  trained = models.build(config).init(jax.random.key(0))
  run.mkdir()
  model_files.save_model(run / "model", [trained])
  (run / "model.json").write_text(json.dumps({"label_names": NAMES, "model": vars(config)}))
  for role in ("vendor", "hospital"):
    found.run(role, "certificate", f"--name={role}")
  given = tmp_path / "given.pem"
  given.write_bytes((found.folders["hospital"] / "certificate.pem").read_bytes())
  found.run("vendor", "certificate", f"--clinic={given}")
  found.folders["dealer"].mkdir(0o700)
  images = found.folders["hospital"] / "images"
  images.mkdir()
  for i in range(2):
    pixels = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
    Image.fromarray(pixels).save(images / f"{i}.png")
  return found


@pytest.mark.slow
def test_three_processes_answer_as_one_and_open_their_own_folders_only(programs, tmp_path):
  run, hospital = tmp_path / "run", programs.folders["hospital"]
  publish = ("vendor", "publish", f"--model={MODEL}")
  programs.run(*publish, f"--checkpoint={run}", *FLAGS)
  programs.send("vendor", "dealer", "dealer", "model_owner")
  said = programs.run("dealer", "deal", f"--model={MODEL}", "--clinic=hospital", "--images=3")
  assert "images a minute" in said
  programs.send("dealer", "model_owner", "vendor", "dealer")
  programs.send("dealer", "hospital", "hospital", "dealer")
  programs.run(*publish)
  programs.send("vendor", "clinics", "hospital", "model_owner")

  with programs.serving("vendor", "--address=127.0.0.1:0", "--daily_images=2") as (_, address):
    ask = ("hospital", "infer_encrypted", f"--connect={address}", f"--model={MODEL}")
    images = f"--images={hospital / 'images'}"
    said = programs.run(*ask, images, f"--output_dir={hospital / 'out'}")
    assert "not for diagnosis" in said
    over = programs.run(*ask, f"--images={hospital / 'images' / '0.png'}", code=1)
    assert "budget of hospital is 2 images a day, and 2 are used" in over

  folder = hospital / "models" / MODEL
  plan = mpc.read(folder / "plan")
  weights = encrypted.load_model(str(run))[1]
  pixels = [
    np.asarray(Image.open(hospital / "images" / f"{i}.png"))[None, ..., None] for i in (0, 1)
  ]
  logits = [np.asarray(mpc.check(plan, (weights, encrypted.normalised(v)))) for v in pixels]
  wanted = scipy.special.softmax(np.concatenate(logits).astype(np.float64), axis=1)
  report.predictions_csv(tmp_path / "wanted.csv", ["0.png", "1.png"], None, wanted, NAMES)
  assert (hospital / "out" / "predictions.csv").read_bytes() == (
    tmp_path / "wanted.csv"
  ).read_bytes()

  assert programs.foreign("dealer") == set()
  assert programs.foreign("hospital") == set()
  assert programs.foreign("vendor", run, tmp_path / "given.pem") == set()
  log = (programs.folders["vendor"] / "audit.jsonl").read_text()
  assert [json.loads(line)["event"] for line in log.splitlines()][-1] == "stopped"
  for role in ("vendor", "dealer", "hospital"):
    assert programs.folders[role].stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_a_hospital_scores_a_vendors_model_as_one_process_and_evaluate_do(programs, tmp_path):
  run, hospital = tmp_path / "run", programs.folders["hospital"]
  data = inputs.images_to_test(Data(data="phantom", image_size=16), 5)[0]
  images, labels = np.asarray(data.images[:90]), np.asarray(data.labels[:90])
  archive = hospital / "labelled.npz"
  np.savez(archive, test_images=images[..., 0], test_labels=labels)
  publish = ("vendor", "publish", f"--model={MODEL}")
  programs.run(
    *publish, f"--checkpoint={run}", "--score=confusion", "--opened_to=both", "--batch=30",
    "--calibration=phantom", "--ring_bits=32", "--fraction_bits=10", "--margin=4",
  )  # fmt: skip
  programs.send("vendor", "dealer", "dealer", "model_owner")
  programs.run("dealer", "deal", f"--model={MODEL}", "--clinic=hospital", "--images=120")
  programs.send("dealer", "model_owner", "vendor", "dealer")
  programs.send("dealer", "hospital", "hospital", "dealer")
  programs.run(*publish)
  programs.send("vendor", "clinics", "hospital", "model_owner")
  unused = lambda: len(folders.unused(hospital / "models" / MODEL))
  with programs.serving("vendor", "--address=127.0.0.1:0", "--daily_images=90") as (_, address):
    ask = (
      "hospital", "evaluate_encrypted", f"--connect={address}", f"--model={MODEL}",
      f"--data=npz:{archive}", f"--label_names={','.join(NAMES)}",
    )  # fmt: skip
    refused = programs.run(*ask, code=1)
    assert "opens the result to both" in refused
    assert unused() == 4
    said = programs.run(*ask, "--opened_to=both", f"--output_dir={hospital / 'out'}")
    assert "to hospital and vendor" in said
    again = programs.run(*ask, "--opened_to=both", code=1)
    assert "90 of 90 images are in an earlier result" in again
    assert unused() == 1
    mixed = programs.run(
      "hospital", "infer_encrypted", f"--connect={address}", f"--model={MODEL}",
      f"--images={hospital / 'images'}", code=1,
    )  # fmt: skip
    assert "opens a score of labelled images" in mixed

  plan = mpc.read(hospital / "models" / MODEL / "plan")
  model, weights, _, _ = encrypted.load_model(str(run))
  one = scored.Score(opened="confusion", batch=30)
  score, rows, columns = scored.function(one, model, NAMES)
  task = scored.Task(score, labels, rows, columns)
  integers, plain = scored.in_the_clear(plan, one, task, weights, images)
  together = scored.run(plan, one, task, weights, images).counts
  likely = evaluation.predictor(model.apply, normalise)([weights], images)
  found = json.loads((hospital / "out" / "score.json").read_text())["counts"]
  (kept,) = (programs.folders["vendor"] / "models" / MODEL / "hospital" / "scores").iterdir()
  evaluated = np.asarray(metrics.confusion_matrix(labels, likely.argmax(1), 3)).astype(int)
  for counts in (integers, plain, together, evaluated, json.loads(kept.read_text())["counts"]):
    np.testing.assert_array_equal(found, counts)
  assert programs.foreign("hospital") == programs.foreign("dealer") == set()
  assert programs.foreign("vendor", run, tmp_path / "given.pem") == set()


@pytest.mark.slow
def test_a_helper_serves_beside_the_vendor_and_the_hospital_needs_no_jax(programs, tmp_path):
  """Four roles as processes; then either server is killed, and the hospital is told which."""
  run, hospital = tmp_path / "run", programs.folders["hospital"]
  given, helped = tmp_path / "given.pem", tmp_path / "helper.pem"
  programs.run("helper", "certificate", "--name=helper")
  programs.run("helper", "certificate", f"--clinic={given}")
  helped.write_bytes((programs.folders["helper"] / "certificate.pem").read_bytes())
  programs.run("vendor", "certificate", f"--helper={helped}")
  publish = ("vendor", "publish", f"--model={MODEL}", "--client=sharing")
  programs.run(*publish, f"--checkpoint={run}", *FLAGS)
  programs.send("vendor", "dealer", "dealer", "model_owner")
  programs.run("dealer", "deal", f"--model={MODEL}", "--clinic=helper", "--images=6")
  programs.send("dealer", "model_owner", "vendor", "dealer")
  programs.send("dealer", "helper", "helper", "dealer")
  at = [f"127.0.0.1:{free_port()}" for _ in range(2)]
  programs.run(*publish, f"--address={at[0]}", f"--helper_address={at[1]}")
  programs.send("vendor", "helper", "helper", "model_owner")
  card = hospital / "card.json"
  card.write_bytes((programs.folders["vendor"] / "outbox/cards" / f"{MODEL}.json").read_bytes())

  (tmp_path / "hospital.log").unlink()  # what follows needs no JAX
  one = hospital / "images" / "0.png"
  ask = ("hospital", "ask_servers", f"--card={card}", "--timeout=30")
  with programs.serving("vendor", f"--address={at[0]}", "--timeout=20") as (vendor, _):
    with programs.serving("helper", f"--address={at[1]}", f"--model_owner={at[0]}") as (helper, _):
      said = programs.run(
        *ask, f"--images={hospital / 'images'}", f"--output_dir={hospital / 'out'}"
      )
      assert "not for diagnosis" in said
      helper.kill()
      helper.wait()
      lost = programs.run(*ask, f"--images={one}", code=1)
      assert f"helper: nobody listens at {at[1]}" in lost
    with programs.serving("helper", f"--address={at[1]}", f"--model_owner={at[0]}") as (helper, _):
      programs.run(*ask, f"--images={one}")
      vendor.kill()
      vendor.wait()
      lost = programs.run(*ask, f"--images={one}", code=1)
      assert f"vendor: nobody listens at {at[0]}" in lost

  plan = mpc.read(programs.folders["vendor"] / "models" / MODEL / "plan")
  weights = encrypted.load_model(str(run))[1]
  pixels = np.asarray(Image.open(one))[None, ..., None]
  logits = np.asarray(mpc.check(plan, (weights, encrypted.normalised(pixels))), np.float64)[0]
  row = next(csv.DictReader((hospital / "out" / "predictions.csv").open()))
  found = [float(row[f"probability {name}"]) for name in NAMES]
  # The client encodes pixels from float64, where the check takes float32: some differ by one unit.
  np.testing.assert_allclose(found, scipy.special.softmax(logits), atol=2e-4)

  assert programs.foreign("hospital") == set()
  assert programs.foreign("helper", given) == set()
  assert programs.foreign("vendor", run, given, helped) == set()
  asked = (tmp_path / "hospital.log").read_text()
  assert re.search("primia_jax/service/.*sharing", asked)
  assert not [line for line in asked.splitlines() if "/site-packages/jax" in line]
  left = [
    len(folders.unused(programs.folders[role] / "models" / MODEL / below))
    for role, below in (("vendor", "helper"), ("helper", ""))
  ]
  assert left == [3, 3]
