"""Taps return a layer's input and output gradient, for every layer, and every other use of the
kernel is refused.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax.conv import conv
from primia_jax.tapped import Log, Tapped, Taps, dense

LAYERS = {
  "dense": (dense, (5, 6), (6, 4)),
  "conv": (functools.partial(conv, strides=(2, 1)), (5, 9, 8, 3), (3, 3, 3, 4)),
  "7x7": (
    functools.partial(conv, strides=(2, 2), padding=((3, 3), (3, 3))),
    (2, 11, 12, 1),
    (7, 7, 1, 3),
  ),
  "small map": (functools.partial(conv, padding="SAME"), (3, 2, 2, 4), (3, 3, 4, 5)),
}


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def noted(layer, x, w):
  """The one use of w, and that noting it changes no value."""
  log = Log()
  y = layer(x, Tapped(w, None, log))
  np.testing.assert_array_equal(y, layer(x, w))
  (use,) = log.uses
  return use


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_kernel_are_the_layer_and_taps_are_filled(name):
  layer, x_shape, w_shape = LAYERS[name]
  x, w = normal(0, *x_shape), normal(1, *w_shape)
  use = noted(layer, x, w)
  y = use.apply(x, w)
  np.testing.assert_allclose(
    (use.rows(x) @ w.reshape(-1, w_shape[-1])).reshape(y.shape), y, rtol=1e-5, atol=1e-5
  )

  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), use.taps)
  loss = lambda x, w, taps: jnp.sum(layer(x, Tapped(w, taps, Log())) ** 3)
  towards_x, towards_w, taps = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, w, zeros)
  np.testing.assert_array_equal(taps.x, x)
  np.testing.assert_allclose(taps.g, 3 * y**2, rtol=1e-5, atol=1e-6)
  assert float(taps.uses) == 1
  assert not np.any(towards_w)
  plain_x, plain_w = jax.grad(lambda x, w: jnp.sum(layer(x, w) ** 3), argnums=(0, 1))(x, w)
  np.testing.assert_allclose(towards_x, plain_x, rtol=1e-4, atol=1e-3)
  of_rows = use.rows(x).T @ taps.g.reshape(-1, w_shape[-1])
  np.testing.assert_allclose(of_rows.reshape(w_shape), plain_w, rtol=1e-3, atol=2e-3)


def test_uses_add_up():
  x, w = normal(0, 5, 4), normal(1, 4, 4)
  taps = Taps(jnp.zeros((5, 4)), jnp.zeros((5, 4)), jnp.zeros(()))
  kernel = lambda taps: Tapped(w, taps, Log())
  assert (
    float(jax.grad(lambda taps: dense(dense(x, kernel(taps)), kernel(taps)).sum())(taps).uses) == 2
  )


def test_anything_else_refuses_the_kernel():
  kernel = Tapped(normal(0, 3, 3), None, Log())
  for use in (jnp.sum, lambda w: w**2, lambda w: jnp.ones((2, 3)) @ w, lambda w: w.T):
    with pytest.raises((TypeError, AttributeError)):
      use(kernel)
  with pytest.raises(ValueError, match=r"\[2, 8, 8, 3\] and \[3, 3, 1, 4\]"):
    conv(normal(0, 2, 8, 8, 3), Tapped(normal(0, 3, 3, 1, 4), None, Log()))
