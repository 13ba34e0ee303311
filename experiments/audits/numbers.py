"""What the numbers that a site sends besides its update tell: class counts, sizes, losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import evaluation, federated, sites, summation
from primia_jax.attacks import leakage, views
from primia_jax.attacks.evidence import Evidence, beats_chance
from primia_jax.data.sites import patients
from primia_jax.metrics import clopper_pearson
from primia_jax.types import Site

from .. import markdown
from ..configs.model import normalise
from . import context as shared
from . import recognition
from .context import Context
from .parts import Part

_TRIALS = 200
_PRESENCE, _CLASS = "presence from class counts", "class from class counts"
_LOSS = "one of two images from the validation loss"
_KNOWN = "all other images"


class Held(NamedTuple):
  """The training images of a site as counts see them: labels [N], and patients [N] or None."""

  labels: np.ndarray
  units: np.ndarray | None


def audit(context: Context) -> Part:
  """Plays games about one unit against exact or noised counts, and reads the sizes of sites."""
  title, config = "Numbers besides updates", context.config
  text, evidence = [], []
  if config.training.class_weights:
    context.note("class counts")
    evidence += _of_counts(context)
    noise = _noise(context)
    said = f"under noise of standard deviation {noise:g} at each site" if noise else "exact"
    text.append(
      f"Class counts leave each site once, before training; here they are {said}. The adversary "
      f"knows the classes of all images but those of one {_unit(context)}, as differential privacy "
      "assumes, and so takes off what it knows. It is asked whether the last one is there, and of "
      "which class it is."
    )
  if config.privacy.validates and config.federation.algorithm != "fedbn":
    context.note("validation losses")
    found = _of_losses(context)
    evidence += found
    if found:
      text.append(
        "The loss over validation images leaves each site after each round, exactly; it is summed "
        "under masks. Everybody knows the model, so whoever knows all but one of these images has "
        "that one's loss. It is asked which of two images of one site and class is the last one."
      )
  if context.has_transcript:
    text += _sizes(context)
  if not text:
    text = ["Nothing leaves a site besides its update and what is public."]
  open_to = [one for one in evidence if one.occurs and beats_chance(one)]
  failures = [
    f"exact numbers: {one.attack}, for whoever knows all other images ({one.threat})"
    for one in open_to
    if one.attack in (_PRESENCE, _LOSS) and one.threat.startswith("honest server")
  ]
  return Part(title, tuple(text), tuple(evidence), tuple(failures))


def _unit(context: Context) -> str:
  return "patient" if context.config.privacy.by_patient else "image"


def _noise(context: Context) -> float:
  p = context.config.privacy
  return p.dp_count_noise if p.dp != "none" else 0.0


def _of_counts(context: Context) -> list[Evidence]:
  """Both games at each threat point, and their control: the exact counts of one site."""
  noise, evidence = _noise(context), []
  exact = play(context, 0.0)
  controls = {
    attack: _evidence(views.EACH, right, attack, "none", context)._replace(occurs=False)
    for (point, attack), right in exact.items()
    if point == views.EACH
  }
  seen = play(context, noise) if noise else exact
  for (point, attack), right in seen.items():
    of = {views.EACH: 1, views.SUM: context.config.hospitals.num_sites}
    others = of.get(point, context.config.hospitals.num_sites - 1)
    protection = f"sum of {others} sites" if others > 1 else ""
    noised = f"noise of {noise:g} a site" if noise else ""
    under = ", ".join(filter(None, (protection, noised))) or "none"
    one = _evidence(point, right, attack, under, context)
    is_control = point == views.EACH and not noise
    evidence.append(one if is_control else one._replace(control=controls[attack]))
  return evidence


def _evidence(
  point: str, right: np.ndarray, attack: str, protection: str, context: Context
) -> Evidence:
  num_classes = len(context.trained.label_names)
  num, hits = len(right), int(right.sum())
  threat = _threat(point, context.config.hospitals.num_sites)
  return Evidence(
    threat, attack, protection, f"answers that are right, of {num}", hits / num,
    clopper_pearson(hits, num), 1 / num_classes if attack == _CLASS else 0.5,
    occurs=point != views.EACH or context.config.aggregation.secagg == "none", assumed=_KNOWN,
  )  # fmt: skip


def _threat(point: str, num_sites: int) -> str:
  others = "the other site" if num_sites == 2 else f"{num_sites - 1} other sites"
  return {
    views.EACH: "honest server, each site's numbers",
    views.SUM: f"honest server, the sum of {num_sites} sites",
    views.PEER: f"peer, the numbers of {others}",
  }[point]


def play(context: Context, noise: float) -> dict[tuple[str, str], np.ndarray]:
  """(threat point, game) -> [T] bool: whether each answer was right.

  In each trial one site and one of its units is drawn, and a peer. The unit is there by a coin, or,
  for its class, there with a class drawn at random.
  """
  part, config = context.images.train, context.config
  by_patient = config.privacy.by_patient
  labels = np.asarray(part.dataset.labels).astype(np.int32)
  held = [
    Held(labels[rows], patients(part, i) if by_patient else None)
    for i, rows in enumerate(part.sites)
  ]
  num_classes, num = len(context.trained.label_names), len(held)
  count = counter(num_classes, max(part.sizes) + 1, noise)
  known_of = np.stack([_exact(one, num_classes) for one in held])
  rng = np.random.default_rng(context.effort.audit_seed)
  right: dict[tuple[str, str], list[bool]] = {}
  for _ in range(min(_TRIALS, context.effort.candidates)):
    i = int(rng.choice(num, p=np.array(part.sizes) / sum(part.sizes)))
    peer = (i + int(rng.integers(1, num))) % num
    unit = int(rng.integers(len(held[i].labels)))
    if held[i].units is not None:
      unit = int(held[i].units[unit])  # type: ignore[index]
    coin, kind = bool(rng.integers(2)), int(rng.integers(num_classes))
    rest, without = [k for k in range(num) if k not in (i, peer)], _without(held[i], unit)
    known, added = _exact(without, num_classes), known_of[i] - _exact(without, num_classes)
    cell = int(added.argmax())
    others = [count([held[peer]]), count([held[k] for k in rest]) if rest else 0]
    known_others = [known_of[peer], sum(known_of[k] for k in rest)]
    of_kind = count([_with_class(held[i], unit, kind)])
    of_coin = count([held[i] if coin else without])
    for point, taken in ((views.EACH, 0), (views.PEER, 1), (views.SUM, 2)):
      # a peer takes off its own numbers, noise included; of two sites nothing else is left
      of_rest = sum(others[2 - taken :][:taken]) if taken else 0
      known_rest = sum(known_others[2 - taken :][:taken]) if taken else 0
      given = leakage.presence(of_coin + of_rest, known + known_rest, (cell,))
      is_there = bool(given > added[cell] / 2)
      right.setdefault((point, _PRESENCE), []).append(is_there == coin)
      named = leakage.attribute(of_kind + of_rest, known + known_rest)
      right.setdefault((point, _CLASS), []).append(int(named) == kind)
  order = (views.EACH, views.SUM, views.PEER)
  return {
    (point, game): np.array(right[point, game]) for game in (_PRESENCE, _CLASS) for point in order
  }


def counter(num_classes: int, most: int, noise: float) -> Callable[[Sequence[Held]], np.ndarray]:
  """The run's own counting, over any sites of at most so many images: what their sum opens."""
  count = evaluation.class_counting(num_classes, summation.clear(), sites.scan(), noise)

  def run(held: Sequence[Held]) -> np.ndarray:
    pad = lambda a, blank: np.pad(a, (0, most - len(a)), constant_values=blank).astype(np.int32)
    number = np.arange(len(held), dtype=np.int32)
    units = None
    if held[0].units is not None:
      units = np.stack([pad(one.units, -1) for one in held])
    stacked = Site(
      number, np.zeros((len(held), most, 1, 1, 1), np.uint8),  # type: ignore[arg-type]
      np.stack([pad(one.labels, 0) for one in held]),  # type: ignore[arg-type]
      np.array([len(one.labels) for one in held], np.int32), None, units,  # type: ignore[arg-type]
    )  # fmt: skip
    return count(federated.in_memory(stacked))

  return run


