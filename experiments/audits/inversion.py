"""Images reconstructed from the update of a single one, under one protection after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.attacks import inversion, learned, priors, scores
from primia_jax.attacks import updates as clients
from primia_jax.attacks.evidence import Evidence
from primia_jax.types import Array, Key, LossFn

from . import laboratory, pictures
from .context import Context
from .laboratory import Bench, Protection
from .parts import Part

_THREAT = "honest server, one image and one step a site"
_PIXELS, _CODES = (
  "Geiping et al. 2020, Adam without signs",
  "Geiping et al. 2020 with a learned prior",
)
# of total variation, beside a cosine distance; a learned prior needs none
_WEIGHTS = {_PIXELS: (0.1, 0.3, 1.0), _CODES: (0.0,)}
_TUNED = 2  # images on which the weight is chosen, and which are not reported
_PICTURE = "reconstructions.png"
_SIBLING = (
  " On the run's own model a search without protection did not succeed; its control is then the "
  "same search, on the same images, in a model that is known to be vulnerable (mlp, untrained), "
  "which shows that the search works, and not that it works on the run's model."
)


class Tried(NamedTuple):
  """Reconstructions under one protection.

  Attributes:
    taken: [V, H, W, C], what the attacker selects.
    best: [V] PSNR of the best restart, which no attacker knows.
    weight: of total variation.
  """

  taken: np.ndarray
  best: np.ndarray
  weight: float


def audit(context: Context) -> Part:
  """Searches images whose gradient points as the one seen, with restarts."""
  title, effort = "Reconstruction from single updates", context.effort
  on = laboratory.bench(context, effort.candidates, effort.victims + _TUNED)
  num = on.num_victims - _TUNED
  if num < 1 or min(on.images.shape[1:3]) < 11:
    return Part(title, ("Left out: there are too few images, or they are below 11 pixels.",))
  truth = (on.images / 255).astype(np.float32)
  rows, quality = {"original": truth[:num]}, {}
  evidence: list[Evidence] = []
  used_sibling = False
  shape = (1, *on.images.shape[1:])
  searched = {_PIXELS: inversion.pixels(shape)}
  if context.prior is not None:
    searched[_CODES] = learned.codes(context.prior, shape)
  for attack, variables in searched.items():
    solve, first = _solver(context, variables, context.loss_fn), len(evidence)
    for protection in laboratory.protections(context):
      tried = _attack(context, on, protection, solve, num, _WEIGHTS[attack])
      psnr = np.asarray(scores.psnr(jnp.asarray(tried.taken), jnp.asarray(truth[:num])))
      ssim = np.asarray(scores.ssim(jnp.asarray(tried.taken), jnp.asarray(truth[:num])))
      named = scores.identify(jnp.asarray(tried.taken), jnp.asarray(truth), jnp.arange(num))
      name = protection.name.replace("none", "no protection") + ", learned prior" * (
        attack == _CODES
      )
      rows[name], quality[name] = tried.taken, psnr
      note = (
        f"PSNR {psnr.mean():.1f} dB ({tried.best.mean():.1f} for the best restart), SSIM "
        f"{ssim.mean():.2f}"
      )
      if tried.weight:
        note += f", total variation {tried.weight:g}"
      control = None
      if len(evidence) > first:
        control = evidence[first].control or evidence[first]
      elif named.interval[0] <= named.chance:  # it fails on the run's own model
        control = _vulnerable(context, on, attack, variables, tried.weight, num)
        used_sibling = True
      evidence.append(
        Evidence(
          _THREAT, attack, protection.name, f"identification among {len(truth)}", named.rate,
          named.interval, named.chance, control, note=note, occurs=False,
        )
      )  # fmt: skip
  path = context.output / _PICTURE
  few = {name: images[:8] for name, images in rows.items()}
  pictures.grid(few, quality, path, f"{title}: {context.data_name}")
  weights = ", ".join(f"{w:g}" for w in _WEIGHTS[_PIXELS])
  text = (
    f"The adversary knows the {'mask' if context.of_pixels else 'label'} and searches for the "
    f"image whose gradient on {on.which} points as the one seen, in {effort.iterations} steps "
    f"(restarts: {effort.restarts}). The weight of total variation is chosen for each protection "
    f"on {_TUNED} images that are not reported, out of {weights}. {num} images were tried. The "
    "control is the same search without protection." + _SIBLING * used_sibling,
    "With a learned prior it searches among what an autoencoder of public images can draw. Such a "
    "guess looks like an image of the kind wherever the update says little: judge it by "
    "identification, and not by looks."
    if _CODES in searched
    else "No prior was learned: there are too few public images.",
  )
  caption = "Original and reconstructions; below each its PSNR in dB"
  return Part(title, text, tuple(evidence), (), {_PICTURE: caption})


def _solver(
  context: Context, variables: inversion.Variables, loss_fn: LossFn
) -> Callable[..., inversion.Found]:
  """(key, weight of total variation, Seen) -> Found; compiled once."""
  settings = inversion.Settings(steps=context.effort.iterations, rate=0.1, signed=False)
  simulate = clients.gradient(loss_fn)

  def solve(key: Key, weight: Array, seen: clients.Seen) -> inversion.Found:
    penalty = lambda seen, images: weight * priors.total_variation(images)
    attack = inversion.inversion(simulate, variables, settings, penalty)
    return inversion.run(attack, key, seen, context.effort.restarts)

  return jax.jit(solve)


def _vulnerable(
  context: Context, on: Bench, attack: str, variables: inversion.Variables, weight: float, num: int
) -> Evidence:
  """The same search with the same effort, on a model whose updates are known to hold images."""
  context.note("reconstruction, control on a vulnerable model")
  loss_fn, model = laboratory.vulnerable(context)
  solve, simulate = _solver(context, variables, loss_fn), jax.jit(clients.gradient(loss_fn))
  truth, taken = (on.images / 255).astype(np.float32), []
  key = jax.random.key(context.effort.audit_seed)
  for row in range(num):
    seen = clients.Seen(*model, None, jnp.asarray(on.labels[row : row + 1]))
    seen = seen._replace(update=simulate(seen, jnp.asarray(truth[row : row + 1])))
    found = solve(jax.random.fold_in(key, row), jnp.float32(weight), seen)
    taken.append(np.asarray(inversion.selected(found)[0]))
  named = scores.identify(jnp.asarray(np.stack(taken)), jnp.asarray(truth), jnp.arange(num))
  return Evidence(
    "honest server, one image and one step on a vulnerable model", attack, "none",
    f"identification among {len(truth)}", named.rate, named.interval, named.chance, occurs=False,
  )  # fmt: skip


def _attack(
  context: Context,
  on: Bench,
  protection: Protection,
  solve: Callable[..., inversion.Found],
  num: int,
  weights: tuple[float, ...],
) -> Tried:
  """Tunes on the images after the first `num`, and reconstructs these."""
  key = jax.random.key(context.effort.audit_seed)
  gradients = laboratory.updates(context, on, protection, range(on.num_victims))
  seen = [
    clients.Seen(*on.model, gradient, jnp.asarray(on.labels[row : row + 1]))
    for row, gradient in enumerate(gradients)
  ]

  def run(row: int, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """What the attacker selects, and the PSNR of each restart."""
    context.note(f"reconstruction, {protection.name}, image {row + 1}")
    found = solve(jax.random.fold_in(key, row), jnp.float32(weight), seen[row])
    original = jnp.asarray(on.images[row].astype(np.float32) / 255)
    of_restarts = scores.psnr(found.images[:, 0], original[None])
    return np.asarray(inversion.selected(found)[0]), np.asarray(of_restarts)

  def on_tuned(weight: float) -> float:
    images = {row: run(row, weight)[0] for row in range(num, on.num_victims)}
    original = on.images[num : on.num_victims].astype(np.float32) / 255
    taken = np.stack([*images.values()])
    return float(jnp.mean(scores.psnr(jnp.asarray(taken), jnp.asarray(original))))

  weight = max(weights, key=on_tuned) if len(weights) > 1 else weights[0]
  taken, qualities = zip(*(run(row, weight) for row in range(num)), strict=True)
  return Tried(np.stack(taken), np.max(qualities, axis=1), weight)
