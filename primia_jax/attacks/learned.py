"""A learned prior: an autoencoder of public images of the same kind, in whose codes an attack
searches.

Every guess is then an image that the decoder can draw. Where an update says little, because of
noise or a sum, the guess still looks like such an image: it must be judged by identification and
not by looks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from primia_jax.attacks.inversion import Variables
from primia_jax.types import Array, Key, PyTree


@dataclasses.dataclass(frozen=True)
class Training:
  """How the autoencoder is trained.

  Attributes:
    code: the length of a code.
    hidden: units of the hidden layers, one in the encoder and one in the decoder.
    steps: of Adam.
    batch_size: public images in a step.
    rate: Adam's, which falls to 0 along a cosine.
    noise: standard deviation of noise on the codes, which makes near codes mean like images.
  """

  code: int = 64
  hidden: int = 512
  steps: int = 2000
  batch_size: int = 64
  rate: float = 1e-3
  noise: float = 0.1


class Autoencoder(NamedTuple):
  """What was learned.

  Attributes:
    params: of the layers, from images to codes to images.
    codes: [N, K], of the public images, in [-1, 1].
    losses: [T], mean squared error of each step.
  """

  params: PyTree
  codes: Array
  losses: Array


def train(key: Key, images: Array, training: Training | None = None) -> Autoencoder:
  """Trains on public images, float32 [N, H, W, C] in [0, 1]. May be jitted.

  Raises:
    ValueError: fewer images than a batch.
  """
  training = training or Training()
  if len(images) < training.batch_size:
    raise ValueError(
      f"{len(images)} images are fewer than batch_size={training.batch_size}; take a smaller batch"
    )
  rows = images.reshape(len(images), -1)
  sizes = (rows.shape[1], training.hidden, training.code, training.hidden, rows.shape[1])
  init_key, step_key = jax.random.split(key)
  draws = jax.random.split(init_key, 4)
  params = [
    {
      "kernel": jax.random.normal(k, (a, b), jnp.float32) / math.sqrt(a),
      "bias": jnp.zeros((1, b), jnp.float32),
    }
    for k, a, b in zip(draws, sizes[:-1], sizes[1:], strict=True)
  ]
  optimizer = optax.adam(optax.cosine_decay_schedule(training.rate, training.steps))

  def loss_fn(params: PyTree, batch: Array, key: Key) -> Array:
    codes = _encode(params, batch)
    codes = codes + training.noise * jax.random.normal(key, codes.shape, codes.dtype)
    return jnp.square(_decode(params, codes) - batch).mean()

  def step(carry, key: Key):
    params, opt_state = carry
    pick, noise = jax.random.split(key)
    batch = rows[jax.random.choice(pick, len(rows), (training.batch_size,))]
    loss, grads = jax.value_and_grad(loss_fn)(params, batch, noise)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
      moves, opt_state = optimizer.update(grads, opt_state)
    return (optax.apply_updates(params, moves), opt_state), loss

  keys = jax.random.split(step_key, training.steps)
  (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
  return Autoencoder(params, _encode(params, rows), losses)


def decode(params: PyTree, codes: Array, shape: tuple[int, int, int]) -> Array:
  """Images [..., H, W, C] of this shape in [0, 1], from codes [..., K]."""
  return _decode(params, codes).reshape(*codes.shape[:-1], *shape)


def encode(params: PyTree, images: Array) -> Array:
  """Codes [B, K] of images [B, H, W, C]."""
  return _encode(params, images.reshape(len(images), -1))


def codes(params: PyTree, shape: tuple[int, int, int, int]) -> Variables:
  """Variables of an attack: a code for each image of a batch [B, H, W, C], which begins as noise
  and stays within [-1, 1], as the encoder's codes do.
  """
  length = params[1]["bias"].shape[-1]
  return Variables(
    lambda key: 0.5 * jax.random.normal(key, (shape[0], length), jnp.float32),
    lambda variables: decode(params, variables, shape[1:]),
    lambda variables: jnp.clip(variables, -1, 1),
  )


def _encode(params: PyTree, rows: Array) -> Array:
  x = jax.nn.relu(rows @ params[0]["kernel"] + params[0]["bias"])
  return jnp.tanh(x @ params[1]["kernel"] + params[1]["bias"])


def _decode(params: PyTree, codes: Array) -> Array:
  shape = codes.shape[:-1]
  x = codes.reshape(-1, codes.shape[-1])
  x = jax.nn.relu(x @ params[2]["kernel"] + params[2]["bias"])
  return jax.nn.sigmoid(x @ params[3]["kernel"] + params[3]["bias"]).reshape(*shape, -1)
