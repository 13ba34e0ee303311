"""Reconstruction from an epoch's update of the run's model, by images at a site and batch size."""

from __future__ import annotations

import jax
import numpy as np

from primia_jax.attacks import grid, tuning
from primia_jax.attacks.evidence import Evidence
from primia_jax.metrics import clopper_pearson

from .. import markdown
from . import context as shared
from . import grid_pictures, laboratory, parts
from .context import Context
from .parts import Part

_SITE_IMAGES, _BATCHES = (1, 8, 32, 128, 512), (1, 4, 8)  # Hatamizadeh et al. 2023
_LEAST = 8  # images attacked in each cell, at least
_TUNING = 24  # images on which the weight of total variation is chosen
_RATE = 0.1  # of the sites' SGD
_RATES, _IMAGES = "grid.png", "grid_images.png"
_ATTACK = "Dimitrov et al. 2022, total variation"


def audit(context: Context) -> Part:
  """Attacks each cell whose images the run has, at its model, on its images."""
  title, effort = "Reconstruction by images at a site", context.effort
  if context.config.federation.algorithm == "fedbn":
    return Part(title, ("Left out: under FedBN sites have no common model.",))
  on = laboratory.bench(context, sum(context.images.train.sizes), 1)
  pools = _images(context, on)
  left = len(pools.attacked[1])
  if left < _LEAST or not len(pools.decoys) or min(on.images.shape[1:3]) < 11:
    return Part(title, ("Left out: there are too few images, or they are below 11 pixels.",))
  sites = sorted({1, max(2, context.config.sites_in_round)})
  cells = grid.cells(_SITE_IMAGES, _BATCHES, sites, min(left, effort.grid_images))
  search = grid.Search(steps=effort.iterations, least=_LEAST, rate=_RATE)
  key, model = jax.random.key(effort.audit_seed), (on.model.params, on.model.model_state)
  folder = context.output / parts.FOLDER / "grid"
  about = f"{context.fingerprint} seed {effort.audit_seed} candidates {effort.candidates}"
  found = grid.explore(
    key, cells, context.loss_fn, model, pools, search, folder, about, context.note
  )
  chance = 1 / (len(pools.decoys) + 1)
  own = f"{context.data_name}, {on.which}"
  grid_pictures.rates(found, chance, context.output / _RATES, own)
  grid_pictures.images(found, pools.attacked[0], context.output / _IMAGES, own)
  evidence = tuple(
    _evidence(cell, one, found.controls[cell], chance) for cell, one in found.outcomes.items()
  )
  rows = [
    (
      f"{cell.num_images:,}", str(cell.batch_size), grid_pictures.view(cell.num_sites),
      f"{one.psnr.mean():.1f}", f"{one.ssim.mean():.2f}", f"{one.named.mean():.0%}",
      f"{found.controls[cell].named.mean():.0%}", str(one.steps),
      str(tuning.Tuned(one.weight, one.is_at_end)),
    )
    for cell, one in found.outcomes.items()
  ]  # fmt: skip
  head = ("images at a site", "batch", "seen", "PSNR (dB)", "SSIM", "named", "control", "steps",
          "total variation")  # fmt: skip
  text = (
    f"Each site makes one epoch of plain SGD from {on.which}, with a learning rate of {_RATE:g} "
    "and without augmentation, on so many of the run's images. The adversary knows all labels and "
    "the order of images, has one site's update or the mean of several, and searches for all "
    f"images together. A true image is named where a guess is nearer to it than all guesses are to "
    f"{len(pools.decoys)} public images. A search for many images has fewer steps; its control is "
    "a single image alone in as many. Intervals take the images of an update as independent, which "
    "they are not.",
    f"Cells of more than {min(left, effort.grid_images)} images together are left out "
    "(--grid_images, and images that the run has).",
    markdown.table(head, rows),
  )
  pictures = {
    _RATES: "Images named, by images at a site",
    _IMAGES: "Originals and guesses; below each its SSIM",
  }
  return Part(title, text, evidence, (), pictures)


def _images(context: Context, on: laboratory.Bench) -> grid.Images:
  """The sites' images, the last of them to tune on, and public ones as decoys, all different."""
  test = context.images.test
  public, _ = shared.take(test, np.arange(min(context.effort.candidates, len(test.labels))))
  flat = lambda images: images.reshape(len(images), -1)
  known = {row.tobytes() for row in flat(on.images)}
  first = np.unique(flat(public), axis=0, return_index=True)[1]
  decoys = public[[i for i in np.sort(first) if flat(public[i : i + 1])[0].tobytes() not in known]]
  stored = (on.images / 255).astype(np.float32)
  split = max(0, len(stored) - _TUNING)
  return grid.Images(
    (stored[:split], on.labels[:split]),
    (stored[split:], on.labels[split:]),
    (decoys / 255).astype(np.float32),
  )


def _evidence(cell: grid.Cell, one: grid.Outcome, control: grid.Outcome, chance: float) -> Evidence:
  """A cell beside its control."""
  rate = lambda named: (float(named.mean()), clopper_pearson(int(named.sum()), len(named)))
  measure = f"identification among {round(1 / chance)}"
  beside = Evidence(
    "honest server, one image and one step", _ATTACK, "none", measure, *rate(control.named), chance,
    occurs=False,
  )  # fmt: skip
  alone = cell == (1, 1, 1)
  return Evidence(
    f"honest server, an epoch of {grid_pictures.count(cell.num_images)}, batch {cell.batch_size}",
    _ATTACK,
    "none" if cell.num_sites == 1 else f"secure aggregation of {cell.num_sites} sites",
    measure, *rate(one.named), chance, None if alone else beside, occurs=False,
  )  # fmt: skip
