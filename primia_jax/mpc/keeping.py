"""A party's program on disk, so that the next process neither traces nor lowers it.

A file is named after all that its content follows from: plan, party, this package's code, JAX, and
what the CPU offers. It tells nothing that the plan does not. XLA compiles what is read, or takes it
from JAX's own compilation cache. As there, whoever can change the files decides what the party
computes, so the folder must be this user's alone.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import pathlib
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jaxlib
import numpy as np

from primia_jax import durable, native
from primia_jax.mpc import segments
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.segments import Program, Segment

_NUMBERS = ("reads", "makes", "sends", "receives", "drops")  # of a segment
_DAMAGED = (zipfile.BadZipFile, ValueError, KeyError, TypeError, IndexError)


def path(folder: pathlib.Path, plan: Plan, party: int, opens: bool) -> pathlib.Path:
  """Where the program of a party of a plan is kept.

  Args:
    folder: for all programs.
    opens: see `multiprocess.online`.
  """
  facts = (
    plan.digest, party, opens, jax.__version__, jaxlib.__version__, jax.default_backend(),
    native.available(), native.has_wide_products(), _code(),
  )  # fmt: skip
  return folder / f"{hashlib.sha256(repr(facts).encode()).hexdigest()}.npz"


@functools.cache
def _code() -> str:
  """SHA-256 of the code that a program follows from."""
  package = pathlib.Path(native.__file__).parent
  own = [package / f"{name}.py" for name in ("native", "prng", "ring")]
  files = sorted([*own, *(package / "mpc").rglob("*.py")])
  return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def write(file: pathlib.Path, program: Program) -> None:
  """Keeps a program that was made with `segments.cut(..., exports=True)`.

  A file that cannot be written is no error: it only saves time, and a warning says so.
  """
  programs = list(dict.fromkeys(program.exported))
  header = {
    "parts": [
      {name: getattr(part, name) for name in _NUMBERS}
      | {"avals": _written(part.avals), "program": programs.index(exported)}
      for part, exported in zip(program.parts, program.exported, strict=True)
    ],
    "outputs": [*program.outputs],
    "reads": [*program.reads],
    "shapes": _written(program.shapes),
    "sizes": program.sizes,
  }
  arrays = [np.frombuffer(v, np.uint8) for v in (json.dumps(header).encode(), *programs)]
  content = io.BytesIO()
  np.savez(content, *arrays)
  try:
    file.parent.mkdir(0o700, parents=True, exist_ok=True)
    durable.replace(file, content.getvalue())
  except OSError as error:
    warnings.warn(f"{file} cannot be kept for the next process: {error}", stacklevel=2)


def read(file: pathlib.Path) -> Program | None:
  """A program that was kept, compiled; None if there is none, or the file is damaged."""
  try:
    with np.load(file, allow_pickle=False) as found:
      header, *programs = (found[f"arr_{i}"].tobytes() for i in range(len(found.files)))
    content = json.loads(header)
    compiled = [segments.compiled(v) for v in programs]
    parts = [_part(part, compiled[part["program"]]) for part in content["parts"]]
    shapes, sizes = _shapes(content["shapes"]), tuple(content["sizes"])
    return Program(parts, content["outputs"], content["reads"], shapes, sizes)
  except (OSError, *_DAMAGED):
    return None


def _part(found: dict[str, Any], run: Callable) -> Segment:
  numbers = {name: tuple(found[name]) for name in _NUMBERS}
  return Segment(run, avals=tuple(_shapes(found["avals"])), **numbers)


def _written(shapes: Any) -> list[Any]:
  return [[list(v.shape), np.dtype(v.dtype).str] for v in shapes]


def _shapes(found: Any) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for shape, dtype in found]
