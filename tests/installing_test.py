"""What `pip install` installs: commands, presets and files. `.ci/smoke` installs the wheel."""

import pathlib
import re
import runpy
import subprocess
import sys
import tomllib

import pytest
from absl import flags

from experiments import presets, programs, settings
from experiments.configs import Train

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMMANDS = PROJECT["project"]["scripts"]


def parsed(*arguments):
  values = flags.FlagValues()
  settings.define_flags(Train, values)
  flags.DEFINE_list("baselines", [], "", flag_values=values)
  presets.define_flag(values)
  values(presets.expanded(["program", *arguments], values))
  return values


def test_each_program_is_a_command_and_runs_as_a_main_module(monkeypatch):
  ran = []
  monkeypatch.setattr(runpy, "run_module", lambda name, **how: ran.append((name, how)))
  for target in COMMANDS.values():
    module, name = target.split(":")
    assert module == "primia_experiments.programs"
    getattr(programs, name)()
  with_main = {
    f"experiments.{path.stem}"
    for path in (ROOT / "experiments").glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
  }
  assert len(ran) == len(COMMANDS) == len(with_main)
  assert {name for name, _ in ran} == with_main
  assert all(how == {"run_name": "__main__", "alter_sys": True} for _, how in ran)


def test_a_command_refuses_with_the_reason(tmp_path):
  code = "import sys\nsys.argv = ['primia-plot', '--run_dir=none']\n"
  code += "from experiments import programs\nprograms.plot()"
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 1
  assert done.stderr.startswith("error: none/config.json does not exist")


def test_all_files_of_the_packages_are_shipped():
  shipped = PROJECT["tool"]["setuptools"]["package-data"]
  for package, folder in (("primia_jax", "primia_jax"), ("primia_experiments", "experiments")):
    for path in (ROOT / folder).rglob("*"):
      if path.is_file() and path.suffix not in (".py", ".pyc"):
        assert any(path.match(f"{folder}/{pattern}") for pattern in shipped[package]), path


def test_every_folder_of_modules_is_a_package():
  """`setup.py` finds packages by their __init__.py."""
  for folder in ("primia_jax", "experiments"):
    for path in (ROOT / folder).rglob("*.py"):
      assert (path.parent / "__init__.py").is_file(), path


@pytest.mark.parametrize(
  "arguments",
  [
    ("--preset=chest_xray", "--rounds=3"),
    ("--rounds=3", "--preset=chest_xray"),
    ("--rounds=3", "-preset", "chest_xray"),
  ],
)
def test_a_preset_sets_what_is_not_given(arguments):
  values = parsed(*arguments)
  assert values.rounds == 3
  assert values.image_size == 96
  assert not values.preset
  assert parsed("--preset=chest_xray").rounds == 24


@pytest.mark.parametrize("arguments", [("--preset=chest",), ("--preset=",), ("--preset",)])
def test_an_unknown_preset_is_refused_with_those_that_exist(arguments):
  with pytest.raises(ValueError, match=r"preset='(chest)?'; use one of chest_xray, .*mnist_priv"):
    parsed(*arguments)


def test_a_preset_within_a_flag_file_is_refused(tmp_path):
  (file := tmp_path / "own.flags").write_text("--preset=chest_xray\n")
  with pytest.raises(flags.IllegalFlagValueError, match="on the command line, not in a flag file"):
    parsed(f"--flagfile={file}")


def test_programs_without_presets_know_no_such_flag():
  arguments = ["program", "--preset=chest_xray"]
  values = flags.FlagValues()
  assert presets.expanded(arguments, values) == arguments
  with pytest.raises(flags.UnrecognizedFlagError, match="preset"):
    values(arguments)


def test_commands_and_presets_that_texts_name_exist():
  texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").glob("*.py")]
  for path in texts:
    text = path.read_text()
    named = re.findall(r"\bprimia-(?!jax\b)\w+(?:-\w+)*", text)
    assert set(named) <= {*COMMANDS}, path
    assert set(re.findall(r"--preset=(\w+)", text)) <= {*presets.names(), "NAME"}, path
