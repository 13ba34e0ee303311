"""Which classes are behind an update, read off the gradient of the last layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.attacks import labels, views
from primia_jax.attacks.evidence import Evidence
from primia_jax.metrics import clopper_pearson
from primia_jax.types import Array, Batch, Params

from ..configs.model import normalise
from . import context as shared
from . import laboratory, recognition
from .context import Context
from .heads import head
from .laboratory import Protection
from .parts import Part

_BATCH = 8
_TRIALS = 64
_PUBLIC = 128  # images whose classes the adversary knows
_ONE_STEP, _RUN = "class counts of a batch from the head", "class shares of a site from the head"


def audit(context: Context) -> Part:
  """One step of each site, under one protection after the other; then the run's own rounds."""
  title = "Classes behind updates"
  on = laboratory.bench(context, context.effort.candidates, context.effort.victims)
  if head(on.model.params) is None or len(on.labels) < 2 * _BATCH or len(set(on.labels)) < 2:
    return Part(title, ("Left out: no dense last layer, too few images, or a single class.",))
  public, gradient = _public(context), _gradients(context, on)
  predicted = np.mean(_predicted(context, on.model, public[0]), axis=0)
  evidence = []
  for protection in laboratory.protections(context):
    context.note(f"classes, {protection.name}")
    evidence.append(_one_step(context, on, protection, predicted, gradient))
  evidence = [evidence[0], *(one._replace(control=evidence[0]) for one in evidence[1:])]
  text = [
    f"A site takes one step on {_BATCH} images. The gradient of the head's bias is the mean of "
    "what the model predicts less the share of each class; public images say what it predicts. So "
    "the adversary counts the classes in the batch, and says which of two lists of counts was the "
    f"batch's: {_TRIALS} times, for batches of the sites' images."
  ]
  if context.has_transcript and context.config.federation.algorithm != "fedbn":
    context.note("classes, the run's rounds")
    of_rounds, said = _rounds(context, public)
    evidence += of_rounds
    text.append(said)
  return Part(title, tuple(text), tuple(evidence))


def _public(context: Context) -> tuple[np.ndarray, np.ndarray]:
  test = context.images.test
  rng = np.random.default_rng(context.effort.audit_seed)
  return shared.take(test, rng.permutation(len(test.labels))[:_PUBLIC])


def _one_step(
  context: Context,
  on: laboratory.Bench,
  protection: Protection,
  predicted: np.ndarray,
  gradient: Callable[..., Params],
) -> Evidence:
  """Two lists of counts, one of them of the batch at site 0: which one is nearer to the guess?"""
  num_classes, num = len(context.trained.label_names), protection.num_sites
  clip, noise = on.l2_clip_norm, protection.noise_multiplier
  right = []
  rng = np.random.default_rng(context.effort.audit_seed)
  count = lambda rows: np.bincount(on.labels[rows], minlength=num_classes)
  key = jax.random.key(context.effort.audit_seed)
  add_noise = jax.jit(lambda key, gradient: laboratory.noised(key, gradient, clip, noise))
  for trial in range(_TRIALS):
    rows = rng.choice(len(on.labels), (num, _BATCH), replace=num * _BATCH > len(on.labels))
    other = rows[0]
    for _ in range(100):  # another list of counts
      other = rng.choice(len(on.labels), _BATCH, replace=False)
      if np.any(count(other) != count(rows[0])):
        break
    sent = [gradient(on.images[mine], on.labels[mine]) for mine in rows]
    if noise:
      sent = [add_noise(jax.random.fold_in(key, trial), sent[0])]
    bias = np.mean([np.asarray(head(one)["bias"]) for one in sent], axis=0)  # type: ignore[index]
    found = labels.counts(bias, predicted, _BATCH)
    own, decoy = (np.abs(found - count(r)).sum() for r in (rows[0], other))
    right.append(own < decoy if own != decoy else bool(rng.integers(2)))
  hits = int(np.sum(right))
  return Evidence(
    f"honest server, one step of {_BATCH} images a site", _ONE_STEP, protection.name,
    f"lists of counts told apart, of {len(right)}", hits / len(right),
    clopper_pearson(hits, len(right)), 0.5, occurs=False,
  )  # fmt: skip


def _gradients(context: Context, on: laboratory.Bench) -> Callable[..., Params]:
  """(images [B, ...], labels [B]) -> the gradient of one step."""

  @jax.jit
  def run(images: Array, targets: Array) -> Params:
    batch = Batch(images, targets, jnp.ones(targets.shape, jnp.float32))
    return jax.grad(context.loss_fn, has_aux=True)(*on.model, batch, jax.random.key(0))[0]

  return run


def _predicted(context: Context, model: views.Model, images: np.ndarray) -> np.ndarray:
  """[N, L] probabilities."""
  apply = context.trained.model.apply
  one = lambda image: jax.nn.softmax(apply(*model, normalise(image[None]))[0][0])
  return np.asarray(jax.jit(lambda x: jax.lax.map(one, x))(images))


