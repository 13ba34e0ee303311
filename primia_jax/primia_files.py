"""Reads the checkpoints that PriMIA's training program saves (github.com/gkaissis/PriMIA).

Such a file is a dictionary: `model_state_dict`, `args` (the options of training), `val_mean_std`
(by which its images are normalised), `optim_state_dict` and `epoch`. It is read without PyTorch,
and no code from it is run.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from primia_jax import state_dicts
from primia_jax.models.config import ModelConfig

_WEIGHTS, _NORMALISATION = "model_state_dict", "val_mean_std"
# The class of the options has been in each of these, depending on how training was started.
_RECORDS = (
  "argparse.Namespace",
  "torchlib.utils.Arguments",
  "utils.Arguments",
  "__main__.Arguments",
)
_POOLS = {"avg": "mean", "max": "max"}
_NAMES = {3: ("normal", "bacterial", "viral")}  # as PriMIA's inference.py names its outputs


class Checkpoint(NamedTuple):
  """What a file of weights holds.

  Attributes:
    state_dict: the weights, by torchvision's names.
    mean, std: by which images are normalised, a number for each channel; empty where the file does
      not say.
    options: of PriMIA's training, by name; empty for a plain state dict.
  """

  state_dict: dict[str, np.ndarray]
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()
  options: Mapping[str, Any] = {}


def read_checkpoint(path: str | pathlib.Path) -> Checkpoint:
  """Reads a state dict, or a checkpoint of PriMIA around one.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is neither, or is damaged.
  """
  content = state_dicts.read_saved(path, _RECORDS)
  if not isinstance(content, dict) or _WEIGHTS not in content:
    return Checkpoint(state_dicts.flat(content, path))
  weights = state_dicts.flat(content[_WEIGHTS], f"{path}: {_WEIGHTS}")
  options = vars(content["args"]) if hasattr(content.get("args"), "__dict__") else {}
  if _NORMALISATION not in content:
    return Checkpoint(weights, (), (), options)
  try:  # a tensor [2, C], or two of [C]
    pair = [np.asarray(v, np.float64).reshape(-1) for v in content[_NORMALISATION]]
    mean, std = (tuple(v.tolist()) for v in pair)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{path}: {_NORMALISATION} is not a mean and a standard deviation ({error}); save them as "
      "PriMIA's train.py does"
    ) from error
  if len(mean) != len(std) or not np.isfinite(mean + std).all() or min(std, default=0) <= 0:
    raise ValueError(
      f"{path}: {_NORMALISATION} has the mean {mean} and the deviation {std}; each channel needs a "
      "finite mean and a positive deviation"
    )
  return Checkpoint(weights, mean, std, options)


def model_config(checkpoint: Checkpoint, path: str | pathlib.Path) -> ModelConfig:
  """The model of a checkpoint of PriMIA, for `models.build`.

  Args:
    checkpoint: as it was read.
    path: for messages.

  Raises:
    ValueError: it is a plain state dict, of a network that is not here, or of images that are
      prepared otherwise than here.
  """
  options, weights = checkpoint.options, checkpoint.state_dict
  if "model" not in options:
    raise ValueError(
      f"{path} does not say which model and images it is for, as a checkpoint of PriMIA does "
      "(args); take it as --pretrained weights of a run"
    )
  known = {
    "resnet-18": ("resnet18", "batch", "7x7", "dense", "conv1.weight", "fc.weight"),
    "vgg16": ("vgg16", "none", "7x7", "dense512", "features.0.weight", "classifier.6.weight"),
  }
  if options["model"] not in known:
    raise ValueError(
      f"{path} is a {options['model']} of PriMIA; models that are read: {', '.join(known)}"
    )
  name, norm, stem, head, first, last = known[options["model"]]
  if missing := [key for key in (first, last) if getattr(weights.get(key), "ndim", 0) < 2]:
    raise ValueError(f"{path} has no {missing[0]}, as a {options['model']} has; save it again")
  size = int(options.get("inference_resolution", 224))
  if options.get("clahe"):
    raise ValueError(
      f"{path} was trained on images after OpenCV's CLAHE (clahe=True), which is not done here; "
      "equalise the images yourself, and save the checkpoint with args.clahe = False"
    )
  if size % 32:
    raise ValueError(
      f"{path} is for images of {size} pixels, of which PriMIA's last pool leaves some out; "
      "networks for multiples of 32 are read"
    )
  pool = options.get("pooling_type", "avg")
  if pool not in _POOLS:
    raise ValueError(f"{path} has pooling_type={pool!r}; known: {', '.join(_POOLS)}")
  channels = weights[first].shape[1]
  mean, std = checkpoint.mean, checkpoint.std
  if not mean:  # PriMIA's own, for checkpoints before it saved them
    mean, std = (0.5,) * channels, (0.2,) * channels
  if len(mean) not in (1, channels):
    raise ValueError(
      f"{path} normalises {len(mean)} channels, and its network takes {channels}; save it again"
    )
  mean, std = (v * channels if len(v) == 1 else v for v in (mean, std))
  return ModelConfig(
    name, weights[last].shape[0], (size, size, channels), norm=norm, pool=_POOLS[pool], stem=stem,
    head=head, width=weights[first].shape[0] / 64, mean=mean, std=std,
  )  # fmt: skip


def label_names(num_classes: int) -> tuple[str, ...]:
  """The classes of a checkpoint in the order of its outputs: PriMIA's for three, else numbers."""
  return _NAMES.get(num_classes, tuple(map(str, range(num_classes))))
