"""What this site has put into sums that were opened, so that it never gives the same to two sums
over different sites: their difference would tell the part of the sites that only one of them has.

A line is on disk before the message leaves that opens a sum. A coordinator can keep the sum to
itself, end all programs, and have the sum formed again without a site; the sites that are left then
refuse. A sum is known again by what it starts from, or by this site's ring elements: those with
fresh noise are never the same twice.

Who learns what: the file lies in the site's own folder. It holds digests, and marks of images under
a key that lies beside it.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from primia_jax import durable
from primia_jax.secagg import messages as msg
from primia_jax.secagg.errors import Refused
from primia_jax.secagg.opening import Opening
from primia_jax.secagg.roster import Roster

from . import registers

FOLDER, _FILE = "opened", "sums.jsonl"  # in a site's own folder
_MARK = 16  # hexadecimal digits


class Keeper(NamedTuple):
  """Where a site writes down what it opens.

  Attributes:
    folder: in its own one.
    number: of the site.
    names: public key to name of the roster's sites; empty without a roster.
  """

  folder: pathlib.Path
  number: int
  names: Mapping[bytes, str]


def keeper(own: pathlib.Path, number: int, known: Roster | None) -> Keeper:
  """That of a site's own folder."""
  (folder := own / FOLDER).mkdir(mode=0o700, exist_ok=True)
  names = {} if known is None else {m.public: m.name for m in known.sites.values()}
  return Keeper(folder, number, names)


def note(kept: Keeper, opening: Opening, since: bytes = b"") -> None:
  """Writes down that a sum is opened.

  Args:
    kept: where.
    opening: the sum.
    since: digest of what this site's elements follow from, where they carry no fresh noise; empty
      takes the elements themselves, which an accelerator need not compute alike twice.

  Raises:
    Refused: the same was given to a sum of the same round over other sites.
    OSError: it cannot be written.
  """
  what = f"{opening.round} {opening.purpose} {(since or opening.digest).hex()}"
  lines = _lines(kept)
  for line in lines:
    if line["what"] == what and line["sites"] != _keys(opening):
      said = f"what this site gives to the sum of round {opening.round}"
      _refuse(kept, opening, line, f"{said} it has given to that of an earlier start")
  _add(kept, lines, opening, what)


def marks(kept: Keeper, images: Any) -> list[str]:
  """A mark of each image [N, H, W, C], by a key of the site's own."""
  return sorted(mark[:_MARK] for mark in registers.marks(kept.folder, images))


def check_images(kept: Keeper, model: str, marked: Sequence[str]) -> None:
  """Refuses to count images of which some, and not all, were in an earlier sum of the same model.

  Args:
    kept: the site's.
    model: its digest.
    marked: all images' marks.

  Raises:
    ValueError: the difference of the two sums would tell what the model says of a few images.
  """
  for line in _lines(kept):
    found = set(line.get("images", ())) if line["what"] == model else set()
    if found and found != set(marked) and (again := found & set(marked)):
      raise ValueError(
        f"{len(again)} of {len(set(marked))} images were counted with this model before, beside "
        "others: the difference of the two sums would tell what it says of single images; score "
        "the same images again, or others alone, or counts with noise (dp_count_noise)"
      )


def note_images(kept: Keeper, model: str, marked: Sequence[str], opening: Opening) -> None:
  """Writes down that a sum of exact counts of these images is opened, by whatever approval.

  Raises:
    Refused: they were counted with this model in a sum over other sites.
    OSError: it cannot be written.
  """
  lines = _lines(kept)
  for line in lines:
    is_same = line["what"] == model and set(line.get("images", ())) & set(marked)
    if is_same and line["sites"] != _keys(opening):
      _refuse(kept, opening, line, "the same images were counted with this model before")
  _add(kept, lines, opening, model, images=list(marked))


def _refuse(kept: Keeper, opening: Opening, line: Mapping[str, Any], what: str) -> NoReturn:
  now, before = set(_keys(opening)), set(line["sites"])
  named = {key.hex(): name for key, name in kept.names.items()}
  numbers = {key.hex(): f"site {i}" for i, key in opening.sites.items()}
  of = lambda keys: sorted(
    named.get(key) or numbers.get(key) or f"the key {key[:8]}" for key in keys
  )
  raise Refused(
    kept.number,
    msg.STAGES[-1],
    "inconsistent",
    f"{what}, in a sum with {of(before - now) or 'nobody'} besides and without "
    f"{of(now - before) or 'nobody'} of this one: the difference would tell their part. Go on when "
    "the same sites take part as then, or have the coordinator offer a run with another seed, or "
    "counts with noise",
  )


def _keys(opening: Opening) -> list[str]:
  return sorted(key.hex() for key in opening.sites.values())


def _add(
  kept: Keeper, lines: Sequence[dict[str, Any]], opening: Opening, what: str, **facts: Any
) -> None:
  line = {"what": what, "sites": _keys(opening)} | facts
  if line not in lines:
    durable.append(kept.folder / _FILE, json.dumps(line).encode())


def _lines(kept: Keeper) -> list[dict[str, Any]]:
  path = kept.folder / _FILE
  if not path.is_file():
    return []
  *lines, _ = path.read_bytes().split(b"\n")
  try:
    found = [dict(json.loads(line)) for line in lines]
    return [{**one, "what": str(one["what"]), "sites": list(one["sites"])} for one in found]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error!r}); restore it from a backup") from error
