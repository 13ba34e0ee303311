"""What a dense layer's update tells of the layer's inputs: one input exactly, of many their sums.

A dense layer z = x W + b has the gradients dW = sum_i x_i g_i^T and db = sum_i g_i, with g_i the
gradient at example i's output. An update of one step of SGD is a multiple of both.

Of one example dW = x g^T and db = g, so dW db / |db|^2 is x exactly (`invert`; Phong et al. 2017,
Geiping et al. 2020, proposition 3.1). The layer's inputs are the image itself in an MLP or a linear
model, and its features in a model of fixed features.

Of many examples dW has no more columns than the layer has outputs L, and softmax makes each g_i sum
to zero. So a head's update has rank L - 1 at most, after any number of steps of any batches (Adam
breaks this, since it scales each number by itself). Whoever sees it alone gets L - 1 directions of
inputs: from zero weights the differences between the classes' sums (`class_contrasts`). None is a
single image (`reach` measures how near one comes). That is no privacy: whoever already holds a
candidate can test whether its share is in the sum (`alignment`), which works better the more
numbers an input has and the fewer images are summed (Homer et al. 2008).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from primia_jax.types import Array, PyTree

_RESOLVED = 1e-4  # of the largest singular value; float32 sums and fixed point are finer


def invert(kernel: Array, bias: Array) -> Array:
  """The input of a dense layer, from the gradient of one example or an SGD step on it.

  Exact where a single example with a non-zero gradient took part. Of several it is a weighted mean
  of their inputs, with weights g_i . db / |db|^2 that may be negative.

  Args:
    kernel: [D, L] float32, dW or any multiple of it.
    bias: [L], db, or the same multiple.

  Returns:
    [D] float32; NaN where the bias did not change.
  """
  return kernel @ (bias / (bias @ bias))


def rank(kernel: Array, resolved: float = _RESOLVED) -> Array:
  """How many directions of inputs an update [D, L] has: int32.

  Args:
    kernel: the update.
    resolved: the least singular value that counts, as a share of the largest.
  """
  values = jnp.linalg.svd(kernel, compute_uv=False)
  return jnp.sum((values > resolved * values[0]).astype(jnp.int32), dtype=jnp.int32)


def class_contrasts(kernel: Array, bias: Array, counts: Array) -> Array:
  """The mean input of each class less that of all, from one step at zero weights.

  At zero weights softmax is 1 / L, so that column l of dW is (sum of all) / L - (sum of class l).
  The sum of all stays unknown: it drops out of the rank L - 1.

  Args:
    kernel, bias: [D, L] and [L], the gradient, or a multiple of it.
    counts: [L] float32, examples of each class, not all equal. They follow from the bias up to
      their scale.

  Returns:
    [D, L]: (sum of class l - sum of all / L) / counts[l].
  """
  expected = jnp.sum(counts) / counts.size - counts
  scale = (bias @ expected) / (expected @ expected)
  return -kernel / scale / counts[None]


def reach(kernel: Array, inputs: Array, mean: Array, num_directions: int) -> Array:
  """The best correlation of any direction of an update with each of some inputs.

  Args:
    kernel: [D, L], the update.
    inputs: [N, D], of images that took part, or did not.
    mean: [D] of public images, which is taken from all inputs.
    num_directions: of the update, the strongest first; its `rank`.

  Returns:
    [N] in [0, 1]; 1 where an input lies in the span. Independent inputs of D numbers reach about
    sqrt(num_directions / D).
  """
  directions = jnp.linalg.svd(kernel, full_matrices=False)[0][:, :num_directions]
  centred = inputs - mean[None]
  return jnp.linalg.norm(centred @ directions, axis=1) / jnp.linalg.norm(centred, axis=1)


def output_gradients(kernel: Array, bias: Array, inputs: Array, labels: Array) -> Array:
  """g of softmax cross-entropy at each example, [N, L]: the probabilities less the one-hot label.

  Args:
    kernel, bias: [D, L] and [L] of the head before the step.
    inputs: [N, D].
    labels: [N] int32.
  """
  right = jax.nn.one_hot(labels, bias.size, dtype=jnp.float32)
  return jax.nn.softmax(inputs @ kernel + bias[None]) - right


def alignment(
  kernel: Array, inputs: Array, gradients: Array, public: Array, ridge: float | Array
) -> Array:
  """How well each candidate's own gradient agrees with an update: the larger, the likelier that the
  candidate took part.

  The log-likelihood ratio of Gaussian inputs, whose covariance is that of public images plus a
  ridge. It decides between "the candidate is in the sum" and "another image is". The attacker is
  given the candidates' labels, as somebody who holds the images has them.

  Args:
    kernel: [D, L], the sum of the steps' updates, so that it points against the gradients.
    inputs, gradients: [N, D] and [N, L] of the candidates; see `output_gradients`.
    public: [M, D], inputs of images that surely took no part.
    ridge: added to the covariance, as a multiple of its mean eigenvalue. Small for an exact update;
      large for one under noise, where the score becomes the plain inner product.

  Returns:
    [N] float32, of unit scale over candidates that took no part, up to a common factor.
  """
  count = public.shape[0]
  mean = jnp.mean(public, axis=0)
  public = public - mean[None]
  gram = public @ public.T / count
  floor = ridge * jnp.trace(gram) / public.shape[1]
  factor = jax.scipy.linalg.cho_factor(gram + floor * jnp.eye(count, dtype=jnp.float32))
  centred = inputs - mean[None]
  # Woodbury: (P^T P / M + r I)^-1 = (I - P^T (P P^T / M + r I)^-1 P / M) / r
  solved = jax.scipy.linalg.cho_solve(factor, public @ kernel) / count
  whitened = (kernel - public.T @ solved) / floor
  shared = centred @ public.T
  inside = jnp.sum(shared * jax.scipy.linalg.cho_solve(factor, shared.T).T, axis=1) / count
  lengths = jnp.sqrt(jnp.maximum(jnp.sum(centred * centred, axis=1) - inside, 0) / floor)
  agreement = -jnp.sum((centred @ whitened) * gradients, axis=1)
  return agreement / (lengths * jnp.linalg.norm(gradients, axis=1))


class Inversion(NamedTuple):
  """Progress from features towards an image.

  Attributes:
    image: the present one, as the features take it, without a batch axis.
    opt_state: of the optimiser.
  """

  image: Array
  opt_state: PyTree


def from_features(
  features_fn: Callable[[Array], Array], features: Array, optimizer: optax.GradientTransformation
) -> tuple[Callable[[Array], Inversion], Callable[[Inversion], tuple[Inversion, Array]]]:
  """Finds an image that has given features, by descent on the squared distance.

  What features do not hold stays as it began: standardised scattering features fix an image up to
  its brightness and contrast.

  Args:
    features_fn: images [1, H, W, C] -> [1, ...], such as `models.features(config)`.
    features: [...] of the one image, without a batch axis.
    optimizer: of the image's pixels.

  Returns:
    init: image to begin with [H, W, C] -> Inversion.
    step: Inversion -> (Inversion, relative squared distance of the features before the step).
  """
  scale = jnp.sum(features * features)

  def distance(image: Array) -> Array:
    error = features_fn(image[None])[0] - features
    return jnp.sum(error * error) / scale

  def init(image: Array) -> Inversion:
    return Inversion(image, optimizer.init(image))

  def step(state: Inversion) -> tuple[Inversion, Array]:
    value, gradient = jax.value_and_grad(distance)(state.image)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.image)
    return Inversion(optax.apply_updates(state.image, updates), opt_state), value

  return init, step
