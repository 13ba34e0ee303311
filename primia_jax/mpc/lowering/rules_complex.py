"""Rules for complex numbers: pairs of real ones, from a Fourier transform to a magnitude.

A Fourier transform of n numbers is a product with a public matrix along each axis; no round but the
truncation before a second axis. Its error is at most n (u / 2 + 2^-w max |x|), where w is
weight_bits - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import powers
from primia_jax.mpc.lowering.holders import Complex, Owned, is_secret
from primia_jax.mpc.lowering.ownership import Lowering, Rule
from primia_jax.mpc.lowering.program import Equation
from primia_jax.mpc.lowering.rules_linear import MOVES, RESHAPES, public_product, shape_of
from primia_jax.mpc.maps import Map

_TRANSFORMS: dict[str, Callable[..., np.ndarray]] = {
  "FFT": lambda n: np.fft.fft(np.eye(n)),
  "IFFT": lambda n: np.fft.ifft(np.eye(n)),
  "RFFT": lambda n: np.fft.rfft(np.eye(n)),
}


def _is_complex(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.complexfloating)


class _Parts:
  """The rules of real numbers, for the parts of complex ones; public zeros cost nothing."""

  def __init__(self, low: Lowering, equation: Equation, rules: Mapping[str, Rule]):
    self.low, self.equation, self.rules = low, equation, rules

  def of(self, v: Any) -> tuple[Any, Any]:
    """The real and the imaginary part of whatever holds a number."""
    if isinstance(v, Complex):
      return v.real, v.imag
    if isinstance(v, Owned) and _is_complex(v.dtype):
      part = lambda fn: v._replace(
        read=lambda values: fn(v.read(values)), dtype=np.dtype(np.float32)
      )
      return part(jnp.real), part(jnp.imag)
    if is_secret(v):
      return v if isinstance(v, Owned) else self.low.value(v), np.zeros(())
    return np.real(np.asarray(v)), np.imag(np.asarray(v))

  def do(self, name: str, *inputs: Any) -> Any:
    """A rule's result as shares, or a public array."""
    if not any(map(is_secret, inputs)):
      fn = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative}[name]
      return fn(*inputs)
    zero = [not is_secret(v) and not np.any(v) for v in inputs]
    if name == "mul" and any(zero):
      return np.zeros(())
    if name in ("add", "sub") and zero[1]:
      return inputs[0]
    if name in ("add", "sub") and zero[0]:
      return inputs[1] if name == "add" else self.do("neg", inputs[1])
    avals = tuple(jax.ShapeDtypeStruct(v.shape, np.float32) for v in self.equation.avals)
    out = self.rules[name](self.low, self.equation._replace(name=name, avals=avals), list(inputs))
    return self.low.value(out)


def _add(parts: _Parts, a: Any, b: Any) -> Complex:
  name = parts.equation.name
  return Complex(*(parts.do(name, v, w) for v, w in zip(parts.of(a), parts.of(b), strict=True)))


def _neg(parts: _Parts, a: Any) -> Complex:
  return Complex(*(parts.do("neg", v) for v in parts.of(a)))


def _mul(parts: _Parts, a: Any, b: Any) -> Complex:
  (a, b), (c, d) = parts.of(a), parts.of(b)
  do = parts.do
  return Complex(
    do("sub", do("mul", a, c), do("mul", b, d)), do("add", do("mul", a, d), do("mul", b, c))
  )


def _div(parts: _Parts, a: Any, b: Any) -> Complex:
  if not is_secret(b):
    return _mul(parts, a, 1 / np.asarray(b, np.complex128))
  if _is_complex(parts.low.dtype(parts.equation.inputs[1])):
    raise NotImplementedError(
      f"{parts.equation.name} by a complex secret at {parts.equation.source}; multiply by its "
      f"conjugate and divide by its squared magnitude"
    )
  return Complex(*(parts.do("div", v, b) if is_secret(v) else v for v in parts.of(a)))


def _abs(parts: _Parts, a: Any) -> Value:
  """|error| as that of `powers.sqrt`, and of its argument."""
  bound = parts.low.bound(parts.equation.outputs[0])
  squares = [parts.do("mul", v, v) for v in parts.of(a)]
  real, imag = (
    v._replace(max_abs=min(v.max_abs, bound * bound)) if isinstance(v, Value) else v
    for v in squares
  )
  return powers.sqrt(parts.low.build, parts.do("add", real, imag), bound)


def _conj(parts: _Parts, a: Any) -> Complex:
  real, imag = parts.of(a)
  return Complex(real, parts.do("neg", imag))


