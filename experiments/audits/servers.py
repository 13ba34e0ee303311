"""A server that prepends a module to the model: what it takes out of an honest, masked sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax import algorithms, federated, local, secagg, sites, summation
from primia_jax.attacks import active, detection
from primia_jax.attacks.evidence import Evidence, beats_chance
from primia_jax.metrics import clopper_pearson
from primia_jax.models import MEAN, STD, normalise
from primia_jax.types import ApplyFn, Array, Params, Site

from . import context as shared
from . import laboratory, pictures
from .context import Context
from .parts import Part

_LARGEST = 1024.0  # of an update in fixed point
_SITES, _EACH, _BINS, _GAIN = 3, 8, 128, 1e-3
_TAKEN = 25.0  # dB from which an image counts as taken
_PICTURE = "malicious_server.png"


def audit(context: Context) -> Part:
  """Runs one masked round of honest sites that were sent the module, and reads the sum."""
  title = "A server that sends a module of its own"
  on = laboratory.bench(context, context.effort.candidates, _SITES * _EACH)
  each = on.num_victims // _SITES
  if each < 1:
    return Part(title, ("Left out: the sites hold too few images.",))
  stored = on.images[: _SITES * each].reshape(_SITES, each, *on.images.shape[1:])
  num_public = min(256, len(context.images.test.labels))
  public, _ = shared.take(context.images.test, np.arange(num_public))
  layer = _layer(np.asarray(normalise(jnp.asarray(public))))
  apply_fn, params = active.prepend(context.trained.model.apply, on.model.params, layer, _GAIN)
  of_site = lambda i: {**params["module"], **active.for_site(layer, i, _SITES)}
  back = jnp.tile(params["module"]["back"], (_SITES, 1))
  sent = [{**params, "module": {**of_site(i), "back": back}} for i in range(_SITES)]
  context.note("a malicious server's round")
  module = _round(context, apply_fn, sent, on, stored, each)["module"]
  found = []
  for i in range(_SITES):
    mine = {name: active.block(module[name], i, _SITES) for name in ("kernel", "bias")}
    bins = active.read(mine["kernel"], mine["bias"])
    images = np.asarray(bins.images)[np.asarray(bins.has)].reshape(-1, *stored.shape[2:])
    found.append(np.clip(images * STD + MEAN, 0, 1).astype(np.float32))
  truth = (stored / 255).astype(np.float32)
  best = [nearest(mine, own) for mine, own in zip(found, truth, strict=True)]
  taken, quality = (np.concatenate(parts) for parts in zip(*best, strict=True))
  of_public = nearest((public / 255).astype(np.float32), truth.reshape(-1, *truth.shape[2:]))[1]
  right, num = int(np.sum(quality > _TAKEN)), len(quality)
  one = Evidence(
    "malicious server, a module of its own", "imprint units for each site",
    f"secure aggregation of {_SITES} sites", f"images taken (PSNR above {_TAKEN:g} dB), of {num}",
    right / num, clopper_pearson(right, num), float(np.mean(of_public > _TAKEN)),
    note="one step on each site's images; guessing takes the nearest public image", occurs=False,
  )  # fmt: skip
  refusal = _refused(sent[0], on)
  failures: tuple[str, ...] = ()
  if beats_chance(one):
    failures = (
      f"malicious architecture: a module before the model takes {right} of {num} images out of a "
      f"masked sum of {_SITES} sites, and names each one's site",
    )
  rows = {"original": truth.reshape(-1, *truth.shape[2:])[:8], "taken": taken[:8]}
  path = context.output / _PICTURE
  pictures.grid(rows, {"taken": quality[:8]}, path, f"{title}: {context.data_name}")
  text = (
    f"The server sends {_SITES} honest sites a module of {_BINS} units for each before the model. "
    f"Each takes one step on {each} images, and the sum is masked. Differences of neighbouring "
    "units' gradients are single images (Fowl et al. 2022; Zhao et al. 2023).",
    f"Our programs' sites build the model from their own settings. Sent the module, "
    f"`detection.check_structure` says: {refusal}",
  )
  caption = "Images of the sites, and what the server took from the masked sum, with PSNR in dB"
  return Part(title, text, (one,), failures, {_PICTURE: caption})


def _layer(public: np.ndarray) -> dict[str, Array]:
  """Units that measure the mean brightness, at quantiles of public images."""
  flat = public.reshape(len(public), -1)
  bins = active.thresholds(flat.mean(1), _BINS)
  measurement = jnp.full(flat.shape[1], 1 / flat.shape[1], jnp.float32)
  return active.imprint(measurement, jnp.asarray(bins))


def _round(
  context: Context,
  apply_fn: ApplyFn,
  sent: list[Params],
  on: laboratory.Bench,
  stored: np.ndarray,
  each: int,
) -> Params:
  """The update of one round of honest sites under secure aggregation."""
  prepare = lambda key, images, targets: (normalise(images), targets)
  num_classes = len(context.trained.label_names)
  loss_fn = local.classification_loss(apply_fn, prepare, num_classes)
  steps = local.epochs(each, each)
  recipe = local.Recipe(steps, local.gradients(loss_fn), None, optax.sgd, lambda t: 1.0)
  algorithm = algorithms.fedavg(recipe)
  summed = summation.masked(secagg.secure_sum(_SITES, num_peers=2, max_abs=_LARGEST))
  run = active.round(algorithm, summed, sites.loop())
  ids = np.arange(_SITES, dtype=np.int32)
  labels = on.labels[: _SITES * each].reshape(_SITES, each)
  data = federated.in_memory(
    Site(ids, stored, labels, np.full(_SITES, each, np.int32))  # type: ignore[arg-type]
  )
  params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *sent)
  state = algorithm.init_site(sent[0], on.model.model_state)
  states = jax.tree.map(lambda a: np.broadcast_to(a, (_SITES, *np.shape(a))), state)
  key = jax.random.key(context.effort.audit_seed)
  first = federated.Global(params, on.model.model_state, (), jnp.int32(0), key)
  return run(first, data, states).update[0]


def nearest(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """For each true image [M, H, W, C] the nearest of those found, and its PSNR; zeros if there is
  none.
  """
  if not len(found):
    return np.zeros_like(truth), np.zeros(len(truth))
  error = np.stack([np.square(found - one).mean((1, 2, 3)) for one in truth])
  best = error.argmin(1)
  return found[best], -10 * np.log10(np.maximum(error.min(1), 1e-12))


def _refused(sent: Params, on: laboratory.Bench) -> str:
  """What a site says that compares the module with its own model."""
  try:
    detection.check_structure(sent, on.model.params)
  except ValueError as error:
    return str(error)
  return "nothing; it did not notice"
