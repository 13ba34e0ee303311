"""Plans and messages as files: versioned, checksummed, without pickle.

A file that serves once (a `Blind` or `Correlations`) has mode 0600. Writing it uses the object up,
and reading it removes the file before its content is returned, so that a crash loses it rather
than lets it serve twice. Nothing can tell a copy of such a file from the first: make none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from primia_jax import durable
from primia_jax.mpc import planning
from primia_jax.mpc.circuit import Config
from primia_jax.mpc.committing import Committed
from primia_jax.mpc.lowering import portable
from primia_jax.mpc.messages import Blind, Correlations, Once, Publication, Question
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.protocol import Part

_FORMAT, _VERSION = "primia_jax mpc", 1
_MAGIC = b"PRIMIA\n"
_ONCE: dict[str, Any] = {kind.__name__: kind for kind in (Blind, Correlations)}
_SENT: dict[str, Any] = {kind.__name__: kind for kind in (Publication, Question)}


def write(path: str | os.PathLike, value: Any) -> None:
  """Writes a Plan, Blind, Publication, Correlations or Question to a new file.

  A Blind or Correlations is used up: from now on the file is the only one.

  Raises:
    FileExistsError: there is something at `path`.
    ValueError: a plan has something that only its own process can hold, or a single-use value was
      used.
    TypeError: the value is none of these.
  """
  path, arrays = pathlib.Path(path), _Arrays()
  if path.exists():
    raise FileExistsError(f"{path} exists; name a new file")
  match value:
    case Plan():
      header = _plan_header(value, arrays)
    case Blind() | Correlations():
      names = {k: getattr(value, k) for k in ("party", "publication", "inference")}
      header = names | {"secret": arrays.pack(value.take(value.party))}
      if isinstance(value, Correlations) and value.committed is not None:
        header["committed"] = [value.committed.seed, *value.committed.parts]
    case Publication() | Question():
      header = {"fields": [v if isinstance(v, str) else arrays.pack(v) for v in value]}
    case _:
      kinds = ", ".join(["Plan", *_ONCE, *_SENT])
      raise TypeError(f"a {type(value).__name__} has no file; use one of {kinds}")
  header |= {"format": _FORMAT, "version": _VERSION, "kind": type(value).__name__}
  payload = io.BytesIO()
  text = np.frombuffer(json.dumps(header).encode(), np.uint8)
  named: dict[str, Any] = {f"a{i}": v for i, v in enumerate(arrays.found)}
  np.savez(payload, header=text, **named)
  mode = 0o600 if isinstance(value, Once) else 0o666
  whole = _MAGIC + hashlib.sha256(payload.getvalue()).digest() + payload.getvalue()
  durable.create(path, whole, mode)
  durable.sync_folder(path.parent)


def check(path: str | os.PathLike) -> None:
  """Raises ValueError unless a file is whole and of this format; nothing is used up."""
  _parsed(pathlib.Path(path))


def read(path: str | os.PathLike) -> Any:
  """Reads what `write` wrote; a Blind or Correlations is removed first, for it serves once.

  Raises:
    FileNotFoundError: there is no such file, or its single use is over.
    ValueError: the file is damaged, or of another format or version.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path}: no such file; what serves once is removed when it is read")
  header, arrays = _parsed(path)
  kind = header["kind"]
  if kind == "Plan":
    return _plan(header, arrays, path)
  if kind in _SENT:
    fields = [v if isinstance(v, str) else _unpack(v, arrays) for v in header["fields"]]
    return _SENT[kind](*fields)
  path.unlink()  # only one of two readers succeeds
  durable.sync_folder(path.parent)
  names = [header[k] for k in ("party", "publication", "inference")]
  value = _ONCE[kind](*names, _unpack(header["secret"], arrays))
  if "committed" in header:
    seed, first, second = header["committed"]
    value.committed = Committed(seed, (first, second))
  return value


def _parsed(path: pathlib.Path) -> tuple[dict[str, Any], list[np.ndarray]]:
  content = path.read_bytes()
  start = len(_MAGIC) + 32
  if not content.startswith(_MAGIC):
    raise ValueError(f"{path} is not a file of a plan or message; write one with mpc.write")
  if hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
    raise ValueError(f"{path} is damaged: its checksum does not fit; copy or write it again")
  found = np.load(io.BytesIO(content[start:]), allow_pickle=False)
  header = json.loads(bytes(found["header"]))
  if (header["format"], header["version"]) != (_FORMAT, _VERSION):
    raise ValueError(
      f"{path} has format {header['format']} {header['version']}, but this version of primia_jax "
      f"reads {_FORMAT} {_VERSION}; use the version that wrote it"
    )
  return header, [found[f"a{i}"] for i in range(len(found.files) - 1)]


# ---- plans


def _plan_header(plan: Plan, arrays: _Arrays) -> dict[str, Any]:
  writer = portable.Writer()
  header = {
    "program": writer.program(plan.program),
    "owners": list(plan.owners),
    "config": dataclasses.asdict(plan.config),
    "bounds": None if plan.bounds is None else [v.hex() for v in plan.bounds.tolist()],
    "magnitudes": [v.hex() for v in plan.magnitudes],
    "digest": plan.digest,
  }
  arrays.found += writer.arrays
  return header


def _plan(header: dict[str, Any], arrays: list[np.ndarray], path: pathlib.Path) -> Plan:
  numbers = lambda texts: [float.fromhex(text) for text in texts]
  bounds = header["bounds"]
  plan = planning.lowered(
    portable.read(header["program"], arrays),
    tuple(header["owners"]),
    Config(**header["config"]),
    None if bounds is None else np.array(numbers(bounds)),
    tuple(numbers(header["magnitudes"])),
  )
  if plan.digest != header["digest"]:
    raise ValueError(
      f"{path} gives another plan here than where it was written; use the same versions of "
      "primia_jax and JAX, or plan again"
    )
  return plan


# ---- trees of arrays


class _Arrays:
  """Takes arrays out of a tree."""

  def __init__(self) -> None:
    self.found: list[np.ndarray] = []

  def pack(self, v: Any) -> Any:
    if v is None:
      return None
    if isinstance(v, dict):
      return {"dict": [[key, self.pack(x)] for key, x in v.items()]}
    if isinstance(v, tuple):
      kind = "part" if isinstance(v, Part) else "tuple"
      return {kind: [self.pack(x) for x in v]}
    self.found.append(np.asarray(v))
    return len(self.found) - 1


def _unpack(v: Any, arrays: Sequence[np.ndarray]) -> Any:
  match v:
    case {"dict": items}:
      return {key: _unpack(x, arrays) for key, x in items}
    case {"part": items}:
      return Part(*(_unpack(x, arrays) for x in items))
    case {"tuple": items}:
      return tuple(_unpack(x, arrays) for x in items)
    case int():
      return arrays[v]
  return v
