"""Whole batches from the update of a first layer that is fully connected with ReLU: SPEAR."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.attacks import scores, spear
from primia_jax.attacks.evidence import Evidence
from primia_jax.models import MEAN, STD
from primia_jax.types import Array, Batch, Params

from . import laboratory, pictures
from .context import Context
from .laboratory import Bench, Protection
from .parts import Part

_BATCH = 3  # images in a site's step
_DRAWS = 8192
_LAYER = "hidden"
_PICTURE = "first_layer.png"


def audit(context: Context) -> Part:
  """Inverts one step of several images, under one protection after the other."""
  title = "The first layer"
  if context.trained.config.name != "mlp":
    return Part(
      title,
      (
        f"Left out: the first layer of {context.trained.config.name} is not fully connected with "
        "ReLU, which SPEAR (Dimitrov et al. 2024) needs.",
      ),
    )
  on = laboratory.bench(context, context.effort.candidates, context.effort.victims)
  num = on.num_victims // _BATCH
  if num < 1:
    return Part(title, (f"Left out: fewer than {_BATCH} images are to be attacked.",))
  truth = (on.images / 255).astype(np.float32)
  decoys = truth[num * _BATCH :]
  rows, quality = {"original": truth[: num * _BATCH]}, {}
  evidence: list[Evidence] = []
  for protection in laboratory.protections(context):
    context.note(f"the first layer, {protection.name}")
    found, best = [], []
    for batch in range(num):
      mine = np.arange(batch * _BATCH, (batch + 1) * _BATCH)
      guesses = _invert(context, on, protection, mine)
      found.append(scores.identify_any(guesses, truth[mine], decoys))
      error = np.stack([np.square(guesses - truth[row]).mean((1, 2, 3)) for row in mine])
      best.append(guesses[error.argmin(1)])
    name = protection.name.replace("none", "no protection")
    rows[name] = np.concatenate(best)
    quality[name] = np.asarray(scores.psnr(jnp.asarray(rows[name]), jnp.asarray(rows["original"])))
    named = scores.join(found)
    evidence.append(
      Evidence(
        f"honest server, one step of {_BATCH} images a site", "SPEAR", protection.name,
        f"found, of {num * _BATCH}, before {len(decoys)} others", named.rate, named.interval,
        named.chance, evidence[0] if evidence else None,
        note=f"median PSNR {np.median(quality[name]):.1f} dB", occurs=False,
      )
    )  # fmt: skip
  few = {name: images[:8] for name, images in rows.items()}
  shown = {name: values[:8] for name, values in quality.items()}
  pictures.grid(few, shown, context.output / _PICTURE, f"{title}: {context.data_name}")
  units = np.shape(on.model.params[_LAYER]["bias"])[0]
  text = (
    f"A site takes one step on {_BATCH} images, on {on.which}. ReLU leaves some of the first "
    f"layer's {units} units without gradient on each image, from which SPEAR (Dimitrov et al. "
    "2024) computes all images of the batch, without any search. A sum over sites is a larger "
    f"batch; noise has no zeros. {num} batches were tried.",
  )
  caption = "Images, and what was computed, with PSNR in dB; grey where nothing was found"
  return Part(title, text, tuple(evidence), (), {_PICTURE: caption})


def _invert(context: Context, on: Bench, protection: Protection, mine: np.ndarray) -> np.ndarray:
  """Images [B, H, W, C] in [0, 1]; one grey image where nothing was found."""
  seed = context.effort.audit_seed
  rng = np.random.default_rng([seed, int(mine[0])])
  others = np.setdiff1d(np.arange(len(on.images)), mine)
  num = _BATCH * (protection.num_sites - 1)
  rows = np.concatenate([mine, rng.choice(others, num, len(others) < num)])

  @jax.jit
  def gradient(images: Array, labels: Array) -> Params:
    batch = Batch(images, labels, jnp.ones(len(rows), jnp.float32))
    return jax.grad(context.loss_fn, has_aux=True)(*on.model, batch, jax.random.key(0))[0]

  sent: Any = gradient(on.images[rows], on.labels[rows])
  if protection.noise_multiplier:
    key = jax.random.fold_in(jax.random.key(seed), int(mine[0]))
    sent = laboratory.noised(key, sent, on.l2_clip_norm, protection.noise_multiplier)
  layer, shape = on.model.params[_LAYER], on.images.shape[1:]
  pair = sent[_LAYER]["kernel"], sent[_LAYER]["bias"]
  got = spear.invert(*pair, layer["kernel"], layer["bias"], seed=seed, num_draws=_DRAWS)
  if got is None:
    return np.full((1, *shape), 0.5, np.float32)
  images = got.inputs.reshape(-1, *shape) * STD + MEAN
  return np.clip(np.nan_to_num(images), 0, 1).astype(np.float32)
