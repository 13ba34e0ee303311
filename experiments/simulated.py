"""`infer_encrypted` without a server: both parties and the dealer in this one process."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax import metrics, models
from primia_jax.data.dataset import Dataset, in_memory
from primia_jax.mpc import planning, pricing

from . import (
  compared,
  encrypted,
  folders,
  found_masks,
  inputs,
  model_files,
  phases,
  predictions,
  registers,
  unfinished,
  versions,
)
from .configs.data import Data
from .folders import private, write_private
from .planned import Infer


def infer(config: Infer) -> None:
  """Classifies the images or finds their masks, and prints and writes what it took.

  Raises:
    ValueError, FileNotFoundError: a flag is wrong.
  """
  encrypted.check(config)
  model, weights, label_names, model_config = encrypted.load_any(config.checkpoint, config.classes)
  of_pixels = model_config.name in models.SEGMENTERS
  size, _, channels = model_config.image_shape
  is_own_test = config.images == encrypted.OWN_TEST
  images = (
    _own_test(config, of_pixels) if is_own_test else _named(config, model_config, label_names)
  )
  calibration, source = encrypted.calibration_images(config, model_config, label_names)
  folder = None
  if config.output_dir:
    folder = private(pathlib.Path(config.output_dir).expanduser())

  print(
    "Encrypted inference, simulated: model owner, data owner and dealer run in this one process, "
    "which sees\n"
    "everything. In the code they are separate, and each is given only what its role holds.\n"
  )
  print(
    f"Model   {model_config.name} from {config.checkpoint}, {size} x {size} x {channels}, "
    f"{', '.join(label_names)}"
  )
  where = "the test images of that run" if is_own_test else config.images
  print(f"Images  {len(images)} from {where}, {config.batch} in a run of the protocol")
  for what, text in images.notes.items():
    print(f"        {what}: {text}")
  print(f"Calibrating on {source} and choosing the ring ...", flush=True)
  start = time.perf_counter()
  plan = encrypted.make_plan(config, model, weights, calibration)
  calibrating = time.perf_counter() - start
  rows, table = pricing.rows(plan.circuit), str(plan)
  print(
    f"\nThe plan, which both parties and the dealer see, for {_images(config.batch)}:\n\n{table}\n"
  )
  print(_who_learns_what(config, of_pixels))
  if any(row.what == "product" and row.layer != "argmax" for row in rows):
    print(
      "\nSome steps multiply secrets with each other, as GroupNorm does with the statistics of an "
      "image. A model\n"
      "trained with --norm=batch avoids them: its owner folds the statistics into the weights."
    )
  print(flush=True)
  images = in_memory(images)
  shown = np.asarray(images.images)
  named = plan.digest, registers.model_digest(weights), config.batch
  with unfinished.of(folder, named, shown) as kept:
    if kept.runs:
      print(f"{len(kept.runs)} runs of the protocol were done before this was stopped\n")
    result = phases.infer(plan, weights, shown, config.batch, kept)
    result.seconds["calibrate"] = calibrating
    about = f"{model_config.name}, {size} px"
    asked = _Asked(plan, model, weights, images, is_own_test, about)
    _tell(config, asked, result, rows, table, folder)


class _Asked(NamedTuple):
  """What was asked of which model.

  Attributes:
    plan, model, weights: of the model.
    images: that were asked about.
    has_labels: their classes are known.
    about: the model, for people.
  """

  plan: planning.Plan
  model: models.Model
  weights: Any
  images: Dataset
  has_labels: bool
  about: str


def _tell(
  config: Infer,
  asked: _Asked,
  result: phases.Result,
  rows: Sequence[pricing.Row],
  table: str,
  folder: pathlib.Path | None,
) -> None:
  """Prints answers, costs and the comparison, and writes them."""
  images, label_names = asked.images, asked.images.label_names
  ids = inputs.names_of(images)
  masks = found_masks.of(result.outputs) if result.outputs.ndim > 2 else None
  scores = _scores(images.labels, result.outputs, len(label_names)) if asked.has_labels else None
  if masks is not None:
    found_masks.show(ids, masks, label_names)
  elif scores is None or folder is None:
    predictions.show(ids, result.outputs, label_names)
  if scores is not None:
    print(
      f"\nUnder encryption, of {len(images)} images: accuracy {100 * scores['accuracy']:.1f} %, "
      f"MCC {scores['mcc']:.3f}"
    )
  summary = _costs(config, asked, rows, result)
  _print_costs(summary)
  checked: dict[str, Any] = {}
  if config.check:
    found = phases.compare(
      asked.plan, asked.model, asked.weights, images.images, config.batch, result.outputs
    )
    what = compared.Asked(config, ids, label_names, None if masks is None else masks.size)
    print(f"\n{compared.text(what, found)}")
    checked = compared.record(what, found) | {"encrypted_scores": scores}
  else:
    print(
      "\nA value beyond its planned range gives a wrong answer that nobody notices; --check finds "
      "such values."
    )
  if folder is None:
    return
  made = ["plan.txt", "costs.json"]
  if masks is not None:
    print("\n" + "\n".join(found_masks.write(folder, config, images, masks, config.overlays)))
  else:
    true = [label_names[label] for label in images.labels] if asked.has_labels else ()
    predictions.write(folder / "predictions.csv", ids, result.outputs, label_names, true)
    made.insert(0, "predictions.csv")
  write_private(folder / "plan.txt", f"{table}\n")
  if checked:
    write_private(folder / "check.json", json.dumps(checked, indent=2) + "\n")
    made.insert(-1, "check.json")
  write_private(folder / "costs.json", json.dumps(summary, indent=2) + "\n")
  print(f"\n{', '.join(made[:-1])} and {made[-1]} are in {folder}")


def _named(config: Infer, of: models.ModelConfig, label_names: tuple[str, ...]) -> Dataset:
  """The images that are named, in the form that the model takes."""
  size, _, channels = of.image_shape
  data = Data(
    data=f"folder:{config.images}",
    image_size=size,
    channels=channels,
    ignore=config.ignore,
    grey_bits=config.grey_bits or model_files.grey_bits(config.checkpoint),
    skip_bad_files=config.skip_bad_files,
    ct_window=model_files.ct_window(config.checkpoint),
  )
  form = size, channels, data.hounsfield
  images = found_masks.volume(config, of.name in models.SEGMENTERS, label_names, *form)
  return inputs.unlabelled_images(data, label_names) if images is None else images


def _own_test(config: Infer, of_pixels: bool) -> Dataset:
  """The images on which the run's own report tests, with their classes."""
  if of_pixels:
    raise ValueError(
      f"images={config.images}: the run's model learns masks, which are found in images that you "
      "name; name a folder or a volume"
    )
  try:
    return inputs.tested_images(folders.settings_of(config.checkpoint))
  except (FileNotFoundError, ValueError) as error:
    raise ValueError(
      f"{error} (the data of the run in {config.checkpoint}; name other images with --images)"
    ) from error


