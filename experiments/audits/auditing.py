"""An audit from its parts to its report; a part that was made before is not made again."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from .. import folders, progress, settings, transcripts
from . import (
  boundaries,
  classes,
  epsilons,
  extraction,
  first_layers,
  grids,
  heads,
  inversion,
  membership,
  numbers,
  pages,
  parts,
  pictures,
  recognition,
  servers,
  several,
  threats,
)
from .context import ARM, Context, Effort
from .parts import Audit, Part

GRID = "grid"
REPORT, OVERVIEW = "privacy_report.md", "evidence.png"
PARTS = {
  "threats": Audit(threats.points, ("attacked_rounds",), of_masks=True),
  "ledger": Audit(threats.budget, of_masks=True),
  "bounds": Audit(epsilons.bounds, ("audit_seed",), of_masks=True),
  "epsilon": Audit(epsilons.proved, ("audit_seed", "canaries")),
  "recognition": Audit(
    recognition.audit,
    ("audit_seed", "candidates", "attacked_rounds"),
    takes_transcript=True,
    of_masks=True,
  ),
  "numbers": Audit(numbers.audit, ("audit_seed", "candidates", "attacked_rounds"), of_masks=True),
  "classes": Audit(classes.audit, ("audit_seed", "candidates", "victims", "attacked_rounds")),
  "inversion": Audit(
    inversion.audit,
    ("audit_seed", "candidates", "victims", "restarts", "iterations"),
    of_masks=True,
  ),
  "several": Audit(
    several.audit,
    ("audit_seed", "candidates", "victims", "iterations", "attacked_rounds"),
    takes_transcript=True,
  ),
  GRID: Audit(
    grids.audit, ("audit_seed", "candidates", "iterations", "grid_images"), in_auto=False
  ),
  "first_layers": Audit(first_layers.audit, ("audit_seed", "candidates", "victims")),
  "heads": Audit(heads.audit, ("audit_seed", "candidates", "victims", "attacked_rounds")),
  "servers": Audit(servers.audit, ("audit_seed", "candidates")),
  "membership": Audit(membership.audit, ("audit_seed", "candidates", "shadows")),
  "extraction": Audit(extraction.audit, ("audit_seed",)),
  "boundary": Audit(boundaries.audit),
}
_AUTO = "auto"
_NO_MASKS = "this part is for models that classify images, and the run's model learns masks"
_WHY = "which needs a transcript: train with --record_transcript and another --run_dir"


def chosen(names: Sequence[str], run: Context) -> list[str]:
  """The parts to make, in order.

  Raises:
    ValueError: an unknown name, or a part that does not apply to models that learn masks.
    FileNotFoundError: a part that was asked for needs a transcript, and there is none.
  """
  named = set(names) - {_AUTO}
  unknown = sorted(named - set(PARTS))
  if unknown or not names:
    raise ValueError(f"parts={unknown}; there are {', '.join(PARTS)}, and {_AUTO}")
  if run.of_pixels and (unfit := [name for name in PARTS if name in named and _unfit(run, name)]):
    raise ValueError(f"parts={unfit} do not apply to this run: {_unfit(run, unfit[0])}")
  if any(PARTS[name].takes_transcript for name in named):
    transcripts.paths(run.run_dir / ARM)
  if _AUTO in names:
    named |= {
      name
      for name, one in PARTS.items()
      if one.in_auto and (run.has_transcript or not one.takes_transcript) and not _unfit(run, name)
    }
  return [name for name in PARTS if name in named]


def _unfit(run: Context, name: str) -> str:
  """Why a part does not apply to the run's kind of model; empty where it does."""
  return _NO_MASKS if run.of_pixels and not PARTS[name].of_masks else ""


def audit(run_dir: pathlib.Path, output: pathlib.Path, effort: Effort, names: Sequence[str]) -> str:
  """Makes the parts that are not there yet, and writes the report of all that are.

  Args:
    run_dir: of a finished run of `train_federated`.
    output: folder of the audit; created.
    effort: how hard to attack.
    names: of parts; "auto" stands for all that the run allows, without those that take long.

  Returns:
    The verdict, as the report's first line has it.

  Raises:
    ValueError, FileNotFoundError: the run is of another kind or not finished, as `chosen`, or the
      output is of another audit.
  """
  run = Context(run_dir, output, effort)
  config = run.config
  settings.read_json(run_dir / "metrics.json")  # the run has ended
  if not (run_dir / ARM).is_dir():
    raise ValueError(
      f"run_dir={run_dir} holds no federated arm, and a site that trains alone sends nothing; "
      "audit a run of primia-train"
    )
  if config.in_processes:
    raise ValueError(
      f"run_dir={run_dir} was trained with placement=flower, where each site keeps its own "
      "ledger and nobody has a transcript; audit a simulation with the same settings"
    )
  if config.data.is_multi:
    raise ValueError(
      f"run_dir={run_dir} gives images any number of labels; the attacks here are on models of one "
      "class an image"
    )
  wanted = chosen(names, run)
  path = lambda name: output / parts.FOLDER / f"{name}.json"
  keys = {name: parts.digest(name, one, run) for name, one in PARTS.items()}
  done = {name: parts.kept(path(name), key) for name, key in keys.items()}
  output.mkdir(mode=0o700, parents=True, exist_ok=True)  # it will show images of the sites
  with folders.alone(output / "audit.lock"):
    bar = progress.bar(
      desc="audit", unit="part", total=len(wanted),
      bar_format="{desc}: {bar:20} part {n_fmt} of {total_fmt}{postfix}  [{elapsed} gone]",
    )  # fmt: skip
    run = Context(run_dir, output, effort, bar.set_postfix_str)
    for name in wanted:
      if done[name] is None:
        bar.set_postfix_str(name)
        done[name] = part = PARTS[name].run(run)
        parts.keep(path(name), part, keys[name])
      bar.update()
    bar.close()
    made = {name: part for name, part in done.items() if part is not None}
    return _write(run, f"Privacy audit: {config.hospitals.num_sites} sites, {run.data_name}", made)


def _write(run: Context, title: str, made: dict[str, Part]) -> str:
  evidence = [one for part in made.values() for one in part.evidence]
  shown = [one for one in evidence if one.chance is not None and one.occurs]
  overview = {}
  if shown:
    pictures.rates(shown, run.output / OVERVIEW, f"Attacks on this run: {run.data_name}")
    overview = {
      OVERVIEW: "Attacks on what somebody sees of this run, beside controls and chance, with 95 % "
      "intervals"
    }
  absent = {
    name: _WHY for name, one in PARTS.items() if one.takes_transcript and not run.has_transcript
  }
  absent |= {name: f"which does not apply: {why}" for name in PARTS if (why := _unfit(run, name))}
  text = pages.page(title, made, absent, overview)
  (run.output / REPORT).write_text(text, encoding="utf-8")
  return pages.first_line(evidence)
