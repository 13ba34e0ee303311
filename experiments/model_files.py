"""The model of a finished run, and what it takes for images."""

from __future__ import annotations

import pathlib

from absl import flags

from primia_jax import models
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
  run_dir: str,
) -> tuple[models.Model, list[tuple[Params, ModelState]], tuple[str, ...], models.ModelConfig]:
  """Loads what `save_model` saved.

  Returns:
    (model, its parameters and state, one pair for each site where FedBN was used, label names, its
    configuration).

  Raises:
    FileNotFoundError: the folder holds no finished run.
  """
  import orbax.checkpoint as ocp

  folder = pathlib.Path(run_dir).expanduser()
  about = settings.read_json(folder / "model.json")
  if not (folder / "model").is_dir():
    raise FileNotFoundError(f"{folder / 'model'} is missing; --run_dir must name a finished run")
  config = models.ModelConfig(
    **about["model"] | {"image_shape": tuple(about["model"]["image_shape"])}
  )
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore((folder / "model").absolute())
  trained = [(m["params"], m["model_state"] or {}) for m in tree["models"]]
  return models.build(config), trained, tuple(about["label_names"]), config


def require_classes(config: models.ModelConfig, program: str) -> None:
  """Raises ValueError for a model that learns masks."""
  if config.name in models.SEGMENTERS:
    raise ValueError(
      f"the run's model is {config.name}, which learns masks, and {program} takes models that "
      "classify images; from Python, `primia_jax.mpc.secret` takes any model's apply"
    )


def ct_window(run_dir: str) -> str:
  """The window of the CT images on which a run's model was trained; empty if they had none."""
  return settings.read_json(pathlib.Path(run_dir) / "model.json").get("ct_window", "")


def grey_bits(run_dir: str) -> int:
  """The bits of 16-bit grey images that a run was trained on; 0 where there were none, or several.

  Raises:
    FileNotFoundError: the folder holds no finished run.
  """
  return settings.read_json(pathlib.Path(run_dir) / "model.json").get("grey_bits", 0)


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
