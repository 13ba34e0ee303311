"""Products, convolutions, pools, images in other sizes, small linear algebra."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.conformance.case import Case, normal, owned, secret, spread

A, B, W = normal(4, 6), normal(4, 6, seed=1), normal(6, 3, seed=2)
VECTORS, BATCH = normal(2, 5, 6, seed=3), normal(2, 6, 5, seed=4)
PUBLIC = normal(6, 6, seed=5)

PRODUCTS = owned(
  "products",
  {
    "x @ w": (lambda w, x: x @ w, W, A),
    "w @ x": (lambda w, x: w @ x, W.T, A.T),
    "x @ w + b": (lambda w, x: x @ w["k"] + w["b"], {"k": W, "b": normal(3)}, A),
    "x @ w, fan-in 4,096": (lambda w, x: x @ w, normal(4096, 3, scale=1 / 64), normal(2, 4096)),
    "three layers": (
      lambda w, x: x @ w[0] @ w[1] @ w[2],
      (W, normal(3, 3), normal(3, 3, seed=1)),
      A,
    ),
    "(x @ w) * scalar weight": (
      lambda w, x: (x @ w["k"]) * w["a"],
      {"k": W, "a": np.float32(0.25)},
      A,
    ),
    "x @ public": (lambda w, x: (x * w) @ PUBLIC, np.float32(1), A),
    "public @ x": (lambda w, x: PUBLIC @ (x * w).T, np.float32(1), A),
    "x @ x.T": (lambda w, x: (y := x * w) @ y.T, np.float32(1), A),
    "x @ y, both shared": (lambda w, x: (x[0] * w) @ (x[1] * w), np.float32(1), (VECTORS, BATCH)),
    "softmax(x @ w).T @ x": (lambda w, x: jax.nn.softmax(x @ w, 0).T @ x, W, A),
    "(x @ w) * relu(x @ v)": (
      lambda w, x: (x @ w["w"]) * jax.nn.relu(x @ w["v"]),
      {"w": W, "v": normal(6, 3)},
      A,
    ),
    "bilinear form x W y": (lambda w, x: jnp.einsum("bi,ij,bj->b", x[0], w, x[1]), PUBLIC, (A, B)),
    "einsum bij,bjk->bik": (lambda w, x: jnp.einsum("bij,bjk->bik", x, w), BATCH, VECTORS),
    "einsum bhqd,bhkd->bhqk": (
      lambda w, x: jnp.einsum("bhqd,bhkd->bhqk", x * w, x),
      np.float32(1),
      normal(2, 2, 5, 4),
    ),
    "einsum ii->": (lambda w, x: jnp.einsum("ii->", x * w), np.float32(1), PUBLIC),
    "einsum ij,ij->": (lambda w, x: jnp.einsum("ij,ij->", x * w, x), np.float32(1), A),
    "tensordot": (lambda w, x: jnp.tensordot(x, w, ((1, 2), (0, 1))), normal(5, 6, 3), VECTORS),
    "dot, vdot, inner, outer": (
      lambda w, x: (jnp.dot(x, w), jnp.vdot(x, w), jnp.inner(x, w), jnp.outer(x, w)),
      normal(6),
      normal(6, seed=1),
    ),
    "outer of two shared": (lambda w, x: jnp.outer(x * w, x * w), np.float32(1), normal(6)),
    "kron": (lambda w, x: jnp.kron(x, w), normal(2, 2), normal(2, 3, seed=1)),
    "cross": (lambda w, x: jnp.cross(x, w), normal(4, 3), normal(4, 3, seed=1)),
    "matrix_power 3": (lambda w, x: jnp.linalg.matrix_power(x * w, 3), np.float32(1), PUBLIC / 2),
    "multi_dot": (lambda w, x: jnp.linalg.multi_dot([x, w, x.T]), PUBLIC, A),
    "int8 weights": (lambda w, x: x @ w, np.rint(W * 30).astype(np.int8), A),
    "bfloat16 weights": (lambda w, x: x @ w, W.astype(jnp.bfloat16), A),
    "float16 image": (lambda w, x: x @ w, W, A.astype(np.float16)),
    "complex product": (lambda w, x: (x * (1 + 2j)) @ w, W, A),
  },
)

NUMBERS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def conv(w, x, stride=1, padding="SAME", **options):
  dims = x.ndim - 2
  strides = (stride,) * dims
  return lax.conv_general_dilated(
    x, w, strides, padding, dimension_numbers=NUMBERS[dims], **options
  )


LINE, IMAGE, VOLUME = normal(2, 16, 3), normal(2, 9, 8, 4), normal(1, 6, 6, 6, 2)
K1, K2, K3 = normal(3, 3, 5), normal(3, 3, 4, 6), normal(3, 3, 3, 2, 3)
transposed = lambda w, x: lax.conv_transpose(
  x, w, (2,) * (x.ndim - 2), "SAME", dimension_numbers=NUMBERS[x.ndim - 2]
)
CONVOLUTIONS = owned(
  "convolutions",
  {
    "1-D": (conv, K1, LINE),
    "2-D": (conv, K2, IMAGE),
    "3-D": (conv, K3, VOLUME),
    "2-D, stride 2": (functools.partial(conv, stride=2), K2, IMAGE),
    "3-D, stride 2": (functools.partial(conv, stride=2), K3, VOLUME),
    "2-D, no padding": (functools.partial(conv, padding="VALID"), K2, IMAGE),
    "2-D, uneven padding": (functools.partial(conv, padding=((0, 2), (1, 0))), K2, IMAGE),
    "1 x 1": (conv, K2[:1, :1], IMAGE),
    "2-D, with bias": (lambda w, x: conv(w["k"], x) + w["b"], {"k": K2, "b": normal(6)}, IMAGE),
    "2-D, dilated": (functools.partial(conv, rhs_dilation=(2, 2)), K2, IMAGE),
    "2-D, two groups": (functools.partial(conv, feature_group_count=2), K2[:, :, :2], IMAGE),
    "2-D, depthwise": (functools.partial(conv, feature_group_count=4), normal(3, 3, 1, 8), IMAGE),
    "1-D, depthwise": (functools.partial(conv, feature_group_count=3), normal(5, 1, 3), LINE),
    "batch groups": (functools.partial(conv, batch_group_count=2), K2, IMAGE),
    "1-D, transposed": (transposed, K1, LINE),
    "2-D, transposed": (transposed, K2, IMAGE),
    "3-D, transposed": (transposed, K3, VOLUME),
    "2-D, transposed 2 x 2": (transposed, K2[:2, :2], IMAGE),
    "2-D, dilated input": (
      functools.partial(conv, padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)),
      K2,
      IMAGE,
    ),
    "NCHW": (
      lambda w, x: lax.conv(x, w, (1, 1), "SAME"),
      K2.transpose(3, 2, 0, 1),
      IMAGE.transpose(0, 3, 1, 2),
    ),
    "local, not shared": (
      lambda w, x: lax.conv_general_dilated_local(
        x, w, (2, 2), "VALID", (3, 3), dimension_numbers=NUMBERS[2]
      ),
      normal(4, 3, 36, 5),
      IMAGE,
    ),
    "patches": (
      lambda w, x: lax.conv_general_dilated_patches(
        x * w, (3, 3), (1, 1), "SAME", dimension_numbers=NUMBERS[2]
      ),
      np.float32(1),
      IMAGE,
    ),
    "public kernel (blur)": (
      lambda w, x: conv(jnp.full((3, 3, 1, 4), 1 / 9, x.dtype), x * w, feature_group_count=4),
      np.float32(1),
      IMAGE,
    ),
    "both shared": (lambda w, x: conv(x[0] * w, x[1] * w), np.float32(1), (K2, IMAGE)),
    "public image, secret kernel": (
      lambda w, x: conv(x * w, IMAGE.astype(x.dtype)),
      np.float32(1),
      K2,
    ),
    "standardised weights": (
      lambda w, x: conv((w - w.mean((0, 1, 2))) / (w.std((0, 1, 2)) + 1e-5), x),
      K2,
      IMAGE,
    ),
    "jnp.convolve": (lambda w, x: jnp.convolve(x, w), normal(5), normal(16)),
    "jnp.correlate": (lambda w, x: jnp.correlate(x, w, "same"), normal(5), normal(16)),
    "scipy.signal.convolve2d": (
      lambda w, x: jax.scipy.signal.convolve2d(x, w, "same"),
      K2[:, :, 0, 0],
      IMAGE[0, :, :, 0],
    ),
  },
)


def window(x, op, start, size, stride, padding, **options):
  dims = x.ndim - 2
  sizes, strides = (1, *(size,) * dims, 1), (1, *(stride,) * dims, 1)
  return lax.reduce_window(x, start, op, sizes, strides, padding, **options)


add = lambda x, size, stride, padding: window(x, lax.add, 0.0, size, stride, padding)
most = lambda x, *rest, **options: window(x, lax.max, -jnp.inf, *rest, **options)
SMALL = spread(-4, 4, 1, 9, 9, 2)
POOLS = secret(
  "pools and sizes",
  {
    "max 2 x 2": (lambda x: most(x, 2, 2, "VALID"), SMALL),
    "max 3 x 3, stride 2": (lambda x: most(x, 3, 2, "SAME"), SMALL),
    "max, then relu": (lambda x: jax.nn.relu(most(x, 3, 2, "SAME")), SMALL),
    "relu, then max": (lambda x: most(jax.nn.relu(x), 3, 2, "SAME"), SMALL),
    "max 1-D": (lambda x: most(x, 3, 2, "SAME"), spread(-4, 4, 2, 16, 3)),
    "max 3-D": (lambda x: most(x, 2, 2, "VALID"), spread(-4, 4, 1, 6, 6, 6, 2)),
    "max, dilated": (lambda x: most(x, 2, 1, "VALID", window_dilation=(1, 2, 2, 1)), SMALL),
    "min 2 x 2": (lambda x: window(x, lax.min, jnp.inf, 2, 2, "VALID"), SMALL),
    "mean 2 x 2": (lambda x: add(x, 2, 2, "VALID") / 4, SMALL),
    "mean 5 x 5, stride 2": (lambda x: add(x, 5, 2, "SAME") / 25, SMALL),
    "mean 5 x 5, stride 2, of ones, then relu": (
      lambda x: jax.nn.relu(add(x, 5, 2, "SAME") / 25),
      np.ones((1, 9, 9, 2), np.float32),
    ),
    "mean 3 x 3, stride 1, then relu": (lambda x: jax.nn.relu(add(x, 3, 1, "SAME") / 9), SMALL),
    "mean 3-D": (lambda x: add(x, 2, 2, "VALID") / 8, spread(-4, 4, 1, 6, 6, 6, 2)),
    "nn.avg_pool without its padding": (
      lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False),
      SMALL,
    ),
    "global mean": (lambda x: x.mean((1, 2)), SMALL),
    "global max": (lambda x: x.max((1, 2)), SMALL),
    "sum": (lambda x: add(x, 3, 2, "SAME"), SMALL),
    "L2": (lambda x: jnp.sqrt(add(x * x, 3, 2, "SAME")), SMALL),
    "nearest, twice as large": (lambda x: x.repeat(2, 1).repeat(2, 2), SMALL),
    "image.resize, nearest": (lambda x: jax.image.resize(x, (1, 18, 18, 2), "nearest"), SMALL),
    "image.resize, bilinear": (lambda x: jax.image.resize(x, (1, 14, 14, 2), "bilinear"), SMALL),
    "image.resize, cubic, smaller": (lambda x: jax.image.resize(x, (1, 5, 5, 2), "cubic"), SMALL),
    "pixel shuffle": (
      lambda x: x.reshape(1, 9, 9, 1, 1, 2).transpose(0, 1, 3, 2, 4, 5).reshape(1, 9, 9, 2),
      SMALL,
    ),
    "map_coordinates at public places": (
      lambda x: jax.scipy.ndimage.map_coordinates(
        x, [np.linspace(0, 7, 5), np.linspace(1, 8, 5)], 1
      ),
      SMALL[0, :, :, 0],
    ),
    "median filter 3 x 3": (
      lambda x: jnp.median(
        jnp.stack([x[:, i : i + 7, j : j + 7] for i in range(3) for j in range(3)]), 0
      ),
      SMALL,
    ),
  },
)

SQUARE = np.eye(3, dtype=np.float32) * 3 + normal(3, 3)
GRAM = SQUARE @ SQUARE.T / 4
ALGEBRA = secret(
  "linear algebra and Fourier transforms",
  {
    "det 2 x 2": (jnp.linalg.det, SQUARE[:2, :2]),
    "det 3 x 3": (jnp.linalg.det, SQUARE),
    "inv": (jnp.linalg.inv, SQUARE),
    "solve": (lambda x: jnp.linalg.solve(x, x[:, 0]), SQUARE),
    "solve with a public matrix": (lambda x: jnp.linalg.solve(SQUARE, x), normal(3, 2)),
    "cholesky": (jnp.linalg.cholesky, GRAM),
    "qr": (jnp.linalg.qr, SQUARE),
    "svd": (lambda x: jnp.linalg.svd(x, compute_uv=False), SQUARE),
    "eigh": (jnp.linalg.eigvalsh, GRAM),
    "expm": (jax.scipy.linalg.expm, SQUARE / 4),
    "largest eigenvalue by iteration": (
      lambda x: lax.fori_loop(
        0, 4, lambda i, v: (y := x @ v) / jnp.sqrt((y * y).sum()), jnp.ones(3, x.dtype)
      ),
      GRAM,
    ),
    "fft": (jnp.fft.fft, normal(2, 8)),
    "rfft, magnitude": (lambda x: jnp.abs(jnp.fft.rfft(x)), normal(2, 8)),
    "fft2, low frequencies, ifft2": (
      lambda x: jnp.fft.ifft2(jnp.fft.fft2(x) * (np.arange(8) < 3)).real,
      normal(8, 8),
    ),
    "cosine transform": (lambda x: jax.scipy.fft.dct(x), normal(2, 8)),
    "projection on public components": (lambda x: (x - 0.5) @ PUBLIC[:, :2], normal(4, 6)),
  },
)
LEAST_SQUARES = owned(
  "linear algebra and Fourier transforms",
  {
    "solve with the model owner's matrix": (jnp.linalg.solve, SQUARE, normal(3, 2)),
    "triangular solve, owner's matrix": (
      lambda w, x: jax.scipy.linalg.solve_triangular(w, x, lower=True),
      SQUARE,
      normal(3, 2),
    ),
  },
)

CASES: list[Case] = [*PRODUCTS, *CONVOLUTIONS, *POOLS, *ALGEBRA, *LEAST_SQUARES]
