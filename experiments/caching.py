"""Where compiled programs are kept on disk, for the next process."""

from __future__ import annotations

import os
import pathlib

import jax


def keep() -> None:
  """Keeps programs that took a second or more to compile."""
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  folder = pathlib.Path(home) / "primia_jax" / "xla"
  jax.config.update("jax_compilation_cache_dir", str(folder))


def keep_all() -> None:
  """Keeps smaller ones, too, for work that has many of them."""
  keep()
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
