"""Images reconstructed from a site's whole update of a round: several steps on several batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import local
from primia_jax.attacks import inversion, learned, priors, scores, tuning, views
from primia_jax.attacks import updates as clients
from primia_jax.attacks.evidence import Evidence
from primia_jax.federated import ORDER
from primia_jax.types import Array, Site

from . import context as shared
from . import pictures, recognition
from .context import Context
from .parts import Part

_PIXELS, _CODES = "Dimitrov et al. 2022, total variation", "Dimitrov et al. 2022, learned prior"
_WEIGHTS = (0.03, 0.1, 0.3)  # of total variation, that are tried first
_MOST = 128  # gradients of images in a step of the search
_SHARE = 6  # of the steps that `inversion` takes
_PICTURE = "whole_updates.png"

Search = Callable[[clients.Seen, float], np.ndarray]


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
  """Attacks the smallest site's update in the first recorded round, beside a control."""
  title, config = "Reconstruction from whole updates", context.config
  if config.federation.algorithm == "fedbn":
    return Part(title, ("Left out: under FedBN sites have no common model.",))
  one, game = context.rounds()[0], recognition.draw(context)
  sizes = np.array(context.images.train.sizes)[one.ids]
  smallest, *others = np.argsort(sizes, kind="stable").tolist()
  target = _target(context, one, smallest)
  pairs = game.pairs[game.site[game.pairs[:, 0]] == target.site]
  if len(target.images) > _MOST:
    return Part(
      title,
      (
        f"Left out: the smallest site holds {len(target.images)} images, all of which are unknown "
        f"together; the search is made for at most {_MOST}. Whether single images can be "
        "recognised in its update is tested under Recognising images in updates.",
      ),
    )  # fmt: skip
  if not len(pairs):
    return Part(title, ("Left out: the smallest site has no images that took no part.",))
  simulate, how = _client(context, target)
  steps = max(1, context.effort.iterations // _SHARE)
  size = len(target.images)
  search = _search(context, _PIXELS, simulate, steps, size)
  weight, chosen = _weight(
    context, target, [_target(context, one, row) for row in others], simulate, search
  )
  rows: dict[str, np.ndarray] = {"original": stored(game, pairs[:8, 0])}
  quality, evidence = {}, []
  for attack, name in ((_PIXELS, "pixels"), (_CODES, "learned prior")):
    if attack == _CODES and context.prior is None:
      continue
    context.note(f"whole updates, control: {attack}")
    gradient = clients.gradient(context.loss_fn)
    update = jax.jit(gradient)(target.seen, target.images)
    given = target.seen._replace(update=update)
    found = _search(context, attack, gradient, steps, size)(given, weight)
    control = _told_apart(found, game, pairs)._replace(
      threat="honest server, one step on the same images", attack=attack, protection="none",
      occurs=False,
    )  # fmt: skip
    context.note(f"whole updates, site {target.site}: {attack}")
    if attack == _CODES:
      search = _search(context, attack, simulate, steps, size)
    found = search(target.seen, weight)
    best = nearest(found, rows["original"])
    rows[f"nearest guess, {name}"] = best
    psnr = np.asarray(scores.psnr(jnp.asarray(best), jnp.asarray(rows["original"])))
    quality[f"nearest guess, {name}"] = psnr
    evidence.append(
      _told_apart(found, game, pairs)._replace(
        threat=target.threat, attack=attack, protection=shared.protection(config), control=control,
        note=f"round {target.round}, mean PSNR of the nearest guess {psnr.mean():.1f} dB",
        occurs=not config.aggregation.is_secure or target.threat.startswith("peer"),
      )
    )  # fmt: skip
  pictures.grid(rows, quality, context.output / _PICTURE, f"{title}: {context.data_name}")
  text = (
    f"The update of site {target.site} in round {target.round} stands for {len(target.images)} "
    f"images. The adversary knows their labels, and searches for all of them at once, {how}. Of "
    "two images of the site and of one class, one of which took part, the one that is nearer to "
    f"any of the guesses is taken for it. {chosen}",
    f"The control is the same search for the same images in as many steps ({steps}), from their "
    "gradient in a single step, without noise. Where it fails, too, the outcome shows nothing.",
  )
  caption = "Images of the site, and the guess nearest to each, with its PSNR in dB"
  return Part(title, text, tuple(evidence), (), {_PICTURE: caption})


def _target(context: Context, one: views.Round, row: int) -> Target:
  """The update of a site of a recorded round; of two sites, as the other one sees it."""
  part, site = context.images.train, int(one.ids[row])
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


def _weight(
  context: Context, target: Target, others: list[Target], simulate: clients.Simulate, search: Search
) -> tuple[float, str]:
  """The weight of total variation that finds most behind another update, which is not reported: of
  another site in the same round, or, where all these hold too many images, as the target's client
  makes one of another site's first images. And how it was chosen, for the reader.
  """
  if not others:
    return _WEIGHTS[1], f"The weight of total variation is {_WEIGHTS[1]:g}, untuned."
  other = others[0]  # the smallest
  whose = f"the update of site {other.site}"
  if len(other.images) <= _MOST:
    steps = max(1, context.effort.iterations // _SHARE)
    search = _search(context, _PIXELS, _client(context, other)[0], steps, len(other.images))
  else:
    images = other.images[: len(target.images)]
    seen = target.seen._replace(labels=other.seen.labels[: len(images)])
    seen = seen._replace(update=jax.jit(simulate)(seen, jnp.asarray(images)))
    other = other._replace(images=images, seen=seen)
    noise = ", without noise" * (context.config.privacy.dp != "none")
    whose = f"a simulated update of {len(images)} images of site {other.site}{noise}"

  def score(weight: float) -> float:
    context.note(f"whole updates, weight {weight:g} tried on site {other.site}")
    return float(closeness(search(other.seen, weight), other.images).mean())

  chosen = tuning.tune(_WEIGHTS, score)
  return chosen.value, (
    f"The weight of total variation, {chosen}, was chosen on {whose}; the step size was not tuned."
  )


def _client(context: Context, target: Target) -> tuple[clients.Simulate, str]:
  """The client that the attacker simulates: the run's own steps, where they are plain."""
  config, t, taken_by = context.config, context.config.training, ""
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
    taken_by = f"{order.size} images in {int(taken)} steps are too many to simulate"
    if order.size <= _MOST:
      schedule = t.build_schedule()
      rates = jnp.stack([schedule(jnp.float32(number + i / int(taken))) for i in range(int(taken))])
      made = clients.local_training(context.loss_fn, rates, order, t.build_optimizer())
      return made, f"simulating its {int(taken)} steps, whose batches follow from the public key"
  if config.privacy.dp != "none":
    taken_by = "noise and batches are secret"
  elif t.optimizer not in ("sgd", "momentum"):
    taken_by = f"{t.optimizer} hides how large gradients were"
  how = f"as if all of them had made one step ({taken_by})"
  return clients.gradient(context.loss_fn), how


def _told_apart(found: np.ndarray, game: recognition.Candidates, pairs: np.ndarray) -> Evidence:
  """Of each member and stranger: is the member nearer to any of the guesses?"""
  member, stranger = (closeness(found, stored(game, pairs[:, side])) for side in (0, 1))
  return recognition.rate_of(member > stranger)


def _search(
  context: Context, attack: str, simulate: clients.Simulate, steps: int, size: int
) -> Search:
  """(Seen, weight of total variation) -> the images [size, H, W, C] that the attacker takes."""
  shape = (size, *context.trained.config.image_shape)
  settings = inversion.Settings(steps=steps, rate=0.1, signed=False)
  is_pixels = attack == _PIXELS  # a learned prior needs no penalty
  variables = inversion.pixels(shape) if is_pixels else learned.codes(context.prior, shape)

  @jax.jit
  def run(seen: clients.Seen, weight: Array) -> Array:
    smooth = lambda seen, images: weight * priors.total_variation(images)
    made = inversion.inversion(simulate, variables, settings, smooth if is_pixels else None)
    return inversion.selected(inversion.run(made, jax.random.key(context.effort.audit_seed), seen))

  return lambda seen, weight: np.asarray(run(seen, jnp.float32(weight)))


def stored(game: recognition.Candidates, rows: np.ndarray) -> np.ndarray:
  """Some images of the game in [0, 1], float32."""
  return (game.images[rows] / 255).astype(np.float32)


def nearest(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """For each true image the guess of the least squared error."""
  error = np.stack([np.square(found - one).mean((1, 2, 3)) for one in truth])
  return found[error.argmin(1)]


def closeness(found: np.ndarray, images: np.ndarray) -> np.ndarray:
  """[N]: the largest correlation of each image's pixels with those of any guess."""
  rows = []
  for some in (found, images):
    flat = np.asarray(some, np.float64).reshape(len(some), -1)
    flat = flat - flat.mean(1, keepdims=True)
    rows.append(flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12))
  return (rows[1] @ rows[0].T).max(1)
