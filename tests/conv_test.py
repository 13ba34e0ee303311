"""Compares conv with jax.lax, in value and both gradients, under every mapping; and pools with
reduce_window.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from primia_jax.conv import conv, max_pool, mean_pool

CASES = [  # x, w, strides, padding
  ((2, 9, 8, 3), (3, 3, 3, 4), (1, 1), "VALID"),
  ((2, 9, 8, 3), (3, 3, 3, 4), (1, 1), "SAME"),
  ((2, 9, 8, 1), (3, 2, 1, 4), (2, 1), "SAME"),
  ((6, 11, 12, 3), (7, 7, 3, 5), (2, 2), ((3, 3), (3, 3))),  # more than a few images
  ((2, 8, 8, 3), (1, 1, 3, 4), (2, 2), "VALID"),
  ((6, 5, 4, 3), (1, 1, 3, 4), (1, 1), "SAME"),  # images are their own patches
  ((2, 8, 7, 2), (3, 3, 2, 4), (3, 2), ((0, 2), (1, 0))),
  ((3, 2, 2, 4), (3, 3, 4, 5), (1, 1), "SAME"),  # maps smaller than the kernel
  ((3, 1, 1, 4), (3, 3, 4, 5), (1, 1), "SAME"),
  ((3, 2, 2, 4), (3, 3, 4, 5), (2, 2), ((1, 1), (1, 1))),
  ((2, 9, 8, 3), (5, 4, 3, 2), (2, 2), ((2, 2), (1, 2))),  # gradients by phases
  ((1, 2, 2, 3), (3, 3, 3, 5), (1, 1), "SAME"),  # kernels larger than the patches that they see
  ((1, 4, 3, 2), (3, 3, 2, 6), (2, 2), ((1, 1), (1, 1))),
]


def reference(x, w, *, strides, padding):
  return lax.conv_general_dilated(
    x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def loss_by_offsets(x, w, strides, padding):
  """((conv(x, w) + 1)^2).sum() and its gradients from the definition, in NumPy's float64.
  XLA's own gradient aborts for some geometries.
  """
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  padded = np.pad(x, ((0, 0), *padding, (0, 0)))
  ends = [n - k + 1 for n, k in zip(padded.shape[1:3], w.shape[:2], strict=True)]
  gradients = np.zeros_like(padded), np.zeros_like(w)
  offsets = {
    (i, j): (slice(None), slice(i, i + ends[0], strides[0]), slice(j, j + ends[1], strides[1]))
    for i, j in np.ndindex(w.shape[:2])
  }
  y = 1 + sum(padded[seen] @ w[offset] for offset, seen in offsets.items())
  for offset, seen in offsets.items():
    gradients[0][seen] += 2 * y @ w[offset].T
    gradients[1][offset] = 2 * np.einsum("bhwc,bhwo->co", padded[seen], y)
  (top, _), (left, _) = padding
  inside = gradients[0][:, top : top + x.shape[1], left : left + x.shape[2]]
  return (y * y).sum(), (inside, gradients[1])


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def value_and_gradients(fn, x, w):
  """The value, both gradients of sum(value^2), which depend on both operands, and the gradient of
  those gradients.
  """

  def loss(x, w):
    y = fn(x, w)
    return (y * y).sum(), y

  def norm_of_gradient(x, w):
    return sum((g * g).sum() for g in jax.grad(lambda *a: loss(*a)[0], argnums=(0, 1))(x, w))

  gradients, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, w)
  return y, gradients, jax.grad(norm_of_gradient, argnums=(0, 1))(x, w)


def assert_close(actual, expected, rtol=1e-4):
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert a.shape == e.shape
    np.testing.assert_allclose(a, e, rtol=rtol, atol=1e-5 * float(jnp.abs(e).max()) + 1e-6)


@pytest.mark.parametrize(("x_shape", "w_shape", "strides", "padding"), CASES)
def test_value_gradients_and_second_gradients(x_shape, w_shape, strides, padding):
  x, w = normal(0, *x_shape), normal(1, *w_shape)

  def run(x, w):
    return [
      value_and_gradients(functools.partial(f, strides=strides, padding=padding), x, w)
      for f in (conv, reference)
    ]

  assert_close(*jax.jit(run)(x, w))


def test_without_jit():
  x, w = normal(0, 2, 9, 8, 3), normal(1, 3, 3, 3, 4)
  ours, theirs = (
    jax.value_and_grad(
      lambda x, w, f=f: (f(x, w, strides=(2, 1), padding="SAME") ** 2).sum(), argnums=(0, 1)
    )(x, w)
    for f in (conv, reference)
  )
  assert_close(ours, theirs)


@settings(max_examples=20, deadline=None)
@given(
  batch=st.sampled_from([1, 5]),  # gradients of a few images have forms of their own
  size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
  kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
  strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
  pads=st.tuples(*[st.integers(0, 3)] * 4),
)
# XLA would swap kernel and map, except for one axis.
@example(5, (4, 5), (2, 3), (2, 3), (1, 2, 0, 2))
@example(5, (5, 4), (3, 2), (3, 2), (0, 2, 1, 2))
# XLA would read memory beyond the images as the gradient's zeros.
@example(5, (4, 4), (2, 2), (1, 1), (2, 0, 3, 0))
@example(5, (1, 3), (1, 1), (2, 3), (1, 1, 2, 0))  # no output sees an image
def test_any_geometry(batch, size, kernel, strides, pads):
  padding = (pads[:2], pads[2:])
  if any(n + sum(p) < k for n, p, k in zip(size, padding, kernel, strict=True)):
    return  # an empty output
  x, w = normal(2, batch, *size, 2), normal(3, *kernel, 2, 3)

  # The gradient of this loss is not 0 even where an output sees only padding.
  loss = lambda *a: ((conv(*a, strides=strides, padding=padding) + 1) ** 2).sum()
  gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)
  assert_close(gradients, loss_by_offsets(x, w, strides, padding))


@pytest.mark.parametrize(
  ("x_shape", "w_shape", "strides", "padding"), [CASES[i] for i in (3, 5, 7)]
)
@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)])
def test_under_vmap(x_shape, w_shape, strides, padding, in_axes):
  sites = [(3,) if axis == 0 else () for axis in in_axes]
  x, w = normal(4, *sites[0], *x_shape), normal(5, *sites[1], *w_shape)

  def run(x, w):
    fns = [functools.partial(f, strides=strides, padding=padding) for f in (conv, reference)]
    return [jax.vmap(functools.partial(value_and_gradients, fn), in_axes)(x, w) for fn in fns]

  assert_close(*jax.jit(run)(x, w))


def test_gradient_of_a_vmap_and_two_vmaps():
  x, w = normal(6, 2, 3, 2, 6, 6, 2), normal(7, 2, 3, 3, 2, 4)

  def total(fn, x, w):
    inner = jax.vmap(
      functools.partial(fn, strides=(1, 1), padding="SAME"), (0, None)
    )  # examples share a kernel
    return jax.grad(lambda x, w: (jax.vmap(inner)(x, w) ** 3).sum(), argnums=(0, 1))(x, w)

  assert_close(*jax.jit(lambda *a: (total(conv, *a), total(reference, *a)))(x, w))


def descend(fn, w, x, steps=3):
  def step(w, _):
    return w - 0.01 * jax.grad(lambda w: (fn(x, w, strides=(1, 1), padding="VALID") ** 2).mean())(
      w
    ), None

  return lax.scan(step, w, None, length=steps)[0]


def test_training_agrees_under_loop_scan_vmap_and_mesh():
  w, x = normal(8, 3, 3, 2, 4), normal(9, 4, 2, 6, 6, 2)
  expected = jnp.stack([descend(reference, w, x[i]) for i in range(4)])
  run = functools.partial(descend, conv)
  mesh = Mesh(np.array(jax.devices()[:2]), ("site",))

  def on_mesh(w, x):
    return lax.map(lambda x: run(lax.pcast(w, "site", to="varying"), x), x)

  sharded = jax.shard_map(on_mesh, mesh=mesh, in_specs=(P(), P("site")), out_specs=P("site"))
  vmapped_on_mesh = jax.shard_map(
    lambda w, x: jax.vmap(run, (None, 0))(lax.pcast(w, "site", to="varying"), x),
    mesh=mesh,
    in_specs=(P(), P("site")),
    out_specs=P("site"),
  )
  assert_close(jnp.stack([jax.jit(run)(w, x[i]) for i in range(4)]), expected)
  assert_close(jax.jit(lambda w, x: lax.map(lambda x: run(w, x), x))(w, x), expected)
  assert_close(jax.jit(jax.vmap(run, (None, 0)))(w, x), expected)
  assert_close(jax.jit(sharded)(w, x), expected)
  assert_close(jax.jit(vmapped_on_mesh)(w, x), expected)


def test_on_a_mesh_a_replicated_kernel_gets_the_sum_of_the_gradients():
  w, x = normal(10, 3, 3, 2, 4), normal(11, 4, 6, 6, 2)
  mesh = Mesh(np.array(jax.devices()[:2]), ("site",))

  def loss(fn, w, x):
    return (fn(x, w, strides=(1, 1), padding="SAME") ** 2).sum()

  sharded = jax.shard_map(
    lambda w, x: jax.grad(functools.partial(loss, conv))(w, x),
    mesh=mesh,
    in_specs=(P(), P("site")),
    out_specs=P(),
  )
  assert_close(jax.jit(sharded)(w, x), jax.grad(functools.partial(loss, reference))(w, x))


@pytest.mark.optimised
def test_an_unused_input_gradient_is_not_computed():
  def count(argnums):
    gradient = jax.grad(lambda x, w: conv(x, w, padding="VALID").sum() ** 2, argnums=argnums)
    step = jax.jit(lambda x, w: lax.fori_loop(0, 2, lambda _, w: w + gradient(x, w)[-1].sum(), w))
    return (
      step.lower(normal(0, 5, 9, 9, 3), normal(1, 3, 3, 3, 4))
      .compile()
      .as_text()
      .count(" convolution(")
    )

  assert count((0, 1)) == count((1,)) == 2  # forward and kernel gradient


def test_bad_shapes_are_refused():
  with pytest.raises(ValueError, match=r"\[2, 8, 8, 3\] and \[3, 3, 1, 4\]"):
    conv(normal(0, 2, 8, 8, 3), normal(0, 3, 3, 1, 4))


@pytest.mark.parametrize(
  ("size", "window", "stride", "padding"), [(8, 2, 2, 0), (9, 2, 2, 0), (10, 3, 2, 1), (7, 3, 1, 1)]
)
def test_pools(size, window, stride, padding):
  x, g = normal(12, 2, size, size, 3), None
  pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  reduce = functools.partial(
    lax.reduce_window,
    window_dimensions=(1, window, window, 1),
    window_strides=(1, stride, stride, 1),
    padding=pads,
  )
  for ours, theirs in (
    (max_pool, lambda x: reduce(x, -jnp.inf, lax.max)),
    (mean_pool, lambda x: reduce(x, 0.0, lax.add) / window**2),
  ):
    y, pull = jax.vjp(lambda x, f=ours: f(x, window, stride, padding), x)
    expected, pull_expected = jax.vjp(theirs, x)
    g = normal(13, *y.shape)
    assert_close((y, pull(g)), (expected, pull_expected(g)))


def test_tied_maxima_share_the_gradient():
  gradient = jax.grad(lambda x: max_pool(x, 2, 2).sum())(jnp.ones((1, 4, 4, 1)))
  assert float(gradient.sum()) == 4.0
  assert float(gradient.min()) > 0


@pytest.mark.parametrize("dilation", [(2, 2), (4, 4), (1, 3)])
@pytest.mark.parametrize("batch", [2, 6])
def test_dilated_convolution(dilation, batch):
  """In value and in first and second gradients; on maps that are smaller than what it sees, too."""
  x, w = normal(0, batch, 6, 7, 3), normal(1, 3, 3, 3, 4)

  def theirs(x, w):
    return lax.conv_general_dilated(
      x, w, (1, 1), "SAME", rhs_dilation=dilation, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  ours = lambda x, w: conv(x, w, dilation=dilation)
  for a, b in zip(
    jax.tree.leaves(value_and_gradients(ours, x, w)),
    jax.tree.leaves(value_and_gradients(theirs, x, w)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))
  sites = normal(2, 3, batch, 6, 7, 3), normal(3, 3, 3, 3, 3, 4)
  np.testing.assert_allclose(jax.vmap(ours)(*sites), jax.vmap(theirs)(*sites), rtol=1e-4, atol=1e-4)
