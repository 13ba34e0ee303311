"""Whether an adversary recognises images that it holds in what it saw: at each threat point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.attacks import alignment, views
from primia_jax.attacks.evidence import Evidence, beats_chance
from primia_jax.metrics import clopper_pearson
from primia_jax.types import Batch

from ..configs import Train
from . import context as shared
from .context import Context
from .parts import Part

_ATTACK = "gradient alignment"
_MEASURE = "pairs told apart"
_PUBLIC = 64  # images that the adversary knows besides
_BATCH = 8  # images in the control's step
_RIDGES = (0.03, 0.3, 3.0, np.inf)
ADDING = ("fedavg", "fedprox", "scaffold")  # whose server adds the mean update
_TUNED = 3  # every third pair chooses the ridge and is not reported


class Candidates(NamedTuple):
  """The images of the game.

  Attributes:
    images, labels: [N, ...] of members and strangers, with masks where the model learns them.
    site: [N] of each.
    pairs: [Q, 2], a member and a stranger of one site and class.
    public: images and labels that the adversary knows besides.
  """

  images: np.ndarray
  labels: np.ndarray
  site: np.ndarray
  pairs: np.ndarray
  public: tuple[np.ndarray, np.ndarray]


def audit(context: Context) -> Part:
  """The attack on the transcript, beside a control of one unprotected step."""
  title = "Recognising images in updates"
  if context.config.federation.algorithm == "fedbn":
    return Part(title, ("Left out: under FedBN sites have no common model.",))
  rounds, game = context.rounds(), draw(context)
  if len(game.pairs) < _TUNED:
    return Part(title, ("Left out: sites hold too few images that they did not train on.",))
  products = shared.jitted(alignment.products(context.loss_fn))
  scores: dict[str, dict[tuple[int, ...], dict[float, np.ndarray]]] = {}
  threats = {}
  for one in rounds:
    context.note(f"recognition, round {one.number}")
    seen = seen_by(context.config, one)
    updates = jax.tree.map(
      lambda *parts: np.concatenate(parts), *[v.updates for v in seen.values()]
    )
    given_to = updates, (game.images, game.labels), game.public
    given = products(*one.before, *given_to)
    columns = {ridge: iter(alignment.scores(given, ridge).T) for ridge in _RIDGES}
    for point, view in seen.items():
      threats[point] = view.threat
      for sites in view.sites:
        of_sites = scores.setdefault(point, {}).setdefault(sites, {})
        for ridge in _RIDGES:
          of_sites[ridge] = of_sites.get(ridge, 0) + next(columns[ridge])
  control = _control(context, game, rounds[0], products)
  hides = context.config.aggregation.is_secure
  evidence = [
    found._replace(
      threat=threats[point],
      protection=shared.protection(context.config, max(map(len, mine))),
      control=control,
      note=f"rounds {', '.join(str(one.number) for one in rounds)}",
      occurs=point != views.EACH or not hides,
    )
    for point, mine in scores.items()
    if (found := told_apart(game, mine)) is not None
  ]
  text = (
    f"The adversary holds {len(game.pairs)} pairs of images: one that a site trained on, and one "
    "of the same site and class that it did not. It computes the gradient of each on the model "
    "before a round, and asks which of the two agrees more with what it saw. Guessing is right in "
    "half of the pairs. Every third pair chose how much public images count; the others are "
    "reported. "
    f"The control is one step of SGD on {_BATCH} images, seen without protection.",
  )
  return Part(title, text, tuple(evidence), _failures(context.config, evidence))


def _failures(config: Train, evidence: list[Evidence]) -> tuple[str, ...]:
  """The case of two sites, where recognition succeeded."""
  peers = [one for one in evidence if one.threat.startswith("peer") and beats_chance(one)]
  if config.hospitals.num_sites != 2 or not peers:
    return ()
  return (
    "two sites: what one takes off the sum is the other's own update, in which it recognises "
    f"{100 * peers[0].value:.0f} % of pairs",
  )


def draw(context: Context) -> Candidates:
  """Members are training images; strangers are the same sites' validation images."""
  images, effort = context.images, context.effort
  sites = [i for i, n in enumerate(images.validation.sizes) if n]
  rng = np.random.default_rng(effort.audit_seed)
  members, of_member = shared.sites_of(images.train, sites)
  strangers, of_stranger = shared.sites_of(images.validation, sites)
  datasets = images.train.dataset, images.validation.dataset
  labels = [np.asarray(d.labels)[i] for d, i in zip(datasets, (members, strangers), strict=True)]
  site = np.concatenate([of_member, of_stranger])
  label = np.concatenate(labels)
  is_member = np.arange(len(site)) < len(members)
  groups = site * (1 + label.max()) + label
  pairs = alignment.pairs(is_member, groups, effort.audit_seed)[: effort.candidates]
  first, second = pairs[:, 0], pairs[:, 1] - len(members)
  chosen = [
    shared.take(d, index[rows])
    for d, index, rows in zip(datasets, (members, strangers), (first, second), strict=True)
  ]
  test = images.test
  known = rng.permutation(len(test.labels))[:_PUBLIC]
  num = len(pairs)
  return Candidates(
    np.concatenate([images for images, _ in chosen]),
    np.concatenate([labels for _, labels in chosen]),
    np.concatenate([site[pairs[:, 0]], site[pairs[:, 1]]]),
    np.stack([np.arange(num), num + np.arange(num)], axis=1),
    shared.take(test, known),
  )


