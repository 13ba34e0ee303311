"""Compares depthwise with jax.lax's grouped convolution, in value, gradients and second gradients,
in all forms and under every mapping.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from primia_jax import depthwise as module
from primia_jax import native
from primia_jax.depthwise import depthwise

FORMS = {"c": 0, "shifts": 1, "grouped": 2}
CASES = [  # x, window, strides, padding
  ((2, 9, 11, 37), (3, 3), (1, 1), "SAME"),  # channels that fill no vector, and pixels no tile
  ((2, 9, 12, 16), (3, 3), (2, 2), "SAME"),  # EfficientNet's: one more zero on the right
  ((2, 10, 17, 8), (5, 5), (2, 2), ((2, 2), (2, 2))),  # PyTorch's
  ((2, 12, 20, 16), (5, 5), (1, 1), "VALID"),
  ((3, 2, 1, 20), (5, 5), (1, 1), "SAME"),  # maps smaller than the kernel
  ((3, 8, 7, 3), (2, 7), (3, 2), ((0, 2), (6, 5))),  # another kernel; outputs that see only zeros
]


def reference(x, w, *, strides=(1, 1), padding="SAME"):
  return lax.conv_general_dilated(
    x,
    w[:, :, None],
    strides,
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
  """Each form, wherever the tests run."""
  if request.param == "c" and not native.available():
    pytest.skip("no C compiler here")
  choose = lambda *forms_and_operands: forms_and_operands[FORMS[request.param]](
    *forms_and_operands[3:]
  )
  monkeypatch.setattr(module, "_fastest", choose)
  return request.param


def normal(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def loss_and_gradients(fn, x, w):
  """The value, the gradients of sum((value + 1)^3), and the gradient of their norm."""
  loss = lambda x, w: ((fn(x, w) + 1) ** 3).sum()
  norm = lambda *a: sum((g * g).sum() for g in jax.grad(loss, argnums=(0, 1))(*a))
  return fn(x, w), jax.grad(loss, argnums=(0, 1))(x, w), jax.grad(norm, argnums=(0, 1))(x, w)


def assert_close(actual, expected, rtol=1e-4):
  for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert (a.shape, a.dtype) == (e.shape, e.dtype)
    np.testing.assert_allclose(a, e, rtol=rtol, atol=1e-5 * float(jnp.abs(e).max()) + 1e-6)


@pytest.mark.parametrize(("x_shape", "window", "strides", "padding"), CASES)
def test_value_gradients_and_second_gradients(form, x_shape, window, strides, padding):
  if form == "shifts" and window == (5, 5):
    window = (3, 3)  # a program of half the size
  x, w = normal(0, *x_shape), normal(1, *window, x_shape[3])
  fns = [functools.partial(f, strides=strides, padding=padding) for f in (depthwise, reference)]
  assert_close(*jax.jit(lambda *a: [loss_and_gradients(fn, *a) for fn in fns])(x, w))


@settings(max_examples=25, deadline=None)
@given(
  batch=st.integers(1, 3),
  size=st.tuples(st.integers(1, 15), st.integers(1, 15)),
  channels=st.sampled_from([1, 5, 16, 33]),
  window=st.tuples(st.integers(1, 6), st.integers(1, 6)),
  strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
  pads=st.tuples(*[st.integers(0, 3)] * 4),
)
def test_any_geometry(batch, size, channels, window, strides, pads):
  """Without jit and without XLA's compiler: the sum over taps, in NumPy's float64."""
  padding = (pads[:2], pads[2:])
  ends = [n + sum(p) - k + 1 for n, p, k in zip(size, padding, window, strict=True)]
  if min(ends) < 1:
    return  # refused
  x, w = normal(2, batch, *size, channels), normal(3, *window, channels)
  y, pull = jax.vjp(functools.partial(depthwise, strides=strides, padding=padding), x, w)
  g = normal(4, *y.shape)
  padded = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
  expected, of_x, of_w = np.zeros(y.shape), np.zeros_like(padded), np.zeros(w.shape)
  for i, j in np.ndindex(*window):
    seen = (slice(None), slice(i, i + ends[0], strides[0]), slice(j, j + ends[1], strides[1]))
    expected += padded[seen] * np.asarray(w[i, j])
    of_x[seen] += np.asarray(g) * np.asarray(w[i, j])
    of_w[i, j] = (padded[seen] * np.asarray(g)).sum((0, 1, 2))
  (top, _), (left, _) = padding
  inside = of_x[:, top : top + size[0], left : left + size[1]]
  for a, e in zip((y, *pull(g)), (expected, inside, of_w), strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)])
def test_under_vmap(form, in_axes):
  sites = [(3,) if axis == 0 else () for axis in in_axes]
  x, w = normal(4, *sites[0], 2, 6, 7, 20), normal(5, *sites[1], 3, 3, 20)

  def run(x, w):
    fns = [functools.partial(f, strides=(2, 2)) for f in (depthwise, reference)]
    return [jax.vmap(functools.partial(loss_and_gradients, fn), in_axes)(x, w) for fn in fns]

  assert_close(*jax.jit(run)(x, w))


def test_gradients_of_single_examples_at_sites(form):
  """Two vmaps: sites with kernels of their own, and the gradient of each example."""
  x, w = normal(6, 2, 3, 6, 6, 5), normal(7, 2, 3, 3, 5)

  def single(fn, x, w):
    return jax.grad(lambda w: (fn(x[None], w) ** 3).sum())(w)

  both = [
    jax.jit(jax.vmap(jax.vmap(functools.partial(single, fn), (0, None))))(x, w)
    for fn in (depthwise, reference)
  ]
  assert_close(*both)


def descend(fn, w, x, steps=3):
  @jax.checkpoint
  def step(w, _):
    return w - 0.01 * jax.grad(lambda w: (fn(x, w) ** 2).mean())(w), None

  return lax.scan(step, w, None, length=steps)[0]


def test_training_agrees_under_loop_scan_vmap_and_mesh():
  w, x = normal(8, 3, 3, 20), normal(9, 4, 2, 6, 6, 20)
  expected = jnp.stack([descend(reference, w, x[i]) for i in range(4)])
  run = functools.partial(descend, depthwise)
  mesh = Mesh(np.array(jax.devices()[:2]), ("site",))
  specs = {"mesh": mesh, "in_specs": (P(), P("site")), "out_specs": P("site")}
  varying = lambda w: lax.pcast(w, "site", to="varying")
  sharded = jax.shard_map(lambda w, x: lax.map(lambda x: run(varying(w), x), x), **specs)
  vmapped = jax.shard_map(lambda w, x: jax.vmap(run, (None, 0))(varying(w), x), **specs)
  assert_close(jnp.stack([jax.jit(run)(w, x[i]) for i in range(4)]), expected)
  assert_close(jax.jit(lambda w, x: lax.map(lambda x: run(w, x), x))(w, x), expected)
  for mapped in (jax.vmap(run, (None, 0)), sharded, vmapped):
    assert_close(jax.jit(mapped)(w, x), expected)


def test_on_a_mesh_a_replicated_kernel_gets_the_sum_of_the_gradients(form):
  w, x = normal(10, 3, 3, 4), normal(11, 4, 6, 6, 4)
  mesh = Mesh(np.array(jax.devices()[:2]), ("site",))
  gradient = lambda fn: jax.grad(lambda w, x: (fn(x, w) ** 2).sum())
  sharded = jax.shard_map(gradient(depthwise), mesh=mesh, in_specs=(P(), P("site")), out_specs=P())
  assert_close(jax.jit(sharded)(w, x), gradient(reference)(w, x))


@pytest.mark.usefixtures("x64")
def test_float64_stays_float64():
  x, w = normal(12, 2, 7, 7, 3, dtype=np.float64), normal(13, 2, 2, 3, dtype=np.float64)
  fns = [functools.partial(f, strides=(2, 2)) for f in (depthwise, reference)]
  run = jax.jit(lambda *a: [loss_and_gradients(fn, *a) for fn in fns])
  assert_close(*run(x, w), rtol=1e-12)


@pytest.mark.optimised
def test_without_the_c_form_nothing_is_a_grouped_convolution(monkeypatch):
  monkeypatch.setenv("PRIMIA_NATIVE", "0")
  gradient = jax.grad(lambda x, w: (depthwise(x, w) ** 2).sum(), argnums=(0, 1))
  text = jax.jit(gradient).lower(normal(0, 2, 9, 9, 3), normal(1, 3, 3, 3)).as_text()
  assert "convolution" not in text
  assert "primia_depthwise" not in text


@pytest.mark.parametrize(
  ("w", "arguments", "said"),
  [
    (np.zeros((3, 3, 4), np.float32), {}, r"\[2, 8, 8, 3\] and float32\[3, 3, 4\]"),
    (np.zeros((3, 3, 3), np.float16), {}, "of one dtype"),
    (np.zeros((9, 3, 3), np.float32), {"padding": "VALID"}, "at least as large as w"),
    (np.zeros((3, 3, 3), np.float32), {"padding": ((-1, 1), (0, 0))}, "must not be negative"),
    (None, {}, "not a NoneType"),
  ],
)
def test_what_does_not_fit_is_refused(w, arguments, said):
  with pytest.raises(ValueError, match=said):
    depthwise(normal(0, 2, 8, 8, 3), w, **arguments)
