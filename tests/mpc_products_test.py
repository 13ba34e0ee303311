"""Every form of every map against NumPy's uint64, which wraps around modulo 2^64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from primia_jax import native
from primia_jax.mpc import maps, products

HALVES = native.has_wide_products()
FORMS = tuple(form for form in products.FORMS if form != "halves" or HALVES)
RINGS = (
  (18, 32),
  (32, 32),
  (7, 20),
  (40, 40),
  (18, 44),
  (18, 64),
  (33, 64),
  (64, 64),
)  # (w_bits, num_bits)
NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
NO_BATCH = ((), ())
pytestmark = pytest.mark.usefixtures("x64")


def split_and_multiply(mapping, x, w, w_bits, num_bits, form):
  return products.multiply(mapping, x, products.split(mapping, w, w_bits, num_bits, form), num_bits)


RUN = jax.jit(split_and_multiply, static_argnums=(0, 3, 4, 5))


def equation_map(fn, *shapes):
  """The map as a jaxpr has it."""
  (equation,) = jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).eqns
  return maps.Map(equation.primitive.name, tuple(equation.params.items()))


def conv_map(
  x_shape,
  w_shape,
  strides,
  padding,
  x_dilation=None,
  w_dilation=None,
  groups=1,
  numbers=NHWC,
  batches=1,
):
  conv = lambda x, w: lax.conv_general_dilated(
    x, w, strides, padding, x_dilation, w_dilation, numbers, groups, batches
  )
  return equation_map(conv, x_shape, w_shape)


def dot_map(contracted=((1,), (0,)), batch=NO_BATCH):
  return maps.Map("dot_general", (("dimension_numbers", (contracted, batch)),))


def elements(seed, shape, num_bits, bits=None):
  """Ring elements as uint64, or signed numbers below 2^(bits-1) as int64; extremes are a third of
  them.
  """
  rng = np.random.default_rng(seed)
  if bits is None or bits == num_bits:
    half, top = 2 ** (num_bits - 1), 2**num_bits - 1
    digits = sum(0x80 << i for i in range(0, num_bits, 8)) & top
    extremes = np.array(
      [0, 1, top, half, half - 1, half + 1, digits, (digits - 1) & top, ~digits & top], np.uint64
    )
    v = rng.integers(0, top, shape, np.uint64, endpoint=True)
  else:
    high = 2 ** (bits - 1) - 1
    extremes = np.array([high, -high, 0, -1, high - 2**6], np.int64)
    v = rng.integers(-high, high, shape, np.int64, endpoint=True)
  return np.where(rng.random(shape) < 1 / 3, rng.choice(extremes, shape), v)


def check(mapping, x, w, expected, w_bits, num_bits, forms=FORMS, run=RUN):
  """All forms, with garbage above bit k in x; `expected` is modulo 2^64."""
  mask = np.uint64(2**num_bits - 1)
  garbage = np.random.default_rng(1).integers(0, 2**64 - 1, x.shape, np.uint64) & ~mask
  dtype = np.uint32 if num_bits <= 32 else np.uint64
  x = jnp.asarray((x | garbage).astype(dtype))
  for form in forms:
    result = run(mapping, x, jnp.asarray(w), w_bits, num_bits, form)
    assert result.dtype == dtype
    np.testing.assert_array_equal(
      np.asarray(result).astype(np.uint64) & mask, expected & mask, f"{form} {num_bits}"
    )


def unsigned(w):
  return w.view(np.uint64) if w.dtype == np.int64 else w


def numpy_conv(x, w, strides, padding, x_dilation=(1, 1), w_dilation=(1, 1), groups=1):
  """Convolution of NHWC images and HWIO kernels of uint64, one tap after the other."""
  dilated = np.zeros(
    (len(x), *((n - 1) * d + 1 for n, d in zip(x.shape[1:3], x_dilation, strict=True)), x.shape[3]),
    x.dtype,
  )
  dilated[:, :: x_dilation[0], :: x_dilation[1]] = x
  for axis, (low, high) in enumerate(padding, 1):  # negative padding crops
    dilated = dilated.take(range(max(0, -low), dilated.shape[axis] - max(0, -high)), axis)
    dilated = np.pad(
      dilated, [(max(0, low), max(0, high)) if a == axis else (0, 0) for a in range(4)]
    )
  size = [
    (dilated.shape[1 + a] - (w.shape[a] - 1) * w_dilation[a] - 1) // strides[a] + 1
    for a in range(2)
  ]
  result = np.zeros((len(x), *size, w.shape[3]), np.uint64)
  for i in range(w.shape[0]):
    for j in range(w.shape[1]):
      top, left = i * w_dilation[0], j * w_dilation[1]
      part = dilated[:, top : top + (size[0] - 1) * strides[0] + 1 : strides[0]]
      part = part[:, :, left : left + (size[1] - 1) * strides[1] + 1 : strides[1]]
      blocks = zip(np.split(part, groups, -1), np.split(w[i, j], groups, -1), strict=True)
      result += np.concatenate([a @ b for a, b in blocks], -1)
  return result


CONVOLUTIONS = {
  "3x3": dict(x=(2, 6, 7, 17), w=(3, 3, 17, 5), strides=(1, 1), padding=((1, 1), (1, 1))),
  "7x7 of few channels": dict(
    x=(1, 16, 16, 3), w=(7, 7, 3, 4), strides=(2, 2), padding=((2, 3), (3, 2))
  ),
  "1x1 with strides": dict(
    x=(2, 5, 5, 6), w=(1, 1, 6, 130), strides=(2, 2), padding=((0, 0), (0, 0))
  ),
  "map smaller than kernel": dict(
    x=(3, 2, 1, 20), w=(3, 3, 20, 4), strides=(1, 1), padding=((1, 1), (1, 1))
  ),
  "dilated": dict(
    x=(1, 6, 5, 18),
    w=(3, 2, 18, 3),
    strides=(2, 1),
    padding=((1, 2), (0, 3)),
    x_dilation=(1, 2),
    w_dilation=(2, 3),
  ),
  "cropped": dict(
    x=(1, 8, 7, 2), w=(2, 3, 2, 3), strides=(1, 2), padding=((-1, 0), (2, -2)), x_dilation=(2, 1)
  ),
  "groups": dict(
    x=(2, 5, 5, 12), w=(3, 3, 3, 8), strides=(1, 2), padding=((1, 1), (0, 1)), groups=4
  ),
  "depthwise": dict(
    x=(1, 6, 6, 9), w=(3, 3, 1, 18), strides=(1, 1), padding=((1, 1), (1, 1)), groups=9
  ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
  case = dict(CONVOLUTIONS[name])
  x_shape, w_shape = case.pop("x"), case.pop("w")
  mapping = conv_map(x_shape, w_shape, **case)
  i = list(CONVOLUTIONS).index(name)
  w_bits, num_bits = RINGS[i]  # eight cases, eight rings
  x, w = elements(i, x_shape, num_bits), elements(i + 99, w_shape, num_bits, w_bits)
  check(mapping, x, w, numpy_conv(x, unsigned(w), **case), w_bits, num_bits)


def test_layout_of_dimensions_and_batch_groups():
  strides, padding, groups = (2, 1), ((1, 0), (1, 1)), 2
  x, w = elements(0, (4, 5, 6, 7), 32), elements(1, (3, 3, 5, 6), 32)  # NCHW, HWIO before
  x_nhwc = x.transpose(0, 2, 3, 1)
  mapping = conv_map(x.shape, (6, 5, 3, 3), strides, padding, numbers=NCHW)
  expected = numpy_conv(x_nhwc, w, strides, padding).transpose(0, 3, 1, 2)
  check(mapping, x, w.transpose(3, 2, 0, 1), expected, 32, 32)
  mapping = conv_map(x_nhwc.shape, w.shape, strides, padding, batches=groups)
  parts = zip(np.split(x_nhwc, groups), np.split(w, groups, -1), strict=True)
  expected = np.concatenate([numpy_conv(a, b, strides, padding) for a, b in parts], -1)
  check(mapping, x_nhwc, w, expected, 32, 32)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_numbers_of_spatial_axes(rank):
  letters = "DHW"[-rank:]
  numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
  x, w = elements(0, (2, *(5,) * rank, 3), 44), elements(1, (*(3,) * rank, 3, 4), 44)
  mapping = conv_map(x.shape, w.shape, (1,) * rank, "VALID", numbers=numbers)
  windows = np.lib.stride_tricks.sliding_window_view(
    x, (3,) * rank, range(1, rank + 1)
  )  # [N, *space', C, *window]
  last = range(rank + 1, 2 * rank + 2)
  expected = np.tensordot(windows, w, ([*last], [rank, *range(rank)]))
  check(mapping, x, w, expected, 44, 44)


@settings(deadline=None, max_examples=12)
@given(st.data())
def test_convolutions_of_any_shape(data):
  draw = lambda low, high: data.draw(st.integers(low, high))
  pair = lambda low, high: (draw(low, high), draw(low, high))
  groups, w_dilation, x_dilation, kernel = draw(1, 3), pair(1, 2), pair(1, 2), pair(1, 4)
  padding = (pair(-2, 3), pair(-2, 3))
  least = [
    max(1, -(-((k - 1) * d + 1 - sum(p)) // e))
    for k, d, p, e in zip(kernel, w_dilation, padding, x_dilation, strict=True)
  ]
  space = [n + draw(1, 5) for n in least]
  channels, strides = draw(1, 35), pair(1, 3)
  x_shape, w_shape = (
    (draw(1, 2), *space, channels * groups),
    (*kernel, channels, draw(1, 5) * groups),
  )
  w_bits, num_bits = data.draw(st.sampled_from(RINGS))
  mapping = conv_map(x_shape, w_shape, strides, padding, x_dilation, w_dilation, groups)
  x, w = elements(draw(0, 9), x_shape, num_bits), elements(draw(10, 19), w_shape, num_bits, w_bits)
  expected = numpy_conv(x, unsigned(w), strides, padding, x_dilation, w_dilation, groups)
  check(mapping, x, w, expected, w_bits, num_bits, [data.draw(st.sampled_from(FORMS))])


DOTS = {
  "matmul": (dot_map(), "mk,kn->mn", (5, 33), (33, 7)),
  "wide": (dot_map(), "mk,kn->mn", (3, 48), (48, 301)),
  "transposed": (dot_map(((0,), (1,))), "km,nk->mn", (20, 3), (4, 20)),
  "vectors": (dot_map(((0,), (0,))), "k,k->", (65,), (65,)),
  "matrix and vector": (dot_map(((1,), (0,))), "mk,k->m", (6, 65), (65,)),
  "outer": (dot_map(((), ())), "m,n->mn", (6,), (5,)),
  "batch": (dot_map(((2,), (1,)), ((0,), (2,))), "bmk,nkb->bmn", (3, 4, 37), (5, 37, 3)),
  "two of each": (
    dot_map(((3, 1), (0, 2)), ((2,), (1,))),
    "mkbl,lbkn->bmn",
    (2, 4, 3, 5),
    (5, 3, 4, 6),
  ),
}


@pytest.mark.parametrize("name", DOTS)
def test_dots(name):
  mapping, letters, x_shape, w_shape = DOTS[name]
  i = list(DOTS).index(name)
  w_bits, num_bits = RINGS[i]  # eight cases, eight rings
  x, w = elements(i, x_shape, num_bits), elements(i + 99, w_shape, num_bits, w_bits)
  check(mapping, x, w, np.einsum(letters, x, unsigned(w)), w_bits, num_bits)


@pytest.mark.parametrize(("w_bits", "num_bits"), RINGS)
def test_elementwise_products(w_bits, num_bits):
  x, w = elements(0, (40, 3), num_bits), elements(1, (40, 3), num_bits, w_bits)
  forms = [form for form in FORMS if form != "halves"]
  check(maps.Map("mul"), x, w, x * unsigned(w), w_bits, num_bits, forms)


@pytest.mark.parametrize("fan_in", [2048, 4608, 70_000])
@pytest.mark.parametrize(("w_bits", "num_bits"), [(18, 44), (18, 32), (44, 44), (64, 64)])
def test_sums_of_extremes_stay_exact(fan_in, w_bits, num_bits):
  """All digits and sums at their largest at once, in either sign."""
  bits = [2 ** (num_bits - 1), 2 ** (num_bits - 1) - 1, 2**num_bits - 1]
  bits += [
    sum(2 ** (b - 1) << i for i in range(0, num_bits, b)) % 2**num_bits for b in range(8, 25)
  ]
  x = np.repeat(np.array(bits, np.uint64)[:, None], fan_in, 1)
  high = 2 ** (w_bits - 1) - 1
  columns = [high, -high] if w_bits < num_bits else [*bits, *(-b % 2**num_bits for b in bits)]
  w = np.repeat(np.array(columns, np.int64 if w_bits < num_bits else np.uint64)[None], fan_in, 0)
  expected = x[:, :1] * unsigned(w)[:1] * np.uint64(fan_in)
  check(dot_map(), x, w, expected, w_bits, num_bits)


def test_fan_in_beyond_one_exact_sum_of_int8():
  x, w = np.full((1, 2**17), 128, np.uint64), np.full((2**17, 1), 128, np.uint64)
  with pytest.raises(ValueError, match="form='int8' sums at most 131071 products"):
    products.split(dot_map(), jnp.asarray(w), 64, 64, "int8")
  check(dot_map(), x, w, np.full((1, 1), 2**31, np.uint64), 64, 64, ("integer", "float64"))
  check(
    dot_map(), x, w, np.full((1, 1), 2**31, np.uint64), 32, 32
  )  # where wrapping around does no harm


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_either_operand(form):
  mapping = dot_map()
  x, y = elements(0, (3, 4, 20), 44), elements(1, (3, 20, 5), 44)
  product = functools.partial(products.product, mapping, num_bits=44, form=form)
  mask = np.uint64(2**44 - 1)
  for x_axis, y_axis in ((0, 0), (0, None), (None, 0)):
    a, b = (v if axis == 0 else v[0] for v, axis in ((x, x_axis), (y, y_axis)))
    result = jax.jit(jax.vmap(product, (x_axis, y_axis)))(jnp.asarray(a), jnp.asarray(b))
    np.testing.assert_array_equal(np.asarray(result) & mask, (a @ b) & mask)


@pytest.mark.parametrize("form", ["integer", "int8"])
def test_rings_up_to_32_bits_need_no_x64(form):
  x, w = elements(0, (4, 20), 32), elements(1, (20, 5), 32)
  with jax.enable_x64(False):
    result = products.product(
      dot_map(), jnp.asarray(x.astype(np.uint32)), jnp.asarray(w.astype(np.uint32)), 32, form
    )
    assert result.dtype == jnp.uint32
  np.testing.assert_array_equal(np.asarray(result), (x @ w).astype(np.uint32))


def test_negative_weights_may_be_ring_elements():
  w = elements(1, (20, 5), 44, 18)
  x = elements(0, (4, 20), 44)
  for elements_of_ring in (unsigned(w), unsigned(w) & np.uint64(2**44 - 1)):
    check(dot_map(), x, elements_of_ring, x @ unsigned(w), 18, 44)


@pytest.mark.parametrize("form", FORMS)
def test_without_jit(form):
  x, w = elements(0, (4, 40), 44), elements(1, (40, 5), 44, 18)
  check(dot_map(), x, w, x @ unsigned(w), 18, 44, [form], split_and_multiply)


def test_empty_operands():
  for shapes in (((0, 20), (20, 5)), ((4, 0), (0, 5)), ((4, 20), (20, 0))):
    x, w = (np.zeros(s, np.uint64) for s in shapes)
    check(dot_map(), x, w, x @ w, 18, 44)


def test_halves_are_chosen_only_where_they_are_fast(monkeypatch):
  choose = lambda columns, num_bits: products.choose(dot_map(), (20, columns), num_bits)
  for has, form in ((False, "integer"), (True, "halves")):
    monkeypatch.setattr(native, "has_wide_products", lambda has=has: has)
    assert [choose(64, 64), choose(64, 33)] == [form, form]
    assert [choose(1, 64), choose(64, 32)] == ["integer", "integer"]
    assert products.choose(maps.MULTIPLY, (20, 64), 64) == "integer"


def test_halves_are_refused_where_there_are_none(monkeypatch):
  w = jnp.ones((20, 5), jnp.int64)
  with pytest.raises(ValueError, match="is for contractions"):
    products.split(maps.MULTIPLY, w, 18, 64, "halves")
  monkeypatch.setattr(native, "has_wide_products", lambda: False)
  with pytest.raises(ValueError, match="use form='integer'"):
    products.split(dot_map(), w, 18, 64, "halves")


@pytest.mark.skipif(not HALVES, reason="this CPU multiplies 64-bit vectors, or has no AVX2")
def test_halves_batched_in_either_operand_or_both():
  """Batch axes of the operands differ, inside each other, and next to groups."""
  mapping = dot_map(((2,), (1,)), ((0,), (0,)))
  x, w = elements(0, (3, 2, 4, 5, 20), 64), elements(1, (3, 2, 4, 20, 9), 64)
  sides = ((0, 0), (0, None), (None, 0))
  for w_bits, outer, inner in itertools.product((18, 64), sides, sides):
    operands = x, elements(1, w.shape, 64, w_bits)
    missing = [tuple(i for i, axes in enumerate((outer, inner)) if axes[v] is None) for v in (0, 1)]
    kept = [v.max(axes, keepdims=True) for v, axes in zip(operands, missing, strict=True)]
    run = lambda x, w, bits=w_bits: split_and_multiply(mapping, x, w, bits, 64, "halves")
    run = jax.jit(jax.vmap(jax.vmap(run, inner), outer))
    got = run(*(jnp.asarray(v.squeeze(axes)) for v, axes in zip(kept, missing, strict=True)))
    np.testing.assert_array_equal(got, kept[0] @ unsigned(kept[1]))


def test_factors_pass_through_jit():
  factor = products.split(dot_map(), jnp.ones((20, 5), jnp.int64), 18, 44)
  assert jax.jit(lambda v: v)(factor).form == factor.form


def test_errors():
  w = jnp.full((4, 4), 128, jnp.int64)
  split = functools.partial(products.split, dot_map())
  split(w, 9, 32)
  split(-w, 9, 32)
  with pytest.raises(ValueError, match=r"128 to 128, but w_bits=8 promises magnitudes below 2\^7"):
    split(w, 8, 32)
  jax.make_jaxpr(lambda w: split(w, 8, 32))(w)  # cannot be checked
  for bits in ((33, 32), (1, 32), (18, 65)):
    with pytest.raises(ValueError, match="w_bits"):
      split(w, *bits)
  with pytest.raises(ValueError, match="form='float'; use one of integer"):
    split(w, 18, 32, "float")
  with pytest.raises(ValueError, match="encode it"):
    split(w.astype(jnp.float32), 18, 32)
  with pytest.raises(ValueError, match="a ring of 32 bits takes uint32"):
    products.multiply(dot_map(), w, split(w, 18, 32), 32)
  with pytest.raises(ValueError, match=r"map\.name='add'; use conv"):
    maps.apply(maps.Map("add"), w, w)
  with jax.enable_x64(False), pytest.raises(ValueError, match="64-bit"):
    split(jnp.ones((4, 4), jnp.int32), 18, 44)
  with jax.enable_x64(False), pytest.raises(ValueError, match="needs x64"):
    split(jnp.ones((4, 4), jnp.int32), 18, 32, "float64")
