"""Encrypted inference phase by phase: the time of each, the cost of each layer, and a comparison
with the clear.
"""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import models
from primia_jax.evaluation import batches
from primia_jax.mpc import clear, inference, planning, pricing, protocol, roles
from primia_jax.types import PyTree

from . import progress
from .encrypted import functions, normalised
from .unfinished import Kept, Run

WHOLE = -2  # in place of an operation: the seconds of a whole phase


class Clock:
  """Times calls by phase and shows a progress bar.

  Attributes:
    seconds: by (phase, operation); of a whole phase under `WHOLE`.
  """

  def __init__(self, total: int):
    self.seconds: dict[tuple[str, int], float] = collections.defaultdict(float)
    self._bar = progress.bar(
      total=total, bar_format="{desc:<44} {bar:20} {n_fmt}/{total_fmt}  [{elapsed} gone]"
    )

  def __call__(
    self, phase: str, fn: Callable[[], Any], layer: str = "", operation: int = WHOLE
  ) -> Any:
    """Returns fn(), and adds its time to the phase."""
    self._bar.set_description_str(f"{phase:<14} {layer[-29:]}")
    start = time.perf_counter()
    out = jax.block_until_ready(fn())
    took = time.perf_counter() - start
    self.seconds[phase, WHOLE] += took
    if operation != WHOLE:
      self.seconds[phase, operation] += took
    self._bar.update()
    return out

  def warm_up(
    self, phase: str, fn: Callable[[], Any], layer: str = "", operation: int = WHOLE
  ) -> Any:
    """The same for a first call, whose time is that of compiling."""
    del operation
    return self("compile", fn, f"{phase}, {layer}" if layer else phase)

  def __enter__(self) -> Clock:
    return self

  def __exit__(self, *error: Any) -> None:
    self._bar.set_description_str("stopped" if error[0] else "done")
    self._bar.close()


class Result(NamedTuple):
  """The outputs and what they took.

  Attributes:
    outputs: [N, L] logits or [N] classes, as the data owner learns them; of masks [N, H, W, L] or
      [N, H, W].
    seconds: by phase, for all runs of the protocol together; compilation counts to "compile".
    online: seconds by the number of the operation that ends each step, for all runs together; -1
      for the output.
    runs: the number of runs of the protocol.
  """

  outputs: np.ndarray
  seconds: dict[str, float]
  online: dict[int, float]
  runs: int


def infer(
  plan: planning.Plan, weights: PyTree, images: Any, batch: int, kept: Kept | None = None
) -> Result:
  """Plays all roles, each with nothing but its own, and times every phase.

  Roles and a run of their own go before, to compile everything. Their time is that of this process;
  of runs of the protocol it is that of all processes.

  Args:
    plan: of (weights, [batch, H, W, C] normalised images).
    weights: (parameters, state).
    images: [N, H, W, C] uint8.
    batch: images in one run of the protocol.
    kept: runs that are done, in an earlier process, and keeps the others; None keeps nothing.
  """
  kept = Kept(None) if kept is None else kept
  steps, parts = inference.simulate_steps(plan), list(batches(images, batch))
  remaining = parts[len(kept.runs) :]

  def cast(timed: Callable) -> tuple[roles.Dealer, roles.ModelOwner, roles.DataOwner]:
    model_owner = timed("encode weights", lambda: roles.ModelOwner(plan, weights))
    dealer = timed("blind", lambda: roles.Dealer(plan, model_owner.tag))
    publish = lambda: roles.DataOwner(plan, model_owner.publish(dealer.blind()))
    return dealer, model_owner, timed("publish", publish)

  def run(timed: Callable, part: np.ndarray) -> np.ndarray:
    first, second = timed("deal", dealer.deal)
    theirs, mine = timed(
      "prepare", lambda: (model_owner.prepare(first), data_owner.prepare(second))
    )
    shown = normalised(part)
    asked, question = timed("encode images", lambda: data_owner.ask(mine, shown))
    ready, operands = roles.together(model_owner.answer(theirs, question), asked)
    env: protocol.Env = {}
    for step in steps:
      layer, last = plan.circuit.operations[step.last - 1].layer, step.last - 1
      env = timed("online", functools.partial(step.fn, ready, operands, env), layer, last)
    shares = protocol.outputs(plan.circuit, env)
    return np.asarray(timed("online", lambda: data_owner.reveal(shares), "output", -1))

  with Clock((6 + (len(remaining) + 1) * (len(steps) + 4)) if remaining else 0) as clock:
    if remaining:
      cast(clock.warm_up)
      dealer, model_owner, data_owner = cast(clock)
      run(clock.warm_up, parts[0])
    before = dict(clock.seconds)
    total = collections.defaultdict(float, before)
    for part in remaining:
      outputs = run(clock, part)
      took = {k: v - before.get(k, 0.0) for k, v in clock.seconds.items() if v != before.get(k)}
      before = dict(clock.seconds)
      kept.add(Run(outputs, took))
  for one in kept.runs:
    for key, value in one.seconds.items():
      total[key] += value
  seconds = {phase: value for (phase, step), value in total.items() if step == WHOLE}
  online = {step: value for (_, step), value in total.items() if step != WHOLE}
  outputs = np.concatenate([one.outputs for one in kept.runs])
  return Result(outputs[: len(images)], seconds, online, len(parts))