def _scores(labels: np.ndarray, outputs: np.ndarray, num_classes: int) -> dict[str, Any]:
  said = outputs.argmax(1) if outputs.ndim == 2 else np.rint(outputs).astype(int)
  counts = np.asarray(metrics.confusion_matrix(labels, said, num_classes))
  return {
    "accuracy": float(metrics.accuracy(counts)),
    "mcc": float(metrics.mcc(counts)),
    "confusion_matrix": counts.tolist(),
  }


def _who_learns_what(config: Infer, of_pixels: bool) -> str:
  what = "of each pixel of its own images" if of_pixels else "of its own images"
  answer = {
    "probabilities": f"the logits {what}, and computes probabilities from them",
    "label": f"the class {what}, but no probabilities or logits",
  }[config.output]
  return (
    "Who learns what, if all follow the protocol and the dealer colludes with neither party:\n"
    "  model owner  the number of images, and nothing else about them or the answers\n"
    f"  data owner   the plan, {answer}\n"
    "  dealer       the plan; neither weights nor images nor answers"
  )


def _costs(
  config: Infer, asked: _Asked, rows: Sequence[pricing.Row], result: phases.Result
) -> dict[str, Any]:
  """The content of `costs.json`: seconds as measured, bytes and rounds of one run as planned."""
  plan = asked.plan
  network = encrypted.parse_network(config.network)
  dealt, sent, rounds = pricing.total(plan.circuit, rows)
  seconds = result.seconds

  def phase(
    name: str, who: str, per: str, num_bytes: int = 0, num_rounds: int = 0
  ) -> dict[str, Any]:
    runs = result.runs if per == "run" else 1
    measured = seconds.get(name, 0.0) / runs
    return {
      "phase": name,
      "who": who,
      "once_per": per,
      "seconds": measured,
      "bytes": num_bytes,
      "rounds": num_rounds,
    }

  return {
    "model": asked.about,
    "images": len(asked.images),
    "images_in_a_run": config.batch,
    "runs": result.runs,
    "config": dataclasses.asdict(plan.config),
    "phases": [
      phase("calibrate", "model owner", "model"),
      phase("compile", "everybody", "model"),
      phase("encode weights", "model owner", "model"),
      phase("blind", "dealer", "model"),
      phase("publish", "model owner to data owner", "model", pricing.published_bytes(plan.circuit)),
      phase("deal", "dealer to data owner", "run", dealt),
      phase("prepare", "both parties", "run"),
      phase("encode images", "data owner", "run"),
      phase("online", "both parties, each way", "run", sent, rounds),
    ],
    "layers": [layer._asdict() for layer in phases.layers(plan, rows, result)],
    "steps": [row._asdict() for row in rows],
    "network": {
      "round_trip_seconds": network.round_trip,
      "bits_per_second": network.bandwidth,
      "online_seconds": network.seconds(rounds, sent),
      "deal_seconds": network.seconds(0, dealt),
      "publish_seconds": network.seconds(0, pricing.published_bytes(plan.circuit)),
    },
    "versions": versions.found(),
  }


