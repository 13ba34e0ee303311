"""The flags of encrypted inference; importing them needs no JAX."""

from __future__ import annotations

import dataclasses
from typing import Any

OUTPUTS = ("probabilities", "label")


def _(default: Any, text: str) -> Any:
  return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Which:
  """Which model."""

  checkpoint: str = _(
    "", "model owner: folder of a finished training run, or a checkpoint of PriMIA (.pt)"
  )
  classes: str = _(
    "",
    "classes of a checkpoint of PriMIA, in the order of its outputs; empty takes normal, "
    "bacterial, viral for three",
  )
  output: str = _(
    "probabilities",
    "what the data owner learns: probabilities (from the logits, revealed to it alone), or label "
    "(only the class, found under encryption)",
  )


@dataclasses.dataclass(frozen=True)
class Protocol:
  """By which protocol, and on which images its ranges are calibrated."""

  comparison: str = _(
    "tables",
    "protocol for signs: tables (less dealt, more rounds) or fss (more dealt, fewer rounds)",
  )
  ring_bits: int = _(0, "bits of a shared number, 8 to 64; 0 chooses by target_error")
  fraction_bits: int = _(0, "bits after the binary point; 0 chooses by target_error")
  target_error: float = _(1e-3, "largest error allowed in a logit, on the calibration images")
  exact: bool = _(
    True,
    "exact truncation and comparison; --noexact is cheaper, each value off by at most one unit",
  )
  margin: float = _(2.0, "factor by which values may exceed the largest of calibration")
  calibration: str = _(
    "run",
    "model owner: images to calibrate on: run (the training run's validation images, or those that "
    "it trained on where it used none; a private run's are left alone), phantom, folder:PATH, "
    "csv:PATH, npz:PATH or tfds:NAME",
  )
  calibration_images: int = _(32, "number of calibration images")


@dataclasses.dataclass(frozen=True)
class Chosen(Protocol, Which):  # flags in the order of Which, Protocol
  """Which model is asked, and by which protocol."""

  grey_bits: int = _(0, "bits that 16-bit grey PNG and TIFF use; 0 takes those of the training run")


@dataclasses.dataclass(frozen=True)
class Planned(Chosen):
  """Which model, and by which protocol."""

  batch: int = _(1, "images in one run of the protocol")
  ignore: str = _("", "files and folders to leave out, as patterns separated by commas")


@dataclasses.dataclass(frozen=True)
class Infer(Planned):
  """What is classified, with which model, and by which protocol."""

  images: str = _(
    "",
    "data owner: an image file (PNG, JPEG, TIFF, BMP, DICOM), a folder or a tar of them; for masks "
    "also a NIfTI volume, whose axial slices are taken; run: the test images of the training run, "
    "whose classes are known",
  )
  skip_bad_files: bool = _(False, "go on without images that cannot be read, and name them")
  output_dir: str = _(
    "",
    "folder for predictions.csv (or masks), plan.txt and costs.json, created if needed, where an "
    "inference that was stopped goes on; empty writes no files",
  )
  check: bool = _(
    False,
    "also compute in the clear: compare with float32, name images whose class may differ, and find "
    "values beyond their range; with output_dir in check.json, too",
  )
  slices: str = _(
    "",
    "which axial slices of a NIfTI volume, counted from the feet, from 0, such as 40 or 40-60; "
    "empty takes all",
  )
  overlays: int = _(
    8,
    "with output_dir and a model of masks: draw this many images with the outlines that were "
    "found; they are IMAGES OF PATIENTS",
  )
  network: str = _(
    "wan", "link whose communication time is estimated: lan, wan, or RTT_MS,MBIT such as 40,100"
  )


@dataclasses.dataclass(frozen=True)
class Connect:
  """A clinic that asks a model owner's server; empty plays all roles here."""

  connect: str = _("", "HOST:PORT of the model owner's server (primia-serve)")
  folder: str = _("", "the clinic's own folder, of mode 0700")
  model: str = _("", "name of the publication, a folder below models")
  timeout: float = _(60.0, "longest wait, in seconds, for a message of the server")
  session_seconds: float = _(
    3600.0, "longest session, in seconds; the server has a limit of its own"
  )


def check_connect(values: Any) -> None:
  """Raises ValueError for flags of `Connect` where no server is named; values are absl's."""
  for name in ("folder", "model", "timeout", "session_seconds"):
    if values[name].present and not values["connect"].value:
      raise ValueError(
        f"{name}={values[name].value} without connect: it is a clinic's; name the server with "
        "--connect"
      )
