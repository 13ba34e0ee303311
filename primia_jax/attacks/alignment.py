"""Was this image behind that update? The candidate's own gradient is compared with what was seen.

A passive attack on membership from updates, for any model (compare Nasr et al. 2019, section IV,
and Li, Li and Ribeiro 2022, "Effective passive membership inference attacks in federated learning
against overparameterized models"). The attacker holds the candidates with their labels, the model
before the update, and public images of the same kind. It needs no search, so that it is a strong
and cheap test of every threat point: an attacker that cannot recognise an image that it holds
will not reconstruct it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.flatten_util import ravel_pytree

from primia_jax.types import Array, Batch, LossFn, ModelState, Params


class Products(NamedTuple):
  """Inner products of gradients, less the mean gradient of the public images, and of updates.

  Attributes:
    own: [N], of each candidate with itself.
    shared: [N, M], of candidates and public images.
    seen: [N, V], of candidates and updates.
    gram: [M, M], of public images.
    public: [M, V], of public images and updates.
    size: P, the number of parameters.
  """

  own: Array
  shared: Array
  seen: Array
  gram: Array
  public: Array
  size: int


def products(
  loss_fn: LossFn,
) -> Callable[[Params, ModelState, Params, tuple[Array, Array], tuple[Array, Array]], Products]:
  """Makes the function that computes them; each gradient is formed once and dropped, but for those
  of public images, which are kept together.

  Args:
    loss_fn: of the site, as in `local`; its key is constant.

  Returns:
    (params, model_state, updates [V, ...] like params, (images [N, ...] as stored, labels [N]) of
    candidates, the same of M public images) -> Products. It may be jitted.
  """

  def gradient(params: Params, model_state: ModelState, image: Array, label: Array) -> Array:
    batch = Batch(image[None], label[None], jnp.ones(1, jnp.float32))
    grads, _ = jax.grad(loss_fn, has_aux=True)(params, model_state, batch, jax.random.key(0))
    return ravel_pytree(grads)[0]

  def run(params, model_state, updates, candidates, public) -> Products:
    of_image = lambda pair: gradient(params, model_state, *pair)
    rows = jax.lax.map(of_image, public)
    mean = jnp.mean(rows, axis=0)
    rows = rows - mean[None]
    changes = jax.vmap(lambda u: ravel_pytree(u)[0])(updates)
    precise = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)

    def of_candidate(pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
      centred = of_image(pair) - mean
      return precise(centred, centred), precise(rows, centred), precise(changes, centred)

    own, shared, seen = jax.lax.map(of_candidate, candidates)
    gram, of_public = precise(rows, rows.T), precise(rows, changes.T)
    return Products(own, shared, seen, gram, of_public, mean.size)

  return run


def scores(given: Products, ridge: float) -> np.ndarray:
  """How well each candidate agrees with each update: [N, V] float64, larger for a member.

  Minus the inner product of gradient and update under the inverse covariance of public gradients
  plus a ridge, over the gradient's own length in it. For Gaussian gradients that orders candidates
  as the likelihood ratio of "this candidate is in the sum" against "another image is".

  Args:
    given: the products.
    ridge: as a multiple of the covariance's mean eigenvalue: small for exact updates of few images,
      large under noise; infinite takes the plain cosine.

  Raises:
    ValueError: for a ridge that is not positive.
  """
  if not ridge > 0:
    raise ValueError(f"ridge={ridge} must be positive; infinite takes the plain cosine")
  own, shared, seen, gram, public = (np.asarray(a, np.float64) for a in given[:-1])
  count = len(gram)
  if np.isinf(ridge):
    return -seen / np.sqrt(own)[:, None]
  # Woodbury: (C^T C / M + r I)^-1 = (I - C^T (C C^T / M + r I)^-1 C / M) / r
  floor = ridge * np.trace(gram) / count / given.size
  inner = scipy.linalg.cho_factor(gram / count + floor * np.eye(count))
  agreement = (seen - shared @ scipy.linalg.cho_solve(inner, public) / count) / floor
  inside = np.sum(shared * scipy.linalg.cho_solve(inner, shared.T).T, axis=1) / count
  lengths = np.sqrt(np.maximum(own - inside, 1e-30) / floor)
  return -agreement / lengths[:, None]


def pairs(is_member: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
  """Pairs members with strangers of their group at random, each candidate once at most: [Q, 2].

  Which of the two agrees more with an update is then a coin toss, unless membership shows. Groups
  keep out what is not membership: class, and site.

  Args:
    is_member: [N] bool.
    groups: [N], of any kind that can be compared.
    seed: of the pairing.
  """
  rng, found = np.random.default_rng(seed), [np.zeros((0, 2), np.int64)]
  for group in np.unique(groups):
    sides = (
      rng.permutation(np.flatnonzero((groups == group) & (is_member == side)))
      for side in (True, False)
    )
    found.append(np.array(list(zip(*sides, strict=False)), np.int64).reshape(-1, 2))
  return rng.permutation(np.concatenate(found))