def _print_costs(summary: dict[str, Any]) -> None:
  text = pricing.bytes_text
  each = _images(summary["images_in_a_run"])
  print(f"\n{'phase':<14} {'who':<26} {'once per':<10} {'time':>10} {'bytes':>10} {'rounds':>7}")
  for p in summary["phases"]:
    per = each if p["once_per"] == "run" else "model"
    size, rounds = (text(p["bytes"]) if p["bytes"] else "", p["rounds"] or "")
    print(
      f"{p['phase']:<14} {p['who']:<26} {per:<10} {_time(p['seconds']):>10} {size:>10} {rounds:>7}"
    )
  print(f"\n{'layer':<28} {'steps':<44} {'online':>10} {'dealt':>10} {'sent':>10} {'rounds':>7}")
  for layer in summary["layers"]:
    steps = _shorten(", ".join(_counted(layer["steps"])), 44)
    print(
      f"{_shorten(layer['name'], 28):<28} {steps:<44} {_time(layer['seconds']):>10} "
      f"{text(layer['dealt']):>10} "
      f"{text(layer['sent']):>10} {layer['rounds']:>7}"
    )
  network = summary["network"]
  link = (
    f"{1e3 * network['round_trip_seconds']:g} ms and {network['bits_per_second'] / 1e6:g} Mbit/s"
  )
  print(f"\nCommunication over a link of {link} would take")
  print(f"  online            {_time(network['online_seconds']):>10} for {each}, besides computing")
  print(f"  deal, beforehand  {_time(network['deal_seconds']):>10} for {each}")
  print(f"  publish           {_time(network['publish_seconds']):>10} once per model")


def _images(number: int) -> str:
  return "1 image" if number == 1 else f"{number} images"


def _counted(steps: Sequence[str]) -> list[str]:
  """max, max, relu -> 2 max, relu, in order of first appearance."""
  return [
    f"{n} {step}" if (n := list(steps).count(step)) > 1 else step for step in dict.fromkeys(steps)
  ]


def _shorten(text: str, width: int) -> str:
  return text if len(text) <= width else text[: width - 1] + "…"


def _time(seconds: float) -> str:
  return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
