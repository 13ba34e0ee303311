"""Tapped kernels: a backward pass that returns a layer's input and output gradient for each
example, instead of each example's gradient of the kernel.

A convolution or dense layer computes y[p] = rows(x)[p] @ w at positions p. One example's gradient
of w is then the sum over p of rows(x)[p]^T g[p]. So x and g determine its norm, and any weighted
sum over examples, without forming the gradient of each example (book-keeping; Bu et al. 2023,
"Differentially private optimization on large model at small cost"). `conv` and `dense` accept a
`Tapped` kernel in place of an ordinary one. A backward pass then returns x and g as the gradients
of its taps.
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
  """Arguments that receive x and g as their gradients. Pass zeros of the shapes in `Use.taps`.

  Attributes:
    x: the layer's input.
    g: the gradient of its output.
    uses: how often the kernel was used, a float32 scalar. Unless it is 1, x and g are sums over
      uses and useless.
  """

  x: Array
  g: Array
  uses: Array


class Use(NamedTuple):
  """One use of a kernel.

  Attributes:
    apply: (x [N, ...], w) -> y [N, ..., O], linear in both.
    rows: x [N, ...] -> [N P, K], the inputs of each position of y: y = rows @ w.reshape(K, O).
    taps: shapes of `Taps`.
  """

  apply: Callable[[Array, Array], Array]
  rows: Callable[[Array], Array]
  taps: Taps


@dataclasses.dataclass(frozen=True, eq=False)
class Log:
  """The uses of kernels that tracing has found."""

  uses: list[Use] = dataclasses.field(default_factory=list)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "taps"], meta_fields=["log"])
@dataclasses.dataclass(frozen=True)
class Tapped:
  """A kernel for one call of `conv` or `dense`. Functions that expect an array reject it.

  Functions that expect a tree (such as a penalty on `jax.tree.leaves` of all parameters) find `w`
  and would silently lose its gradient; `only_in_layers` detects this.

  Attributes:
    w: the kernel, which gets no gradient itself.
    taps: receive x and g; None only records the use in `log`.
    log: see `Log`.
  """

  w: Array
  taps: Taps | None
  log: Log

  @property
  def shape(self) -> tuple[int, ...]:
    return self.w.shape


def only_in_layers(loss_fn: Callable[[Any], Array], kernels: Any) -> Array:
  """Returns loss_fn(kernels), and checks that it uses kernels only in `conv` and `dense`, as
  `Tapped` without taps. Can be traced.

  Raises:
    ValueError: the loss depends on a kernel in another way; taps would miss that gradient.
  """
  return jax.jvp(lambda kernels: _constant(loss_fn(kernels)), (kernels,), (kernels,))[0]


@jax.custom_jvp
def _constant(loss: Array) -> Array:
  return loss


def _constant_jvp(primals: tuple[Array], tangents: tuple[Any]) -> tuple[Array, Any]:
  if not isinstance(tangents[0], SymbolicZero):
    raise ValueError(
      "the loss depends on a tapped kernel outside of `conv` and `dense`, e.g. by a penalty on all "
      "parameters, and that gradient would be lost; add the penalty after clipping (weight decay), "
      "or use no taps"
    )
  return primals[0], tangents[0]


_constant.defjvp(_constant_jvp, symbolic_zeros=True)


def dense(x: Array, w: Array | Tapped) -> Array:
  """x [N, K] @ w [K, O], where w may be tapped."""
  if isinstance(w, Tapped):
    return linear(x, w, jnp.matmul, lambda x: x)
  return x @ w


def linear(
  x: Array, kernel: Tapped, apply: Callable[[Array, Array], Array], rows: Callable[[Array], Array]
) -> Array:
  """apply(x, kernel.w) with taps. `Use` describes the arguments."""
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
