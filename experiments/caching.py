"""Where compiled programs are kept on disk, for the next process."""

from __future__ import annotations

import os
import pathlib

import jax


def folder(name: str) -> pathlib.Path:
  """A folder of this user's cache."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "primia_jax" / name


def programs() -> pathlib.Path:
  """Where `mpc.multiprocess.online` keeps programs."""
  return folder("online")


def keep() -> None:
  """Keeps programs that took a second or more to compile, unless JAX_COMPILATION_CACHE_DIR or
  another setting says where and which.
  """
  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", str(folder("xla")))


def keep_all() -> None:
  """Keeps smaller ones, too, for work that has many of them."""
  keep()
  jax.config.update("jax_traceback_in_locations_limit", 0)  # it is then lowered a quarter faster
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
