"""What all runs in a ledger were charged, as tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def show(summary: Mapping[str, Any]) -> None:
  """Prints what `ledgers.summary` returns."""
  show_facts(summary["statement"])
  for name in ("runs", "units"):
    for i, row in enumerate(summary[name]):
      cells = {k: _cell(value) for k, value in row.items()}
      widths = [28 if key == "begun" else 14 for key in cells]
      if not i:
        print("\n" + "".join(f"{key:<{w}}" for key, w in zip(cells, widths, strict=True)))
      print("".join(f"{value:<{w}}" for value, w in zip(cells.values(), widths, strict=True)))


def show_facts(facts: Mapping[str, Any]) -> None:
  """Prints names and values in two columns."""
  width = max(map(len, facts))
  for key, value in facts.items():
    print(f"{key:{width}}  {value}")


def _cell(value: Any) -> str:
  if isinstance(value, list):
    return " ".join(value)
  return f"{value:.6g}" if isinstance(value, float) else str(value)
