"""The CPU form of `prng`'s inner loop: C shipped with the package, compiled on first use and cached for the user.

XLA's CPU compiler cannot keep ChaCha20's sixteen words in registers: plain JAX takes seven times the CPU time, on one
core. Without a C compiler, or with PRIMIA_NATIVE=0 in the environment, everything works, bit for bit the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import shlex
import subprocess
import tempfile
import threading
import warnings

import jax

from primia_jax.types import Array

_SOURCE = pathlib.Path(__file__).with_name("chacha20.c")
_TARGET = "primia_mask_sum"
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared")
_LOCK = threading.Lock()


def available() -> bool:
  """Whether the C form can be used here; the first call compiles it (about a second) unless the cache holds it.

  A failure is told once, as a RuntimeWarning, and leaves plain JAX. PRIMIA_NATIVE=0 turns the C form off.
  """
  if os.environ.get("PRIMIA_NATIVE", "1") == "0":
    return False
  with _LOCK:
    return _load()


def mask_sum(keys: Array, signs: Array, nonce: Array, size: int, dtype) -> Array:
  """`prng.mask_sum`, flat and unchecked, for CPU only and where `available()`."""
  call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((size,), dtype), vmap_method="broadcast_all")
  return call(keys, signs, nonce)


@functools.cache
def _load() -> bool:
  try:
    library = ctypes.cdll.LoadLibrary(str(_build()))
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library[_TARGET]), platform="cpu")
  except (OSError, RuntimeError, subprocess.SubprocessError) as error:
    detail = getattr(error, "stderr", None) or error
    warnings.warn(
      f"masks are made in plain JAX, at least 7 times slower: {_SOURCE.name} could not be built or loaded ({detail}). "
      "Install a C compiler or set CC; PRIMIA_NATIVE=0 silences this.",
      RuntimeWarning,
      stacklevel=3,
    )
    return False
  return True


def _build() -> pathlib.Path:
  """Compiles the source into the user's cache, under a name that tells source, header, compiler and CPU apart."""
  compiler = [*shlex.split(os.environ.get("CC", "cc")), *_FLAGS]
  header = pathlib.Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
  # The predefined macros name the compiler's version and every instruction set that -march=native found.
  macros = _run([*compiler, "-E", "-dM", "-x", "c", os.devnull])
  digest = hashlib.sha256(b"".join((" ".join(compiler).encode(), macros, header.read_bytes(), _SOURCE.read_bytes())))
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "primia_jax"
  library = cache / f"chacha20-{digest.hexdigest()[:32]}.so"
  if not library.exists():
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
      built = pathlib.Path(scratch) / library.name
      _run([*compiler, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(built)])
      built.replace(library)  # atomic: several processes may build at once
  return library


def _run(command: list[str]) -> bytes:
  return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
