"""Compiles the C sources that are shipped with the package.

`native` does it on first use, and `setup.py` when it builds a wheel; so this imports no JAX.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess

SOURCES, HEADERS = (
  tuple(sorted(pathlib.Path(__file__).parent.glob(pattern))) for pattern in ("*.c", "*.h")
)
PORTABLE = pathlib.Path(__file__).with_name(
  "portable.so"
)  # in a wheel, for any CPU; not in a clone
ERRORS = (OSError, subprocess.SubprocessError)  # of a compiler that is missing or fails
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared")


def compiler() -> list[str]:
  """The compiler of the environment variable CC, or cc, with the flags of every build."""
  return [*shlex.split(os.environ.get("CC") or "cc"), *_FLAGS]


def build(library: pathlib.Path, interface: pathlib.Path, *more: str) -> None:
  """Compiles all sources into a library.

  Args:
    library: what to write.
    interface: the folder of XLA's headers.
    *more: further flags.

  Raises:
    OSError, subprocess.SubprocessError: there is no compiler, or it fails.
  """
  run([*compiler(), *more, f"-I{interface}", *map(str, SOURCES), "-o", str(library)])


def run(command: list[str]) -> bytes:
  """What a command prints; raises as `build`."""
  return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


def reason(error: Exception) -> str:
  """Why a library could not be built or loaded, in words."""
  if isinstance(error, FileNotFoundError) and error.filename == compiler()[0]:
    return f"there is no C compiler {error.filename!r}"
  printed = getattr(error, "stderr", None) or b""
  return printed.decode(errors="replace").strip() or str(error)
