"""What a server learns of single X-rays from the linear head of `chest_xray_private.flags`.

  python -m benchmarks.head_inversion --data=folder:XRAYS

The preset's own rounds, from zero weights, by the library: three hospitals, one image and one step
each, or a whole round (batches of 199, ten steps at the largest). Each without protection, under
secure aggregation, and with the preset's differential privacy as well (epsilon 6; also without
secure aggregation).

Identification: an image that took part stands among 499 that did not, held out at the same
hospitals; the attack names one of the 500. For one image and step it names the candidate nearest
to the inverted features (`linear.invert`), for a round the one whose gradient agrees best with the
update (`linear.alignment`). The attacker has the candidates' labels and other public images: what
else was held out, and the test images. Its ridge, and whether it takes gradients at the model
before the round (0) or after it (1), are tuned on a dealing that is not reported. Intervals are
Student's over independent dealings of the images, since the images of one round share its
candidates and its noise; of rates, the wider of that and the exact one over images. `reach` is the
best correlation of any direction of the update with an image's features, and its AUC tells images
that took part from others.

The last lines take one image from its inverted features back to pixels, up to brightness and
contrast, which the features do not hold: PSNR after the best fit of these two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from absl import app, flags, logging

from benchmarks import measuring
from experiments import inputs, settings, study
from experiments.configs import Train
from experiments.configs.model import normalise, of_stored
from primia_jax import algorithms, federated, local, models, secagg, sites, summation
from primia_jax.attacks import linear
from primia_jax.data import overlaps, partition
from primia_jax.data.dataset import Dataset
from primia_jax.data.sites import Part, hold_out
from primia_jax.metrics import clopper_pearson, roc_auc
from primia_jax.privacy import plan
from primia_jax.types import Array, Site

_DATA = flags.DEFINE_string("data", None, "The X-rays, as train_federated takes them.")
_SPLITS = flags.DEFINE_integer(
  "splits", 5, "Dealings of the images, besides the one to tune on.", lower_bound=2
)
_IMAGES = flags.DEFINE_integer("images", 2, "Images to take back to pixels.", lower_bound=0)

PRESET, CANDIDATES, LARGEST = "chest_xray_private", 500, 2
TRIALS = 8  # of one image and one step, in each dealing
_MEMBERS = 400  # of a round, whose identification is tried
_TUNED = [(at, ridge) for at in (0.0, 1.0) for ridge in (0.02, 0.2, 2.0, 100.0)]
_PIXEL_STEPS = 300


class Images(NamedTuple):
  """All images of the source: [N, h, w, F] features, and labels [N]; the test images come last."""

  features: np.ndarray
  labels: np.ndarray


class Split(NamedTuple):
  """One dealing: rows of each hospital, of 499 candidates that took no part, and of the attacker's
  public images.
  """

  hospitals: tuple[np.ndarray, ...]
  others: np.ndarray
  public: np.ndarray


class Protection(NamedTuple):
  """What stands in the attack's way.

  Attributes:
    name: as the lines say it.
    ids: the sites in the sum.
    summed: how.
    is_private: under the preset's differential privacy.
  """

  name: str
  ids: tuple[int, ...]
  summed: summation.Summation
  is_private: bool


def deal(config: Train, dataset: Dataset, num_test: int, seed: int) -> Split:
  """Deals the training images as `experiments.inputs` does, with any seed."""
  h, tied = config.hospitals, overlaps.tied(dataset)
  shares = settings.fractions(h.site_fractions)
  dealt = partition.dirichlet(
    tied, h.num_sites, h.dirichlet_alpha, seed, fractions=shares, min_examples=2
  )
  kept, held = hold_out(Part(tied, dealt), h.validation_fraction, seed)
  aside = np.random.default_rng(seed).permutation(np.concatenate(held.sites))
  public = np.concatenate([aside[CANDIDATES - 1 :], len(dataset) + np.arange(num_test)])
  return Split(kept.sites, aside[: CANDIDATES - 1], public)


def recipes(config: Train, loss: Callable, sizes: Sequence[int]) -> dict[bool, local.Recipe]:
  """The preset's recipe with differential privacy (True) and without."""
  t = config.training
  built = t.build_optimizer(), t.build_schedule()
  private = config.privacy.build_steps(t, loss, sizes, max_examples=max(sizes))
  plain = local.Recipe(t.build_steps(sizes), local.gradients(loss), None, *built)
  return {True: private.recipe(*built), False: plain}


def single(config: Train, loss: Callable, sigma: float) -> dict[bool, local.Recipe]:
  """The same for one image and one step; the noise is that of a step of the preset."""
  t = config.training
  built = t.build_optimizer(), t.build_schedule()
  private = plan.dp_sgd(
    loss,
    num_units=1,
    sampling_rate=1.0,
    steps=1,
    rounds=1,
    delta=0.1,
    noise_multiplier=sigma,
    l2_clip_norm=config.privacy.l2_clip_norm,
  )
  plain = local.Recipe(local.epochs(1, 1), local.gradients(loss), None, *built)
  return {True: private.recipe(*built), False: plain}


