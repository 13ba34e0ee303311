"""What to write instead of an operation that has no protocol."""

from __future__ import annotations

_SERIES = "use a polynomial of it, or jnp.interp on public knots"
_FLAG = "a secret value cannot steer what is printed, checked or called; return it as an output"
_NEAREST = {
  "acos": _SERIES,
  "approx_top_k": "use lax.top_k",
  "asin": _SERIES,
  "atan2": _SERIES,
  "bessel_i0e": _SERIES,
  "bessel_i1e": _SERIES,
  "bitcast_convert_type": "the bits of a float are not kept; compare it with public numbers",
  "cholesky": "let one party factorise what it holds alone",
  "cumlogsumexp": "use jnp.log(jnp.cumsum(jnp.exp(x - largest))) + largest",
  "clz": "compare with the powers of two: (x[..., None] < 2**jnp.arange(n)).sum(-1)",
  "debug_callback": _FLAG,
  "debug_print": _FLAG,
  "digamma": _SERIES,
  "eigh": "let one party factorise what it holds alone",
  "erf_inv": _SERIES,
  "igamma": _SERIES,
  "igammac": _SERIES,
  "io_callback": _FLAG,
  "lgamma": _SERIES,
  "lu": "let one party factorise what it holds alone",
  "nextafter": "add the smallest step that matters",
  "polygamma": _SERIES,
  "population_count": "add up (x >> i) & 1",
  "pure_callback": _FLAG,
  "qr": "let one party factorise what it holds alone",
  "random_bits": "draw from a public key",
  "random_seed": "draw from a public key",
  "reduce": "use a sum, product, maximum, minimum, any or all",
  "reduce_window": "use a sum or maximum over windows",
  "reduce_window_min": "use -max over windows of -x",
  "regularized_incomplete_beta": _SERIES,
  "scatter_max": "use jnp.where and a maximum over an axis",
  "scatter_min": "use jnp.where and a minimum over an axis",
  "select_and_gather_add": "use a sum or maximum over windows",
  "select_and_scatter_add": "gradients of maxima over windows have no protocol",
  "svd": "let one party factorise what it holds alone",
  "triangular_solve": "let one party invert the matrix that it holds alone, and multiply",
  "zeta": _SERIES,
}


_LEAST = "for the least of some entries use -jnp.max(jnp.where(mask, -x, -jnp.inf))"
_ABOVE = "keep its argument above 0, as by jnp.maximum(x, 1e-6)"
_FINITE = {
  "div": "keep the divisor away from 0",
  "exp": "subtract the largest first",
  "gather": "positions beyond the end fill in NaN: use mode='clip' or fill_value=0",
  "log": _ABOVE,
  "min": _LEAST,
  "reduce_min": _LEAST,
  "rsqrt": _ABOVE,
  "select_n": "choose between finite numbers; " + _LEAST,
  "sqrt": _ABOVE,
  "sub": "a row that is masked wholly by minus infinity has no softmax: mask it by a finite number "
  "such as -1e9",
}


def finite(name: str) -> str:
  """What keeps a primitive's result finite."""
  return _FINITE.get(name, "calibrate with examples on which it is finite")


def nearest(name: str) -> str:
  """The nearest thing that works in place of a primitive."""
  return _NEAREST.get(
    name.replace("-", "_"),
    "compose it of sums, products, comparisons, jnp.where and the usual functions, or compute it "
    "where its inputs are in the clear",
  )
