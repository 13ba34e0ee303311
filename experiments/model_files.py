"""The model of a finished run, and what it takes for images."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from primia_jax import models, pretrained, primia_files
from primia_jax.types import ModelState, Params

from . import settings


def save_model(folder: pathlib.Path, trained: list[tuple[Params, ModelState]]) -> None:
  """Saves models for `evaluate`, replacing older ones; called by the first process alone."""
  import orbax.checkpoint as ocp  # here, because the import takes half a second

  alone = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="model"
  )
  with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
    tree = [{"params": params, "model_state": model_state} for params, model_state in trained]
    checkpointer.save(folder.absolute(), {"models": tree}, force=True)


def load_model(
  run_dir: str, classes: str = ""
) -> tuple[models.Model, list[tuple[Params, ModelState]], tuple[str, ...], models.ModelConfig]:
  """Loads what `save_model` saved, or a checkpoint of PriMIA.

  Args:
    run_dir: the folder of a run, or the file of a checkpoint.
    classes: of a checkpoint, which does not name them: separated by commas; empty takes PriMIA's.

  Returns:
    (model, its parameters and state, one pair for each site where FedBN was used, label names, its
    configuration).

  Raises:
    FileNotFoundError: the folder holds no finished run.
    ValueError: as `primia_files`, or classes for a run, which names its own.
  """
  folder = pathlib.Path(run_dir).expanduser()
  if folder.is_file():
    return _load_checkpoint(folder, settings.names(classes))
  if classes:
    raise ValueError(
      f"classes={classes}: the run in {run_dir} names its own classes; leave it out, or name the "
      "file of a checkpoint of PriMIA"
    )
  import orbax.checkpoint as ocp

  about = settings.read_json(folder / "model.json")
  if not (folder / "model").is_dir():
    raise FileNotFoundError(f"{folder / 'model'} is missing; --run_dir must name a finished run")
  config = config_of(about["model"])
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore((folder / "model").absolute())
  trained = [(m["params"], m["model_state"] or {}) for m in tree["models"]]
  return models.build(config), trained, tuple(about["label_names"]), config


def config_of(record: Mapping[str, Any]) -> models.ModelConfig:
  """The configuration of a model, from its record in `model.json`."""
  shapes = {name: tuple(record[name]) for name in ("image_shape", "mean", "std") if name in record}
  return models.ModelConfig(**{**record, **shapes})


def _load_checkpoint(path: pathlib.Path, names: tuple[str, ...]) -> Any:
  checkpoint = primia_files.read_checkpoint(path)
  config = primia_files.model_config(checkpoint, path)
  if names and len(names) != config.num_classes:
    raise ValueError(
      f"classes={','.join(names)}: {path} has {config.num_classes} outputs; name each"
    )
  model = models.build(config)
  empty = jax.eval_shape(model.init, jax.random.key(0))
  trained = pretrained.convert(checkpoint.state_dict, *empty, source=str(path))
  return model, [trained], names or primia_files.label_names(config.num_classes), config


def _about(run_dir: str) -> dict[str, Any]:
  """The record of a run's model; empty for a checkpoint of PriMIA, which has none."""
  folder = pathlib.Path(run_dir).expanduser()
  return {} if folder.is_file() else settings.read_json(folder / "model.json")


def require_classes(config: models.ModelConfig, program: str) -> None:
  """Raises ValueError for a model that learns masks."""
  if config.name in models.SEGMENTERS:
    raise ValueError(
      f"the run's model is {config.name}, which learns masks, and {program} takes models that "
      "classify images; primia-infer finds masks under encryption"
    )


def ct_window(run_dir: str) -> str:
  """The window of the CT images on which a run's model was trained; empty if they had none."""
  return _about(run_dir).get("ct_window", "")


def is_multi(run_dir: str) -> bool:
  """Whether a run's model gives images any number of labels."""
  return _about(run_dir).get("multi_label", False)


def grey_bits(run_dir: str) -> int:
  """The bits of 16-bit grey images that a run was trained on; 0 where there were none, or several.

  Raises:
    FileNotFoundError: the folder holds no finished run.
  """
  return _about(run_dir).get("grey_bits", 0)


def take_form(values: flags.FlagValues, run_dir: str, config: models.ModelConfig) -> None:
  """Sets the flags of the images' form to what a run's model takes.

  Raises:
    ValueError: a flag asks for another form.
  """
  size, _, channels = config.image_shape
  set_form(values, size, channels, ct_window(run_dir), grey_bits(run_dir))


def set_form(
  values: flags.FlagValues, size: int, channels: int, window: str, grey_bits: int
) -> None:
  """Sets the flags of the images' form; raises ValueError if one asks for another form."""
  form = {"image_size": size, "channels": channels, "ct_window": window}
  for name, value in form.items():
    if values[name].present and values[name].value != value:
      raise ValueError(
        f"{name}={values[name].value}: the model takes {value or 'none'}; omit the flag"
      )
    values[name].value = value
  if not values["grey_bits"].present:
    values["grey_bits"].value = grey_bits
