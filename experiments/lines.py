"""What an arm writes down: its JSON lines, one a round, and facts for the report."""

from __future__ import annotations

import json
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from primia_jax import federated, metrics

from . import loop
from .markdown import ABORTED
from .processes import Place

if TYPE_CHECKING:
  from .checkpoints import Best


def scores(done: loop.Round) -> dict[str, float]:
  """A line's scores on validation; empty without."""
  if done.scores is None:
    return {}
  confusion = done.scores.confusion
  # of several labels an image, the mean over labels
  accuracy, mcc = (float(np.mean(f(confusion))) for f in (metrics.accuracy, metrics.mcc))
  return {"val_loss": done.scores.loss, "val_accuracy": accuracy, "val_mcc": mcc}


def text(value: float | str) -> str:
  """A score as the terminal shows it, or that it is suppressed."""
  return value if isinstance(value, str) else f"{value:.3f}"


def facts(
  rows: list[dict[str, Any]],
  best: Best,
  state: federated.State,
  place: Place,
  num_sites: int,
  is_charged: bool,
) -> dict[str, Any]:
  """What the report says of an arm's rounds.

  Args:
    rows: its lines.
    best, state: at its end.
    place: where the sites ran.
    num_sites: of the arm.
    is_charged: whether the arm is private.
  """
  between_processes = place.placement.is_own_process
  shown = {row["round"]: row["val_mcc"] for row in rows if isinstance(row.get("val_mcc"), str)}
  mcc = shown.get(int(best.round), float(best.mcc))  # suppressed, as its line is
  out: dict[str, Any] = {"best round": int(best.round), "validation MCC": mcc}
  if not any("val_mcc" in row for row in rows):
    out = {"round kept": f"{int(best.round)}, the last; validation images were not used"}
  out["rounds trained"] = len(rows)
  if aborted := int(state.round) - len(rows):
    charged = ", charged all the same" if is_charged else ""
    what = "rounds without this site, or aborted" if between_processes else ABORTED
    out[what] = f"{aborted} of {int(state.round)}{charged}"
  if between_processes:
    lost = place.missing(num_sites).union(*(row.get("lost", ()) for row in rows))
    out["sites lost in some round"] = sorted(lost) or "none"
  return out


def read(path: pathlib.Path, finished: int) -> list[dict[str, Any]]:
  """The lines of the finished rounds; drops later ones, of a round that was not saved."""
  if not path.is_file():
    return []
  found = [row for row in rows(path) if row["round"] <= finished]
  path.write_text("".join(json.dumps(row) + "\n" for row in found))
  return found


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """All lines of an arm. An unfinished last one is of a round that was not saved, and left out.

  Raises:
    ValueError: another line is damaged.
  """
  out = []
  *finished, _ = path.read_text().split("\n")
  for number, line in enumerate(finished, 1):
    try:
      out.append(json.loads(line))
    except ValueError as error:
      raise ValueError(
        f"{path} is damaged at line {number} ({error}); restore it, or use another --run_dir"
      ) from error
  return out
