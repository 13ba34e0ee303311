"""What `--help` and `--helpfull` print: a program's flags in sections, one for each record of
settings, in the order of the records.
"""

from __future__ import annotations

import inspect
import shutil
import sys
import textwrap
from collections.abc import Sequence

from absl import flags

# What most runs set; `--help` explains these and only names the others.
_USUAL = (
  "preset", "run_dir", "seed", "baselines", "data", "site_data", "image_size", "channels",
  "label_names", "num_sites", "partition", "model", "norm", "pretrained",
  "first_trained", "augment", "rounds",
  "sync_epochs", "batch_size", "optimizer", "learning_rate", "class_weights", "algorithm",
  "placement", "aggregation", "secagg_threshold", "dp", "target_epsilon", "delta",
  "noise_multiplier", "l2_clip_norm", "ledger_dir", "output_dir", "unlabelled", "num_units",
  "checkpoint", "images", "output", "check", "calibration", "record_transcript", "parts",
  "folder", "name", "clinic", "connect", "rotate", "check_dealer", "checked", "open", "disk_gb",
  "models", "discard", "address", "only_checked", "daily_images", "total_images", "metrics_port",
  "opened", "opened_to", "threshold", "positive", "small_classes", "vendor_dir", "hospital_dir",
  "query_budget", "site_dir", "number", "role", "federation", "join", "leave", "revoke", "accept",
  "renumber",
  "digest", "config", "fewest_patients", "fewest_sites", "max_epsilon", "allowed", "reports_to",
  "title", "host", "port", "card", "model_owner", "helper", "client", "helper_address",
  "study", "seeds", "epsilons", "arms", "trials", "space", "settings", "other", "ids", "blinded",
  "returned", "kind", "score_bins", "subgroups", "channel_dir",
)  # fmt: skip
_COLUMN = 27  # where the texts begin
_WIDTHS = 72, 100  # the narrowest and the widest page


def asked(arguments: Sequence[str]) -> str:
  """The flag by which help is asked for, without its dashes; empty where it is not."""
  names = [argument.lstrip("-") for argument in arguments[1:] if argument.startswith("-")]
  known = [name for name in names if name in ("help", "helpfull", "helpshort", "h", "?")]
  return known[0] if known else ""


def text(module: str, is_full: bool, values: flags.FlagValues = flags.FLAGS) -> str:
  """The help of a program.

  Args:
    module: of the program, whose docstring comes first and whose own flags are the first section.
    is_full: explain every flag, also those that few runs set.
    values: the program's flags.
  """
  width = min(max(shutil.get_terminal_size().columns, _WIDTHS[0]), _WIDTHS[1]) - 1
  about = inspect.cleandoc(sys.modules[module].__doc__ or "").split("\n\n")
  is_code = lambda part: part.startswith("  ")
  about = [part if is_code(part) else textwrap.fill(part, width) for part in about]
  sections = {
    name: own
    for name, own in values.flags_by_module_dict().items()
    if not name.startswith("absl.") and ": " in name
  }
  own = [flag for name, of_module in values.flags_by_module_dict().items()
         if name in (module, sys.argv[0]) for flag in of_module]  # fmt: skip
  lines = [
    "\n\n".join(about),
    "",
    "Flags are written --name=value; below they stand with defaults.",
  ]
  for title, of_section in {"This program": own, **sections}.items():
    if of_section:
      lines += ["", title, *_section(of_section, is_full, width)]
  end = "--flagfile=FILE reads flags from a file, a flag on each line; later flags win. "
  end += "--verbosity=1 shows where an error comes from."
  if not is_full:
    end += " --helpfull explains all flags."
  return "\n".join([*lines, "", *textwrap.wrap(end, width)])


def _section(of_section: Sequence[flags.Flag], is_full: bool, width: int) -> list[str]:
  explained = [flag for flag in of_section if is_full or flag.name in _USUAL]
  lines = [line for flag in explained for line in _lines(flag, width)]
  if others := [f"--{flag.name}" for flag in of_section if flag not in explained]:
    lead = "  also: " if explained else "  "
    lines += textwrap.wrap(
      "  ".join(others), width, initial_indent=lead, subsequent_indent=" " * len(lead),
      break_on_hyphens=False,
    )  # fmt: skip
  return lines


def _lines(flag: flags.Flag, width: int) -> list[str]:
  """A flag with its default, and its text beside it, or below where it is long."""
  name, about = f"--{flag.name}={flag.default_as_str or ''}".replace("'", ""), flag.help
  if flag.boolean:
    name = f"--[no]{flag.name}"
    about = f"{'on' if flag.default else 'off'} by default: {about}"
  elif flag.default is None:
    name, about = f"--{flag.name}={flag.name.upper()}", f"must be given: {about}"
  indent = " " * _COLUMN
  lines = textwrap.wrap(
    str(about), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False,
    break_long_words=False,
  )  # fmt: skip
  if len(name) + 4 <= _COLUMN:
    lines[0] = f"  {name:<{_COLUMN - 2}}" + lines[0][_COLUMN:]
    return lines
  return [f"  {name}", *lines]
