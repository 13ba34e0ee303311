"""Whether the final model tells which images it was trained on: shadow models, and a ROC curve."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import local, models, prng, sites
from primia_jax.attacks import alignment, rates, shadows
from primia_jax.attacks import membership as attacks
from primia_jax.attacks.evidence import Evidence
from primia_jax.attacks.membership import Signals
from primia_jax.metrics import clopper_pearson
from primia_jax.types import Array, ModelState, Params

from .. import settings
from ..configs.model import normalise
from . import context as shared
from . import pictures
from .context import Context
from .parts import Part
from .recognition import Candidates, draw

_AIMED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_MANY = 64  # shadows from which each image has a variance of its own (Carlini et al. 2022)
_PICTURE = "membership.png"


class Played(NamedTuple):
  """One attack on some models.

  Attributes:
    curve: points of the ROC curve, with thresholds from the shadows.
    right: of each pair, whether it was told apart.
    own: points with thresholds from the attacked model's own answers, which no attacker has.
  """

  curve: rates.Curve
  right: np.ndarray
  own: rates.Curve | None = None


def audit(context: Context) -> Part:
  """The final model is attacked with shadows; the control attacks shadows without privacy."""
  title, game = "Membership in the final model", draw(context)
  if len(game.images) < 16:
    return Part(title, ("Left out: sites hold too few images that they did not train on.",))
  included = shadows.halves(context.effort.audit_seed, context.effort.shadows, len(game.images))
  plain = _signals(context, game, included, is_private=False)
  own = plain
  if context.config.privacy.dp in ("example", "patient"):
    own = _signals(context, game, included, is_private=True)
  target = _target(context, game)
  is_member = np.isin(np.arange(len(game.images)), game.pairs[:, 0])
  evidence, curves = [], {}
  for name, attack in _attacks(context.effort.shadows).items():
    context.note(f"membership, {name}")
    control = _among(attack, plain, included, game)
    reached = _on(attack, target, own, included, is_member, game)
    low = _evidence(name, "shadow models without privacy", "none", control)
    protection = shared.protection(context.config, context.config.hospitals.num_sites)
    one = _evidence(name, "public, the final model", protection, reached)
    evidence.append(one._replace(control=low, note=_said(reached)))
    assert reached.own is not None
    curves[f"{name}: this run"] = reached.own
    curves[f"{name}: control"] = control.curve
  title_of_picture = f"Membership in the final model: {context.data_name}"
  pictures.membership(curves, context.output / _PICTURE, title_of_picture)
  text = (
    f"The adversary has the final model and trains {context.effort.shadows} shadow models in one "
    f"place, as often over the images as the run, each on a random half of {len(game.images)} "
    "images, half of which the run was trained on. In the "
    "table it tells a member from a stranger of the same site and class. The control attacks each "
    "shadow, trained without privacy, with the others.",
  )
  caption = (
    "True against false positives with 95 % intervals; thresholds of the control come from other "
    "shadows, those of this run from its own answers, which no attacker has"
  )
  return Part(title, text, tuple(evidence), (), {_PICTURE: caption})


def _attacks(num_shadows: int) -> dict[str, attacks.Attack]:
  pooled = num_shadows < _MANY
  lira = functools.partial(attacks.lira, pooled_variance=pooled)
  return {
    "loss threshold": attacks.loss_threshold,
    "LiRA" + ", one variance" * pooled: lira,
    "BaVarIA": attacks.bavaria,
  }


def _target(context: Context, game: Candidates) -> Signals:
  """What the run's model says."""
  trained = context.trained
  answer = lambda image: _predict(trained.model, trained.params, trained.model_state, image[None])[
    0
  ]
  asked = np.concatenate([game.images, game.public[0]])
  logits = jax.jit(lambda x: jax.lax.map(answer, x, batch_size=128))(asked)
  return _split(logits, game)


def _predict(model: models.Model, params: Params, model_state: ModelState, images: Array) -> Array:
  return model.apply(params, model_state, normalise(images))[0]


def _split(logits: Any, game: Candidates) -> Signals:
  labels = np.concatenate([game.labels, game.public[1]])
  odds, num = attacks.log_odds(logits, labels), len(game.images)
  return Signals(odds[..., :num], odds[..., num:])