def _rounds(context: Context, public: tuple[np.ndarray, np.ndarray]) -> tuple[list[Evidence], str]:
  """Class shares of each site, read off its updates of the run; whose are they, of two sites?"""
  num_classes, part = len(context.trained.label_names), context.images.train
  of_site = np.stack([
    np.bincount(np.asarray(part.dataset.labels)[rows], minlength=num_classes) / len(rows)
    for rows in part.sites
  ])  # fmt: skip
  right: dict[str, list[bool]] = {}
  threats, shown = {}, []
  rounds = context.rounds()
  for one in rounds:
    means = _of_classes(context, one, public)
    for point, view in recognition.seen_by(context.config, one).items():
      if point == views.SUM:
        continue  # the shares over all sites are no secret where class weights are used
      threats[point] = view.threat
      for row, sites in enumerate(view.sites):
        update = head(jax.tree.map(lambda a, row=row: a[row], view.updates))
        assert update is not None  # `audit` asked
        kernel, bias = np.asarray(update["kernel"]), np.asarray(update["bias"])
        found = labels.shares(kernel, bias, *means)
        true = np.average(of_site[list(sites)], axis=0, weights=np.array(part.sizes)[list(sites)])
        if one is rounds[0] and point == views.EACH:
          shown.append(f"site {sites[0]}: {_percent(found)} (it holds {_percent(true)})")
        for decoy in _others(of_site, sites):
          if np.abs(decoy - true).sum() > 0.02:
            nearer = np.abs(found - true).sum() < np.abs(found - decoy).sum()
            right.setdefault(point, []).append(bool(nearer))
  if not right:
    return [], "The sites hold each class in equal shares, so that their updates tell none apart."
  hides = context.config.aggregation.is_secure
  by_point: dict[str, Evidence] = {}
  for point, answers in right.items():
    hits, num = int(np.sum(answers)), len(answers)
    by_point[point] = Evidence(
      threats[point], _RUN, shared.protection(context.config, _most(context, point)),
      f"sites told apart, of {num}", hits / num, clopper_pearson(hits, num), 0.5,
      note=f"rounds {', '.join(str(one.number) for one in rounds)}",
      occurs=point != views.EACH or not hides,
    )  # fmt: skip
  # of the same attack, each site's own update is what should tell it
  evidence = [
    one if point == views.EACH else one._replace(control=by_point.get(views.EACH))
    for point, one in by_point.items()
  ]
  optimizer = context.config.training.optimizer
  adam = (
    ""
    if optimizer in ("sgd", "momentum")
    else f" ({optimizer} scales each number by itself, which spoils the sum)"
  )
  return evidence, (
    "A site's whole update is about a sum over classes: of each class's share times the mean "
    f"gradient of public images of that class{adam}. The adversary solves for the shares and says "
    f"whose they are, of two sites. From round {rounds[0].number}, by class: {'; '.join(shown)}."
  )


def _most(context: Context, point: str) -> int:
  return 1 if point == views.EACH else context.config.sites_in_round - 1


def _others(of_site: np.ndarray, sites: tuple[int, ...]) -> Iterator[np.ndarray]:
  """The shares of each site that is not among these."""
  return (of_site[k] for k in range(len(of_site)) if k not in sites)


def _of_classes(
  context: Context, one: views.Round, public: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """([L, D, L], [L, L]): the mean gradient of the head over public images of each class."""
  num_classes = len(context.trained.label_names)
  weights = np.ones(num_classes) if one.class_weights is None else np.asarray(one.class_weights)

  @jax.jit
  def run(images: Array, targets: Array) -> tuple[Array, Array]:
    def add(total: tuple[Array, Array], pair: tuple[Array, Array]):
      batch = Batch(pair[0][None], pair[1][None], jnp.ones(1, jnp.float32))
      grads = jax.grad(context.loss_fn, has_aux=True)(*one.before, batch, jax.random.key(0))[0]
      mine: Any = head(grads)
      is_class = jax.nn.one_hot(pair[1], num_classes, dtype=jnp.float32)
      kernel = total[0] + is_class[:, None, None] * mine["kernel"][None]
      return (kernel, total[1] + is_class[:, None] * mine["bias"][None]), None

    mine: Any = head(one.before.params)
    zeros = lambda name: jnp.zeros((num_classes, *mine[name].shape), jnp.float32)
    return jax.lax.scan(add, (zeros("kernel"), zeros("bias")), (images, targets))[0]

  kernel, bias = map(np.asarray, run(*public))
  number = np.maximum(np.bincount(public[1], minlength=num_classes), 1) / weights
  return kernel / number[:, None, None], bias / number[:, None]


def _percent(shares: np.ndarray) -> str:
  return "/".join(f"{100 * share:.0f}" for share in shares) + " %"
