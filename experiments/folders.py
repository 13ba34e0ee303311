"""Folders of runs, and of results, which are never overwritten."""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from . import refusals, settings

if TYPE_CHECKING:
  from .configs import Train

RUN = "config.json"  # what makes a folder that of a training run


def settings_of(run_dir: str) -> Train:
  """The settings of a run.

  Raises:
    FileNotFoundError: the folder holds no run.
    ValueError: another version of primia_jax began it.
  """
  from .configs import Train  # here, since programs without JAX have folders, too

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
  if held := [name for name in dict.fromkeys(writes) if (folder / name).exists()]:
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


def host_and_port(name: str, value: str, least: int = 1) -> None:
  """Raises ValueError unless a flag's value is HOST:PORT."""
  host, _, port = value.rpartition(":")
  if not host or not port.isdecimal() or not least <= int(port) < 2**16:
    raise ValueError(f"{name}={value!r}; use HOST:PORT, such as 127.0.0.1:7443")


def role(name: str, path: str) -> pathlib.Path:
  """Checks the folder of a role, which need not exist: nobody else may read it.

  Raises:
    ValueError: it cannot be written, or other users can read it.
  """
  folder = refusals.folder(name, path)
  if folder.is_dir() and folder.stat().st_mode & 0o077:
    raise ValueError(f"{name}={path} can be read by other users; chmod 700 it")
  return folder


def check_images(images: str) -> None:
  """Refuses images that are not there; raises as `check_there`."""
  if not images:
    raise ValueError("images is empty; name an image, a folder or a tar, such as --images=xray.png")
  check_there("images", images, images)


def check_there(name: str, value: str, path: str) -> None:
  """Refuses a file or folder that a flag names and that cannot be read.

  Raises:
    ValueError, FileNotFoundError: naming the flag, its value and the cure.
  """
  found = pathlib.Path(path).expanduser()
  if not found.exists():
    raise FileNotFoundError(f"{name}={value}: there is no such file or folder; check the path")
  if not (found.is_dir() or found.is_file()):  # opening a pipe would wait for ever
    raise ValueError(f"{name}={value}: {found} is a pipe or device; name a file or folder")


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