def _signals(context: Context, game: Candidates, included: np.ndarray, is_private: bool) -> Signals:
  """What shadow models say, trained with the run's privacy or without any."""
  config, trained = context.config, context.trained
  recipe, divisor = _recipe(context, game, is_private)
  init_fn = lambda key: config.model.initial(trained.config, key)
  train_fn = shadows.trainer(recipe, init_fn, divisor)
  predict_fn = functools.partial(_predict, trained.model)
  run = shadows.shadow_logits(train_fn, predict_fn, sites.fastest())
  parts, block, secrets = [], 2 * max(1, jax.device_count() // 2), prng.random_keys(len(included))
  for first in range(0, len(included), block):
    now = slice(first, first + block)
    of_kind = " with privacy" * is_private
    context.note(f"membership, shadow model {first + 1} of {len(included)}{of_kind}")
    key, data = jax.random.key(context.effort.audit_seed), (game.images, game.labels)
    numbers = np.arange(len(included), dtype=np.int32)[now]
    parts.append(run(key, included[now], *data, game.public[0], numbers, secrets[now]))
  return _split(np.concatenate(parts), game)


def _recipe(
  context: Context, game: Candidates, is_private: bool
) -> tuple[local.Recipe, int | None]:
  """The run's training of one image, in one round: as many passes over it, and the same schedule;
  and by what a private one divides its sums.
  """
  config, most = context.config, shadows.most_images(len(game.images))
  t, sizes = config.training, context.images.train.sizes
  passes = t.sync_epochs or 1
  if not (t.sync_epochs or is_private or config.privacy.dp != "none"):
    passes = (t.sync_batches or 20) * t.batch_size * len(sizes) / sum(sizes)  # type: ignore[assignment]
  num_epochs = max(1, round(t.rounds * passes))
  schedule = t.build_schedule()
  rate: Callable[[Array], Array] = lambda time: schedule(time * jnp.float32(t.rounds))
  loss_fn = context.loss_fn
  if not is_private:
    size = min(t.batch_size, len(game.images) // 4)
    steps = local.epochs(size, most, num_epochs=num_epochs)
    return local.Recipe(steps, local.gradients(loss_fn), None, t.build_optimizer(), rate), None
  once = settings.replace(
    t, rounds=1, sync_epochs=num_epochs, sync_batches=0, class_weights=False,
    batch_size=max(1, round(t.batch_size * most / max(sizes))),
  )  # fmt: skip
  plan = config.privacy.build_steps(once, loss_fn, (most,), max_examples=most)
  return plan.recipe(t.build_optimizer(), rate), len(game.images) // 2


def _among(
  attack: attacks.Attack, signals: Signals, included: np.ndarray, game: Candidates
) -> Played:
  """Each shadow attacked with the others."""
  found = rates.attack_each(attack, signals, included, _AIMED)
  curve = rates.curve(found.scores, found.included, found.thresholds, _AIMED)
  right = [
    _told_apart(scores, alignment.pairs(row, _groups(game), 0))
    for scores, row in zip(found.scores, found.included, strict=True)
  ]
  return Played(curve, np.concatenate(right))


def _on(
  attack: attacks.Attack,
  target: Signals,
  signals: Signals,
  included: np.ndarray,
  is_member: np.ndarray,
  game: Candidates,
) -> Played:
  """The run's model attacked with all shadows."""
  everyone, outs = np.arange(len(included)), []
  for model in everyone:
    others = everyone[everyone // 2 != model // 2]
    of = lambda rows: Signals(*(a[rows] for a in signals))
    outs.append(attack(of(model), of(others), included[others])[~included[model]])
  thresholds = rates.threshold(np.concatenate(outs), _AIMED)
  scores = attack(target, signals, included)
  curve = rates.curve(scores[None], is_member[None], thresholds[None], _AIMED)
  best = rates.threshold(scores[~is_member], _AIMED)
  own = rates.curve(scores[None], is_member[None], best[None], _AIMED)
  return Played(curve, _told_apart(scores, game.pairs), own)


def _told_apart(scores: np.ndarray, pairs: np.ndarray) -> np.ndarray:
  return scores[pairs[:, 0]] > scores[pairs[:, 1]]


def _groups(game: Candidates) -> np.ndarray:
  return game.site * (1 + game.labels.max()) + game.labels


def _evidence(name: str, threat: str, protection: str, played: Played) -> Evidence:
  right = played.right
  interval = clopper_pearson(int(right.sum()), len(right))
  measure = f"pairs told apart, of {len(right)}"
  return Evidence(threat, name, protection, measure, float(right.mean()), interval, 0.5)


def _said(played: Played) -> str:
  """The true positives at few false ones, with both kinds of thresholds."""
  at, curve = _AIMED.index(0.01), played.curve
  assert played.own is not None
  percent = lambda rates: (
    f"{100 * rates.value[at]:.0f} % [{100 * rates.low[at]:.0f}, {100 * rates.high[at]:.0f}]"
  )
  return (
    f"aiming at 1 % false positives, {percent(curve.true_positive)} true ones at "
    f"{percent(curve.false_positive)} false ones; {percent(played.own.true_positive)} with the "
    "threshold that no attacker has"
  )
