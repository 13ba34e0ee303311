"""The cheapest ring in which a function's outputs stay within a target error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from primia_jax.mpc import clear, inference
from primia_jax.mpc.circuit import Config
from primia_jax.mpc.planning import Plan, calibrate, planned, warn_of_no_room
from primia_jax.types import PyTree

# Rings by their cost: 32 bits take half the storage, and within one width fewer fraction bits
# compare fewer digits. The range of a 64-bit ring is never short, so no ring between 32 and 64 is
# tried.
CANDIDATES = tuple((32, f) for f in (14, 12, 10, 8)) + tuple((64, f) for f in range(10, 25, 2))


def fit(
  fn: Callable,
  owners: Sequence[Any],
  examples: Sequence[Sequence[PyTree]],
  target_error: float,
  config: Config = Config(),  # noqa: B008
  spare: float = 1.5,
  candidates: Sequence[tuple[int, int]] = CANDIDATES,
) -> Plan:
  """Plans fn with the cheapest ring whose error on the examples is below the target.

  The error is the largest difference between an output of the integer model, which the exact
  protocol equals bit for bit, and of fn itself. The examples are the model owner's. Other inputs
  are assumed to behave alike; `spare` allows for the difference. A ring without room for all that
  comparisons may decide (`lowering.truths`) is taken, with a warning, only if no other reaches the
  target.

  Args:
    fn: as for `plan`.
    owners: as for `plan`.
    examples: argument lists of the planned shapes, with the model owner's values.
    target_error: the largest error allowed in any output.
    config: everything but num_bits and fraction_bits.
    spare: the error on the examples must be smaller than the target by this factor.
    candidates: (num_bits, fraction_bits), cheapest first. All are measured: the finest that fits a
      ring need not be the most accurate, since weights then get fewer bits.

  Raises:
    ValueError: no ring reaches the target; the message says the best error.
  """
  if not target_error > 0:
    raise ValueError(f"target_error={target_error}; use a positive number")
  ranges = calibrate(fn, owners, examples)
  wanted = [jax.tree.leaves(jax.jit(fn)(*args)) for args in examples]
  best, why, narrow = np.inf, "", None
  for num_bits, fraction_bits in candidates:
    trial = dataclasses.replace(
      config,
      num_bits=num_bits,
      fraction_bits=fraction_bits,
      weight_bits=min(config.weight_bits, num_bits),
    )
    try:
      candidate, lacks = planned(fn, owners, examples[0], trial, ranges)
    except ValueError as error:  # the ring is too small for so many fraction bits
      why = f"; {num_bits} bits with {fraction_bits} of fraction are refused: {error}"
      continue
    encode_all, run_clear = inference.encoder(candidate), clear.operands_checker(candidate)
    largest = max(
      clear.difference(a, b)
      for args, want in zip(examples, wanted, strict=True)
      for a, b in zip(jax.tree.leaves(run_clear(encode_all(args))), want, strict=True)
    )
    if largest * spare <= target_error:
      narrow = narrow or (candidate, lacks)
      if not np.any(lacks & np.isfinite(ranges[1])):  # a wider ring would not know more bounds
        narrow = candidate, lacks
        break
    best = min(best, largest)
  if narrow is not None:
    warn_of_no_room(narrow[0].program, narrow[1], stacklevel=2)
    return narrow[0]
  raise ValueError(
    f"no ring reaches target_error={target_error}; the best error is {best:.3g}{why}"
  )
