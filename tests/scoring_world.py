"""Three hospitals and a coordinator that have approved to score one model together."""

import shutil

import numpy as np
from experiments_runs import NAMES, write_untrained

from experiments import joining, model_files, offering
from experiments.evaluations import Finished
from experiments.joining import Approve, Init, Join
from experiments.offering import Offer
from experiments.site_folders import Limits, Own
from primia_jax import evaluation
from primia_jax.models import normalise
from primia_jax.secagg import roster

SITES = range(3)
KINDS = ((0, 1, 2), (0, 1), (0, 1, 2))  # site 1 has no image of the third class
IMAGES = (24, 18, 30)
BINS = 16
FLOORLESS = Limits(fewest_patients=0, fewest_colluding=0)


def images_of(site, num=None):
  """(images, labels, patients) of a site's test split: two images of each patient."""
  rng, num = np.random.default_rng(site), num or IMAGES[site]
  images = rng.integers(0, 256, (num, 16, 16)).astype(np.uint8)
  return images, rng.choice(KINDS[site], num), np.array([f"{site}-{i // 2}" for i in range(num)])


def write_images(path, site, split="test", num=None):
  images, labels, patients = images_of(site, num)
  arrays = {"images": images, "labels": labels, "groups": patients}
  np.savez(path, **{f"{split}_{name}": array for name, array in arrays.items()})
  return f"npz:{path}"


def offer(root, text="", model="model"):
  at = root / "coordinator"
  offering.offer(str(at), Offer(text), Finished(str(root / model)))
  return at / "config.json"


def approve(root, site, model="model"):
  config = root / "coordinator" / "config.json"
  joining.approve(str(root / f"site_{site}"), Approve(str(config)), Finished(str(root / model)))


def make(root):
  """The hospitals' folders, site_N, and the coordinator's."""
  (root / "model").mkdir()
  write_untrained(root / "model", NAMES)
  for i in SITES:
    own = Own(write_images(root / f"images_{i}.npz", i))
    joining.init(str(root / f"site_{i}"), Init(i, f"hospital-{i}"), own, FLOORLESS)
  at = root / "coordinator"
  joining.init(str(at), Init(-1, "coordinator", "coordinator"), Own(), Limits())
  parts = ",".join(str(root / f"site_{i}" / "public.json") for i in SITES)
  joining.rosters(str(at), Join("lungs", parts))
  digest = roster.spoken(roster.digest(roster.decode((at / "roster.json").read_bytes())))
  offer(root, f"--score_bins={BINS}")
  for i in SITES:
    joining.rosters(str(root / f"site_{i}"), Join(accept=str(at / "roster.json"), digest=digest))
    approve(root, i)
  return root


def again(root, new):
  """A copy of all folders."""
  shutil.copytree(root, new, dirs_exist_ok=True)
  for name in ("coordinator", *(f"site_{i}" for i in SITES)):
    (new / name).chmod(0o700)
  return new


def pooled(root):
  """What one process finds on the test images of all: labels, probabilities, patients."""
  model, trained, *_ = model_files.load_model(str(root / "model"))
  predict = evaluation.predictor(model.apply, normalise)
  parts = zip(*map(images_of, SITES), strict=True)
  images, labels, patients = (np.concatenate(part) for part in parts)
  return labels, predict(trained, images[..., None]), patients
