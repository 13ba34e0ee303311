"""Kernels with taps: a layer's input and output gradient, example by example, in place of each
example's gradient.

A convolution or dense layer is y[p] = rows(x)[p] @ w over positions p, so that one example's
gradient of w is the sum over p of rows(x)[p]^T g[p]: whoever holds x and g knows its norm, and any
weighted sum over examples, without forming it for every example (book-keeping, Bu et al. 2023,
"Differentially private optimization on large model at small cost"). `conv` and `dense` take a
`Tapped` kernel for an ordinary one; a backward pass then hands x and g to its taps as if they were
gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from primia_jax.types import Array


class Taps(NamedTuple):
  """What a kernel's one use fills: zeros on the way in, see `Use.taps`; their gradients are what is
  asked for.

  Attributes:
    x: the layer's input.
    g: the gradient of its output.
    uses: how often the kernel was used, float32 scalar; x and g are sums, and worth nothing, unless
      it is 1.
  """

  x: Array
  g: Array
  uses: Array


class Use(NamedTuple):
  """One use of a kernel.

  Attributes:
    apply: (x [N, ...], w) -> y [N, ..., O], linear in both.
    rows: x [N, ...] -> [N P, K], what each position of y sees: y = rows @ w.reshape(K, O).
    taps: shapes of `Taps`.
  """

  apply: Callable[[Array, Array], Array]
  rows: Callable[[Array], Array]
  taps: Taps


@dataclasses.dataclass(frozen=True, eq=False)
class Log:
  """The uses that tracing finds."""

  uses: list[Use] = dataclasses.field(default_factory=list)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "taps"], meta_fields=["log"])
@dataclasses.dataclass(frozen=True)
class Tapped:
  """A kernel that `conv` or `dense` is given once; what takes it for an array refuses it.

  What takes it for a tree (`jax.tree.leaves` of all parameters, for a penalty) finds `w`, and loses
  its gradient where nobody looks: see `only_in_layers`.

  Attributes:
    w: the kernel, which gets no gradient itself.
    taps: where x and g go; None to note the use in `log` only.
    log: see `Log`.
  """

  w: Array
  taps: Taps | None
  log: Log

  @property
  def shape(self) -> tuple[int, ...]:
    return self.w.shape


def only_in_layers(loss_fn: Callable[[Any], Array], kernels: Any) -> Array:
  """loss_fn(kernels), which gives their w to `conv` and `dense` by `Tapped` without taps; traces
  well.

  Raises:
    ValueError: the loss depends on a kernel in another way, whose gradient taps would not hold.
  """
  return jax.jvp(lambda kernels: _constant(loss_fn(kernels)), (kernels,), (kernels,))[0]


@jax.custom_jvp
def _constant(loss: Array) -> Array:
  return loss


def _constant_jvp(primals: tuple[Array], tangents: tuple[Any]) -> tuple[Array, Any]:
  if not isinstance(tangents[0], SymbolicZero):
    raise ValueError(
      "the loss depends on a kernel with taps in another way than by `conv` or `dense`, such as a "
      "penalty on all "
      "parameters, whose gradient would be lost; add it after clipping (weight decay), or use no "
      "taps"
    )
  return primals[0], tangents[0]


_constant.defjvp(_constant_jvp, symbolic_zeros=True)


def dense(x: Array, w: Array | Tapped) -> Array:
  """x [N, K] @ w [K, O], whose kernel may have taps."""
  if isinstance(w, Tapped):
    return linear(x, w, jnp.matmul, lambda x: x)
  return x @ w


def linear(
  x: Array, kernel: Tapped, apply: Callable[[Array, Array], Array], rows: Callable[[Array], Array]
) -> Array:
  """apply(x, kernel.w), with taps; see `Use` for the arguments."""
  if kernel.taps is not None:
    return _through(apply, x, kernel.w, kernel.taps)
  y = apply(x, lax.stop_gradient(kernel.w))
  kernel.log.uses.append(Use(apply, rows, jax.eval_shape(Taps, x, y, jnp.ones((), jnp.float32))))
  return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(apply: Callable[[Array, Array], Array], x: Array, w: Array, taps: Taps) -> Array:
  del taps
  return apply(x, w)


def _through_fwd(
  apply: Callable, x: Array, w: Array, taps: Taps
) -> tuple[Array, tuple[Array, Array]]:
  del taps
  return apply(x, w), (x, w)


def _through_bwd(
  apply: Callable, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Any, Taps]:
  x, w = residuals
  (towards_x,) = jax.vjp(lambda x: apply(x, w), x)[1](g)
  return towards_x, None, Taps(x, g, jnp.ones((), jnp.float32))


_through.defvjp(_through_fwd, _through_bwd)
