"""Tiny runs of the binaries' own code, for several test files."""

import functools
import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from PIL import Image

from experiments import arms, inputs, model_files, settings, trainers
from experiments.configs import Train, privacy
from experiments.processes import Place
from primia_jax import models, sites, summation
from primia_jax.privacy import ledger
from primia_jax.privacy.chain import Chain

TINY = settings.replace(
  Train(),
  phantom_images=36,
  phantom_test_images=18,
  image_size=16,
  model="mlp",
  rounds=4,
  sync_epochs=1,
  batch_size=4,
  augment="none",
  optimizer="momentum",
  learning_rate=0.01,
  keep_optimizer=True,
)
PRIVATE = settings.replace(
  TINY, rounds=3, optimizer="sgd", learning_rate=0.1, keep_optimizer=False, dp="example",
  noise_multiplier=1.0, dp_seed=1,
)  # fmt: skip
SITE = settings.replace(PRIVATE, dp="site", weighting="uniform", class_weights=False, delta=0.1)
MOVING = settings.replace(SITE, dp_clip_quantile=0.5, l2_clip_norm=0.7)  # the clip of updates
FIXED = settings.replace(PRIVATE, dp_noise="banded", batch_size=2)  # batches in a fixed order
NAMES = ("cat", "dog", "owl")  # of `write_folder`


@functools.cache
def images_of(data, hospitals, seed):
  return inputs.site_images(Train(seed=seed, data=data, hospitals=hospitals))


def cohort_of(config):
  images = images_of(config.data, config.hospitals, config.seed)
  mine = np.arange(config.hospitals.num_sites)
  patients = inputs.count_patients(images.train)
  return trainers.Cohort("federated", images.train, images.validation, mine, patients)


def make_trainer(config, cohort):
  model_config = config.model.config(config.data, 3)
  model = models.build(model_config)
  return trainers.make_trainer(config, model, model_config, [cohort], Place(sites.scan()))


@functools.cache
def _compiled(config):
  return make_trainer(config, cohort_of(config))


def trainer_of(config):
  """A trainer that tests share, since it compiles; it holds no state, and dp_seed is not in it."""
  return _compiled(settings.replace(config, dp_seed=-1))


def train(
  config, folder: pathlib.Path, stop_after=None, trainer=None, ledger_dir=None, save_every=0.0
):
  """The federated arm; stopped after a round's line is written and before its checkpoint is. Its
  ledger lies below the folder, unless another is given.
  """

  def log(row):
    if row["round"] == stop_after:
      raise KeyboardInterrupt

  folder.mkdir(exist_ok=True)
  model_config, trainer = config.model.config(config.data, 3), trainer or trainer_of(config)
  ledger_dir = ledger_dir or folder / "ledger"
  cohort = cohort_of(config)
  return arms.train(config, cohort, trainer, model_config, folder, ledger_dir, log, save_every)


def ledgers(folder):
  """What the ledger says of each site of an arm, which `train` has trained."""
  return ledger.of_run(folder / ledger.LEDGER, Chain(folder / "ledger", read_only=True))


def charged(folder):
  """(release, times) of the ledger of site 0, in order."""
  return [(release.what, release.times) for release in ledgers(folder)[0].releases]


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def flags_of(config) -> list[str]:
  """The flags that differ from the default."""
  changed = settings.differences(settings.flat(Train()), config)
  return [
    (f"--{'' if value else 'no'}{name}" if isinstance(value, bool) else f"--{name}={value}")
    for name, (_, value) in changed.items()
  ]


def write_untrained(folder, names):
  """An untrained model of phantom images, as a finished run leaves one."""
  config = settings.replace(TINY, norm="").model.config(TINY.data, len(names))
  model_files.save_model(folder / "model", [models.build(config).init(jax.random.key(0))])
  about = {"label_names": names, "model": vars(config)}
  (folder / "model.json").write_text(json.dumps(about))
  return folder


def write_folder(root, splits=("",), each=6):
  """Images of three classes that their brightness tells apart."""
  for split in splits:
    for k, name in enumerate(NAMES):
      (root / split / name).mkdir(parents=True, exist_ok=True)
      for i in range(each):
        image = Image.fromarray(np.full((16, 16), 20 + 90 * k + i, np.uint8))
        image.save(root / split / name / f"{split}{i}.png")
  return root


def write_npz(path, order=(0, 1, 2), split="train"):
  """The same, where class k has the number order[k]."""
  kinds = np.repeat(np.arange(3), 6)
  images = (20 + 90 * kinds + np.tile(np.arange(6), 3)).astype(np.uint8)
  images = np.broadcast_to(images[:, None, None], (18, 16, 16))
  arrays = {f"{split}_images": images, f"{split}_labels": np.array(order)[kinds]}
  np.savez(path, **arrays)
  return path


class Drawn:
  """Records every secret and every key of masks that a run draws."""

  def __init__(self, patch):
    self.noise, self.masks = [], []
    fresh, begin = privacy.fresh_secrets, summation.simulation.begin

    def secrets(*of_sum):
      self.noise += list(out := fresh(*of_sum))
      return out

    def begun(*args):
      out = begin(*args)
      arrays = out.rows.keys, out.rows.self_mask, out.rows.noise
      self.masks += [key for a in arrays if a is not None for key in np.asarray(a).reshape(-1, 8)]
      return out

    patch.setattr(privacy, "fresh_secrets", secrets)
    patch.setattr(summation.simulation, "begin", begun)


def contents(folder):
  """The bytes of all files, and of all arrays in checkpoints, whose files are compressed."""
  for path in folder.rglob("*"):
    if path.is_file():
      yield path.read_bytes()
    elif path.name == "default" and path.parent.parent.name == "checkpoints":
      tree = ocp.StandardCheckpointer().restore(path.absolute())
      yield from (np.asarray(a).tobytes() for a in jax.tree.leaves(tree))


def found(keys, folder):
  """How many keys, or parts of them, are in the folder: as bytes, hexadecimal or numbers."""
  everything = list(contents(folder))
  forms = lambda key: (
    key[:2].tobytes(), key[-2:].tobytes(), key[:2].tobytes().hex().encode(), str(key[3]).encode()
  )  # fmt: skip
  return sum(any(form in data for form in forms(key) for data in everything) for key in keys)