def _exact(held: Held, num_classes: int) -> np.ndarray:
  """[L] float64; the images of one patient count as 1 together."""
  if held.units is None:
    return np.bincount(held.labels, minlength=num_classes).astype(np.float64)
  of_unit = np.bincount(held.units)
  return np.bincount(held.labels, 1 / of_unit[held.units], minlength=num_classes)


def _without(held: Held, unit: int) -> Held:
  if held.units is None:
    return Held(np.delete(held.labels, unit), None)
  stays = held.units != unit
  return Held(held.labels[stays], held.units[stays])


def _with_class(held: Held, unit: int, kind: int) -> Held:
  is_it = np.arange(len(held.labels)) == unit if held.units is None else held.units == unit
  return held._replace(labels=np.where(is_it, np.int32(kind), held.labels))


def _of_losses(context: Context) -> list[Evidence]:
  """Which of two images a site validates with, from the loss of all of them."""
  game, part = recognition.draw(context), context.images.validation
  if len(game.pairs) < 1:
    return []
  num_sites = context.config.hospitals.num_sites
  errors = _losses(context)
  of_site = [errors(*shared.take(part.dataset, rows)) for rows in part.sites]
  held_in, out = (errors(game.images[game.pairs[:, k]], game.labels[game.pairs[:, k]])
                  for k in (1, 0))  # fmt: skip
  sent = np.array([np.sum(one, dtype=np.float32) for one in of_site], np.float64)
  most = evaluation.MAX_LOSS * max(part.sizes)
  fixed = context.config.aggregation.secure_sum(num_sites, num_sites, False, most).fixed
  unit = 2.0**-fixed.fraction_bits
  sent = np.round(sent / unit) * unit
  known = np.array([np.sum(one, dtype=np.float64) for one in of_site])
  evidence: list[Evidence] = []
  for point in (views.EACH, views.SUM, views.PEER):
    right = []
    for site, inside, outside in zip(game.site[game.pairs[:, 0]], held_in, out, strict=True):
      peer = (site + 1) % num_sites
      rows = {views.EACH: [site], views.PEER: [k for k in range(num_sites) if k != peer]}.get(
        point, list(range(num_sites))
      )
      left = sent[rows].sum() - (known[rows].sum() - inside)
      right.append(abs(left - inside) < abs(left - outside))
    one = _evidence(point, np.array(right), _LOSS, "none", context)
    of = {views.EACH: 1, views.SUM: num_sites, views.PEER: num_sites - 1}[point]
    under = f"sum of {of} sites" if of > 1 else "none"
    control = None if point == views.EACH else evidence[0]._replace(occurs=False)
    evidence.append(one._replace(protection=under, control=control))
  return evidence


