"""Runs a whole case study: pooled, local, federated, secure, private, encrypted and attacked arms.

  primia-case-study --run_dir=study
  primia-case-study --study=chest_xray --data=folder:PATH --run_dir=study_chest

Each arm is a run of another program in a folder of its own, with a report of its own. When all are
finished, case_study.md compares them: scores with intervals over seeds, paired tests, and a human
reader where one is known. An interrupted study continues when it is started again with the same
--run_dir: finished runs are not repeated. More seeds may be added to a finished study.

Without --study the study is of the synthetic phantom.
"""

import json
import pathlib
import shlex
import subprocess
import sys

from absl import flags

from . import folders, refusals, running, settings, study, study_report

_about = "; ".join(f"{name}: {one.about}" for name, one in study.STUDIES.items())
flags.DEFINE_string("study", "phantom", f"which study: {_about}")
flags.DEFINE_string(
  "run_dir", None, "folder of the study: a new one, or that of an interrupted one", required=True
)
flags.DEFINE_list("seeds", [], "seeds of the runs; empty takes the study's own")
flags.DEFINE_list("epsilons", [], "budgets of the private arms; empty takes the study's own")
flags.DEFINE_list(
  "arms",
  [],
  f"which arms: {', '.join(study.ARMS)}; empty takes the study's own. local is trained in the run "
  "of secure, encrypted asks its model about all test images, and attacked attacks federated, "
  "whose updates are in the clear",
)
flags.DEFINE_string("data", "", "the images, as primia-train takes them; empty: the study's own")
flags.DEFINE_string(
  "ledger_dir", "", "folder of the ledger that private arms are charged in; empty: as primia-train"
)
flags.DEFINE_string(
  "train_flags", "", "further flags of training without privacy, such as '--rounds=2 --model=mlp'"
)
flags.DEFINE_string("private_flags", "", "further flags of the private arms")
flags.DEFINE_string("attack_flags", "", "further flags of the attacks, as primia-audit takes them")
FLAGS = flags.FLAGS

_RECORD = "study.json"


def main() -> None:
  if FLAGS.study not in study.STUDIES:
    raise ValueError(f"study={FLAGS.study!r}; use one of {', '.join(study.STUDIES)}")
  one = study.STUDIES[FLAGS.study]
  seeds = _numbers("seeds", FLAGS.seeds, int) or one.seeds
  epsilons = _numbers("epsilons", FLAGS.epsilons, float) or one.epsilons
  arms = [arm for arm in FLAGS.arms if arm] or one.arms
  if unknown := set(arms) - set(study.ARMS):
    raise ValueError(f"arms={sorted(unknown)}; use some of {', '.join(study.ARMS)}")
  private = _words("private_flags")
  private += [f"--ledger_dir={FLAGS.ledger_dir}"] if FLAGS.ledger_dir else []
  more = _words("train_flags"), private, _words("attack_flags")
  steps = study.steps(one, seeds, epsilons, arms, FLAGS.data, *more)
  if not FLAGS.run_dir:
    raise ValueError("run_dir is empty; name a folder for the study, such as --run_dir=study")
  folder = refusals.folder("run_dir", FLAGS.run_dir)
  commands = {step.folder: _command(step, folder) for step in steps}
  _begin(folder, {step.folder: list(step.flags) for step in steps})
  with folders.alone(folder / "lock"):
    for number, step in enumerate(steps, start=1):
      own = folder / step.folder
      if (own / step.made).is_file():
        print(f"[{number} of {len(steps)}] {step.folder}: finished before", flush=True)
        continue
      print(f"[{number} of {len(steps)}] {commands[step.folder]}", flush=True)
      code = subprocess.run([sys.executable, "-m", *_arguments(step, folder)]).returncode
      if code:
        raise RuntimeError(
          f"{step.folder} ended with exit code {code}; its reason is above. Start the study again "
          "with the same flags to continue"
        )
    path = study_report.write(folder, steps, commands, f"The study `{FLAGS.study}`: {one.about}.")
  print(f"Report: {path}")


def _numbers(name: str, texts: list[str], kind: type) -> tuple:
  try:
    values = tuple(kind(text) for text in texts if text)
  except ValueError:
    raise ValueError(f"{name}={','.join(texts)}; write numbers separated by commas") from None
  if len(set(values)) != len(values) or any(value < 0 for value in values):
    raise ValueError(f"{name}={','.join(texts)}: each must be positive and given once")
  return values


def _words(name: str) -> list[str]:
  try:
    return shlex.split(FLAGS[name].value)
  except ValueError:
    raise ValueError(
      f"{name}={FLAGS[name].value} has a quotation mark without its pair; close it"
    ) from None


def _arguments(step: study.Step, folder: pathlib.Path) -> list[str]:
  filled = [flag.replace("{study}", str(folder)) for flag in step.flags]
  return [f"{__package__}.{step.module}", *filled, f"--{step.to}={folder / step.folder}"]


def _command(step: study.Step, folder: pathlib.Path) -> str:
  """As a user would type it."""
  module, *arguments = _arguments(step, folder)
  return shlex.join(["python", "-m", module, *arguments])


def _begin(folder: pathlib.Path, now: dict[str, list[str]]) -> None:
  """Keeps what each run is; a study whose runs have changed is refused.

  Raises:
    ValueError: the folder holds another study, or something else.
  """
  saved = folder / _RECORD
  before: dict[str, list[str]] = {}
  if saved.is_file():
    before = settings.read_json(saved)
    if changed := [name for name in now if before.get(name, now[name]) != now[name]]:
      raise ValueError(
        f"run_dir={FLAGS.run_dir} holds a study whose run {changed[0]} had other flags "
        f"({shlex.join(before[changed[0]])}); use another --run_dir"
      )
  elif folder.is_dir() and any(folder.iterdir()):
    raise ValueError(
      f"run_dir={FLAGS.run_dir} is not empty and holds no study ({_RECORD}); use another --run_dir"
    )
  folder.mkdir(parents=True, exist_ok=True)
  saved.write_text(json.dumps(before | now, indent=2) + "\n")


if __name__ == "__main__":
  running.start(main)
