"""What each program refuses, as its user sees it: exit code 1, one or two sentences that name the
flag or the file, its value and the cure, no traceback, and nothing begun and no folder left.
"""

import collections
import errno
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from experiments_programs import ended, loader
from experiments_refusals import SHORT, TABLES
from experiments_runs import TINY
from PIL import Image

from experiments import (
  encrypted,
  inputs,
  memory,
  model_files,
  phases,
  processes,
  running,
  settings,
  trial,
)
from primia_jax import evaluation, models
from primia_jax.service import cards, certificates
from primia_jax.service.cards import About, Card, Issued, Server

LEFT = ("new",)  # may not exist after a refusal


def card_of(*pems):
  """A card of two servers that are not there."""
  servers = tuple(Server(f"127.0.0.1:{i}", p, certificates.name(p)) for i, p in enumerate(pems, 1))
  image, output = {"shape": [1, 16, 16, 1]}, {"shape": [1, 3], "unit": 0.01, "dtype": "float32"}
  card = Card("0" * 64, 32, [image | {"unit": 0.01, "bits": 12}], [output])
  about = About("1", 16, 1, ("normal", "bacterial", "viral"), "probabilities", 1)
  return cards.text(Issued("chest-1", about, 0.5, 0.25, servers, card))


@pytest.fixture(scope="module")
def at(tmp_path_factory):
  """Files and folders by the names that rows use."""
  root = tmp_path_factory.mktemp("refused")
  names = (
    "missing file folder fifo full run broken emptied torn cut drawn kept new flags nested loop "
    "vendor hospital bare expired intruded"
  )
  at = {name: root / name for name in names.split()}
  for name in ("folder", "full", "run", "broken", "emptied", "torn", "cut", "drawn", "kept"):
    at[name].mkdir()
  for name in ("vendor", "hospital", "bare", "expired", "intruded"):
    at[name].mkdir(0o700)
  for name, days in (("vendor", 1), ("hospital", 1), ("expired", -1)):
    certificates.create(at[name], name, days)
  for name in ("vendor", "hospital"):
    (at[name] / "models" / "chest-1").mkdir(parents=True)
  pem = {n: (at[n] / "certificate.pem").read_bytes() for n in ("vendor", "hospital", "expired")}
  for name, second in (("card", "hospital"), ("selfish", "vendor"), ("outdated", "expired")):
    at[name] = root / f"{name}.json"
    at[name].write_text(card_of(pem["vendor"], pem[second]))
  evil = at["intruded"] / "inbox" / "dealer" / "clinics" / "evil.pem"
  evil.parent.mkdir(parents=True)
  evil.touch()
  at["file"].write_text("no image, no weights, no arrays\n")
  at["weights"] = root / "weights.pth"
  at["weights"].write_text("no weights")
  os.mkfifo(at["fifo"])
  at["image"] = root / "image.png"
  Image.fromarray(np.full((16, 16), 255, np.uint8)).save(at["image"])
  at["flags"].write_text("--rounds=2\n--roundz=3\n")
  at["nested"].write_text(f"# more\n--flagfile={at['fifo']}\n")
  at["loop"].write_text(f"--flagfile={at['loop']}\n")
  (at["full"] / "letter.txt").write_text("Dear Sir")
  (at["torn"] / "ledger.jsonl").write_text('{"kind": 3}\n')
  model_config = TINY.model.config(TINY.data, 3)
  about = {"label_names": ["normal", "bacterial", "viral"], "model": vars(model_config)}
  trained = models.build(model_config).init(jax.random.key(0))
  model_files.save_model(at["run"] / "model", [trained])
  for name in ("run", "emptied"):
    (at[name] / "model.json").write_text(json.dumps(about))
  for name in ("run", "cut", "drawn"):
    settings.save(settings.replace(TINY, rounds=5), at[name] / "config.json")
    (at[name] / "federated").mkdir()
    (at[name] / "federated" / "checkpoint").touch()  # as of a run that has begun
  (at["run"] / "metrics.json").write_text("{}")
  (at["kept"] / "parts").mkdir()
  (at["kept"] / "parts" / "ledger.json").write_text('{"digest": "of another run"}')
  (at["cut"] / "federated" / "rounds.jsonl").write_text('{"round": 1}\n{"round": 2, "tr\n{}\n')
  (at["drawn"] / "federated" / "rounds.jsonl").write_text('{"round": 1, "arm": "federated"}\n')
  for name in ("config.json", "model.json"):
    (at["broken"] / name).write_text("{")
  return at


@pytest.fixture(scope="module")
def program():
  """Imports a program with its flags as if it were alone in the process."""
  with loader() as load:
    yield load