def rounds(recipe: local.Recipe, summed: summation.Summation, init: Callable) -> Callable:
  """(Site stacked, sites of the sum, seed) -> kernel and bias of the update that a server sees."""
  run = federated.federate(algorithms.fedavg(recipe), summed, sites.loop(), 3)
  params, _ = init(jax.random.key(0))

  def update(stacked: Site, ids: Sequence[int], seed: int) -> tuple[Array, Array]:
    there = federated.in_memory(stacked)._replace(ids=np.asarray(ids, np.int32))
    state, _ = run.step(jax.random.key(seed), run.init(params), there)
    change = jax.tree.map(jnp.subtract, state.params, params)["linear"]
    return change["kernel"], change["bias"]

  return update


def stacked(images: Images, rows: Sequence[np.ndarray], most: int) -> Site:
  """The hospitals' images, padded with blank ones to `most`."""
  padded = np.zeros((len(rows), most, *images.features.shape[1:]), np.float32)
  labels = np.zeros((len(rows), most), np.int32)
  for i, row in enumerate(rows):
    padded[i, : len(row)], labels[i, : len(row)] = images.features[row], images.labels[row]
  counts = np.array([len(row) for row in rows], np.int32)
  return Site(np.arange(len(rows), dtype=np.int32), padded, labels, counts)


def interval(values: Sequence[float]) -> tuple[float, list[float]]:
  """Mean, and Student's 95 % interval of it over dealings."""
  mean, error = np.mean(values), scipy.stats.sem(values)
  half = scipy.stats.t.ppf(0.975, len(values) - 1) * error
  return float(mean), [float(f"{end:.4g}") for end in (mean - half, mean + half)]


def say(name: str, values: Sequence[float], unit: str, target: float | None = None, **more) -> None:
  mean, ends = interval(values)
  if trials := more.get("trials"):  # of each dealing: the wider of Student's and the exact interval
    exact = clopper_pearson(round(sum(values) * trials), len(values) * trials)
    ends = [max(0.0, min(ends[0], exact[0])), min(1.0, max(ends[1], exact[1]))]
  measuring.say(name, values, unit, target, value=mean, interval=ends, **more)


flat = lambda images, rows: jnp.asarray(images.features[rows].reshape(len(rows), -1))


def attack_single(images: Images, split: Split, update: Callable, ids, seed: int) -> np.ndarray:
  """[2]: identification and relative error of the inverted features, means over trials."""
  mean = jnp.mean(flat(images, split.public), axis=0)
  out = []
  for trial in range(TRIALS):
    rng = np.random.default_rng((seed, trial))
    rows = [rng.choice(hospital, 1) for hospital in split.hospitals]
    kernel, bias = update(stacked(images, rows, 1), ids, seed)
    found = linear.invert(kernel, bias) - mean
    candidates = flat(images, np.concatenate([rows[LARGEST], split.others])) - mean[None]
    cosine = candidates @ found / jnp.linalg.norm(candidates, axis=1)
    error = jnp.linalg.norm(candidates[0] - found) / jnp.linalg.norm(candidates[0] + mean)
    out.append([float(jnp.argmax(cosine) == 0), float(error)])
  return np.mean(out, axis=0)


def attack_round(
  images: Images,
  split: Split,
  seen: tuple[Array, Array],
  ids,
  tuned: tuple[float, float],
  seed: int,
) -> dict:
  """Identification, and what the span of an update holds, of images of a round."""
  (kernel, bias), (at, ridge) = seen, tuned
  rng = np.random.default_rng(seed)
  took_part = rng.permutation(np.concatenate([split.hospitals[i] for i in ids]))[:_MEMBERS]
  rows = np.concatenate([took_part, split.others])
  inputs_, labels = flat(images, rows), jnp.asarray(images.labels[rows])
  gradients = linear.output_gradients(at * kernel, at * bias, inputs_, labels)
  public = flat(images, split.public)
  score = np.asarray(linear.alignment(kernel, inputs_, gradients, public, ridge))
  reach = np.asarray(linear.reach(kernel, inputs_, jnp.mean(public, axis=0), 2))
  is_member = np.arange(len(rows)) < len(took_part)
  auc = lambda s: float(roc_auc(is_member, s))
  return {
    "identification": float(np.mean(score[is_member] > score[~is_member].max())),
    "alignment AUC": auc(score),
    "reach AUC": auc(reach),
    "reach": float(reach[is_member].mean()),
    "reach of others": float(reach[~is_member].mean()),
    "largest reach": float(reach[is_member].max()),
    "rank": int(linear.rank(kernel)),
  }


