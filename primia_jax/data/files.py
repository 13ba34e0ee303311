"""Finds and reads the image files of a folder, or of an uncompressed tar archive, read in place."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import posixpath
import re
import stat
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from primia_jax.data import decode

# Files and folders that systems and publishers leave among images. Any other file that is not an
# image is an error.
JUNK = (".*", "__MACOSX", "Thumbs.db", "desktop.ini", "DICOMDIR", "README*", "LICENSE*")

_SHOWN = 10  # names in a message


class Files(NamedTuple):
  """The image files of a folder or tar: sorted names relative to it, and a function from a name to
  its bytes.
  """

  root: str
  names: tuple[str, ...]
  read: Callable[[str], bytes]


def list_files(path: str | os.PathLike[str], ignore: Sequence[str] = ()) -> Files:
  """Lists the images of a folder or tar, or one image file. Raises as `read_folder`."""
  root = pathlib.Path(path)
  patterns = (*JUNK, *ignore)
  if root.is_dir():
    names, folders = _walk(root, patterns)
    read: Callable[[str], bytes] = partial(read_file, root)
  elif root.suffix == ".tar" and root.is_file():
    members, folders = _index_tar(root)
    names, read = list(members), partial(_read_member, root, members)
  elif root.is_file():
    names, folders, read, root = [root.name], [], partial(read_file, root.parent), root.parent
  else:
    raise FileNotFoundError(f"there is no image folder or tar at {root}; check the path")
  names = sorted(name for name in names if not _is_ignored(name, patterns))
  files = Files(str(root), tuple(names), read)
  if others := [name for name in names if not is_image(name)]:
    suffix = posixpath.splitext(others[0])[1]
    pattern = f"*{suffix}" if suffix else posixpath.basename(others[0])
    raise ValueError(
      f"{these(str(root), others)} not an image ({', '.join(decode.SUFFIXES)}); move "
      f"{them(others)} elsewhere, or leave {them(others)} out with --ignore='{pattern}'"
    )
  parents = {str(parent) for name in names for parent in pathlib.PurePosixPath(name).parents}
  empty = [one for one in sorted(folders) if one not in parents and not _is_ignored(one, patterns)]
  if empty:
    named = f"folder {root}/{empty[0]} holds"
    if len(empty) > 1:
      named = f"the folders {listed(empty)} of {root} hold"
    raise ValueError(f"{named} no image; remove {them(empty)} or put images there")
  if not names:
    raise ValueError(f"{root} holds no image ({', '.join(decode.SUFFIXES)}); check the path")
  return files


def is_image(name: str) -> bool:
  """Whether a file's name is one of an image."""
  suffix = posixpath.splitext(name)[1].lower()
  # DICOM files are often named by their UID, so they have no suffix, or a number as a suffix.
  return suffix in decode.SUFFIXES or re.fullmatch(r"(\.\d+)?", suffix) is not None


def listed(names: Sequence[str]) -> str:
  """The first names, and how many there are."""
  more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more


def these(root: str, names: Sequence[str]) -> str:
  """Names files as the subject of a sentence, with its verb."""
  if len(names) == 1:
    return f"{root}/{names[0]} is"
  return f"{len(names)} files of {root} ({listed(names)}) are"


def them(names: Sequence[str]) -> str:
  """The pronoun of such names."""
  return "it" if len(names) == 1 else "them"


def _is_ignored(name: str, patterns: Sequence[str]) -> bool:
  """Patterns are of a file's or folder's name, or with a slash of the path below the root."""
  parts = name.split("/")
  paths = ["/".join(parts[: i + 1]) for i in range(len(parts))]
  return any(
    fnmatch.fnmatchcase(one, pattern)
    for pattern in patterns
    for one in (paths if "/" in pattern else parts)
  )


def _walk(root: pathlib.Path, patterns: Sequence[str]) -> tuple[list[str], list[str]]:
  """Returns the files and the folders below `root`, relative to it. Follows links."""
  names, folders = [], []

  def fail(error: OSError) -> None:
    raise error  # by default, os.walk skips a folder that cannot be listed

  for folder, children, files in os.walk(root, onerror=fail, followlinks=True):
    children[:] = [child for child in children if not _is_ignored(child, patterns)]
    relative = pathlib.Path(folder).relative_to(root)
    for child in children:
      if os.path.islink(os.path.join(folder, child)) and _is_within(
        folder, os.path.join(folder, child)
      ):
        raise ValueError(f"{folder}/{child} links to a folder that contains it; remove the link")
    folders += [(relative / child).as_posix() for child in children]
    names += [(relative / file).as_posix() for file in files]
  return names, folders


def _is_within(folder: str, other: str) -> bool:
  return pathlib.Path(folder).resolve().is_relative_to(pathlib.Path(other).resolve())


def _index_tar(root: pathlib.Path) -> tuple[dict[str, tuple[int, int]], list[str]]:
  """Returns name -> (offset, length) in bytes of each file in a tar, and its folders."""
  members, folders, special = {}, [], []
  try:
    with tarfile.open(root, "r:") as archive:
      for member in archive:
        name = posixpath.normpath(member.name).lstrip("/")
        if member.isdir():
          folders += [name] if name != "." else []
        elif member.isreg() and not member.issparse():
          members[name] = (member.offset_data, member.size)
        else:
          special.append(name)
  except tarfile.TarError as error:
    raise ValueError(
      f"{root} is compressed, truncated or not a tar ({error}); copy it again or unpack it"
    ) from error
  if special:
    raise ValueError(
      f"{these(str(root), special)} a link or special file; unpack the archive and pass the folder"
    )
  return members, folders


def read_file(root: pathlib.Path, name: str) -> bytes:
  """Reads a file below a folder.

  Raises:
    FileNotFoundError, ValueError: it is not there, no file, or cannot be opened.
  """
  try:
    if not stat.S_ISREG(os.stat(root / name).st_mode):  # opening a FIFO would wait for ever
      raise ValueError(f"{root}/{name} is no file but a FIFO, socket or device; remove it")
    return (root / name).read_bytes()
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{root}/{name} has disappeared or is a broken link; restore it or remove the link"
    ) from error
  except OSError as error:
    raise ValueError(
      f"{root}/{name} cannot be opened ({error.strerror}); make it readable, or remove it"
    ) from error


def _read_member(root: pathlib.Path, members: dict[str, tuple[int, int]], name: str) -> bytes:
  offset, length = members[name]
  with open(root, "rb") as file:  # each call, since threads must not share a position
    file.seek(offset)
    data = file.read(length)
  if len(data) != length:
    raise ValueError(f"{root} is truncated within {name}; copy it again")
  return data
