"""What was opened about a vendor's model: each image costs one query, and counts in one result.

The register lies in the vendor's folder. It holds marks of images, which the hospital makes under a
key in its own folder: HMAC-SHA256, so the vendor recognises an image that comes again and learns
nothing about any. That the marks are of the images that are scored is the hospital's word.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from primia_jax import durable
from primia_jax.types import PyTree

from . import folders

_FORMAT = 1


def marks(folder: pathlib.Path, images: Any) -> list[str]:
  """A mark of each image [N, H, W, C], by the hospital's own key, which is made on first use."""
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  path = folder / "key"
  if not path.exists():
    durable.create(path, os.urandom(32))
    durable.sync_folder(folder)
  key = path.read_bytes()
  if len(key) != 32:
    raise ValueError(f"{path} is damaged; restore it: under another key, images count as new ones")
  of = lambda image: f"{image.dtype}{image.shape}".encode() + np.ascontiguousarray(image).tobytes()
  return [hmac.new(key, of(np.asarray(image)), hashlib.sha256).hexdigest() for image in images]


def model_digest(weights: PyTree) -> str:
  """SHA-256 of the weights; for the vendor's own folder, since it confirms a guess of them."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
    array = np.ascontiguousarray(leaf)
    found.update(f"{path}{array.dtype}{array.shape}".encode() + array.tobytes())
  return found.hexdigest()


def check_new(folder: pathlib.Path, model: str, images: Sequence[str], learner: str = "") -> None:
  """Raises ValueError, as `charge` does, if an image is in an earlier result of the model, or of
  another model that the same learner has.
  """
  path = folder / "register.json"
  same = lambda e: e["model"] == model or (learner and e.get("learner", "") == learner)
  known = {mark for e in _entries(path) if same(e) for mark in e["images"]}
  if again := known & set(images):
    raise ValueError(
      f"{len(again)} of {len(images)} images are in an earlier result of this "
      f"{'vendor' if learner else 'model'} "
      f"({path}): the difference of two results tells the classes of single images; leave "
      "these images out"
    )


def charge(
  folder: pathlib.Path,
  model: str,
  opened: str,
  images: Sequence[str],
  budget: int,
  learner: str = "",
) -> int:
  """Enters a result before the protocol begins, so that a crash can overcharge, never undercharge.

  Args:
    folder: the vendor's; created if needed.
    model: its digest.
    opened: what is opened, and to whom.
    images: the marks.
    budget: images that all results of this model may count together.
    learner: the vendor, if it learns the result. The sums of a matrix's rows do not depend on the
      model, so that two results, also of two models, tell it the classes of images in one of them.

  Returns:
    How many queries of the budget are left.

  Raises:
    ValueError: the budget does not suffice, an image is in an earlier result of the same model, or
      another process is at work on the register.
  """
  folder.mkdir(parents=True, exist_ok=True, mode=0o700)
  path = folder / "register.json"
  with folders.alone(folder / "register.lock"):
    entries = _entries(path)
    before = [entry for entry in entries if entry["model"] == model]
    spent = sum(entry["queries"] for entry in before)
    if spent + len(images) > budget:
      raise ValueError(
        f"query_budget={budget}: {spent} of it are spent, and {len(images)} images cost one each; "
        "the vendor may raise it with --query_budget, or give fewer images"
      )
    check_new(folder, model, images, learner)
    entries.append(
      {
        "model": model,
        "opened": opened,
        "learner": learner,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "queries": len(images),
        "images": sorted(set(images)),
      }
    )
    record = {"format": _FORMAT, "results": entries}
    durable.replace(path, (json.dumps(record, indent=1) + "\n").encode())
  return budget - spent - len(images)


def _entries(path: pathlib.Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  try:
    record = json.loads(path.read_text())
    if record["format"] != _FORMAT:
      raise ValueError(f"it has format {record['format']}")
    return record["results"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"{path} is damaged ({error}); restore it from a backup: without it, results cannot be told "
      "apart from label queries"
    ) from error
