"""Folders of runs, and of results, which are never overwritten."""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
from collections.abc import Iterable, Iterator

from . import refusals, settings
from .configs import Train

RUN = "config.json"  # what makes a folder that of a training run


def settings_of(run_dir: str) -> Train:
  """The settings of a run.

  Raises:
    FileNotFoundError: the folder holds no run.
    ValueError: another version of primia_jax began it.
  """
  path = pathlib.Path(run_dir) / RUN
  saved = settings.load(path)
  if unknown := set(saved) - set(settings.flat(Train())):
    raise ValueError(f"{path} holds {sorted(unknown)}, which this version of primia_jax lacks")
  return settings.replace(Train(), **saved)


def to_write(output_dir: str, writes: Iterable[str]) -> pathlib.Path:
  """Checks the folder for a program's results, which need not exist.

  Args:
    output_dir: as the user wrote it.
    writes: the names of the files that the program may write.

  Raises:
    ValueError: the folder cannot be written, one of these files is there already, or the folder is
      that of a training run, whose report has the same names.
  """
  folder = refusals.folder("output_dir", output_dir)
  if (folder / RUN).exists():
    raise ValueError(
      f"output_dir={output_dir} is the folder of a training run, whose own report must stay; name "
      f"another, such as --output_dir={folder}_results"
    )
  if held := [name for name in writes if (folder / name).exists()]:
    raise ValueError(
      f"output_dir={output_dir} already holds {', '.join(held)} of an earlier result, which is "
      f"never overwritten; name another, such as --output_dir={folder}_2, or remove the files"
    )
  return folder


def role_folder(value: str, make: bool = False) -> pathlib.Path:
  """The folder of one role of encrypted inference, which its user alone can read.

  Args:
    value: as the user wrote it.
    make: make it, if it is not there.

  Raises:
    ValueError, FileNotFoundError: it is none, is missing, or others can read it.
  """
  if not value:
    raise ValueError(
      "folder is empty; name this institution's own folder, such as --folder=hospital"
    )
  path = refusals.folder("folder", value)
  if make:
    path.mkdir(0o700, parents=True, exist_ok=True)
  if not path.is_dir():
    raise FileNotFoundError(
      f"folder={value}: there is no such folder; make it with primia-certificate, or mkdir -m 700"
    )
  if path.stat().st_mode & 0o077:
    raise ValueError(f"folder={value} can be read by others; run chmod 700 on it")
  (path / "inbox").mkdir(0o700, exist_ok=True)
  return path


def role(name: str, path: str) -> pathlib.Path:
  """Checks the folder of a role, which need not exist: nobody else may read it.

  Raises:
    ValueError: it cannot be written, or other users can read it.
  """
  folder = refusals.folder(name, path)
  if folder.is_dir() and folder.stat().st_mode & 0o077:
    raise ValueError(f"{name}={path} can be read by other users; chmod 700 it")
  return folder


@contextlib.contextmanager
def alone(path: pathlib.Path) -> Iterator[None]:
  """Keeps a second process out while this one works on a run.

  Two would overwrite each other's checkpoints and lines.

  Raises:
    ValueError: another process holds the lock.
  """
  with path.open("w") as file:
    try:
      fcntl.flock(
        file, fcntl.LOCK_EX | fcntl.LOCK_NB
      )  # it ends with the process, even a killed one
    except BlockingIOError:
      raise ValueError(
        f"another process is at work in {path.parent}; wait for it or stop it"
      ) from None
    yield