def to_pixels(
  config: Train, transform: Callable, stored: np.ndarray, features: Array
) -> list[float]:
  """PSNR of the image from its features, and of the blurred one that it begins from."""
  size, true = config.data.image_size, np.asarray(normalise(jnp.asarray(stored)))
  optimizer = optax.adam(optax.cosine_decay_schedule(0.1, _PIXEL_STEPS))
  init, step = linear.from_features(transform, features, optimizer)
  step = jax.jit(step)  # and a loop: convolutions in a scan are slow on CPU
  start = jax.image.resize(features[..., :1], (size, size, 1), "cubic")
  state = init(start)
  for _ in range(_PIXEL_STEPS):
    state, _ = step(state)

  def psnr(image: Array) -> float:
    columns = np.stack([np.ravel(image), np.ones(true.size)], 1)
    fitted = columns @ np.linalg.lstsq(columns, true.ravel(), rcond=None)[0]
    return float(-10 * np.log10(np.mean(np.square((fitted - true.ravel()) / 4))))

  return [psnr(state.image), psnr(start)]


def main(_):
  config = study.configured((f"--preset={PRESET}", f"--data={_DATA.value}"))
  loaded = inputs.site_images(config)
  train, test = loaded.train.dataset, loaded.test
  model_config = config.model.config(config.data, len(train.label_names))
  model = models.build(model_config)
  compute, transform = of_stored(model_config), models.features(model_config)
  assert compute is not None  # it is a model of fixed features
  assert transform is not None
  both = [np.concatenate([np.asarray(getattr(d, name)) for d in (train, test)])
          for name in ("images", "labels")]  # fmt: skip
  images = Images(compute(both[0]), both[1].astype(np.int32))
  loss = local.classification_loss(
    model.apply, lambda key, x, targets: (x, targets), model_config.num_classes
  )
  splits = [deal(config, train, len(test), seed) for seed in range(_SPLITS.value + 1)]
  most = max(len(rows) for split in splits for rows in split.hospitals)
  fewest = min(len(rows) for split in splits for rows in split.hospitals)
  recipe = recipes(config, loss, [fewest, most])
  sigma = config.privacy.build_steps(config.training, loss, [most]).noise_multiplier
  one = single(config, loss, sigma)

  masks, clear = summation.masked(secagg.secure_sum(3)), summation.clear()
  everyone, largest = (0, 1, 2), (LARGEST,)
  protections = (
    Protection("no protection", largest, clear, False),
    Protection("secure aggregation of 3 sites", everyone, masks, False),
    Protection("epsilon 6, one site's update seen", largest, clear, True),
    Protection("epsilon 6 and secure aggregation", everyone, masks, True),
  )
  chance = 1 / CANDIDATES
  among = f"identification among {CANDIDATES}"
  about = {"chance": chance, "features": images.features[0].size}
  for how, ids, summed, is_private in protections:
    update = rounds(one[is_private], summed, model.init)
    got = [attack_single(images, split, update, ids, i) for i, split in enumerate(splits[1:], 1)]
    rate, error = np.transpose(got)
    name = f"one image, one step, {how}"
    target = 0.99 if how == "no protection" else None
    say(f"{name}: {among}", rate, "rate", target, at_least=True, trials=TRIALS, **about)
    say(f"{name}: relative error of the features", error, "ratio", 1e-4 if target else None)
  for how, ids, summed, is_private in protections:
    update = rounds(recipe[is_private], summed, model.init)
    seen = [update(stacked(images, s.hospitals, most), ids, i) for i, s in enumerate(splits)]
    attack = lambda i, tuned, seen=seen, ids=ids: attack_round(
      images, splits[i], seen[i], ids, tuned, i
    )
    tuned = max(_TUNED, key=lambda tuned, attack=attack: attack(0, tuned)["alignment AUC"])
    got = [attack(i, tuned) for i in range(1, len(splits))]
    more = {"gradients at": tuned[0], "ridge": tuned[1], "trials": _MEMBERS}
    more["sigma"] = sigma if is_private else 0
    name = f"a round, {how}"
    say(f"{name}: {among}", [g.pop("identification") for g in got], "rate", **about, **more)
    for what in got[0]:
      say(f"{name}: {what}", [g[what] for g in got], "")
  update = rounds(one[False], clear, model.init)
  for row in splits[1].hospitals[LARGEST][: _IMAGES.value]:
    rows = [np.array([row])] * 3
    found = linear.invert(*update(stacked(images, rows, 1), largest, 0))
    shaped = found.reshape(images.features.shape[1:])
    after, before = to_pixels(config, transform, both[0][row], shaped)
    what = "one image, one step, no protection: from features to pixels"
    measuring.say(what, [after], "dB", None, begins_at=before)


if __name__ == "__main__":
  flags.mark_flag_as_required("data")
  logging.set_verbosity(logging.ERROR)
  app.run(main)
