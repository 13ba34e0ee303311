"""jax-privacy's private step, in Flax, on a full batch of 32. private_step_jax_privacy.py ROUNDS
CASE HOW CONV STEPS

HOW is plain (no privacy), full (the gradients of all examples at once) or micro1, micro8, ... (that
many at once). CONV is xla (Flax's own) or dot: im2col and a product where the result is 2x2 or
smaller, because XLA on CPU is far too slow there.
"""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax_privacy
import optax
import stepping
from jax_privacy import noise_addition

num_rounds, case, how, by, num_steps = sys.argv[1:]
BATCH, RATE, CLIP_NORM, NOISE = 32, 0.1, 1.0, 1.0


def convolve(x, kernel, strides, padding, **options):
  """What Flax's layers call in place of `jax.lax.conv_general_dilated`."""
  (rows, columns), (height, width) = kernel.shape[:2], x.shape[1:3]
  (above, below), (left, right) = padding
  (down, across) = strides
  out = (height + above + below - rows) // down + 1, (width + left + right - columns) // across + 1
  if by == "xla" or max(out) > 2:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  taps = [
    x[:, i : i + down * (out[0] - 1) + 1 : down, j : j + across * (out[1] - 1) + 1 : across]
    for i in range(rows)
    for j in range(columns)
  ]
  return jnp.concatenate(taps, -1) @ kernel.reshape(-1, kernel.shape[-1])


Conv = functools.partial(nn.Conv, conv_general_dilated=convolve)


class CNN(nn.Module):
  """The tutorials' CNN: 26,010 parameters."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(Conv(16, (8, 8), (2, 2), padding=3)(x))
    x = nn.relu(Conv(32, (4, 4), (2, 2), padding=0)(nn.max_pool(x, (2, 2))))
    x = nn.max_pool(x, (2, 2)).reshape(x.shape[0], -1)
    return nn.Dense(10)(nn.relu(nn.Dense(32)(x)))


class ResNet18(nn.Module):
  """ResNet-18 with GroupNorm and torchvision's stem: 11,178,051 parameters."""

  @nn.compact
  def __call__(self, x):
    conv, norm = (
      functools.partial(Conv, use_bias=False),
      functools.partial(nn.GroupNorm, num_groups=32),
    )
    x = nn.relu(norm()(conv(64, (7, 7), (2, 2), padding=3)(x)))
    x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for stage, features in enumerate((64, 128, 256, 512)):
      for block in range(2):
        strides = (2, 2) if stage and not block else (1, 1)
        y = nn.relu(norm()(conv(features, (3, 3), strides, padding=1)(x)))
        y = norm()(conv(features, (3, 3), padding=1)(y))
        if x.shape != y.shape:
          x = norm()(conv(features, (1, 1), strides, padding=0)(x))
        x = nn.relu(x + y)
    return nn.Dense(3)(x.mean((1, 2)))


model, shape, num_classes = {
  "cnn28": (CNN(), (28, 28, 1), 10),
  "resnet18_64": (ResNet18(), (64, 64, 3), 3),
}[case]
keys = jax.random.split(jax.random.key(0), 4)
images = jax.random.normal(keys[0], (BATCH, *shape))
labels = jax.random.randint(keys[1], (BATCH,), 0, num_classes)
params = jax.jit(model.init)(keys[2], images[:1])


def loss(params, images, labels):
  return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, images), labels).mean()


if how == "plain":
  gradient, noise = jax.grad(loss), optax.identity()
else:
  microbatch = None if how == "full" else int(how.removeprefix("micro"))
  gradient = jax_privacy.clipped_grad(
    loss,
    l2_clip_norm=CLIP_NORM,
    normalize_by=BATCH,
    batch_argnums=(1, 2),
    microbatch_size=microbatch,
  )
  noise = noise_addition.gaussian_privatizer(
    stddev=NOISE * gradient.sensitivity(), prng_key=keys[3]
  )
descend = optax.chain(noise, optax.sgd(RATE))


@jax.jit
def step(params, state):
  updates, state = descend.update(gradient(params, images, labels), state)
  return optax.apply_updates(params, updates), state


state = params, descend.init(params)
compiled = step.lower(*state).compile()


def one_round(_):
  global state
  for _ in range(int(num_steps)):
    state = jax.block_until_ready(compiled(*state))


parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
temporary = round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)
stepping.run(
  int(num_rounds), one_round, "jax", "jax-privacy", parameters=parameters, temporary_mib=temporary
)
