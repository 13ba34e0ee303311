"""Files of feature statistics: some come with the programs, by name."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np

from primia_jax import models

_FOLDER = pathlib.Path(__file__).parents[1] / "statistics"
_KEYS = {"images", "model", "image_size", "mean", "std"}


def known() -> list[str]:
  """The names of those that come with the programs."""
  return sorted(path.stem for path in _FOLDER.glob("*.json"))


def path_of(name: str) -> pathlib.Path:
  """The file of a name, or of a path.

  Raises:
    FileNotFoundError: there is none.
  """
  path = _FOLDER / f"{name}.json" if name in known() else pathlib.Path(name).expanduser()
  if not path.is_file():
    raise FileNotFoundError(
      f"feature_statistics={name}: there is no such file; check the path, or use one of "
      f"{', '.join(known())}, which come with the programs"
    )
  return path


def read(name: str, model: str, image_size: int) -> models.FeatureStatistics:
  """Statistics of a model's features at one size of images.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it holds something else, or those of another model or size.
  """
  record = _record(name)
  for key, mine in (("model", model), ("image_size", image_size)):
    if record[key] != mine:
      raise ValueError(
        f"feature_statistics={name} are of {key}={record[key]}, and the run has {key}={mine}; make "
        "others with `python -m benchmarks.feature_statistics`"
      )
  return models.FeatureStatistics(*(np.asarray(record[key], np.float64) for key in ("mean", "std")))


def source(name: str) -> str:
  """Which public images they are of."""
  return str(_record(name)["images"])


def _record(name: str) -> dict[str, Any]:
  path = path_of(name)
  try:
    record = json.loads(path.read_text())
  except ValueError:
    record = None
  if not isinstance(record, dict) or set(record) != _KEYS:
    raise ValueError(
      f"feature_statistics={name}: {path} must be a JSON record of {', '.join(sorted(_KEYS))} and "
      "nothing else; make it with `python -m benchmarks.feature_statistics`"
    )
  return record


def write(
  path: pathlib.Path, statistics: models.FeatureStatistics, images: str, model: str, image_size: int
) -> None:
  """Writes what `read` reads, to six digits; `images` says which, and under which licence."""
  mean, std = ([float(f"{v:.6g}") for v in values] for values in statistics)
  about = {"images": images, "model": model, "image_size": image_size}
  lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
  lines += [f' "{key}": {json.dumps(v)}' for key, v in (("mean", mean), ("std", std))]
  path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
