"""What a site can check of a model that it is sent, before it trains it on its images.

A server that lies plants parameters whose update holds single images (`active`). Three checks of
what a site was sent, the first two exact:

- `check_structure`: a site builds the model from its own settings. Parameters of another structure,
  as a module before the model has, are refused.
- `digest`: sites that compare what they got notice a model that differs from site to site. Between
  our processes this is done: `experiments.starts.agree` has all sites sign the state to start from,
  each computes later models itself from the sums, and `secagg.exchange` binds each sum to all
  before, so that sites with different models refuse each other's messages.
- `measure`: what is left is one hostile model for all, by a server that reports a false sum or a
  site that sends a huge update. Its parameters show: units that all measure the same, units that
  never open, a gradient that is one image's.

`measure` finds the attacks that are known, and no proof: a server that knows the limits can stay
below them, for less (Garov et al. 2024, "Hiding in plain sight"). Differential privacy is what
bounds it. Limits come from honest models (`calibrate`); `benchmarks.active_server` measures how
often the default ones refuse others.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.federated import Info, Sites, State
from primia_jax.types import Array, Batch, Key, LossFn, ModelState, Params, PyTree

Step = Callable[[Key, State, Sites], tuple[State, Info]]
_FEWEST_UNITS = 8  # of a layer with bins; fewer hold hardly an image, and heads have fewer


class Scores(NamedTuple):
  """What `measure` found; each the most of any layer of eight units or more, larger is worse.

  Attributes:
    alike: the share of a kernel's squared singular values that is the largest one's. 1 where all
      units measure the same, as those of an imprint layer do.
    closed: the share of a layer's units whose gradient is exactly zero on the batch. 1 where no
      unit opens for any image.
    single: how much of the gradient is one image's: its norm over that of the others' root sum of
      squares (after the D-SNR of Garov et al. 2024), of any parameter.
  """

  alike: Array | np.floating
  closed: Array | np.floating
  single: Array | np.floating


# What is planted scores 1, 1, or without bound; four honest small networks on X-rays, fresh
# and trained, at most 0.35, 0.79 and 3.5.
LIMITS = Scores(*map(np.float32, (0.9, 0.98, 30.0)))


def check_structure(params: Params, own: Params) -> None:
  """Refuses parameters that are not those of the site's own model.

  Args:
    params: as sent.
    own: of the model that the site builds from its own settings; arrays or shapes
      (`jax.eval_shape`).

  Raises:
    ValueError: another structure, shape or dtype, or a number that is not finite; it names the
      first parameter that differs.
  """
  sent, ours = (
    {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for tree in (params, own)
  )
  cure = "the server wants another model trained than this site's settings build; do not train it"
  if set(sent) != set(ours):
    listed = lambda names: f"{', '.join(sorted(names)[:2])} (of {len(names)})" if names else "none"
    raise ValueError(
      f"the model sent has parameters beyond the site's own, {listed(set(sent) - set(ours))}, and "
      f"lacks {listed(set(ours) - set(sent))}: {cure}"
    )
  for name, leaf in ours.items():
    form = lambda a: (a.dtype.name, tuple(a.shape))
    if form(sent[name]) != form(leaf):
      raise ValueError(f"parameter {name} is {form(sent[name])} and not {form(leaf)}: {cure}")
    if not bool(jnp.isfinite(sent[name]).all()):
      raise ValueError(f"parameter {name} holds numbers that are not finite; do not train it")


def digest(params: Params) -> bytes:
  """SHA-256 of all names, shapes, dtypes and bytes of the parameters, for sites to compare."""
  out = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    a = np.asarray(leaf)
    out.update(repr((jax.tree_util.keystr(path), a.dtype.str, a.shape)).encode())
    out.update(a.tobytes())
  return out.digest()


def measure(
  loss_fn: LossFn, params: Params, model_state: ModelState, batch: Batch, key: Key
) -> Scores:
  """How suspicious a model is, on images of the site that is to train it; nothing leaves the site.

  One gradient for each image, one after the other, in the memory of two.

  Args:
    loss_fn: as the site trains, e.g. `local.classification_loss`.
    params, model_state: as sent.
    batch: [B, ...] of the site, at least 2 examples; 16 or more tell closed units from rare ones.
    key: of the loss.

  Raises:
    ValueError: for fewer than two examples.
  """
  if len(batch.labels) < 2:
    raise ValueError(f"a batch of {len(batch.labels)}: comparing images needs at least 2")
  grad_fn = jax.grad(loss_fn, has_aux=True)
  squared = lambda tree: jax.tree.map(lambda g: jnp.sum(g * g), tree)
  largest = lambda tree: jax.tree.map(lambda g: jnp.max(jnp.abs(g), tuple(range(g.ndim - 1))), tree)

  def one(opened: PyTree, example: Batch) -> tuple[PyTree, PyTree]:
    alone = jax.tree.map(lambda a: a[None], example)
    gradient, _ = grad_fn(params, model_state, alone, key)
    return jax.tree.map(jnp.maximum, opened, largest(gradient)), squared(gradient)

  nothing = jax.tree.map(jnp.zeros_like, largest(params))
  opened, norms = jax.lax.scan(one, nothing, batch)
  kernels = [a for a in jax.tree.leaves(params) if a.ndim > 1 and a.shape[-1] >= _FEWEST_UNITS]
  units = [a for a in jax.tree.leaves(opened) if a.ndim == 1 and a.size >= _FEWEST_UNITS]
  zero = jnp.zeros((), jnp.float32)
  most = lambda values: jnp.max(jnp.stack([zero, *values]))
  return Scores(
    most([_largest_share(a.reshape(-1, a.shape[-1])) for a in kernels]),
    most([jnp.mean((a == 0).astype(jnp.float32)) for a in units]),
    most([_outstanding(a) for a in jax.tree.leaves(norms)]),
  )


def calibrate(honest: Sequence[Scores], margin: float) -> Scores:
  """Limits: of each score the largest of honest models, plus `margin` of the way to its worst.

  The worst of a share is 1; `single` has none, and its limit is the largest times 1 + margin.
  """
  alike, closed, single = (max(float(s) for s in column) for column in zip(*honest, strict=True))
  up = lambda share: share + margin * (1 - share)
  return Scores(*map(np.float32, (up(alike), up(closed), (1 + margin) * single)))


def suspicions(scores: Scores, limits: Scores) -> list[str]:
  """What is beyond its limit, in words; empty for a model that may be trained."""
  told = {
    "alike": "units of a layer all measure the same, as bins for single images do",
    "closed": "units of a layer open for none of the site's images, as in a round aimed at another",
    "single": "one image makes up the gradient",
  }
  return [
    f"{told[name]} ({name} {float(value):.3g}, limit {float(limit):.3g})"
    for name, value, limit in zip(Scores._fields, scores, limits, strict=True)
    if not float(value) <= float(limit)
  ]


def refuse(scores: Scores, limits: Scores, site: int) -> None:
  """Ends a site's round before it trains a suspicious model.

  Raises:
    ValueError: naming what is beyond its limit.
  """
  if found := suspicions(scores, limits):
    raise ValueError(
      f"site {site} does not train the model it was sent: {'; '.join(found)}. Ask who runs the "
      "server; if the model is right, raise the limits"
    )


def guarded(
  step: Step,
  loss_fn: LossFn,
  here: Callable[[np.ndarray], np.ndarray],
  limits: Scores = LIMITS,
  num_images: int = 16,
) -> Step:
  """The step of a round, before which each site looks at the model, and refuses a suspicious one.

  Args:
    step: of `federated.federate`.
    loss_fn: as the sites train.
    here: numbers of the sites in the round -> positions of those that run here (`Placement.rows`).
    limits: see `refuse`, which the step raises as.
    num_images: of each site that look at the model, the first ones. A site of a single image
      cannot compare and lets all pass.
  """
  run = jax.jit(functools.partial(measure, loss_fn))

  def checked(key: Key, state: State, sites: Sites) -> tuple[State, Info]:
    ids = np.asarray(sites.ids, np.int32)
    mine = ids[here(ids)]
    loaded = sites.load(mine)
    for row, site in enumerate(mine.tolist()):
      count = min(num_images, int(loaded.num_examples[row]))
      if count > 1:
        images, labels = (jnp.asarray(a[row, :count]) for a in (loaded.images, loaded.labels))
        numbers = jnp.arange(count, dtype=jnp.int32)
        batch = Batch(images, labels, jnp.ones(count, jnp.float32), numbers)
        refuse(run(state.params, state.model_state, batch, key), limits, site)
    return step(key, state, sites)

  return checked


def _largest_share(kernel: Array) -> Array:
  """Of the squared singular values of [D, K]; 0 for a kernel of zeros or of a single direction
  that its shape allows.
  """
  if min(kernel.shape) < 2:
    return jnp.zeros((), jnp.float32)
  gram = kernel.T @ kernel if kernel.shape[0] > kernel.shape[1] else kernel @ kernel.T
  total = jnp.trace(gram)
  return jnp.linalg.eigvalsh(gram)[-1] / jnp.where(total > 0, total, 1)


def _outstanding(norms: Array) -> Array:
  """The largest of squared norms [B] over the sum of the others, as a ratio of norms; 0 for
  zeros.
  """
  largest = jnp.max(norms)
  return jnp.sqrt(largest / jnp.where(largest > 0, jnp.sum(norms) - largest, 1))
