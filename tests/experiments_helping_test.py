"""`--help`: sections in the order of the settings, the usual flags explained, the rest named."""

import pathlib
import re
import sys

import pytest
from absl import flags

from experiments import helping, settings
from experiments.configs import Train
from experiments.configs.scoring import Scoring

ROOT = pathlib.Path(__file__).parents[1]
PROGRAMS = (
  "train_federated", "train_pooled", "evaluate", "infer_encrypted", "evaluate_encrypted", "account",
  "audit_privacy", "plot", "clinic_page", "dicom_node", "certificate", "publish", "deal",
  "serve_encrypted", "quickstart", "site", "ask_servers", "search", "case_study",
)  # fmt: skip


def defined():
  values = flags.FlagValues()
  settings.define_flags(Train, values)
  flags.DEFINE_string("run_dir", None, "folder of the run", values, True, module_name=__name__)
  values(["program", "--run_dir=x"])
  return values


def page(monkeypatch, columns, is_full=False):
  monkeypatch.setenv("COLUMNS", str(columns))
  return helping.text(__name__, is_full, defined())


def order(text, names):
  """Where each flag is, explained or named."""
  return [re.search(rf"--(\[no\])?{name}\b", text).start() for name in names]


@pytest.mark.parametrize("columns", [40, 80, 100, 300])
@pytest.mark.parametrize("is_full", [False, True])
def test_every_flag_is_on_a_page_that_fits_in_the_order_of_the_settings(
  monkeypatch, columns, is_full
):
  text = page(monkeypatch, columns, is_full)
  assert max(map(len, text.splitlines())) <= max(72, min(columns, 100))
  places = order(text, settings.flat(Train()))
  explained = re.findall(r"^  --(?:\[no\])?(\w+)", text, re.MULTILINE)
  if is_full:
    assert places == sorted(places)
    assert set(explained) == {"run_dir", *settings.flat(Train())}
  else:
    assert 25 < len(explained) < 40


def test_sections_are_the_records(monkeypatch):
  titles = re.findall(r"^(\w[\w ]*)(?:: .*)?\n  ", page(monkeypatch, 100), re.MULTILINE)
  assert titles == [
    "This program", "Train", "Data", "Hospitals", "Model", "Augment", "Training", "Federation",
    "Aggregation", "Privacy", "Disclosure", "Comparison",
  ]  # fmt: skip


def test_defaults_are_shown(monkeypatch):
  text = page(monkeypatch, 100, is_full=True)
  assert f"--rounds={Train().training.rounds} " in text
  assert "--run_dir=RUN_DIR " in text
  assert re.search(r"--\[no\]class_weights +on by default: weigh classes", text)
  assert re.search(r"--label_names= +classes in order", text)


def test_the_usual_flags_are_flags():
  """Of some program; one that was renamed would vanish from `--help`."""
  ours = "joining", "site_folders", "offering", "intersecting", "seating"
  modules = *PROGRAMS, "planned", "scored", "sharing", *ours
  sources = " ".join((ROOT / "experiments" / f"{name}.py").read_text() for name in modules)
  known = {
    *settings.flat(Train()),
    *settings.flat(Scoring()),
    *re.findall(r'DEFINE_\w+\(\s*"(\w+)"', sources),
  }
  known |= {
    "preset",
    *re.findall(r"^  (\w+): \w+ = (?:_|(?:settings\.)?setting)\(", sources, re.MULTILINE),
  }
  assert set(helping._USUAL) <= known
  assert len(set(helping._USUAL)) == len(helping._USUAL)


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["--help"], "help"), (["-h"], "h"), (["--rounds=2", "--helpfull"], "helpfull"),
    (["--rounds=2"], ""), (["help"], ""), (["--helper"], ""),
  ],
)  # fmt: skip
def test_asking(arguments, expected):
  assert helping.asked(["program", *arguments]) == expected


def test_the_page_begins_with_the_program_s_own_words(monkeypatch):
  assert page(monkeypatch, 100).startswith(sys.modules[__name__].__doc__)
