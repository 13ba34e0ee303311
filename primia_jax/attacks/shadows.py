"""Shadow models: trained as the attacked model is, on random halves of a pool of images.

Each image is in exactly half of the models (Carlini et al. 2022). Here models come in
pairs: 2k takes an image by a fair coin, and 2k + 1 takes what 2k leaves. So whoever attacks model
2k with all pairs but its own meets each image in exactly half of its shadows, whatever 2k holds,
and every model serves once as target and else as shadow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import local
from primia_jax.sites import Placement
from primia_jax.types import Array, Key, ModelState, Params, Site

# (key, images and labels of one model) -> the trained model
TrainFn = Callable[[Key, Site], tuple[Params, ModelState]]


def halves(seed: int, num_models: int, num_images: int) -> np.ndarray:
  """Which images each model is trained on: [S, N] bool, in complementary pairs.

  Coins are independent, so that an image tells nothing of who else is in: two models that differ in
  one image are neighbours as differential privacy has them.

  Raises:
    ValueError: for an odd number of models, or less than two images.
  """
  if num_models < 2 or num_models % 2 or num_images < 2:
    raise ValueError(f"num_models={num_models} must be even, num_images={num_images} at least 2")
  coins = np.random.default_rng(seed).random((num_models // 2, num_images)) < 0.5
  return np.stack([coins, ~coins], axis=1).reshape(num_models, num_images)


def most_images(num_images: int) -> int:
  """A bound on the images of one half that does not depend on the coins: N / 2 and seven standard
  deviations, which a model exceeds with probability below 1e-11.
  """
  return min(num_images, num_images // 2 + int(np.ceil(3.5 * np.sqrt(num_images))))


def trainer(
  recipe: local.Recipe,
  init_fn: Callable[[Key], tuple[Params, ModelState]],
  divisor: int | None = None,
) -> TrainFn:
  """One round of `local.train` from fresh parameters, as a TrainFn.

  Args:
    recipe: of the training, with as many steps in its round as are wanted.
    init_fn: key -> (params, model_state).
    divisor: the number of units by which a private recipe divides its noised sums; None for the
      site's own. A number that does not depend on who is in keeps models of neighbouring data
      neighbours, where the number of units is not public.
  """
  if divisor is not None and recipe.privatizer is not None:
    inner = recipe.privatizer

    def update(grads, state, params=None, **known):
      return inner.update(grads, state, params, **{**known, "num_units": jnp.int32(divisor)})

    fixed = local.Privatizer(inner.init, update)
    fixed.goes_with = getattr(inner, "goes_with", ())
    recipe = recipe._replace(privatizer=fixed)
  train = local.train(recipe)

  def run(key: Key, site: Site) -> tuple[Params, ModelState]:
    init_key, order_key, step_key = jax.random.split(key, 3)
    params, model_state = init_fn(init_key)
    opt_state = recipe.optimizer(jnp.float32(0)).init(params)
    now = local.Round(jnp.int32(0), order_key, step_key)
    noise = local.init_noise(recipe, params)
    trained = train(params, model_state, opt_state, noise, site, now)
    return trained.params, trained.model_state

  return run


def shadow_logits(
  train_fn: TrainFn,
  predict_fn: Callable[[Params, ModelState, Array], Array],
  placement: Placement,
  batch_size: int = 128,
) -> Callable[..., np.ndarray]:
  """Makes the function that trains models, one after another on each device, and asks them.

  On CPU `sites.fastest()` is a scan of models on each of several forced host devices, which is
  fastest there: side by side, convolutions with a kernel for each model run one by one anyway. On
  an accelerator it is a vmap.

  Args:
    train_fn: see `TrainFn`; traced once.
    predict_fn: (params, model_state, images as stored) -> logits.
    placement: where models are trained.
    batch_size: of the images asked.

  Returns:
    (key, included [S, N], images [N, H, W, C], labels [N], others [Z, H, W, C], numbers [S]=None,
    secrets [S, 8]=None) -> logits [S, N + Z, L] of the pool and of others. `numbers` are folded
    into the key, for models trained in several calls; secrets are for private recipes. It raises a
    ValueError for a half larger than `most_images`.
  """

  def site_fn(shared: Any, model: Any) -> tuple[Any, Array]:
    key, images, labels, asked = shared
    number, rows, count, secret = model
    site = Site(number, images[rows], labels[rows], count, secret)
    params, model_state = train_fn(jax.random.fold_in(key, number), site)
    answer = lambda image: predict_fn(params, model_state, image[None])[0]
    return (), jax.lax.map(answer, asked, batch_size=batch_size)

  lifted = placement.sum_over_sites(site_fn)

  def run(key, included, images, labels, others, numbers=None, secrets=None) -> np.ndarray:
    included = np.asarray(included)
    most, counts = most_images(included.shape[1]), included.sum(axis=1).astype(np.int32)
    if counts.max() > most:
      raise ValueError(f"a model has {counts.max()} of {included.shape[1]} images, over {most}")
    rows = np.argsort(~included, axis=1, kind="stable")[:, :most].astype(np.int32)
    numbers = np.arange(len(included), dtype=np.int32) if numbers is None else numbers
    asked = np.concatenate([images, others])
    shared = placement.replicate((key, images, np.asarray(labels, np.int32), asked))
    _, logits = lifted(shared, placement.put((numbers, rows, counts, secrets)))
    return np.asarray(logits)

  return run
