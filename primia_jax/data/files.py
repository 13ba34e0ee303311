"""Finds and reads the image files of a folder, or of an uncompressed tar archive, read in place."""

from __future__ import annotations

import fnmatch
import os
import pathlib
import posixpath
import re
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from primia_jax.data import decode

# Files and folders that systems and publishers leave among images. Any other file that is not an
# image is an error.
JUNK = (".*", "__MACOSX", "Thumbs.db", "desktop.ini", "DICOMDIR", "README*", "LICENSE*")


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
    read: Callable[[str], bytes] = partial(_read_file, root)
  elif root.suffix == ".tar" and root.is_file():
    members, folders = _index_tar(root)
    names, read = list(members), partial(_read_member, root, members)
  elif root.is_file():
    names, folders, read, root = [root.name], [], partial(_read_file, root.parent), root.parent
  else:
    raise FileNotFoundError(f"there is no image folder or tar at {root}; check the path")
  names = sorted(name for name in names if not _is_ignored(name, patterns))
  for name in names:
    suffix = posixpath.splitext(name)[1].lower()
    # DICOM files are often named by their UID, so they have no suffix, or a number as a suffix.
    if suffix not in decode.SUFFIXES and not re.fullmatch(r"(\.\d+)?", suffix):
      raise ValueError(
        f"{root}/{name} is not an image ({', '.join(decode.SUFFIXES)}); move it elsewhere, or add "
        "it to `ignore`"
      )
  parents = {str(parent) for name in names for parent in pathlib.PurePosixPath(name).parents}
  for folder in sorted(folders):
    if folder not in parents and not _is_ignored(folder, patterns):
      raise ValueError(f"folder {root}/{folder} holds no image; remove it or put its images there")
  if not names:
    raise ValueError(f"{root} holds no image ({', '.join(decode.SUFFIXES)}); check the path")
  return Files(str(root), tuple(names), read)


def _is_ignored(name: str, patterns: Sequence[str]) -> bool:
  return any(fnmatch.fnmatchcase(part, pattern) for part in name.split("/") for pattern in patterns)


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
  members, folders = {}, []
  try:
    with tarfile.open(root, "r:") as archive:
      for member in archive:
        name = posixpath.normpath(member.name).lstrip("/")
        if member.isdir():
          folders += [name] if name != "." else []
        elif member.isreg() and not member.issparse():
          members[name] = (member.offset_data, member.size)
        else:
          raise ValueError(
            f"{root}/{name} is a link or special file; unpack the archive and pass the folder"
          )
  except tarfile.TarError as error:
    raise ValueError(
      f"{root} is compressed, truncated or not a tar ({error}); copy it again or unpack it"
    ) from error
  return members, folders


def _read_file(root: pathlib.Path, name: str) -> bytes:
  try:
    return (root / name).read_bytes()
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{root}/{name} has disappeared or is a broken link; restore it or remove the link"
    ) from error


def _read_member(root: pathlib.Path, members: dict[str, tuple[int, int]], name: str) -> bytes:
  offset, length = members[name]
  with open(root, "rb") as file:  # each call, since threads must not share a position
    file.seek(offset)
    data = file.read(length)
  if len(data) != length:
    raise ValueError(f"{root} is truncated within {name}; copy it again")
  return data
