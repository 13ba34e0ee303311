"""Presets: the flag files that are installed with the programs, taken by name."""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

_FOLDER = pathlib.Path(__file__).with_name("flags")
_NAME = "preset"


def names() -> list[str]:
  return sorted(path.stem for path in _FOLDER.glob("*.flags"))


def define_flag(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines --preset as a flag of the program; `expanded` takes it out before flags are parsed."""
  text = f"settings of a whole run, by name: {', '.join(names())}. Other flags override it"
  flags.DEFINE_string(_NAME, "", text, flag_values=values, module_name=sys.argv[0])
  flags.register_validator(
    _NAME,
    lambda name: not name,
    "give it on the command line, not in a flag file",
    flag_values=values,
  )


def expanded(arguments: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Command-line arguments with the flag file of each preset before all other flags.

  Raises:
    ValueError: there is no such preset; the message lists those that there are.
  """
  program, *rest = arguments
  if _NAME not in values:
    return [*arguments]
  chosen, others = [], []
  while rest:
    name, is_joined, value = (first := rest.pop(0)).partition("=")
    if name not in (f"--{_NAME}", f"-{_NAME}"):
      others.append(first)
      continue
    chosen.append(value if is_joined else rest.pop(0) if rest else "")
  if unknown := [name for name in chosen if name not in names()]:
    raise ValueError(f"preset={unknown[0]!r}; use one of {', '.join(names())}")
  return [program, *(f"--flagfile={_FOLDER / name}.flags" for name in chosen), *others]
