"""What the folders around an image mean: its site, its split, its class or its patient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from primia_jax.data.files import Files, listed, them, these

SPLITS = {
  "train": "train",
  "training": "train",
  "val": "validation",
  "valid": "validation",
  "validation": "validation",
  "test": "test",
  "testing": "test",
}
LEVELS = ("site", "split", "class", "patient")
NOTHING = "*"  # a level without a meaning

# Classes that need no `label_names` to be known as classes.
_KNOWN = {"normal", "pneumonia"}


class Places(NamedTuple):
  """What folders say of each file; "" where they say nothing.

  Attributes:
    layout: the levels as given or recognised, for reports.
    splits: "train", "validation", "test", or "all" without split folders.
    folders: the path's folders other than split and class.
  """

  layout: str
  splits: list[str]
  classes: list[str]
  sites: list[str]
  patients: list[str]
  folders: list[str]


def levels(layout: str) -> tuple[str, ...]:
  """Reads a layout such as "site/split/class", from the root to the file.

  Raises:
    ValueError: it has another level, one level twice, or no class.
  """
  found = tuple(level.strip().lower() for level in layout.split("/"))
  named = [level for level in found if level != NOTHING]
  if set(named) - set(LEVELS) or len(set(named)) < len(named) or "class" not in named:
    raise ValueError(
      f"layout={layout!r} must name the folders from the root to the image by {', '.join(LEVELS)}, "
      f"each once at most and class always, or {NOTHING} for a folder that means nothing, such as "
      "site/class or */split/class/patient"
    )
  return found


def places(files: Files, layout: str = "", label_names: Sequence[str] | None = None) -> Places:
  """Takes folders as the layout says, or recognises `[SITE/][SPLIT/]CLASS/**`.

  Raises:
    ValueError: files are in no class folder, or other folders may be the classes as well.
  """
  return _given(files, layout) if layout else _recognised(files, label_names)


def _given(files: Files, layout: str) -> Places:
  named = levels(layout)
  parts = [name.split("/")[:-1] for name in files.names]
  if short := [n for n, p in zip(files.names, parts, strict=True) if len(p) < len(named)]:
    raise ValueError(
      f"layout={layout!r} wants {len(named)} folders around each image, but "
      f"{these(files.root, short)} in fewer; move {them(short)}, or change --layout"
    )
  of = lambda level: [p[named.index(level)] if level in named else "" for p in parts]
  splits = ["all"] * len(parts)
  if "split" in named:
    if unknown := sorted({one for one in of("split") if one.lower() not in SPLITS}):
      raise ValueError(
        f"layout={layout!r}: {listed(unknown)} of {files.root} are not splits "
        f"({', '.join(SPLITS)}); rename the folders, or change --layout"
      )
    splits = [SPLITS[one.lower()] for one in of("split")]
  used = {named.index(level) for level in ("split", "class") if level in named}
  folders = ["/".join(one for i, one in enumerate(p) if i not in used) for p in parts]
  return Places(layout, splits, of("class"), of("site"), of("patient"), folders)


def _recognised(files: Files, label_names: Sequence[str] | None) -> Places:
  parts = [name.split("/")[:-1] for name in files.names]
  where = [next((i for i, part in enumerate(p) if part.lower() in SPLITS), None) for p in parts]
  stray = [name for name, i in zip(files.names, where, strict=True) if i is None]
  has_split = len(stray) < len(where)
  if has_split and stray:
    verb = "is" if len(stray) == 1 else "are"
    raise ValueError(
      f"{files.root} has split folders (train, validation, test), but {listed(stray)} {verb} in "
      f"none; move {them(stray)}, or say what the folders mean with --layout"
    )
  given = {name.lower() for name in label_names or ()}
  start = 0  # the folders that contain everything
  while min(map(len, parts)) > start + 1 and len({p[start] for p in parts}) == 1:
    if parts[0][start].lower() in given | set(SPLITS):
      break
    start += 1
  above = {tuple(p[start:i]) for p, i in zip(parts, where, strict=True)} if has_split else {()}
  has_sites = len(above) > 1 and {len(one) for one in above} == {1}
  at = [start if i is None else i + 1 for i in where]
  lost = [name for name, p, i in zip(files.names, parts, at, strict=True) if i >= len(p)]
  if lost:
    raise ValueError(
      f"{these(files.root, lost)} in no class folder; move {them(lost)} into one "
      "(CLASS/IMAGE), or say what the folders mean with --layout"
    )
  known = given or _KNOWN
  if has_sites:
    _check_shared(files, [(p[i - 2], p[i]) for p, i in zip(parts, at, strict=True)], known)
  before = [NOTHING] * start + ["site"] * has_sites + ["split"] * has_split
  if not has_sites and _classes_are_inner(files, parts, at, where, known, before):
    at = [i + 1 for i in at]
    before += ["site"]
  is_inner = before[-1:] == ["site"]
  spots = list(zip(parts, at, where, strict=True))
  sites = [p[i - 1] if is_inner else p[w - 1] if has_sites and w else "" for p, i, w in spots]
  return Places(
    "/".join([*before, "class"]),
    ["all" if w is None else SPLITS[p[w].lower()] for p, i, w in spots],
    [p[i] for p, i, w in spots],
    sites,
    [""] * len(parts),
    ["/".join([*p[: (i - is_inner if w is None else w)], *p[i - is_inner : i], *p[i + 1 :]])
     for p, i, w in spots],
  )  # fmt: skip


def _check_shared(files: Files, pairs: Sequence[tuple[str, str]], known: set[str]) -> None:
  """Sites (outer) above splits share classes (inner); else outer folders may be the classes."""
  outer = {inner: {one for one, other in pairs if other == inner} for _, inner in set(pairs)}
  if {one.lower() for one in outer} <= known or max(map(len, outer.values())) > 1:
    return
  names = sorted({one for one, _ in pairs})
  raise ValueError(
    f"{files.root}: the folders {listed(names)} above the splits hold no folders of the same names "
    f"below ({listed(sorted(outer))}), so that either may be the classes; say what they mean: "
    "--layout=site/split/class, class/split/patient or class/split, after */ for each folder around"
  )


def _classes_are_inner(
  files: Files,
  parts: Sequence[Sequence[str]],
  at: Sequence[int],
  where: Sequence[int | None],
  known: set[str],
  before: Sequence[str],
) -> bool:
  """Whether the folders below those at `at` are the classes, as known names tell.

  Without splits, a folder name that returns in several others is enough for a doubt. With splits,
  SPLIT/CLASS is usual, and the doubt begins where all hold the same folders.
  """
  inner: dict[tuple[str, str], set[str]] = {}
  for p, i, w in zip(parts, at, where, strict=True):
    split = "" if w is None else SPLITS[p[w].lower()]
    inner.setdefault((split, p[i]), set()).update(p[i + 1 : i + 2])
  outer = {one for _, one in inner}
  below = [one for _, one in sorted(inner.items())]
  names = set().union(*below)
  has_split = where[0] is not None
  shared = set.intersection(*below)
  if not has_split:
    shared = {name for name in names if sum(name in one for one in below) > 1}
  if {one.lower() for one in outer} <= known:
    return False
  if {one.lower() for one in names} <= known and all(below):
    return True
  if len(outer) < 2 or len(names) < 2 or not shared or (has_split and shared < names):
    return False
  head = "/".join([*before, ""]) if before else ""
  one, other = sorted(outer)[0], sorted(shared)[0]
  raise ValueError(
    f"{files.root}: the folders {listed(sorted(outer))} hold folders of the same names, "
    f"{listed(sorted(shared))}, so that either may be the classes; say what they mean: "
    f"--layout={head}site/class where {other} is a class, {head}class/site or {head}class/patient "
    f"where {one} is one, or {head}class where inner folders mean nothing"
  )
