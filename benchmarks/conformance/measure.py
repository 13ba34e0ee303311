"""One case of the table: what the plan says, and the error of the integer model."""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.conformance.case import Case
from primia_jax import mpc
from primia_jax.mpc import pricing
from primia_jax.types import PyTree

OWNERS = ("model_owner", "data_owner")
CONFIG = mpc.Config(num_bits=64, fraction_bits=16)
ACCEPTED, REFUSED, BROKEN, SKIPPED = "accepted", "refused", "broken", "skipped"


class Result(NamedTuple):
  """What became of a case.

  Attributes:
    case: the case.
    outcome: accepted, refused by an error that says why, broken by another, or skipped for want of
      a package.
    said: the error's text; empty if accepted.
    error: the largest |y - exact y| / max(1, |exact y|) over all outputs.
    rounds: of communication; messages that do not wait for each other share one.
    sent: bytes that each party sends.
    dealt: bytes that the data owner receives from the dealer.
  """

  case: Case
  outcome: str
  said: str = ""
  error: float = 0.0
  rounds: int = 0
  sent: int = 0
  dealt: int = 0


def measure(case: Case) -> Result:
  """Plans the case in `CONFIG`, with ranges of its own input, and runs the integer model."""
  with as_users_have_it():
    try:
      with jax.enable_x64(False):  # models are made as without encryption
        fn, *args = case.make()
      exact = in_float64(fn, args)
      ranges = mpc.calibrate(fn, OWNERS, [args])
      plan = mpc.plan(fn, OWNERS, args, CONFIG, ranges)
      outputs = mpc.check(plan, args)
    except ImportError as error:
      return Result(case, SKIPPED, str(error))
    except Exception as error:  # the table says so
      if is_refusal(error):
        return Result(case, REFUSED, str(error))
      return Result(case, BROKEN, f"{type(error).__name__}: {error}")
    total = pricing.total(plan.circuit)
  error = largest_error(outputs, exact)
  return Result(case, ACCEPTED, "", error, total.rounds, total.sent, total.dealt)


def is_refusal(error: Exception) -> bool:
  """Whether the library refused, or JAX because a traced value decides on a shape.

  The library refuses by a `raise` of its own. A call or an operator of its code that fails, such as
  a strict zip or a reshape inside, is a fault.
  """
  if isinstance(error, jax.errors.JAXTypeError | jax.errors.JAXIndexError):
    return True
  if type(error) not in (NotImplementedError, ValueError) or error.__traceback__ is None:
    return False
  last = error.__traceback__
  while last.tb_next is not None:
    last = last.tb_next
  code = last.tb_frame.f_code
  raised = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
  return raised and "/primia_jax/mpc/" in code.co_filename


@contextlib.contextmanager
def as_users_have_it() -> Iterator[None]:
  """JAX's own defaults for promotion, and 64-bit types, which the ring needs."""
  with (
    jax.enable_x64(True),
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    yield


def in_float64(fn: Any, args: Sequence[PyTree]) -> PyTree:
  """fn(*args) with every real number in float64; under x64."""
  is_real = lambda v: hasattr(v, "dtype") and jax.numpy.issubdtype(v.dtype, np.floating)
  wide = lambda v: np.asarray(v, np.float64) if is_real(v) else v
  return jax.jit(fn)(*jax.tree.map(wide, args))


def largest_error(got: PyTree, exact: PyTree) -> float:
  """The largest |got - exact| / max(1, |exact|); infinite where only one is NaN or infinite."""
  worst = 0.0
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
    a, b = (np.asarray(v).astype(np.complex128) for v in (a, b))
    if a.shape != b.shape:
      return np.inf
    with np.errstate(invalid="ignore"):
      error = np.where(a == b, 0.0, np.abs(a - b) / np.maximum(1.0, np.abs(b)))
    error = np.where(np.isnan(a) & np.isnan(b), 0.0, error)
    worst = max(worst, float(np.max(np.where(np.isnan(error), np.inf, error), initial=0.0)))
  return worst