def seen_by(config: Train, one: views.Round) -> dict[str, views.View]:
  """What each passive adversary saw; one peer, so that no pair is compared twice."""
  seen = {views.EACH: views.server_each(one)}
  sums = config.aggregation.aggregation in ("secure", "clear") and len(one.ids) > 1
  if sums:
    seen[views.SUM] = views.server_sum(one)
  if sums and config.federation.algorithm in ADDING:
    seen[views.PEER] = views.peer(one, int(one.ids[0]))
  return seen


def told_apart(
  game: Candidates, scores: dict[tuple[int, ...], dict[float, np.ndarray]]
) -> Evidence | None:
  """The share of pairs in which the member scored more, over all updates of a threat point; None
  where they are too few to choose the ridge on some and report others.
  """
  is_tuned = np.arange(len(game.pairs)) % _TUNED == 0
  wins: dict[float, list[np.ndarray]] = {ridge: [] for ridge in _RIDGES}
  tuned = []
  for sites, by_ridge in scores.items():
    mine = np.isin(game.site[game.pairs[:, 0]], sites)
    tuned.append(is_tuned[mine])
    for ridge, column in by_ridge.items():
      member, stranger = column[game.pairs[mine]].T
      wins[ridge].append(member > stranger)
  apart = np.concatenate(tuned)
  joined = {ridge: np.concatenate(parts) for ridge, parts in wins.items()}
  if apart.all() or not apart.any():
    return None
  best = max(joined, key=lambda ridge: joined[ridge][apart].mean())
  return rate_of(joined[best][~apart])


def rate_of(right: np.ndarray) -> Evidence:
  """A share of pairs as evidence."""
  value, num = float(np.mean(right)), len(right)
  interval = clopper_pearson(int(np.sum(right)), num)
  return Evidence("", _ATTACK, "", f"{_MEASURE}, of {num}", value, interval, 0.5)


def _control(
  context: Context, game: Candidates, one: views.Round, products: Callable[..., Any]
) -> Evidence:
  """One step on each batch of members, which is compared with those members' strangers."""
  context.note("recognition, control")
  gradient = jax.jit(jax.grad(context.loss_fn, has_aux=True))
  size = min(_BATCH, len(game.pairs))
  num = min(len(game.pairs) // size, 12)
  steps = []
  for rows in np.arange(num * size).reshape(num, size):
    members = game.pairs[rows, 0]
    images, labels = jnp.asarray(game.images[members]), jnp.asarray(game.labels[members])
    batch = Batch(images, labels, jnp.ones(size, jnp.float32))
    grads, _ = gradient(*one.before, batch, jax.random.key(0))
    steps.append(jax.tree.map(lambda g: -np.asarray(g), grads))
  updates = jax.tree.map(lambda *parts: np.stack(parts), *steps)
  given = products(*one.before, updates, (game.images, game.labels), game.public)
  of_step = np.arange(num * size) // size
  is_tuned = np.arange(num * size) % _TUNED == 0
  right = {}
  for ridge in _RIDGES:
    scores = alignment.scores(given, ridge)
    member, stranger = (scores[game.pairs[: num * size, side], of_step] for side in (0, 1))
    right[ridge] = member > stranger
  best = max(right, key=lambda ridge: right[ridge][is_tuned].mean())
  threat = f"honest server, one step of {size} images"
  return rate_of(right[best][~is_tuned])._replace(threat=threat, protection="none")
