"""Subgroups from flags, and what a report says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from primia_jax import subgroups
from primia_jax.data.dataset import Dataset
from primia_jax.data.scan import PIXELS
from primia_jax.disclosure import Suppressed

from . import markdown

SITE = "site"  # a column that is compared unasked


def of_images(asked: Mapping[str, Sequence[float]], test: Dataset) -> dict[str, subgroups.Members]:
  """The subgroups of test images by each column that is asked for, and by site.

  Args:
    asked: column -> edges of its bins, or none.
    test: whose images carry their site in a column of this name, if they do.

  Raises:
    ValueError: there is no such column, or `subgroups.members` refuses it.
  """
  columns = {name: column for name, column in test.columns.items() if name != PIXELS}
  if unknown := [name for name in asked if name not in columns]:
    raise ValueError(
      f"subgroups: the test images of {test.name!r} have no column {unknown[0]!r}; their columns "
      f"are {', '.join(sorted(columns)) or 'none'}, and csv:PATH may have any"
    )
  out = {}
  for name, edges in asked.items():
    try:
      out[name] = subgroups.members(name, columns[name], edges)
    except ValueError as error:
      raise ValueError(f"subgroups: {error}") from error
  if SITE in columns and SITE not in out:
    try:
      sites = subgroups.members(SITE, columns[SITE])
    except ValueError:  # too many to compare, and nobody has asked
      return out
    if len(sites.names) > 1:
      out[SITE] = sites
  return out


def gap(found: subgroups.Gap | None) -> dict[str, Any] | None:
  """What `metrics.json` holds of a gap."""
  return None if found is None else found._asdict()


def told(table: subgroups.Table) -> dict[str, Any]:
  """What `metrics.json` holds of a column."""
  interval = lambda one: one if isinstance(one, Suppressed) else one._asdict()
  rows = {
    row.name: {
      "images": row.images, "accuracy": interval(row.accuracy), "mcc": interval(row.mcc)
    }
    for row in table.rows
  }  # fmt: skip
  return {
    "subgroups": rows,
    "largest gap": {"accuracy": gap(table.accuracy), "mcc": gap(table.mcc)},
  }


def section(result: Mapping[str, Any]) -> list[str]:
  """The section of `report.md`; empty without subgroups."""
  if not result["subgroups"]:
    return []
  lines = ["## Scores by subgroup", "", f"Of the {result['main_arm']} model.", ""]
  for column, found in result["subgroups"].items():
    rows = [
      (markdown.plain(name), of["images"], markdown.cell(of["accuracy"], True),
       markdown.cell(of["mcc"], False))
      for name, of in found["subgroups"].items()
    ]  # fmt: skip
    head = markdown.plain(column), "images", "accuracy (%)", "MCC"
    lines += [markdown.table(head, rows), ""]
    of, said = found["largest gap"], "No gap: fewer than two subgroups have scores to compare."
    if of["accuracy"] is not None:
      mcc = f"; in MCC: {markdown.gap_cell(of['mcc'], False)}" if of["mcc"] else ""
      said = f"Largest gap in accuracy (points): {markdown.gap_cell(of['accuracy'], True)}{mcc}."
    lines += [said, ""]
  return [
    *lines,
    "Brackets hold 95 % percentile bootstrap intervals within each subgroup; one whose answers are "
    "all right has an interval that is too narrow. A largest gap is the best subgroup minus the "
    "worst. Its interval is for all pairs of the column at once, so one that holds 0 may be "
    "chance. Images without a value, or outside of the bins, are in no gap. MCC is undefined where "
    "all images of a subgroup are of one class.",
    "",
  ]
