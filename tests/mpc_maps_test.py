"""Bilinear maps taken from jaxprs: their shapes, their weights' axes, and exchanged operands, on
whole numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from primia_jax.mpc import maps
from primia_jax.mpc.maps import apply


def conv(numbers=("NHWC", "HWIO", "NHWC"), **options):
  options = {"window_strides": (1, 1), "padding": "SAME"} | options
  return lambda x, w: lax.conv_general_dilated(x, w, dimension_numbers=numbers, **options)


CASES = {
  "matrix": (lambda x, w: x @ w, (3, 4), (4, 5)),
  "vector": (lambda x, w: x @ w, (4,), (4, 5)),
  "two contracted": (
    lambda x, w: lax.dot_general(x, w, (((1, 2), (0, 2)), ((), ()))),
    (2, 3, 4),
    (3, 5, 4),
  ),
  "batch": (
    lambda x, w: lax.dot_general(x, w, (((1,), (3,)), ((2, 0), (0, 2)))),
    (2, 4, 3),
    (3, 5, 2, 4),
  ),
  "outer": (lambda x, w: lax.dot_general(x, w, (((), ()), ((), ()))), (2, 3), (4,)),
  "conv": (conv(), (2, 6, 5, 3), (3, 3, 3, 4)),
  "strided": (conv(window_strides=(2, 1), rhs_dilation=(2, 1)), (1, 6, 5, 3), (3, 2, 3, 4)),
  "transposed": (conv(padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)), (1, 4, 3, 2), (2, 2, 2, 3)),
  "channels first": (conv(("NCHW", "OIHW", "NCHW")), (2, 3, 5, 4), (6, 3, 3, 3)),
  "grouped": (conv(feature_group_count=2), (1, 4, 4, 4), (3, 3, 2, 6)),
  "batch groups": (conv(batch_group_count=2), (4, 4, 4, 3), (3, 3, 3, 6)),
}
each_case = pytest.mark.parametrize(("fn", "x_shape", "w_shape"), CASES.values(), ids=CASES)


def whole(seed, shape):
  """Whole numbers in float32, whose sums of products are exact."""
  return jnp.asarray(np.random.default_rng(seed).integers(-9, 9, shape), jnp.float32)


def map_of(fn, x_shape, w_shape):
  jaxpr = jax.make_jaxpr(fn)(jnp.zeros(x_shape), jnp.zeros(w_shape))
  (equation,) = (
    e for e in jaxpr.eqns if e.primitive.name in ("dot_general", "conv_general_dilated")
  )
  return maps.from_equation(equation.primitive.name, equation.params)


@each_case
def test_a_map_is_what_the_jaxpr_computes(fn, x_shape, w_shape):
  mapping, x, w = map_of(fn, x_shape, w_shape), whole(0, x_shape), whole(1, w_shape)
  np.testing.assert_array_equal(apply(mapping, x, w), fn(x, w))
  assert maps.shape_of(mapping, x_shape, w_shape) == fn(x, w).shape
  assert hash(mapping) == hash(map_of(fn, x_shape, w_shape))  # so that it can be static under jit


def along(v, axis):
  """1, 2, 3, ... along one axis, to be broadcast against v."""
  return np.arange(1, 1 + v.shape[axis], dtype=np.float32).reshape(
    [-1 if j == axis else 1 for j in range(v.ndim)]
  )


@each_case
def test_a_factor_on_an_axis_of_the_result_is_one_on_the_weights(fn, x_shape, w_shape):
  mapping, x, w = map_of(fn, x_shape, w_shape), whole(0, x_shape), whole(1, w_shape)
  out = apply(mapping, x, w)
  axes = maps.weight_axes(mapping, x_shape, w_shape)
  assert len(axes) == out.ndim
  for i, axis in enumerate(axes):
    if axis is not None:
      assert out.shape[i] == w.shape[axis]
      np.testing.assert_array_equal(apply(mapping, x, w * along(w, axis)), out * along(out, i))


@pytest.mark.parametrize(
  ("case", "axes"),
  [
    ("matrix", (None, 1)),
    ("two contracted", (None, 1)),
    ("batch", (0, 2, 1)),
    ("conv", (None, None, None, 3)),
    ("channels first", (None, 0, None, None)),
    (
      "batch groups",
      (None, None, None, None),
    ),  # an output channel there is not one of the weight's alone
  ],
)
def test_the_weights_axes(case, axes):
  fn, x_shape, w_shape = CASES[case]
  assert maps.weight_axes(map_of(fn, x_shape, w_shape), x_shape, w_shape) == axes


@pytest.mark.parametrize("case", ["matrix", "vector", "two contracted", "batch", "outer"])
def test_exchanged_operands_give_the_same(case):
  fn, x_shape, w_shape = CASES[case]
  mapping, x, w = map_of(fn, x_shape, w_shape), whole(0, x_shape), whole(1, w_shape)
  other, order = maps.swapped(mapping, x.ndim, w.ndim)
  np.testing.assert_array_equal(apply(other, w, x).transpose(order), apply(mapping, x, w))


def test_elementwise_products():
  x, w = whole(0, (2, 3)), whole(1, (2, 3))
  np.testing.assert_array_equal(apply(maps.MULTIPLY, x, w), x * w)
  assert maps.shape_of(maps.MULTIPLY, (2, 3), (2, 3)) == (2, 3)
  assert maps.weight_axes(maps.MULTIPLY, (2, 3), (2, 3)) == (0, 1)
