"""The private last layer of `chest_xray_private_pretrained.flags` over seeds and epsilons: three
hospitals under secure aggregation, and all images in one place.

  python -m benchmarks.private_head --data=folder:XRAYS --seeds=0,1,2,3,4 --epsilons=1,3,6,8

Each run goes through the programs' own path (`experiments.arms`), with noise of its own; only what
the frozen layers make of an image is computed once for all runs, and kept in --out, where an
interrupted benchmark continues. Each hospital adds its own noise, so its epsilon holds against the
server and any number of other hospitals together. The pooled model takes as large a share of its
images in a step, and as many steps. Up to epsilon 1 rounds and learning rate are half the preset's.
The flags of each run are those of `primia-case-study --study=chest_xray_pretrained`.
The recipe was chosen on held-out training images; every run scores the test images once.
"""

import hashlib
import json
import pathlib
import tempfile

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks import measuring
from experiments import arms, inputs, settings, study, trainers
from experiments.configs import Train
from experiments.configs.model import of_stored
from experiments.processes import Place
from primia_jax import evaluation, metrics, models, sites
from primia_jax.data import sites as data_sites
from primia_jax.privacy import accounting

_DATA = flags.DEFINE_string("data", "", "The X-rays; by default where the preset looks.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Seeds of the runs.")
_EPSILONS = flags.DEFINE_list("epsilons", ["1", "3", "6", "8"], "Budgets of a run.")
_OUT = flags.DEFINE_string(
  "out", "", "Folder that keeps scores and features; by default none does."
)
_ARMS = flags.DEFINE_list("arms", ["federated", "pooled"], "Which arms.")

STUDY = study.STUDIES["chest_xray_pretrained"]


class Features:
  """What the frozen layers make of images, each computed once; kept in a file, under the recipe."""

  def __init__(self, compute, path: pathlib.Path, recipe: str):
    self._compute, self._path, self._recipe, self._known = compute, path, recipe.encode(), {}
    if path.is_file():
      saved = np.load(path)
      self._known = {d.tobytes(): f for d, f in zip(saved["digests"], saved["rows"], strict=True)}

  def __call__(self, images: np.ndarray) -> np.ndarray:
    digests = [hashlib.sha256(self._recipe + image.tobytes()).digest() for image in images]
    new = {d: i for i, d in enumerate(digests) if d not in self._known}
    if new:
      rows = self._compute(images[list(new.values())])
      self._known |= dict(zip(new, rows, strict=True))
      kept = np.array([np.frombuffer(d, np.uint8) for d in self._known])
      np.savez(self._path, digests=kept, rows=np.stack([*self._known.values()]))
    return np.stack([self._known[d] for d in digests])


def recipe_of(record) -> str:
  """A name for settings, whatever folder the images are in; others have another name."""
  known = settings.flat(record) | {"data": ""}
  return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]


def score(config: Train, arm: str, images: inputs.Inputs, features, folder: pathlib.Path):
  """Trains an arm as the programs do; what its report would say of the test images."""
  together = arm == "federated"
  parts = images.train, images.validation
  everyone = tuple(range(config.hospitals.num_sites))
  if not together:
    parts = tuple(data_sites.merge(part, everyone) for part in parts)
  names = images.train.dataset.label_names
  model_config = config.model.config(config.data, len(names))
  mine = np.arange(len(parts[0].sites), dtype=np.int32)
  cohort = trainers.Cohort(arm, *parts, mine)
  built = models.build(model_config), model_config, [cohort], Place(sites.loop())
  trainer = trainers.make_trainer(config, *built)._replace(features=features)
  folder.mkdir(parents=True, exist_ok=True)
  trained = arms.train(config, cohort, trainer, model_config, folder, folder / "ledger")
  predict = evaluation.predictor(trainer.frozen.model.apply, lambda x: x)
  said = predict([trained.sent], features(images.test.images))
  scored = metrics.scores(images.test.labels, said)
  figures = {name: np.asarray(value).tolist() for name, value in scored._asdict().items()}
  return figures | {"epsilon": accounting.of_sites(trained.ledgers)}


def main(_):
  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache/primia_jax/xla"))
  logging.set_verbosity(logging.WARNING)
  source = (f"--data={_DATA.value}",) if _DATA.value else ()
  base = study.configured((*STUDY.private, *source))
  with tempfile.TemporaryDirectory() as scratch:
    out = pathlib.Path(_OUT.value or scratch)
    out.mkdir(parents=True, exist_ok=True)
    model_config = base.model.config(base.data, 3)
    frozen = base.model.frozen(model_config, jax.random.key(0))
    recipe = recipe_of(base)
    compute = of_stored(model_config, frozen)
    features = Features(compute, out / "features.npz", recipe_of(base.model))
    done = out / "scores.jsonl"
    rows = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    for seed in map(int, _SEEDS.value):
      images = inputs.site_images(settings.replace(base, seed=seed))
      for epsilon in map(float, _EPSILONS.value):
        for arm in _ARMS.value:
          key = {"arm": arm, "seed": seed, "target": epsilon, "recipe": recipe}
          if any(key.items() <= row.items() for row in rows):
            continue
          words = study.private_flags(STUDY, epsilon, arm == "pooled", source)
          config = settings.replace(study.configured(words), seed=seed)
          where = out / recipe / f"{arm}_{seed}_{epsilon:g}"
          rows.append(key | score(config, arm, images, features, where))
          with done.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    for arm in _ARMS.value:
      for epsilon in map(float, _EPSILONS.value):
        key = {"arm": arm, "target": epsilon, "recipe": recipe}
        mine = [row for row in rows if key.items() <= row.items()]
        for what in ("accuracy", "mcc", "macro_roc_auc"):
          values = [row[what] for row in mine]
          mean, low, high = metrics.over_seeds(values)
          name = f"private head, {arm}, epsilon {epsilon:g}: {what} [{low:.3f}, {high:.3f}]"
          measuring.say(name, values, "", None, value=mean)


if __name__ == "__main__":
  app.run(main)
