"""Settings as frozen dataclasses: a field is a flag, a line of `config.json` and a row of a report.

A setting may itself be a dataclass of settings; its fields are flags like all others, so names are
unique over the whole.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import pathlib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags

FORMAT = 2  # of config.json; 1 had all settings in one flat record


def setting(default: Any, text: str) -> Any:
  """A field with its flag's help."""
  return dataclasses.field(default=default, metadata={"help": text})


def choose(kind: str, value: Any, allowed: typing.Iterable[Any]) -> None:
  """Checks a setting that has a few values.

  Raises:
    ValueError: naming the setting, its value and what may be given.
  """
  if value not in (allowed := tuple(allowed)):
    raise ValueError(f"{kind}={value!r}; use one of {', '.join(map(str, allowed))}")


def require(holds: bool, kind: str, value: Any, cure: str) -> None:
  """Checks a setting that is a number.

  Raises:
    ValueError: naming the setting, its value and the cure.
  """
  if not holds:
    raise ValueError(f"{kind}={value} {cure}")


def define_flags(kind: type, values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines one flag for each field. Those of a record are a section of `--help`, under its name
  and the first line of its docstring.
  """
  define: dict[type, Any] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
  }
  about = (inspect.getdoc(kind) or "").partition("\n")[0].rstrip(".")
  section = f"{kind.__name__}: {about[:1].lower()}{about[1:]}"
  for field, of_type in _fields(kind):
    if dataclasses.is_dataclass(of_type):
      define_flags(of_type, values)  # type: ignore[arg-type]
    else:
      said = field.default, field.metadata["help"]
      define[of_type](field.name, *said, flag_values=values, module_name=section)


def from_flags(kind: type, values: flags.FlagValues = flags.FLAGS) -> Any:
  """Reads the settings back from the parsed flags."""
  out: dict[str, Any] = {}
  for field, of_type in _fields(kind):
    is_group = dataclasses.is_dataclass(of_type)
    name = field.name
    out[name] = from_flags(typing.cast(type, of_type), values) if is_group else values[name].value
  return kind(**out)


def flat(settings: Any) -> dict[str, Any]:
  """All settings by name, from all nested records."""
  out: dict[str, Any] = {}
  for field, of_type in _fields(type(settings)):
    value = getattr(settings, field.name)
    out |= flat(value) if dataclasses.is_dataclass(of_type) else {field.name: value}
  return out


def replace(settings: Any, **changes: Any) -> Any:
  """The settings with some changed by name, in any nested record; for tests and tools.

  Raises:
    TypeError: for a name that is not a setting.
  """
  if unknown := set(changes) - set(flat(settings)):
    raise TypeError(f"{sorted(unknown)} are not settings")
  new = {}
  for field, of_type in _fields(type(settings)):
    value = getattr(settings, field.name)
    if dataclasses.is_dataclass(of_type):
      own = {name: changes[name] for name in flat(value) if name in changes}
      new[field.name] = replace(value, **own) if own else value
    else:
      new[field.name] = changes.get(field.name, value)
  return type(settings)(**new)


def save(settings: Any, path: pathlib.Path, program: str = "") -> None:
  """Writes `config.json`: the settings, and which program made them."""
  record = {"format": FORMAT, "program": program, "settings": dataclasses.asdict(settings)}
  path.write_text(json.dumps(record, indent=2) + "\n")


def load(path: pathlib.Path) -> dict[str, Any]:
  """Reads the settings of `config.json` by name.

  Raises:
    FileNotFoundError: the file is not there.
    ValueError: another version of primia_jax wrote it.
  """
  record = read_json(path)
  if record.get("format") != FORMAT:
    raise ValueError(
      f"{path} has format {record.get('format', 1)}, and this version of primia_jax reads format "
      f"{FORMAT}: evaluate and infer_encrypted still take the run's model, but training cannot "
      "continue; use another --run_dir, or the version that began the run"
    )
  return _by_name(record["settings"])


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a record of a run folder.

  Raises:
    FileNotFoundError: it is not there; the message says what makes one.
  """
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} does not exist; --run_dir must name the folder of a finished training run"
    )
  try:
    record = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(
      f"{path} is damaged ({error}); restore it, or use another --run_dir"
    ) from error
  if not isinstance(record, dict):
    raise ValueError(
      f"{path} is damaged (it holds no record); restore it, or use another --run_dir"
    )
  return record


def differences(old: Mapping[str, Any], new: Any) -> dict[str, tuple[Any, Any]]:
  """The settings that differ, as name -> (old, new)."""
  now = flat(new)
  return {name: (old.get(name), value) for name, value in now.items() if old.get(name) != value}


def flagfile(settings: Any, comment: str) -> str:
  """The settings that differ from the defaults, as a file for `--flagfile`."""
  changed = differences(flat(type(settings)()), settings)
  lines = [f"# {line}" for line in comment.splitlines()]
  for name, (_, value) in changed.items():
    is_bool = isinstance(value, bool)
    lines.append(f"--{'' if value else 'no'}{name}" if is_bool else f"--{name}={value}")
  return "\n".join(lines) + "\n"


def names(text: str) -> tuple[str, ...]:
  """Splits "a,b" and drops blanks."""
  return tuple(part.strip() for part in text.split(",") if part.strip())


def fractions(text: str) -> tuple[float, ...] | None:
  """Reads "0.5,0.3,0.2"; None for the empty text.

  Raises:
    ValueError: a part is no number.
  """
  try:
    return tuple(float(part) for part in names(text)) or None
  except ValueError as error:
    raise ValueError(
      f"site_fractions={text!r}; write numbers separated by commas, such as 0.5,0.3,0.2"
    ) from error


def _fields(kind: type) -> Iterator[tuple[Any, type]]:
  types = typing.get_type_hints(kind)
  return ((field, types[field.name]) for field in dataclasses.fields(kind))


def _by_name(record: Mapping[str, Any]) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for name, value in record.items():
    out |= _by_name(value) if isinstance(value, dict) else {name: value}
  return out
