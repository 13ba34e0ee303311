"""Membership inference with shadow models on real X-rays, with and without differential privacy.

  python -m benchmarks.membership --data=FOLDER/pneumoniamnist_28.npz

The small CNN (97,650 parameters) is trained on random halves of a pool of PneumoniaMNIST's training
images, 64 times without privacy, until it knows them, and 64 times by DP-SGD with epsilon 1 (the
unit is an image). Each model is attacked with the 62 others that are not its complement. Thresholds
come from the shadows. RMIA's population is the validation images, accuracy "outside" that of the
pool's images which a model did not see. The target of private models is what f-DP allows at the
high end of the measured rate of false positives. (With epsilon 1 so few images teach this network
little more than the larger class, whose share is printed; --epsilon and --pool change that.)
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
from absl import app, flags, logging

from benchmarks import measuring
from primia_jax import local, models, prng, sites
from primia_jax.attacks import membership, rates, shadows
from primia_jax.attacks.membership import Signals
from primia_jax.privacy import plan
from primia_jax.privacy.reconstruction import max_true_positive_rate

_DATA = flags.DEFINE_string("data", "../shared/data/pneumoniamnist_28.npz", "The images.")
_MODELS = flags.DEFINE_integer("models", 64, "Models without privacy; 0 for none.", lower_bound=0)
_PRIVATE = flags.DEFINE_integer("private_models", 64, "With privacy; 0 for none.", lower_bound=0)
_POOL = flags.DEFINE_integer("pool", 1024, "Images whose membership is asked.", 128, 4196)
_EPOCHS = flags.DEFINE_integer("epochs", 30, "Without privacy.", lower_bound=1)
_PRIVATE_EPOCHS = flags.DEFINE_integer("private_epochs", 12, "With privacy.", lower_bound=1)
_EPSILON = flags.DEFINE_float("epsilon", 1.0, "Of each private model.", lower_bound=0.0)
_BLOCK = flags.DEFINE_integer("block", 8, "Models between two lines of progress.", lower_bound=2)
_DEVICES = flags.DEFINE_integer("devices", 2, "CPU devices, each training a model at a time.")
_OUTPUT = flags.DEFINE_string("output", None, "File (npz) for log-odds, membership and curves.")

BATCH, PRIVATE_BATCH, RATE, AIMED = 32, 64, 2e-3, (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
ATTACKS: dict[str, membership.Attack] = {
  "loss threshold": membership.loss_threshold,
  "LiRA": membership.lira,
  "LiRA, offline": functools.partial(membership.lira, online=False),
  "BaVarIA": membership.bavaria,
  "RMIA": functools.partial(membership.rmia, gamma=1.0),
  "RMIA, offline": functools.partial(membership.rmia, gamma=1.0, offline_a=0.3),
}
CONFIG = models.ModelConfig("cnn", 2, (28, 28, 1))
_TUNED = 512  # images on which gamma was chosen; they are not reported


def recipes(num_images: int) -> tuple[local.Recipe, local.Recipe, plan.StepPlan]:
  """How models are trained without and with privacy, and the plan of the latter."""
  model, most = models.build(CONFIG), shadows.most_images(num_images)
  floats = lambda key, images, targets: (images.astype(np.float32) / 255, targets)
  loss_fn = local.classification_loss(model.apply, floats, 2)
  steps = local.epochs(BATCH, most, num_epochs=_EPOCHS.value)
  plain = local.Recipe(steps, local.gradients(loss_fn), None, optax.adam, lambda t: RATE)
  rate = 2 * PRIVATE_BATCH / num_images
  private = plan.dp_sgd(
    loss_fn,
    num_units=most,
    sampling_rate=rate,
    steps=round(_PRIVATE_EPOCHS.value / rate),
    rounds=1,
    target_epsilon=_EPSILON.value,
    delta=0.1 / most,
    has_taps=models.has_taps(CONFIG),
  )
  return plain, private.recipe(optax.adam, lambda t: RATE), private


def trained(
  recipe: local.Recipe, included: np.ndarray, data: tuple, divisor: int | None, what: str
) -> tuple[Signals, np.ndarray, float]:
  """Signals of all models, whether they are right on the pool [S, N], and seconds."""
  images, labels, others, other_labels = data
  model, start = models.build(CONFIG), time.perf_counter()
  predict = lambda params, state, x: model.apply(params, state, x.astype(np.float32) / 255)[0]
  run = shadows.shadow_logits(
    shadows.trainer(recipe, model.init, divisor), predict, sites.fastest()
  )
  parts, secrets = [], prng.random_keys(len(included))
  for first in range(0, len(included), _BLOCK.value):
    block = slice(first, first + _BLOCK.value)
    numbers = np.arange(len(included), dtype=np.int32)[block]
    parts.append(
      run(jax.random.key(0), included[block], images, labels, others, numbers, secrets[block])
    )
    seconds = time.perf_counter() - start
    print(f"{what}: {first + len(numbers)} models, {seconds:.0f} s", file=sys.stderr, flush=True)
  logits = np.concatenate(parts)
  odds = membership.log_odds(logits, np.concatenate([labels, other_labels]))
  right = logits[:, : len(labels)].argmax(axis=-1) == labels
  return Signals(odds[:, : len(labels)], odds[:, len(labels) :]), right, seconds


def told(
  what: str, signals: Signals, included: np.ndarray, allowed: Callable[[float], float] | None
) -> dict[str, np.ndarray]:
  """Prints what each attack reaches; returns the curves as arrays."""
  arrays = {}
  for name, attack in ATTACKS.items():
    found = rates.attack_each(attack, signals, included, AIMED)
    points = rates.curve(found.scores, found.included, found.thresholds, AIMED)
    own = rates.curve(found.scores, found.included, found.own_thresholds, AIMED)
    arrays[f"{what}, {name}"] = np.stack(
      [AIMED, *points.false_positive[:3], *points.true_positive, own.true_positive.value]
    )
    precisions = [rates.precision(points, prior) for prior in (0.01, 0.1)]
    for aimed in (0.001, 0.01):
      at, (false, true) = AIMED.index(aimed), (points.false_positive, points.true_positive)
      more, target = {}, None
      if allowed is not None:
        target = allowed(false.high[at])  # thresholds from shadows may miss the aimed rate
        more["allowed_at_the_aimed_rate"] = allowed(aimed)
      measuring.say(
        f"{what}: true positives of {name} at {100 * aimed:g} % false positives, lower bound",
        [true.low[at]],
        "rate",
        target,
        rate=true.value[at],
        interval=(true.low[at], true.high[at]),
        interval_over_models=(true.least[at], true.most[at]),
        false_positives=(false.value[at], false.low[at], false.high[at]),
        with_own_threshold=own.true_positive.value[at],
        precision_at_prior_1_percent=[float(p[at]) for p in precisions[0]],
        precision_at_prior_10_percent=[float(p[at]) for p in precisions[1]],
        trials=int(included.sum()),
        **more,
      )
  return arrays


def main(_):
  jax.config.update("jax_num_cpu_devices", _DEVICES.value)
  start, file, rng = time.perf_counter(), np.load(_DATA.value), np.random.default_rng(0)
  chosen = rng.permutation(len(file["train_labels"]))[_TUNED : _TUNED + _POOL.value]
  part = lambda split, rows: (
    file[f"{split}_images"][rows][..., None],
    file[f"{split}_labels"][rows].astype(np.int32),
  )
  data = (*part("train", chosen), *part("val", slice(None)))
  larger = np.bincount(data[1]).max() / len(data[1])
  measuring.say("share of the larger class in the pool", [larger], "share", None)
  plain, private, plan_ = recipes(_POOL.value)
  ledger = plan_.spent(1)
  runs: list[tuple] = []
  if _MODELS.value:
    runs.append(("not private", plain, _MODELS.value, None, None))
  if _PRIVATE.value:
    allowed = functools.cache(functools.partial(max_true_positive_rate, ledger))
    name = f"epsilon {plan_.epsilon(1):.3g}, delta {plan_.delta:.2g}"
    runs.append((name, private, _PRIVATE.value, _POOL.value // 2, allowed))
  kept: dict[str, np.ndarray] = {}
  for what, recipe, num_models, divisor, allowed in runs:
    included = shadows.halves(1, num_models, _POOL.value)
    signals, right, seconds = trained(recipe, included, data, divisor, what)
    measuring.say(f"{what}: {num_models} models trained", [seconds], "s", None)
    for where, rows in (("on their images", included), ("outside", ~included)):
      each = [np.mean(r[i]) for r, i in zip(right, rows, strict=True)]
      measuring.say(f"{what}: accuracy {where}", each, "share", None)
    kept |= told(what, signals, included, allowed)
    kept |= {f"{what}: {k}": v for k, v in (*signals._asdict().items(), ("included", included))}
  if _OUTPUT.value:
    np.savez_compressed(_OUTPUT.value, **kept)
  measuring.say("all of it", [(time.perf_counter() - start) / 60], "min", 20.0)


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