def _losses(context: Context) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """(images as stored, labels) -> the loss of each on the final model, float32."""
  trained = context.trained
  num_classes = len(trained.label_names)
  of_one = evaluation.count_errors(trained.model.apply, normalise, num_classes, 1)

  @jax.jit
  def run(images, labels):
    one = lambda pair: of_one(
      trained.params, trained.model_state, pair[0][None], pair[1][None], jnp.int32(1)
    )["loss"]
    return jax.lax.map(one, (images, labels))

  return lambda images, labels: np.asarray(run(images, labels))


def _sizes(context: Context) -> list[str]:
  """What a recorded round tells of sizes and of how well the model fits, at each threat point."""
  one, config = context.rounds()[0], context.config
  sent = leakage.besides_update(one.messages)
  total = {name: np.asarray(v, np.float64) for name, v in leakage.besides_update(one.total).items()}
  of_each = {name: np.asarray(v, np.float64) for name, v in sent.items()}
  rest = {name: leakage.of_missing_site(total[name], of_each[name][0]) for name in total}
  sizes = np.array(context.images.train.sizes)[one.ids]
  units = sizes
  if config.privacy.by_patient:
    units = np.array([len(np.unique(patients(context.images.train, int(i)))) for i in one.ids])
  by_size = config.federation.weighting == "examples" and config.federation.algorithm != "scaffold"
  rows = []
  for threat, given in (
    ("honest server, each site", of_each),
    (f"honest server, the sum of {len(one.ids)} sites", total),
    (f"peer (site {int(one.ids[0])}), all others", rest),
  ):
    seen = "–"
    if by_size:
      public = float(units.max())  # a public bound, by which weights are divided
      seen = _listed(given["weight"] * public, ".0f")
    count = np.asarray(given["metrics.num_examples"])
    fits = ["–", "–"]
    if np.all(count > 0):
      fits = [
        _listed(given["metrics.loss"] / count, ".3f"),
        _listed(100 * given["metrics.correct"] / count, ".0f"),
      ]
    rows.append((threat, seen, *fits))
  table = markdown.table(
    ("adversary", f"{_unit(context)}s", "mean loss in training", "right answers, %"), rows
  )
  private = config.privacy.dp != "none"
  end = (
    " Under differential privacy numbers of units are public, and losses are not sent."
    if private
    else " Under masks each site's own are not seen, unless sums can be subtracted."
  )
  true = ", ".join(map(str, units.tolist()))
  return [f"What the numbers of round {one.number} say (the sites hold {true}).{end}", table]


def _listed(values: np.ndarray, form: str) -> str:
  return ", ".join(f"{v:{form}}" for v in np.ravel(values).tolist())