@pytest.fixture
def no_work(monkeypatch):
  """Whatever is work fails, and no setting of JAX is changed."""

  def begun(*args, **kwargs):
    raise AssertionError("work was begun")

  monkeypatch.setattr(jax.config, "update", lambda *args: None)
  for module, name in (
    (running, "run"), (trial, "launch"), (processes, "connect"), (evaluation, "predictor"),
    (phases, "infer"), (encrypted, "make_plan"), (inputs, "site_images"),
  ):  # fmt: skip
    monkeypatch.setattr(module, name, begun)
  return monkeypatch


def wrong_with(said, words):
  """Why a message is not as it must be; empty where it is."""
  if not isinstance(said, str) or not said.startswith("error: "):
    return f"ended with {said!r}"
  missing = [word for word in words if word not in said]
  sentences = re.findall(r"[.:;?] ", said.removeprefix("error: "))
  if missing:
    return f"lacks {missing}: {said}"
  if "\n" in said or len(said) > 500 or len(sentences) > 5:
    return f"is long: {said}"
  return ""


def rows():
  for name, always, table in TABLES:
    for line in filter(None, table.splitlines()):
      given, *words = (cell.strip() for cell in line.split(" | "))
      given = " ".join(SHORT.get(word, word) for word in given.split())
      yield name, [*always.split(), *given.split()], words


def test_every_bad_invocation_is_refused_by_flag_value_and_cure(at, program, no_work):
  count, wrong, loaded = collections.Counter(), [], None
  for name, given, words in rows():
    if name != loaded:
      main, loaded = program(name), name
    arguments, words = ([text.format(**at) for text in texts] for texts in (given, words))
    fault = wrong_with(ended(main, arguments, no_work), words)
    if at["new"].exists():
      fault = fault or "left a folder behind"
      shutil.rmtree(at["new"])
    if fault:
      wrong.append(f"{name} {' '.join(arguments)}\n  {fault}")
    count[name] += 1
  assert not wrong, "\n".join(wrong)
  assert sum(count.values()) >= 200
  assert len(count) == 19


def failing(error):
  def fail(*args, **kwargs):
    raise error

  return fail


def full(*args, **kwargs):
  with open("/dev/full", "w") as file:
    file.write("lines")


@pytest.mark.parametrize(
  ("work", "words"),
  [
    (full, ["run_dir={new}", "No space left on device", "free space"]),
    (failing(OSError(errno.EDQUOT, "", "{new}/a/b")), ["run_dir={new}", "{new}/a/b", "free space"]),
    (failing(OSError(errno.EROFS, "", "{new}/a")), ["run_dir={new}", "{new}/a", "can be written"]),
    (failing(PermissionError(errno.EACCES, "", "{file}")), ["{file}", "denied", "rights"]),
    (failing(ValueError("RESOURCE_EXHAUSTED: x: No space left on device [28]\n" * 9)),
     ["run_dir={new}", "No space left on device", "free space"]),
    (failing(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nPeak:\n")),
     ["out of memory", "9 bytes", "image_size=32", "batch_size=8", "lower"]),
    (failing(MemoryError("Unable to allocate 9 GiB")), ["out of memory", "9 GiB", "lower"]),
  ],
)  # fmt: skip
def test_a_full_or_closed_disk_and_little_memory_end_a_run_with_the_cure(
  at, program, no_work, work, words
):
  main = program("train_pooled")

  def begun(*args, **kwargs):
    try:
      work()
    except OSError as error:
      if error.filename:
        error.filename = error.filename.format(**at)
      raise

  no_work.setattr(running, "run", begun)
  said = ended(main, [f"--run_dir={at['new']}"], no_work)
  shutil.rmtree(at["new"])
  assert not wrong_with(said, [word.format(**at) for word in words])


def test_a_folder_without_rights_is_refused_before_work(at, program, no_work):
  no_work.setattr(os, "access", lambda path, mode: path != at["folder"])
  words = [f"run_dir={at['folder']}/below", "cannot be written", "rights"]
  for name in ("train_pooled", "train_federated"):
    said = ended(program(name), [f"--run_dir={at['folder']}/below"], no_work)
    assert not wrong_with(said, words)


def test_an_error_in_the_code_keeps_its_traceback(at, program, no_work):
  no_work.setattr(running, "run", failing(TypeError("a bug")))
  said = ended(program("train_pooled"), [f"--run_dir={at['new']}"], no_work)
  shutil.rmtree(at["new"])
  assert isinstance(said, TypeError)


def test_memory_that_is_not_there_is_counted(monkeypatch):
  """One page of a GiB: 16 images of 8192 x 8192 fill it, and a step of one takes four."""
  monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 2**30, "SC_PHYS_PAGES": 1}.__getitem__)
  config = settings.replace(TINY, image_size=8192, batch_size=1, model="cnn")
  memory.check_images(16, config.data)
  with pytest.raises(ValueError, match=r"image_size=8192: 32 images .* 2 GiB .* sites_in_memory"):
    memory.check_images(32, config.data)
  with pytest.raises(ValueError, match=r"image_size=8192 with batch_size=1: .* 4 GiB"):
    memory.check_step(config)
  memory.check_step(settings.replace(config, image_size=4096))
