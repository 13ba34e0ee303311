"""The clinic's programs against real servers over TLS: by a card, and by a session."""

import csv
import os
import pathlib
import stat
import subprocess
import sys
import urllib.parse

import numpy as np
import pytest
import service_helped_world as of_card
import service_institution as institution
import service_serving_test as of_session
from clinic_node_test import xray
from clinic_page_test import lines_of, png, question
from PIL import Image
from service_institution import CLINIC, MODEL, WEIGHTS

from experiments import asking, encrypted, sharing
from experiments.planned import Connect
from primia_jax import mpc
from primia_jax.clinic import node, page
from primia_jax.clinic.asking import WARNING
from primia_jax.data import decode
from primia_jax.service.errors import SessionEnded

ROOT = pathlib.Path(__file__).parents[1]
PIXELS = np.random.default_rng(5).integers(0, 256, (4, 4, 1), np.uint8)


@pytest.fixture(scope="module")
def card(tmp_path_factory):
  """Two servers, and the flags of a clinic that has a card of them."""
  world = of_card.World(tmp_path_factory.mktemp("card"), 12)
  path = world.vendor / "outbox" / "cards" / f"{MODEL}.json"
  with world.serving(daily=6):
    yield world, sharing.Shared(str(path), str(world.clinic), 20.0)


def likely(plan, image):
  """The probabilities that one process computes for a uint8 image."""
  logits = np.asarray(mpc.check(plan, (WEIGHTS, encrypted.normalised(image[None]))), np.float64)[0]
  return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def test_every_pixel_is_encoded_as_jax_encodes_it(card):
  issued = sharing.check(card[1]).issued
  every, unit = np.arange(256, dtype=np.uint8), issued.card.images[0]["unit"]
  ours, theirs = issued.encoded(every), np.asarray(encrypted.normalised(every), np.float64)
  np.testing.assert_array_equal(np.rint(ours / unit), np.rint(theirs / unit))


def test_the_page_shares_an_image_and_shows_what_happens(card, capsys):
  world, flags = card
  before = world.left(), world.lines()
  model, ask, learned, warning = sharing.ready(flags)
  assert "SHA-256" in capsys.readouterr().out
  assert (world.left(), world.lines()) == before  # it only looks
  with page.serve(model, ask, learned, 0, warning) as address:
    _, body = question(urllib.parse.urlsplit(address), png())
  _, *phases, last = lines_of(body)
  assert [line["phase"].partition(" ")[0] for line in phases] == ["Your", "Both", "The"]
  wanted = likely(world.plan, decode.decode(png(), "x", size=4, channels=1))
  np.testing.assert_allclose(last["answer"]["probabilities"], wanted, rtol=1e-5)
  assert last["answer"]["bytes"] == {"sent to each server": 64, "received from each": 12}
  assert set(last["answer"]["seconds"]) == {"connect and share", "compute"}
  who = dict(learned)
  assert {"vendor-b", of_card.HELPER, "Assumed"} < set(who)
  assert warning.startswith(WARNING)


def test_the_node_reports_what_two_servers_answer(card):
  world, flags = card
  model, ask, *_ = sharing.ready(flags)
  report = node.report_of(xray(), model, ask)
  wanted = likely(world.plan, decode.decode(xray(), "x", size=4, channels=1))
  text = " ".join(map(str, report.iterall()))
  assert institution.ABOUT.label_names[wanted.argmax()] in text
  assert WARNING in text


def test_primia_ask_needs_no_jax_and_writes_what_evaluate_would(card, tmp_path):
  world, flags = card
  (tmp_path / "images").mkdir()
  for i, image in enumerate((PIXELS, PIXELS[::-1])):
    Image.fromarray(image[..., 0]).save(tmp_path / "images" / f"{i}.png")
  code = """
import runpy, sys
for name in ("jax", "jaxlib", "flax"):
  sys.modules[name] = None  # cannot be imported
sys.argv = ["primia-ask", *sys.argv[1:]]
runpy.run_module("experiments.ask_servers", run_name="__main__", alter_sys=True)
"""
  run = lambda images, *more: subprocess.run(
    [sys.executable, "-c", code, f"--card={flags.card}", f"--folder={flags.folder}",
     f"--images={images}", *more],
    capture_output=True, text=True, timeout=120, env=dict(os.environ, PYTHONPATH=str(ROOT)),
  )  # fmt: skip
  out = tmp_path / "out"
  done = run(tmp_path / "images", f"--output_dir={out}")
  assert done.returncode == 0, done.stderr
  modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (out, *out.iterdir())}
  assert modes == {"out": 0o700, "predictions.csv": 0o600, "costs.json": 0o600}
  rows = list(csv.DictReader((out / "predictions.csv").open()))
  for row, image in zip(rows, (PIXELS, PIXELS[::-1]), strict=True):
    found = [float(row[f"probability {name}"]) for name in institution.ABOUT.label_names]
    np.testing.assert_allclose(found, likely(world.plan, image), rtol=1e-5)
  for words in ("vendor-b at 127.0.0.1", "64 bytes to each server", "not for diagnosis"):
    assert words in done.stdout
  (tmp_path / "images" / "2.png").write_bytes((tmp_path / "images" / "0.png").read_bytes())
  over = run(tmp_path / "images")  # the page, the node and this program have asked 4 of 6
  assert over.returncode == 1
  assert "2 of 3 images are answered" in over.stderr
  assert "budget of hospital-a is 6 images a day, and 6 are used" in over.stderr
  assert "Traceback" not in over.stderr


def test_the_page_asks_in_sessions_with_a_server(tmp_path, capsys):
  world = of_session.World(tmp_path)
  folder = str(world.roles.clinic)
  with world.serving(daily=2) as (address, audit):
    before = of_session.left(world)
    model, ask, learned, warning = asking.ready(Connect(address, folder, MODEL, 20.0))
    assert "that are unused" in capsys.readouterr().out
    assert (of_session.left(world), audit.left(CLINIC)) == (before, 2)  # it only looks
    assert [line["event"] for line in world.lines()] == ["session", "end"]
    with page.serve(model, ask, learned, 0, warning) as at:
      bodies = [question(urllib.parse.urlsplit(at), png())[1] for _ in range(3)]
    with pytest.raises(SessionEnded, match="budget"):
      ask(PIXELS, lambda phase: None)
  _, *phases, last = lines_of(bodies[1])
  assert [line["phase"].partition(" ")[0] for line in phases] == ["A", "Both", "Both"]
  wanted = likely(world.plan, decode.decode(png(), "x", size=4, channels=1))
  np.testing.assert_allclose(last["answer"]["probabilities"], wanted, rtol=1e-5)
  assert set(last["answer"]["seconds"]) == {"connect", "prepare", "compute"}
  assert last["answer"]["bytes"]["sent, each way"] == sum(world.online[1].sizes)
  assert "2 images a day, and 2 are used" in lines_of(bodies[2])[-1]["error"]
  assert {"vendor-b", "dealer", "Assumed"} < set(dict(learned))
  gone = Connect("127.0.0.1:1", folder, MODEL, 5.0)
  with pytest.raises(SessionEnded, match="nobody listens"):
    asking.ready(gone)