def _each(parts: _Parts, *inputs: Any) -> Any:
  """Rearranges both parts alike; what is no number, such as positions, goes to both."""
  low, equation = parts.low, parts.equation
  rule = parts.rules[equation.name]
  numbers = {"concatenate": len(inputs), "pad": 2}.get(equation.name, 1)
  first = int(equation.name == "select_n")
  halves = []
  for part in (0, 1):
    row = list(inputs)
    for i in range(first, len(inputs) if first else numbers):
      row[i] = parts.of(inputs[i])[part]
      if not is_secret(row[i]):
        row[i] = np.broadcast_to(row[i], shape_of(inputs[i]))
    if any(is_secret(v) for v in row):
      halves.append(rule(low, equation, row))
    else:
      halves.append(np.asarray(equation.bind(*map(jnp.asarray, row))[0]))
  if isinstance(halves[0], list):
    return [Complex(*pair) for pair in zip(*halves, strict=True)]
  return Complex(*(low.value(v) if is_secret(v) else v for v in halves))


def _fft(parts: _Parts, x: Any) -> Any:
  kind = str(parts.equation.params["fft_type"]).rsplit(".", 1)[-1]
  kind = {"0": "FFT", "1": "IFFT", "2": "RFFT", "3": "IRFFT"}.get(kind, kind)
  lengths = parts.equation.params["fft_lengths"]
  axes = range(len(shape_of(x)) - len(lengths), len(shape_of(x)))
  # Of several axes only the last holds half a spectrum.
  steps = [
    (axis, n, kind if axis == axes[-1] else kind.replace("R", ""))
    for axis, n in zip(axes, lengths, strict=True)
  ]
  out: Any = Complex(*parts.of(x))
  for axis, n, k in reversed(steps) if kind == "RFFT" else steps:
    out = _transformed(parts.low, out, axis, n, k)
  return out


def _transformed(low: Lowering, x: Complex, axis: int, n: int, kind: str) -> Any:
  """One axis; real for IRFFT."""
  secret = [low.value(v) for v in x if is_secret(v)]
  if len(secret) == 1 and is_secret(x.imag):
    raise NotImplementedError(f"{low.build.place}: a purely imaginary number; transform x.imag")
  if kind == "IRFFT":
    half = np.eye(n // 2 + 1)
    matrix = np.concatenate([np.fft.irfft(half, n), np.fft.irfft(1j * half, n)])
  else:
    full = _TRANSFORMS[kind](n)
    matrix = np.block([[full.real, full.imag], [-full.imag, full.real]])
  if len(secret) == 2:
    secret = list(low.build.align(*secret))
  joined = low.build.local(lambda *vs: lax.concatenate(vs, axis), *secret)
  mapping = Map("dot_general", (("dimension_numbers", (((axis,), (0,)), ((), ()))),))
  out = public_product(low, joined, matrix[: joined.shape[axis]], mapping, None)
  out = low.build.local(lambda v: jnp.moveaxis(v, -1, axis), out)
  if kind == "IRFFT":
    return out
  parts = lambda v: lax.split(v, [v.shape[axis] // 2] * 2, axis)
  return Complex(*(low.build.local(lambda v, i=i: parts(v)[i], out) for i in (0, 1)))


_RULES: dict[str, Callable[..., Any]] = {
  "fft": _fft,
  "real": lambda parts, a: parts.of(a)[0],
  "imag": lambda parts, a: parts.of(a)[1],
  "complex": lambda parts, a, b: Complex(parts.of(a)[0], parts.of(b)[0]),
  "conj": _conj,
  "abs": _abs,
  "add": _add,
  "add_any": _add,
  "sub": _add,
  "neg": _neg,
  "mul": _mul,
  "div": _div,
  "convert_element_type": lambda parts, a: Complex(*parts.of(a)),
}
_RULES |= {
  name: _each
  for name in (*RESHAPES, *MOVES, "reduce_sum", "concatenate", "pad", "select_n", "copy")
}


def rules(others: Mapping[str, Rule]) -> dict[str, Rule]:
  """All rules, with those of complex numbers."""

  def rule(name: str) -> Rule:
    def chosen(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
      dtypes = [*map(low.dtype, equation.inputs), *(v.dtype for v in equation.avals)]
      if not any(map(_is_complex, dtypes)):
        return others[name](low, equation, inputs)
      if name not in _RULES:
        raise NotImplementedError(
          f"{name} of complex numbers at {equation.source}; take jnp.real and jnp.imag first"
        )
      return _RULES[name](_Parts(low, equation, others), *inputs)

    return chosen

  return {name: rule(name) for name in {*others, *_RULES}}
