"""Images reconstructed from a site's whole update of a round: several steps on several batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import local, models
from primia_jax.attacks import inversion, learned, priors, scores, views
from primia_jax.attacks import updates as clients
from primia_jax.attacks.evidence import Evidence, beats_chance
from primia_jax.federated import ORDER
from primia_jax.types import Array, LossFn, Site

from ..configs.model import normalise
from . import context as shared
from . import laboratory, pictures, recognition
from .context import Context
from .parts import Part

_PIXELS, _CODES = "Dimitrov et al. 2022, total variation", "the same, with a learned prior"
_TV = 0.1  # weight of total variation
_MOST = 128  # gradients of images in a step of the search
_SHARE = 6  # of the steps that a single image gets
_STEPS, _BATCH, _RATE = 2, 1, 0.05  # of the control
_PICTURE = "whole_updates.png"


class Target(NamedTuple):
  """An update of the run that is attacked.

  Attributes:
    threat: who has it.
    site: whose it is.
    round: its number.
    seen: what the attacker has.
    images: [N, H, W, C] float32, those behind it.
  """

  threat: str
  site: int
  round: int
  seen: clients.Seen
  images: np.ndarray


def audit(context: Context) -> Part:
  """Attacks the smallest site's update in the first recorded round, beside a small control."""
  title, config = "Reconstruction from whole updates", context.config
  if config.federation.algorithm == "fedbn":
    return Part(title, ("Left out: under FedBN sites have no common model.",))
  target = _target(context)
  decoys = _decoys(context)
  if len(target.images) > _MOST or len(decoys) < 1:
    return Part(
      title,
      (
        f"Left out: the smallest site holds {len(target.images)} images, all of which are unknown "
        f"together; the search is made for at most {_MOST}. Whether single images can be "
        "recognised in its update is tested under Recognising images in updates.",
      ),
    )  # fmt: skip
  if len(context.images.test.labels) and min(target.images.shape[1:3]) < 11:
    return Part(title, ("Left out: images are below 11 pixels.",))
  simulate, how = _client(context, target)
  control_loss, control_model = _vulnerable(context)
  rows: dict[str, np.ndarray] = {"original": target.images[:8]}
  quality, evidence = {}, []
  for attack in (_PIXELS, _CODES):
    if attack == _CODES and context.prior is None:
      continue
    context.note(f"whole updates, control: {attack}")
    control = _control(context, attack, control_loss, control_model, decoys)
    context.note(f"whole updates, site {target.site}: {attack}")
    steps = max(1, context.effort.iterations // _SHARE)
    found = _search(context, attack, simulate, steps, len(target.images))(target.seen)
    named = scores.identify_any(found, target.images, decoys)
    best = nearest(found, target.images[:8])
    name = f"nearest guess, {'prior' if attack == _CODES else 'pixels'}"
    rows[name] = best
    quality[name] = np.asarray(scores.psnr(jnp.asarray(best), jnp.asarray(target.images[:8])))
    evidence.append(
      Evidence(
        target.threat, attack, shared.protection(config), f"found, of {len(target.images)}, before "
        f"{len(decoys)} others of the site", named.rate, named.interval, named.chance, control,
        note=f"round {target.round}, mean PSNR of the nearest guess "
        f"{_mean_psnr(found, target.images):.1f} dB",
        occurs=not config.aggregation.is_secure or target.threat.startswith("peer"),
      )
    )  # fmt: skip
  pictures.grid(rows, quality, context.output / _PICTURE, f"{title}: {context.data_name}")
  weak = not all(beats_chance(one.control) for one in evidence if one.control)
  text = (
    f"The update of site {target.site} in round {target.round} stands for {len(target.images)} "
    f"images. The adversary knows their labels, and searches for all of them at once, {how}. An "
    "image counts as found if a guess is nearer to it than any guess is to each of the same "
    "site's images that did not take part.",
    f"The control is the same search on a model that is known to be vulnerable (mlp, untrained): "
    f"{_STEPS} steps of {_BATCH} image each. A larger batch or more steps make it harder; at this "
    "size the search finds what there is to find."
    + (" Here it did not succeed, so that nothing follows from a failure." if weak else ""),
  )
  caption = "Images of the site, and the guess nearest to each, with its PSNR in dB"
  return Part(title, text, tuple(evidence), (), {_PICTURE: caption})


def _target(context: Context) -> Target:
  """The smallest site in the first recorded round; of two sites, as the other one sees it."""
  one = context.rounds()[0]
  part, sizes = context.images.train, np.array(context.images.train.sizes)[one.ids]
  row = int(sizes.argmin())
  site = int(one.ids[row])
  view, at = views.server_each(one), row
  adds = context.config.federation.algorithm in recognition.ADDING
  if len(one.ids) == 2 and adds and context.config.aggregation.is_secure:
    view, at = views.peer(one, int(one.ids[1 - row])), 0
  images, labels = shared.take(part.dataset, part.sites[site])
  update = jax.tree.map(lambda u: jnp.asarray(u[at]), view.updates)
  weights = None if one.class_weights is None else jnp.asarray(one.class_weights)
  seen = clients.Seen(*one.before, update, jnp.asarray(labels), class_weights=weights)
  threat = view.threat.replace("each site's update", f"site {site}'s update")
  return Target(threat, site, one.number, seen, (images / 255).astype(np.float32))


def _decoys(context: Context) -> np.ndarray:
  """Images of the sites that took no part, all different from those that did."""
  train, held = context.images.train, context.images.validation
  rows = np.concatenate(held.sites)
  rows = np.random.default_rng(context.effort.audit_seed).permutation(rows)
  images, _ = shared.take(held.dataset, rows[: context.effort.candidates])
  own, _ = shared.take(train.dataset, np.concatenate(train.sites))
  known = {image.tobytes() for image in own}
  first = {image.tobytes(): image for image in images if image.tobytes() not in known}
  return np.array([image / 255 for image in first.values()], np.float32)


def _client(context: Context, target: Target) -> tuple[clients.Simulate, str]:
  """The client that the attacker simulates: the run's own steps, where they are plain."""
  config, t = context.config, context.config.training
  if config.privacy.dp == "none" and t.optimizer in ("sgd", "momentum"):
    steps = t.build_steps(context.images.train.sizes)
    number = np.int32(target.round - 1)
    fold = jax.random.fold_in
    key = fold(fold(jax.random.key(config.seed), ORDER), target.site)
    now = local.Round(jnp.int32(number), key, key)
    num = jnp.int32(len(target.images))
    site = Site(jnp.int32(target.site), target.seen.labels, target.seen.labels, num)
    taken, draw = steps.begin(site, now)
    order = jax.vmap(lambda i: draw(i, ()))(jnp.arange(int(taken), dtype=jnp.int32))
    if order.size <= _MOST:
      schedule = t.build_schedule()
      rates = jnp.stack([schedule(jnp.float32(number + i / int(taken))) for i in range(int(taken))])
      made = clients.local_training(context.loss_fn, rates, order, t.build_optimizer())
      return made, f"simulating its {int(taken)} steps, whose batches follow from the public key"
  return (
    clients.gradient(context.loss_fn),
    "as if all of them had made one step (simulating the run's own steps is no better: they are "
    "noised, of another optimiser than SGD, or too many)",
  )


def _vulnerable(context: Context) -> tuple[LossFn, views.Model]:
  """A model whose updates are known to hold images, and its loss."""
  given = context.trained.config
  config = models.ModelConfig("mlp", given.num_classes, given.image_shape)
  model = models.build(config)
  prepare = lambda key, images, targets: (normalise(images), targets)
  loss_fn = local.classification_loss(model.apply, prepare, config.num_classes)
  return loss_fn, views.Model(*model.init(jax.random.key(context.effort.audit_seed)))


def _control(
  context: Context, attack: str, loss_fn: LossFn, model: views.Model, decoys: np.ndarray
) -> Evidence:
  """Small updates of the vulnerable model, of the bench's images."""
  on = laboratory.bench(context, context.effort.candidates, context.effort.victims)
  size = _STEPS * _BATCH
  order = jnp.arange(size, dtype=jnp.int32).reshape(_STEPS, _BATCH)
  simulate = clients.local_training(loss_fn, _RATE, order)
  send = jax.jit(lambda labels, images: simulate(clients.Seen(*model, None, labels), images))
  search = _search(context, attack, simulate, context.effort.iterations, size)
  found = []
  for first in range(0, max(size, on.num_victims - size + 1), size):
    rows = slice(first, first + size)
    images = (on.images[rows] / 255).astype(np.float32)
    labels = jnp.asarray(on.labels[rows])
    guesses = search(clients.Seen(*model, send(labels, images), labels))
    found.append(scores.identify_any(guesses, images, decoys))
  named = scores.join(found)
  return Evidence(
    f"honest server, {_STEPS} steps of one image on a vulnerable model", attack, "none",
    f"found, of {len(named.found)}", named.rate, named.interval, named.chance, occurs=False,
  )  # fmt: skip


def _search(
  context: Context, attack: str, simulate: clients.Simulate, steps: int, size: int
) -> Callable[[clients.Seen], np.ndarray]:
  """Seen -> the images [size, H, W, C] that the attacker takes."""
  shape = (size, *context.trained.config.image_shape)
  settings = inversion.Settings(steps=steps, rate=0.1, signed=False)
  if attack == _CODES:
    made = inversion.inversion(simulate, learned.codes(context.prior, shape), settings)
  else:
    smooth: Callable[[clients.Seen, Array], Array] = lambda seen, images: (
      _TV * priors.total_variation(images)
    )
    made = inversion.inversion(simulate, inversion.pixels(shape), settings, smooth)  # type: ignore[arg-type]
  key = jax.random.key(context.effort.audit_seed)
  run = jax.jit(lambda seen: inversion.selected(inversion.run(made, key, seen)))
  return lambda seen: np.asarray(run(seen))


def nearest(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """For each true image the guess of the least squared error."""
  error = np.stack([np.square(found - one).mean((1, 2, 3)) for one in truth])
  return found[error.argmin(1)]


def _mean_psnr(found: np.ndarray, truth: np.ndarray) -> float:
  best = nearest(found, truth)
  return float(np.mean(np.asarray(scores.psnr(jnp.asarray(best), jnp.asarray(truth)))))
