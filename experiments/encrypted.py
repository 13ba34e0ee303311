"""The work of `infer_encrypted` before anything is dealt: checks of flags, model, calibration,
choice of the ring.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import models
from primia_jax.data.folder import read_images
from primia_jax.data.load import KINDS
from primia_jax.evaluation import batches
from primia_jax.mpc import fitting, planning, pricing
from primia_jax.mpc.circuit import CHECKED, SHARING, TRUSTED, Config
from primia_jax.mpc.gates.elementwise import COMPARISONS
from primia_jax.types import Array, PyTree

from . import folders, found_masks, inputs, model_files, settings, unfinished
from .configs.data import Data
from .planned import OUTPUTS, Infer, Planned

OWNERS = ("model_owner", "data_owner")
_NETWORKS = {"lan": pricing.LAN, "wan": pricing.WAN}
ENCODER = models.MEAN, models.STD  # of `normalised`, whatever a model's own normalisation is
_CALIBRATION_BATCH = 32  # images at a time; the ranges do not depend on it
OWN_TEST = "run"  # as images: those on which the training run's own report tests
WRITES = ("predictions.csv", "plan.txt", "costs.json", "check.json", *found_masks.FILES)
_FRACTION_BITS = (*range(10, 25, 2), 8, 6)  # in the order tried if only the ring is given


def check(s: Infer) -> None:
  """Refuses wrong flags before any work.

  Raises:
    ValueError, FileNotFoundError: the message names the flag and the cure.
  """
  check_planned(s)
  if s.images == OWN_TEST:
    _check_own_test(s)
  else:
    folders.check_images(s.images)
  found_masks.check(s)
  if s.output_dir:
    is_stopped = unfinished.is_there(pathlib.Path(s.output_dir).expanduser())
    folders.to_write(s.output_dir, () if is_stopped else WRITES)
  parse_network(s.network)


def _check_own_test(s: Infer) -> None:
  if pathlib.Path(OWN_TEST).exists():
    raise ValueError(
      f"images={OWN_TEST} means the test images of the training run, but there is a file or folder "
      f"of that name here; write --images=./{OWN_TEST} for it, or start the program elsewhere"
    )
  if pathlib.Path(s.checkpoint).expanduser().is_file():
    raise ValueError(
      f"images={OWN_TEST}: {s.checkpoint} is a checkpoint without images; name a file or a folder"
    )


def check_planned(s: Planned) -> None:
  """The same for what a model owner decides; raises as `check`."""
  check_protocol(s)
  choose("output", s.output, OUTPUTS)


def check_protocol(s: Any) -> None:
  """The same for what all programs of encrypted inference share: the model and the protocol.

  Raises:
    ValueError, FileNotFoundError: the message names the flag and the cure.
  """
  if not s.checkpoint:
    raise ValueError(
      "checkpoint is empty; name the folder of a training run, such as --checkpoint=runs/first"
    )
  path = pathlib.Path(s.checkpoint).expanduser()
  if not path.is_file() and not (path / "model.json").is_file():
    raise FileNotFoundError(
      f"checkpoint={s.checkpoint} holds no model.json; name the folder of a finished training run, "
      "or the file of a checkpoint"
    )
  choose("comparison", s.comparison, tuple(COMPARISONS))
  if s.ring_bits and not 8 <= s.ring_bits <= 64:
    raise ValueError(f"ring_bits={s.ring_bits}; use 8 to 64, or 0 to choose by target_error")
  most = (s.ring_bits or 64) // 2 - 1
  if s.fraction_bits and not 0 < s.fraction_bits <= most:
    raise ValueError(
      f"fraction_bits={s.fraction_bits}; use 1 to {most}, less than half the ring, or 0 to choose"
    )
  for name in ("target_error", "calibration_images", "batch"):
    if not 0 < getattr(s, name) < math.inf:
      raise ValueError(f"{name}={getattr(s, name)}; use a positive number")
  if not 1 <= s.margin < math.inf:
    raise ValueError(f"margin={s.margin}; use at least 1: ranges that calibration saw must fit")
  kind, _, where = s.calibration.partition(":")
  if s.calibration not in ("run", "phantom") and not (kind in KINDS and where):
    raise ValueError(
      f"calibration={s.calibration!r}; use run, phantom, folder:PATH, csv:PATH, npz:PATH or "
      "tfds:NAME"
    )
  if s.calibration == "run" and path.is_file():
    raise ValueError(
      f"calibration=run: {s.checkpoint} is a checkpoint without images; name some, such as "
      "--calibration=folder:PATH"
    )
  if kind in ("folder", "csv", "npz"):
    folders.check_there("calibration", s.calibration, where)


def choose(name: str, value: str, allowed: Sequence[str]) -> None:
  """Checks a flag that has a few values."""
  if value not in allowed:
    raise ValueError(f"{name}={value!r}; use {' or '.join(allowed)}")


def parse_network(text: str) -> pricing.Network:
  """Reads "lan", "wan" or "RTT_MS,MBIT".

  Raises:
    ValueError: the text is none of these.
  """
  if text in _NETWORKS:
    return _NETWORKS[text]
  try:
    milliseconds, megabits = (float(part) for part in text.split(","))
  except ValueError:
    milliseconds, megabits = -1.0, 0.0
  if not (0 <= milliseconds < math.inf and 0 < megabits < math.inf):
    raise ValueError(
      f"network={text!r}; use lan, wan, or RTT_MS,MBIT such as 40,100 (40 ms, 100 Mbit/s)"
    )
  return pricing.Network(milliseconds / 1e3, megabits * 1e6)


# ---- before anything is dealt


def calibration_images(
  s: Any, config: models.ModelConfig, label_names: tuple[str, ...]
) -> tuple[np.ndarray, str]:
  """The calibration images, uint8 [N, H, W, C] spread over the source, and their description.

  Raises:
    ValueError, FileNotFoundError: the source is wrong or missing.
  """
  size, _, channels = config.image_shape
  kind, _, path = s.calibration.partition(":")
  if kind == "run":
    try:
      run = folders.settings_of(s.checkpoint)
      if not run.data.site_data:  # sites of a round do not matter here, and may forbid this
        run = settings.replace(run, sites_in_memory=1, sites_per_round=0)
      if run.privacy.dp != "none" and not run.privacy.validates:
        raise ValueError(
          f"calibration=run: with dp={run.privacy.dp} and validation={run.privacy.validation} the "
          "run's validation images are unused, and a plan would tell every layer's range on them"
        )
      found = inputs.site_images(run)
      used, part = "validation", found.validation
      if not run.privacy.validates:
        used, part = "training", found.train
    except (FileNotFoundError, ValueError) as error:
      raise ValueError(
        f"{error} (the data of the training run; name other images with --calibration)"
      ) from error
    images: Any = part.dataset.images
    index = np.concatenate(part.sites)
    source = f"{used} images of the run ({run.data.site_data or run.data.data})"
  else:
    if s.calibration == "phantom" and channels != 1:
      raise ValueError(
        f"calibration=phantom: the phantom is grey, and the model takes {channels} channels; name "
        "other images with --calibration"
      )
    bits = s.grey_bits or model_files.grey_bits(s.checkpoint)
    if kind == "folder":  # labelled or not
      window = Data(data=s.calibration, ct_window=model_files.ct_window(s.checkpoint)).hounsfield
      _, images = read_images(
        os.path.expanduser(path),
        size=size,
        channels=channels,
        lazy=True,
        ignore=settings.names(s.ignore),
        grey_bits=bits,
        ct_window=window,
      )
    else:
      data = Data(data=s.calibration, image_size=size, channels=channels, grey_bits=bits)
      images = inputs.images_to_test(data, label_names=label_names)[0].images
    index, source = np.arange(images.shape[0]), f"images of {s.calibration}"
  chosen = index[np.linspace(0, len(index) - 1, min(s.calibration_images, len(index))).astype(int)]
  return np.asarray(images[chosen]), f"{len(chosen)} {source}"


def load_model(
  checkpoint: str, classes: str = ""
) -> tuple[models.Model, PyTree, tuple[str, ...], models.ModelConfig]:
  """The model, its (parameters, state), label names and configuration; see `model_files`.

  Raises:
    ValueError: as `load_any`, or the model gives masks.
  """
  loaded = load_any(checkpoint, classes)
  model_files.require_classes(loaded[-1], "this program")
  return loaded


def load_any(
  checkpoint: str, classes: str = ""
) -> tuple[models.Model, PyTree, tuple[str, ...], models.ModelConfig]:
  """The same, also of a model that gives masks.

  Raises:
    ValueError: the run holds several personal models, or gives images any number of labels.
  """
  model, trained, label_names, config = model_files.load_model(checkpoint, classes)
  if model_files.is_multi(checkpoint):
    raise ValueError(
      f"checkpoint={checkpoint} gives images any number of labels, and encrypted programs take "
      "models of one class an image; from Python, `primia_jax.mpc.secret` takes any model's apply"
    )
  if len(trained) > 1:
    raise ValueError(
      f"checkpoint={checkpoint} holds {len(trained)} personal models, one for each site (FedBN). "
      f"`evaluate` averages their probabilities, which would take a run of the protocol for each; "
      f"use a run of another algorithm"
    )
  return model, trained[0], label_names, config


def functions(model: models.Model) -> dict[str, Callable[[PyTree, Array], Array]]:
  """The functions to encrypt, (weights, normalised images) -> output, by output."""
  logits = lambda weights, images: model.apply(*weights, images, train=False)[0]

  def label(weights: PyTree, images: Array) -> Array:
    scores = logits(weights, images)
    with jax.named_scope("argmax"):
      return jnp.argmax(scores, axis=-1)

  return {"probabilities": logits, "label": label}


def make_plan(
  s: Planned, model: models.Model, weights: PyTree, calibration: np.ndarray, client: str = TRUSTED
) -> planning.Plan:
  """Calibrates, chooses ring and fraction bits if they are left open, and plans.

  Args:
    s: the flags.
    model: the model.
    weights: (parameters, state) of the model owner.
    calibration: uint8 [N, H, W, C].
    client: see `mpc.Config`.

  Raises:
    ValueError: no ring reaches the target, or the chosen ring is too small.
  """
  pairs, fns = examples(weights, calibration), functions(model)
  given = dataclasses.replace(s, ring_bits=32) if client == CHECKED and not s.ring_bits else s
  config = choose_config(given, fns["probabilities"], pairs)
  config = dataclasses.replace(config, client=client)
  fn, owners = fns[s.output], ("model_owner", "shared") if client == SHARING else OWNERS
  images = jax.ShapeDtypeStruct((s.batch, *calibration.shape[1:]), jnp.float32)
  return planning.plan(fn, owners, (weights, images), config, planning.calibrate(fn, owners, pairs))


def examples(weights: PyTree, calibration: np.ndarray) -> list[tuple[PyTree, Array]]:
  """The weights with some calibration images at a time."""
  size = min(len(calibration), _CALIBRATION_BATCH)
  return [(weights, normalised(part)) for part in batches(calibration, size)]


def choose_config(s: Any, logits: Callable, pairs: Sequence[tuple[PyTree, Array]]) -> Config:
  """The ring of the flags; what they leave open follows from target_error on these examples.

  Raises:
    ValueError: no ring reaches the target.
  """
  config = Config(exact=s.exact, comparison=s.comparison, margin=s.margin)
  if s.ring_bits and s.fraction_bits:
    weight_bits = min(config.weight_bits, s.ring_bits)
    return dataclasses.replace(
      config, num_bits=s.ring_bits, fraction_bits=s.fraction_bits, weight_bits=weight_bits
    )
  rings = [s.ring_bits] if s.ring_bits else [32, 64]
  fractions = [s.fraction_bits] if s.fraction_bits else _FRACTION_BITS
  open_choices = [(ring, bits) for ring in rings for bits in fractions if bits < ring // 2]
  candidates = open_choices if s.ring_bits or s.fraction_bits else fitting.CANDIDATES
  return fitting.fit(logits, OWNERS, pairs, s.target_error, config, candidates=candidates).config


def normalised(images: np.ndarray) -> Array:
  """uint8 images as the model takes them; their owner does this in the clear."""
  return models.normalise(jnp.asarray(images))
