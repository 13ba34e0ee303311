"""What an encrypted inference has answered so far: one that was stopped goes on after its last run
of the protocol.

The folder lies among the data owner's results, holds its answers, and is removed when all are
written. Masks are in none of the files: each run of the protocol has fresh ones.
"""

from __future__ import annotations

import hashlib
import io
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from primia_jax import durable

from . import folders

FOLDER = "unfinished"
_OF, _LOCK = "of", "lock"
Seconds = Mapping[tuple[str, int], float]  # by (phase, operation); see `phases.Clock`


class Run(NamedTuple):
  """One run of the protocol.

  Attributes:
    outputs: [B, ...] float32, as the data owner learns them.
    seconds: what it took.
  """

  outputs: np.ndarray
  seconds: Seconds


class Kept:
  """The runs of the protocol that are done, on disk once `add` returns.

  Attributes:
    runs: in their order.
  """

  def __init__(self, folder: pathlib.Path | None):
    self._folder = folder
    self.runs: list[Run] = []
    while folder is not None and (path := self._path(folder)).is_file():
      with np.load(path) as saved:
        phases, operations = saved["phases"].tolist(), saved["operations"].tolist()
        names = zip(phases, operations, strict=True)
        took = dict(zip(names, saved["seconds"].tolist(), strict=True))
        self.runs.append(Run(saved["outputs"], took))

  def add(self, run: Run) -> None:
    """Keeps one more."""
    if self._folder is not None:
      phases, operations = zip(*run.seconds, strict=True)
      file = io.BytesIO()
      np.savez(
        file, outputs=run.outputs, phases=phases, operations=operations,
        seconds=[*run.seconds.values()],
      )  # fmt: skip
      durable.replace(self._path(self._folder), file.getvalue())
    self.runs.append(run)

  def _path(self, folder: pathlib.Path) -> pathlib.Path:
    return folder / f"run_{len(self.runs):06d}.npz"


def is_there(output_dir: pathlib.Path) -> bool:
  """Whether an inference into this folder was stopped."""
  return (output_dir / FOLDER / _OF).is_file()


@contextmanager
def of(output_dir: pathlib.Path | None, what: Any, images: np.ndarray) -> Iterator[Kept]:
  """What is done of an inference; when the context ends without an error, nothing remains of it.

  Args:
    output_dir: the folder of results, which exists; None keeps nothing.
    what: names the plan, the weights and how it is run.
    images: uint8 [N, H, W, C].

  Raises:
    ValueError: the folder holds answers of other images, or by another plan or model; or another
      process is at work.
  """
  if output_dir is None:
    yield Kept(None)
    return
  found = hashlib.sha256(f"{what}{images.shape}".encode() + np.ascontiguousarray(images).tobytes())
  folder, name = folders.private(output_dir / FOLDER), found.hexdigest().encode()
  with folders.alone(folder / _LOCK):
    if (folder / _OF).is_file() and (folder / _OF).read_bytes() != name:
      raise ValueError(
        f"output_dir={output_dir} holds answers of an inference that was stopped, of other images "
        f"or with other flags; go on with those, remove {folder}, or name another folder"
      )
    if not (folder / _OF).is_file():  # a crash took it first, and what is left may be of others
      _remove_answers(folder)
    durable.replace(folder / _OF, name)
    yield Kept(folder)
    _remove_answers(folder)  # before `_OF`, which says whose they are
    shutil.rmtree(folder)


def _remove_answers(folder: pathlib.Path) -> None:
  for path in folder.glob("run_*.npz"):
    path.unlink()
