"""The clinic's programs on a tiny model: the class of `evaluate`, in a report and on the page."""

import io
import re
import signal
import subprocess
import sys
import urllib.parse

import numpy as np
import pydicom
import pytest
from clinic_node_test import xray
from clinic_page_test import lines_of, png, question
from experiments_runs import write_untrained

from experiments import clinics, model_files
from experiments.configs.model import normalise
from primia_jax import evaluation
from primia_jax.clinic import asking, node
from primia_jax.data import decode

NAMES = ("normal", "bacterial", "viral")
PROTOCOL = {"calibration": "phantom", "calibration_images": 8, "ring_bits": 32, "fraction_bits": 10}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return write_untrained(tmp_path_factory.mktemp("run"), NAMES)


def expected(checkpoint, image):
  model, trained, _, _ = model_files.load_model(str(checkpoint))
  return evaluation.predictor(model.apply, normalise)(trained, image[None])[0]


def test_a_report_has_the_probabilities_of_evaluate(checkpoint):
  s = clinics.Clinic(checkpoint=str(checkpoint), **PROTOCOL)
  clinics.check(s, clinics.Remote(), [])
  model, ask, *_ = clinics.load(s, clinics.Remote())
  assert (model.name, model.label_names, model.size) == ("mlp", NAMES, 16)
  assert re.fullmatch(r"[0-9a-f]{12}", model.version)
  answers, said = [], []

  def watch(image, told):
    answers.append(ask(image, said.append))
    return answers[-1]

  data = xray()
  report = node.report_of(data, model, watch)
  wanted = expected(checkpoint, decode.decode(data, "x", size=16, channels=1))
  np.testing.assert_allclose(answers[0].probabilities, wanted, atol=0.02)
  text = " ".join(map(str, report.iterall()))
  for word in (model.version, NAMES[wanted.argmax()], asking.WARNING):
    assert word in text
  assert len(said) == len(answers[0].seconds) == 5
  assert answers[0].num_bytes["sent, each way"] > 0
  assert pydicom.dcmread(io.BytesIO(data)).StudyInstanceUID == report.StudyInstanceUID


def test_the_page_of_the_program(checkpoint):
  given = [f"--{name}={value}" for name, value in PROTOCOL.items()]
  command = [sys.executable, "-m", "experiments.clinic_page", f"--checkpoint={checkpoint}", *given]
  with subprocess.Popen([*command, "--output=label"], stdout=subprocess.PIPE, text=True) as process:
    try:
      lines = iter(process.stdout.readline, "")
      address = next(line.split()[1] for line in lines if line.startswith("Open "))
      status, body = question(urllib.parse.urlsplit(address), png())
      process.send_signal(signal.SIGINT)
      assert process.wait(30) == 0
    finally:
      process.kill()
  last = lines_of(body)[-1]
  wanted = expected(checkpoint, decode.decode(png(), "x", size=16, channels=1))
  assert status == 200
  assert last["answer"]["label"] == wanted.argmax()
  assert last["answer"]["probabilities"] is None
