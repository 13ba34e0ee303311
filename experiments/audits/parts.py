"""A part of an audit, and the file that keeps it, so that an interrupted audit continues."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from primia_jax.attacks.evidence import Evidence

from .. import settings
from .context import Context

FOLDER = "parts"  # in the output folder


class Part(NamedTuple):
  """What a part of an audit showed.

  Attributes:
    title: its heading.
    text: paragraphs of Markdown.
    evidence: outcomes of attacks.
    failures: the named cases in which protection fails, a sentence each.
    pictures: file in the output folder -> caption.
  """

  title: str
  text: tuple[str, ...] = ()
  evidence: tuple[Evidence, ...] = ()
  failures: tuple[str, ...] = ()
  pictures: dict[str, str] = {}  # noqa: RUF012  (never changed)


@dataclasses.dataclass(frozen=True)
class Audit:
  """How a part is made.

  Attributes:
    run: the part, of a run.
    effort: the fields of `context.Effort` that decide its result.
    takes_transcript: whether it needs the run's transcript.
    in_auto: whether `auto` stands for it too; False for what takes long.
    of_masks: whether it can be made of a model that learns masks.
  """

  run: Callable[[Context], Part]
  effort: tuple[str, ...] = ()
  takes_transcript: bool = False
  in_auto: bool = True
  of_masks: bool = False


def digest(name: str, audit: Audit, context: Context) -> str:
  """SHA-256 of what decides a part: its name, the run and the effort."""
  effort = {field: getattr(context.effort, field) for field in audit.effort}
  return hashlib.sha256(json.dumps([name, context.fingerprint, effort]).encode()).hexdigest()


def keep(path: pathlib.Path, part: Part, key: str) -> None:
  """Writes a part that has been made."""
  path.parent.mkdir(exist_ok=True)
  unfinished = path.with_suffix(".tmp")
  unfinished.write_text(json.dumps({"digest": key, "part": part._asdict()}, indent=2) + "\n")
  unfinished.replace(path)


def kept(path: pathlib.Path, key: str) -> Part | None:
  """The part that was made before; None where it was not.

  Raises:
    ValueError: the file is damaged, or of another run or effort.
  """
  if not path.is_file():
    return None
  record = settings.read_json(path)
  if record.get("digest") != key:
    raise ValueError(
      f"output_dir={path.parents[1]} holds the part {path.stem!r} of another run, or with other "
      "settings; name another folder"
    )
  held = record["part"]
  return Part(
    held["title"], tuple(held["text"]), tuple(map(_evidence, held["evidence"])),
    tuple(held["failures"]), held["pictures"],
  )  # fmt: skip


def _evidence(held: list[Any]) -> Evidence:
  """Evidence from JSON, where tuples are lists."""
  one = Evidence(*held)
  return one._replace(
    interval=None if one.interval is None else (one.interval[0], one.interval[1]),
    control=None if one.control is None else _evidence(one.control),  # type: ignore[arg-type]
  )
