"""How a program refuses: wrong flags and failed work end it with what is wrong and the cure, and
without a traceback.

A refusal is a ValueError, an OSError, a RuntimeError or a MemoryError. Anything else is an error in
the code, and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import pathlib
import shlex
from collections.abc import Iterator, Sequence

from absl import flags

REFUSALS = (ValueError, OSError, RuntimeError, MemoryError)
_SPACE = "free space there, and start again"
_RIGHTS = "change its rights, or name another one"
_CURES = {
  errno.ENOSPC: _SPACE,
  errno.EDQUOT: _SPACE,
  errno.EROFS: "name a folder that can be written",
  errno.EACCES: _RIGHTS,
  errno.EPERM: _RIGHTS,
  errno.ENOTDIR: "a part of the path is a file; name a folder",
  errno.EEXIST: "it is a file; name a folder",
  errno.EISDIR: "it is a folder; name a file",
  errno.ENOENT: "check the path",
  errno.ENAMETOOLONG: "use a shorter name",
}
_FULL_OR_CLOSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory")  # of XLA, in a RuntimeError
_OF_SIZE = ("image_size", "batch_size", "phantom_images", "batch", "calibration_images")


def parse(arguments: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
  """Reads the flags of a command line and of its flag files; returns what is not a flag.

  Raises:
    ValueError: naming the flag or the file.
  """
  _check_flagfiles(arguments[1:])
  try:
    rest = values(arguments)
  except flags.UnrecognizedFlagError as error:
    of_absl = lambda name: str(values.find_module_defining_flag(name)).startswith("absl.")
    own = [name for name in values if not of_absl(name)]
    alike = difflib.get_close_matches(error.flagname, own, 1, 0.7)
    hint = f"did you mean --{alike[0]}?" if alike else "--helpfull lists all flags"
    raise ValueError(f"--{error.flagname} is not a flag of this program; {hint}") from error
  except flags.IllegalFlagValueError as error:
    raise ValueError(_illegal(str(error), values)) from error
  except (flags.Error, ValueError) as error:
    raise ValueError(f"{error}; --helpfull lists all flags") from error
  if len(rest) > 1:
    raise ValueError(f"{rest[1]!r} is not a flag; flags are written --name=value")
  return rest


def command(arguments: Sequence[str], commands: Sequence[str]) -> str:
  """The word that a command line begins with, of those that a program knows.

  Raises:
    ValueError: there is none, or another one.
  """
  given = arguments[1] if len(arguments) > 1 else ""
  if given not in commands:
    said = f"{given!r} is not a command" if given and given[0] != "-" else "no command comes first"
    raise ValueError(f"{said}; use one of {', '.join(commands)}, and then flags; see --help")
  return given


def _illegal(message: str, values: flags.FlagValues) -> str:
  """absl's message of a value that a flag does not take, in the form of all others."""
  name, _, value = message.removeprefix("flag --").partition(": ")[0].partition("=")
  if name not in values:
    return f"{message}; --helpfull lists all flags"
  if value == "None":
    missing = [line.partition("=")[0].removeprefix("flag --") for line in message.splitlines()]
    return f"--{' and --'.join(missing)} must be given; --help explains all that most runs set"
  kind = values[name].parser.syntactic_help or "true or false"
  return f"--{name}={value}: the value must be {kind}; --help explains the flag"


def _check_flagfiles(arguments: Sequence[str], seen: tuple[str, ...] = ()) -> None:
  for path in _flagfiles(arguments):
    if path in seen:
      raise ValueError(f"flagfile={path} names itself, directly or by another; remove that line")
    if not os.path.exists(path):
      raise ValueError(f"flagfile={path}: there is no such file; check the path")
    if not os.path.isfile(path):  # opening a pipe would wait for ever
      raise ValueError(
        f"flagfile={path} is a folder, pipe or device; write the flags to an ordinary file"
      )
    try:
      lines = pathlib.Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
      reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
      raise ValueError(
        f"flagfile={path} cannot be read ({reason}); name a text file with a flag on each line"
      ) from error
    _check_flagfiles([line.strip() for line in lines], (*seen, path))


def _flagfiles(arguments: Sequence[str]) -> Iterator[str]:
  for i, argument in enumerate(arguments):
    name, is_given, path = argument.partition("=")
    if name not in ("--flagfile", "-flagfile"):
      continue
    if not is_given:
      path = arguments[i + 1] if i + 1 < len(arguments) else ""
    if not path:
      raise ValueError("--flagfile names no file; give --flagfile=FILE")
    yield os.path.expanduser(path.strip())


def words(name: str, text: str) -> list[str]:
  """The words of a flag that holds flags.

  Raises:
    ValueError: a quote is not closed.
  """
  try:
    return shlex.split(text)
  except ValueError as error:
    raise ValueError(f"{name}={text!r}: {error}; close the quotes") from error


def folder(name: str, value: str) -> pathlib.Path:
  """The folder that the flag `name` says. It is checked here and made later, when there is
  something to write.

  Raises:
    ValueError: it cannot be made or written.
  """
  path = pathlib.Path(value).expanduser()
  nearest = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
  if not nearest.is_dir():
    kind = "a file" if nearest.is_file() else "no folder"
    raise ValueError(f"{name}={value}: {nearest} is {kind}; name a folder")
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise ValueError(f"{name}={value}: {nearest} cannot be written; {_RIGHTS}")
  return path


def said(error: BaseException, values: flags.FlagValues = flags.FLAGS) -> str:
  """A refusal as the user reads it; what the system says, with the flag that it concerns."""
  text, code, file = str(error), getattr(error, "errno", None), getattr(error, "filename", None)
  if not code:  # libraries hide what the system said in texts of their own
    code = next((code for code in _FULL_OR_CLOSED if os.strerror(code) in text), None)
  if code:
    flag = _flag_of(file, values)
    what = f"{flag}: " * bool(flag) + (str(file) if file else "writing or reading")
    return (
      f"{what} fails ({os.strerror(code)}): {_CURES.get(code, 'check the path and its rights')}"
    )
  if isinstance(error, MemoryError) or any(word in text for word in _NO_MEMORY):
    given = ", ".join(f"{n}={values[n].value}" for n in _OF_SIZE if n in values)
    return f"out of memory ({_first_line(text) or 'nothing more is known'}); lower one of {given}"
  return text


def _first_line(text: str) -> str:
  return text.strip().partition("\n")[0][:200]


def _flag_of(file: object, values: flags.FlagValues) -> str:
  """The flag within whose path a file lies; where the file is unknown, the folder written to."""
  given: dict[str, pathlib.Path] = {}
  for name in values:
    value = values[name].value
    if values[name].present and isinstance(value, str) and value:
      given[name] = pathlib.Path(value.partition(":")[2] or value).expanduser().absolute()
  if not isinstance(file, str):
    names = [name for name in given if name in ("run_dir", "output_dir")]
  else:
    names = [name for name in given if pathlib.Path(file).absolute().is_relative_to(given[name])]
    names.sort(key=lambda name: len(given[name].parts), reverse=True)
  return f"{names[0]}={values[names[0]].value}" if names else ""