class Close(NamedTuple):
  """An image whose class encryption might change, or has changed.

  Attributes:
    image: its number.
    gap: how far apart its two best float32 logits are.
    encrypted, plain: its class.
  """

  image: int
  gap: float
  encrypted: int
  plain: int


class Difference(NamedTuple):
  """How encrypted outputs differ from the clear.

  Attributes:
    largest: the largest difference of a logit from float32; None if only the class is known.
    same: the number of images, or of the pixels of masks, with the same class.
    bitwise: whether the outputs equal the integer model's bit for bit; None if the plan is not
      exact.
    margin: how far apart the two best float32 logits are where the class differs, at most; 0 where
      none does. An error of e changes no class whose margin exceeds 2 e.
    close: images, not of masks, whose class differs, or whose margin is at most 2 e for the largest
      difference e; closest first.
  """

  largest: float | None
  same: int
  bitwise: bool | None
  margin: float = 0.0
  close: tuple[Close, ...] = ()


def compare(
  plan: planning.Plan,
  model: models.Model,
  weights: PyTree,
  images: Any,
  batch: int,
  outputs: np.ndarray,
) -> Difference:
  """Compares with float32 in the clear and with the integer model, whose ranges it checks.

  Raises:
    ValueError: a value leaves its planned range; the message names the images and the layer.
  """
  logits_fn, run_clear = jax.jit(functions(model)["probabilities"]), clear.checker(plan)
  logits, integers = [], []
  starts = range(0, len(images), batch)
  bar = progress.bar(total=len(starts), desc="check in the clear", unit="batch")
  for start, part in zip(starts, batches(images, batch), strict=True):
    try:
      integers.append(np.asarray(run_clear((weights, normalised(part)))))
    except ValueError as error:
      raise ValueError(
        f"images {start} to {min(start + batch, len(images)) - 1}: {error}"
      ) from error
    logits.append(np.asarray(logits_fn(weights, normalised(part))))
    bar.update()
  bar.close()
  wanted, exact = (np.concatenate(parts)[: len(images)] for parts in (logits, integers))
  bitwise = bool(np.array_equal(exact, outputs)) if plan.config.exact else None
  has_logits = outputs.ndim == wanted.ndim
  said = outputs.argmax(-1) if has_logits else outputs
  plain, two = wanted.argmax(-1), np.sort(wanted, axis=-1)[..., -2:]
  differs, gaps = said != plain, two[..., 1] - two[..., 0]
  largest = float(np.abs(outputs - wanted).max()) if has_logits else None
  margin, close = float(gaps[differs].max(initial=0.0)), []
  if plain.ndim == 1:
    near = np.flatnonzero(differs | (gaps <= 2 * (largest or 0.0)))
    close = [Close(int(i), float(gaps[i]), int(said[i]), int(plain[i])) for i in near]
  close.sort(key=lambda one: one.gap)
  return Difference(largest, int(np.sum(~differs)), bitwise, margin, tuple(close))


# ---- costs


class Layer(NamedTuple):
  """Consecutive steps of one layer: seconds and bytes of one run of the protocol."""

  name: str
  steps: tuple[str, ...]
  seconds: float
  dealt: int
  sent: int
  rounds: int


def layers(plan: planning.Plan, rows: Sequence[pricing.Row], result: Result) -> list[Layer]:
  """The rows of a plan by layer, with the mean time; a step counts to the layer of its end."""
  named = [row if row.operation >= 0 else row._replace(layer="output") for row in rows]
  seconds = {number: value / result.runs for number, value in result.online.items()}
  last = len(plan.circuit.operations) - 1
  # Operations after the last step that has a row count to it.
  ends = rows[-2].operation if len(rows) > 1 else -1
  if ends != last:
    seconds[ends] = seconds.get(ends, 0.0) + seconds.get(last, 0.0)
  out: list[Layer] = []
  for row in named:
    took = seconds.get(row.operation, 0.0)
    if out and out[-1].name == row.layer:
      old = out.pop()
      out.append(Layer(old.name, (*old.steps, row.what), old.seconds + took, old.dealt + row.dealt,
                       old.sent + row.sent, old.rounds + row.rounds))  # fmt: skip
    else:
      out.append(Layer(row.layer, (row.what,), took, row.dealt, row.sent, row.rounds))
  return out
