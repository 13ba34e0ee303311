"""Chest X-rays from the update of an epoch, by images at a site, batch size and secure aggregation.

  python -m benchmarks.chest_grid --results_dir=runs/chest_grid

The form of the grid is that of Hatamizadeh et al. 2023: 1, 8, 32, 128 and 512 images at a site,
batches of 1, 4 and 8, the update of one site and the mean of three. Images have 32 px; the model is
an untrained sigmoid LeNet (Zhu et al. 2019), and sites make one epoch of SGD. The attacker knows
all labels and the order of images. A search for more than 32 images is made with a third of the
steps, and for more than 128 with 0.15 of them: the control is a single image in as many steps.

Identification: is a true image nearer to some guess than all of them are to each of 499 decoys?
Chance is 1 in 500. Images of one update are not independent, so that intervals are too narrow
where a cell has one attack.

Each cell is kept in the folder when it is done: start it again to continue. grid.png and
images.png, which shows X-rays, are drawn there.
"""

from __future__ import annotations

import pathlib

import jax
from absl import app, flags, logging

from benchmarks import attacked, measuring
from experiments.audits import grid_pictures
from primia_jax.attacks import grid
from primia_jax.metrics import clopper_pearson

_DATA = flags.DEFINE_string("data", "../shared/data/chest_xray_224.tar", "Folder or tar of X-rays.")
_RESULTS = flags.DEFINE_string("results_dir", None, "Folder of the cells.", required=True)
_SITE_IMAGES = flags.DEFINE_list("site_images", "1,8,32,128,512", "Images at a site.")
_BATCHES = flags.DEFINE_list("batches", "1,4,8", "Batch sizes.")
_SITES = flags.DEFINE_list("sites", "1,3", "Sites in the sum.")
_STEPS = flags.DEFINE_integer("steps", 400, "Of a search for up to 32 images.", lower_bound=10)
_MOST = flags.DEFINE_integer("most", 1536, "Images together, at most.", lower_bound=1)
_SIZE, _DECOYS, _CLASSES = 32, 499, 3


def main(_):
  images, labels = attacked.images(_DATA.value, "train", _SIZE, 1)
  first, second = _DECOYS + 1536, _DECOYS + 1664
  pools = grid.Images(
    (images[_DECOYS:first], labels[_DECOYS:first]),
    (images[first:second], labels[first:second]),
    images[:_DECOYS],
  )
  params, _, loss_fn = attacked.network("lenet", _SIZE, 1, _CLASSES)
  sizes, batches, sites = ([*map(int, flag.value)] for flag in (_SITE_IMAGES, _BATCHES, _SITES))
  cells = grid.cells(sizes, batches, sites, _MOST.value)
  search = grid.Search(steps=_STEPS.value)
  folder = pathlib.Path(_RESULTS.value)
  found = grid.explore(
    jax.random.key(0), cells, loss_fn, (params, {}), pools, search, folder, f"X-rays {_SIZE} px",
    lambda text: logging.info("%s", text),
  )  # fmt: skip
  for cell, one in found.outcomes.items():
    control = found.controls[cell]
    name = f"{cell.num_images} images at each of {cell.num_sites} sites, batch {cell.batch_size}"
    more = {"steps": one.steps, "weight": one.weight, "attacks": one.num_attacks}
    more |= {"weight_at_end": one.is_at_end}
    measuring.say(f"{name}: PSNR", one.psnr.tolist(), "dB", None, **more)
    measuring.say(f"{name}: SSIM", one.ssim.tolist(), "SSIM", None, **more)
    measuring.say(
      f"{name}: identification among {_DECOYS + 1}", one.named.astype(float).tolist(), "rate", None,
      value=float(one.named.mean()), control=float(control.named.mean()),
      interval=[round(x, 4) for x in clopper_pearson(int(one.named.sum()), len(one.named))], **more,
    )  # fmt: skip
  title = f"chest X-rays, {_SIZE} px, untrained LeNet"
  grid_pictures.rates(found, 1 / (_DECOYS + 1), folder / "grid.png", title)
  grid_pictures.images(found, pools.attacked[0], folder / "images.png", title)


if __name__ == "__main__":
  logging.set_verbosity(logging.INFO)
  app.run(main)
