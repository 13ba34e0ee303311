"""What a result depends on besides its configuration."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import subprocess
from typing import Any

import jax


def found() -> dict[str, str]:
  """Versions, git commit and device."""
  result = {"python": platform.python_version()}
  for package in ("jax", "jaxlib", "flax", "optax", "numpy", "primia-jax"):
    try:
      result[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      result[package] = "unknown"
  devices = jax.devices()
  commit = _git_commit(pathlib.Path(__file__).resolve().parents[1])
  return result | {
    "git commit": commit,
    "backend": jax.default_backend(),
    "device": f"{len(devices)} x {devices[0].device_kind}",
  }


def _git_commit(root: pathlib.Path) -> str:
  if not (root / ".git").exists():  # an installed copy must not name a surrounding repository
    return "unknown"
  describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
  options: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 10}
  try:
    return subprocess.run(["git", "-C", str(root), *describe], **options).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return "unknown"
