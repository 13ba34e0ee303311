"""Operations on each number: arithmetic, powers, transcendental functions, rounding, integers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.conformance.case import Case, normal, octaves, owned, secret, spread

A, B = spread(-8, 8), spread(-8, 8, seed=1)
POSITIVE = octaves(0.01, 100)
FACTORS = spread(-2, 2, 32, seed=2)

ARITHMETIC = secret(
  "arithmetic",
  {
    "x + y": (jnp.add, A, B),
    "x - y": (jnp.subtract, A, B),
    "x * y": (jnp.multiply, A, B),
    "x * y, up to 1000": (jnp.multiply, spread(-1000, 1000), spread(-1000, 1000, seed=1)),
    "x / y": (jnp.divide, A, octaves(0.1, 10, seed=1)),
    "x / y, y of both signs": (jnp.divide, A, np.where(B < 0, B - 0.5, B + 0.5)),
    "x + 3": (lambda x: x + 3, A),
    "3 - x": (lambda x: 3 - x, A),
    "3 x": (lambda x: 3 * x, A),
    "x / 3": (lambda x: x / 3, A),
    "1 / x": (lambda x: 1 / x, POSITIVE),
    "1 / x, x near 0.01": (jnp.reciprocal, octaves(0.01, 0.02)),
    "1 / x, both signs": (jnp.reciprocal, np.where(B < 0, B - 0.5, B + 0.5)),
    "-x": (jnp.negative, A),
    "abs": (jnp.abs, A),
    "square": (jnp.square, A),
    "square, up to 1000": (jnp.square, spread(-1000, 1000)),
    "x times a public vector": (lambda x: x * FACTORS, A),
    "x plus a public vector": (lambda x: x + FACTORS, A),
    "x times 1e-6, times 1e6": (lambda x: (x * 1e-6) * 1e6, A),
    "hypot": (jnp.hypot, A, B),
    "x y + x": (lambda x, y: x * y + x, A, B),
    "polynomial of degree 4": (lambda x: jnp.polyval(np.arange(5.0) / 4, x), spread(-2, 2)),
    "sinc": (jnp.sinc, A),
    "copysign": (jnp.copysign, A, B),
    "degrees to radians": (jnp.deg2rad, spread(-180, 180)),
    "clip": (lambda x: jnp.clip(x, -1, 2), A),
    "clip between two secrets": (lambda x, y: jnp.clip(x, -jnp.abs(y), jnp.abs(y)), A, B),
    "nan_to_num": (jnp.nan_to_num, A),
    "complex number's magnitude": (lambda x, y: jnp.abs(x + 1j * y), A, B),
  },
)
POWERS = secret(
  "powers",
  {
    "x ** 3": (lambda x: x**3, A),
    "x ** 6": (lambda x: x**6, A),
    "x ** 0": (lambda x: x**0, A),
    "x ** -1": (lambda x: x**-1, POSITIVE),
    "x ** -2": (lambda x: x**-2, octaves(0.25, 8)),
    "x ** 0.5": (lambda x: x**0.5, POSITIVE),
    "x ** -0.5": (lambda x: x**-0.5, POSITIVE),
    "x ** 2.5": (lambda x: x**2.5, octaves(0.01, 16)),
    "x ** public powers": (lambda x: x ** np.array([1.0, 2.0, 0.5, 3.0]), octaves(0.1, 4, 8, 4)),
    "2 ** x": (lambda x: 2**x, A),
    "0.5 ** x": (lambda x: 0.5**x, A),
    "x ** y": (jnp.power, octaves(0.25, 4), spread(-2, 2, seed=1)),
    "sqrt": (jnp.sqrt, POSITIVE),
    "sqrt of 0 and of small numbers": (jnp.sqrt, spread(0, 0.02)),
    "rsqrt": (lax.rsqrt, POSITIVE),
    "rsqrt, x near 0.001": (lax.rsqrt, octaves(0.001, 0.01)),
    "cbrt": (jnp.cbrt, A),
  },
)
TRANSCENDENTAL = secret(
  "transcendental",
  {
    "exp": (jnp.exp, spread(-8, 4)),
    "exp, x in -20 to 20": (jnp.exp, spread(-20, 20)),
    "exp2": (jnp.exp2, A),
    "expm1": (jnp.expm1, spread(-8, 4)),
    "log": (jnp.log, POSITIVE),
    "log, x in 0.001 to 10000": (jnp.log, octaves(0.001, 10000)),
    "log2": (jnp.log2, POSITIVE),
    "log10": (jnp.log10, POSITIVE),
    "log1p": (jnp.log1p, POSITIVE),
    "logaddexp": (jnp.logaddexp, A, B),
    "logaddexp2": (jnp.logaddexp2, A, B),
    "x log y": (jax.scipy.special.xlogy, A, POSITIVE),
    "logit": (jax.scipy.special.logit, spread(0.02, 0.98)),
    "sin": (jnp.sin, A),
    "cos": (jnp.cos, A),
    "sin, x up to 100": (jnp.sin, spread(-100, 100)),
    "tan": (jnp.tan, spread(-1.4, 1.4)),
    "arcsin": (jnp.arcsin, spread(-1, 1)),
    "arccos": (jnp.arccos, spread(-1, 1)),
    "arctan": (jnp.arctan, A),
    "arctan2": (jnp.arctan2, A, B),
    "sinh": (jnp.sinh, spread(-4, 4)),
    "cosh": (jnp.cosh, spread(-4, 4)),
    "tanh": (jnp.tanh, A),
    "arcsinh": (jnp.arcsinh, A),
    "arccosh": (jnp.arccosh, octaves(1, 100)),
    "arctanh": (jnp.arctanh, spread(-0.95, 0.95)),
    "erf": (jax.scipy.special.erf, spread(-4, 4)),
    "erfc": (jax.scipy.special.erfc, spread(-4, 4)),
    "erf_inv": (jax.scipy.special.erfinv, spread(-0.95, 0.95)),
    "normal distribution function": (jax.scipy.stats.norm.cdf, spread(-4, 4)),
    "normal density": (jax.scipy.stats.norm.pdf, spread(-4, 4)),
    "lgamma": (jax.scipy.special.gammaln, octaves(0.5, 50)),
    "digamma": (jax.scipy.special.digamma, octaves(0.5, 50)),
  },
)
ROUNDING = secret(
  "rounding and look-up",
  {
    "round": (jnp.round, A),
    "round to 2 decimals": (lambda x: jnp.round(x, 2), A),
    "floor": (jnp.floor, A),
    "ceil": (jnp.ceil, A),
    "trunc": (jnp.trunc, A),
    "x % 1": (lambda x: x % 1.0, A),
    "x % 3": (lambda x: x % 3.0, A),
    "x // 3": (lambda x: x // 3.0, A),
    "fmod": (lambda x: jnp.fmod(x, 3.0), A),
    "remainder of two secrets": (jnp.remainder, A, octaves(0.5, 4, seed=1)),
    "to int32": (lambda x: x.astype(jnp.int32), A),
    "to int8 and back": (lambda x: jnp.round(x * 8).astype(jnp.int8).astype(x.dtype) / 8, A),
    "modf": (jnp.modf, A),
    "digitize": (lambda x: jnp.digitize(x, np.array([-4.0, -1.0, 0.0, 2.5])), A),
    "searchsorted on public knots": (lambda x: jnp.searchsorted(np.array([-4.0, 0.0, 2.5]), x), A),
    "interp on public knots": (
      lambda x: jnp.interp(x, np.array([-3.0, 0.0, 3.0]), np.array([0.0, 1.0, 4.0])),
      A,
    ),
    "window of a CT image": (lambda x: jnp.clip((x + 1.5) / 5, 0, 1), A),
    "piecewise": (lambda x: jnp.piecewise(x, [x < 0, x > 2], [-1.0, 1.0, lambda v: v / 2]), A),
    "histogram": (lambda x: jnp.histogram(x, np.array([-8.0, -2.0, 0.0, 2.0, 8.0]))[0], A),
  },
)

LOGITS, LABELS = normal(8, 5), np.arange(8, dtype=np.int32) % 5
TABLE = normal(5, 6, seed=3)
ONE = np.float32(1)
INTEGERS = owned(
  "integers",
  {
    "argmax & 1": (lambda w, x: jnp.argmax(x * w, -1) & 1, ONE, LOGITS),
    "argmax | 1, ^ 1": (lambda w, x: [(i := jnp.argmax(x * w, -1)) | 1, i ^ 1], ONE, LOGITS),
    "lax.div of counts": (lambda w, x: lax.div(jnp.argmax(x * w, -1), 2), ONE, LOGITS),
    "count // 2": (lambda w, x: jnp.argmax(x * w, -1) // 2, ONE, LOGITS),
    "count % 2": (lambda w, x: jnp.argmax(x * w, -1) % 2, ONE, LOGITS),
    "count << 2, >> 1": (lambda w, x: [(i := jnp.argmax(x * w, -1)) << 2, i >> 1], ONE, LOGITS),
    "uint8 wraps around": (
      lambda w, x: jnp.argmax(x * w, -1).astype(jnp.uint8) * np.uint8(100),
      ONE,
      LOGITS,
    ),
    "int32 minus and absolute": (lambda w, x: jnp.abs(jnp.argmax(x * w, -1) - 2), ONE, LOGITS),
    "argmax equals a public label": (lambda w, x: jnp.argmax(x * w, -1) == LABELS, ONE, LOGITS),
    "argmax to float": (lambda w, x: jnp.argmax(x * w, -1).astype(jnp.float32) / 4, ONE, LOGITS),
    "one_hot of argmax": (lambda w, x: jax.nn.one_hot(jnp.argmax(x * w, -1), 5), ONE, LOGITS),
    "one_hot of a private token @ table": (
      lambda w, x: jax.nn.one_hot(x, 5, dtype=w.dtype) @ w,
      TABLE,
      LABELS,
    ),
    "embedding of a private token": (lambda w, x: w[x], TABLE, LABELS),
    "jnp.take of a private token": (lambda w, x: jnp.take(w, x, axis=0), TABLE, LABELS),
    "private integers times weights": (lambda w, x: x * w, TABLE[:, :1], np.arange(-2, 3)),
    "uint8 image, normalised": (
      lambda w, x: ((x / np.float32(255) - 0.5) / 0.25) @ w,
      TABLE,
      np.arange(40, dtype=np.uint8).reshape(8, 5) * 6,
    ),
    "bits counted": (lambda w, x: lax.population_count(jnp.argmax(x * w, -1)), ONE, LOGITS),
    "cumsum of argmax": (lambda w, x: jnp.cumsum(jnp.argmax(x * w, -1)), ONE, LOGITS),
    "bincount": (lambda w, x: jnp.bincount(jnp.argmax(x * w, -1), length=5), ONE, LOGITS),
  },
)

CASES: list[Case] = [*ARITHMETIC, *POWERS, *TRANSCENDENTAL, *ROUNDING, *INTEGERS]
