"""The phases of encrypted inference run one by one, what each costs, and the comparison with the
clear.
"""

from __future__ import annotations

import collections
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments.encrypted import batches, functions, normalised
from primia_jax import models, prng
from primia_jax.mpc import inference, planning, protocol
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.types import PyTree


class Clock:
  """Times what is done by phase, and shows it as a progress bar.

  Attributes:
    seconds: by phase, and by (phase, detail).
  """

  def __init__(self, total: int):
    self.seconds: dict[Any, float] = collections.defaultdict(float)
    self._bar = tqdm.tqdm(
      total=total, bar_format="{desc:<44} {bar:20} {n_fmt}/{total_fmt}  [{elapsed} gone]"
    )

  def __call__(
    self,
    phase: str,
    fn: Callable[[], Any],
    layer: str = "",
    detail: Any = None,
    compiled: bool = False,
  ):
    """Returns fn(); unless compiled, runs it once before, which counts to the phase "compile"."""
    if not compiled:
      self._timed("compile", fn, f"{phase}, {layer}" if layer else phase)
    out, took = self._timed(phase, fn, layer)
    if detail is not None:
      self.seconds[phase, detail] += took
    self._bar.update()
    return out

  def _timed(self, phase: str, fn: Callable[[], Any], text: str) -> tuple[Any, float]:
    self._bar.set_description_str(f"{phase:<14} {text[-29:]}")
    start = time.perf_counter()
    out = jax.block_until_ready(fn())
    took = time.perf_counter() - start
    self.seconds[phase] += took
    return out, took

  def __enter__(self) -> Clock:
    return self

  def __exit__(self, *error: Any) -> None:
    self._bar.set_description_str("stopped" if error[0] else "done")
    self._bar.close()


class Result(NamedTuple):
  """What came of it.

  Attributes:
    outputs: [N, L] logits or [N] classes, as the data owner learns them.
    seconds: by phase, all runs of the protocol together; compilation apart under "compile".
    online: seconds by the number of the operation that ends each step, all runs together; -1 for
      the output.
    runs: of the protocol.
  """

  outputs: np.ndarray
  seconds: dict[str, float]
  online: dict[int, float]
  runs: int


def infer(plan: planning.Plan, weights: PyTree, images: Any, batch: int) -> Result:
  """Runs model owner, dealer, data owner and both parties' protocol, phase by phase.

  Each phase is given what its role holds and nothing else: shapes stand for the other party's
  arguments.

  Args:
    plan: of (weights, [batch, H, W, C] normalised images).
    weights: (parameters, state).
    images: [N, H, W, C] uint8.
    batch: images in one run of the protocol.
  """
  weight_shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), v.dtype), weights)
  image_shapes = jax.ShapeDtypeStruct((batch, *images.shape[1:]), jnp.float32)
  deal = jax.jit(lambda key, blind: inference.deal(plan, key, blind))
  prepare = [
    jax.jit(lambda *held, party=party: inference.prepare(plan, party, *held)) for party in (0, 1)
  ]
  encode_images = inference.encoder(plan, DATA_OWNER)
  steps = inference.simulate_steps(plan)
  parts = list(batches(images, batch))
  outputs = []
  with Clock(3 + len(parts) * (len(steps) + 4)) as clock:
    # Once per model. The dealer's key of the model goes to the model owner, never to the data
    # owner.
    model_key = prng.random_key()
    own = clock(
      "encode weights", lambda: inference.encode(plan, (weights, image_shapes), MODEL_OWNER)
    )
    blind = clock("blind", lambda: inference.blinds(plan, model_key))
    published = clock("publish", lambda: inference.publish(plan, own, model_key))
    for number, part in enumerate(parts):
      timed = functools.partial(clock, compiled=number > 0)
      shown = normalised(part)
      theirs = timed("encode images", lambda: encode_images((weight_shapes, shown)))  # noqa: B023
      key = prng.random_key()  # the dealer's, of this run alone
      dealt = timed("deal", lambda: deal(key, blind))  # noqa: B023
      held: list[Any] = [(own, {}), (theirs, published)]
      parties = lambda: [prepare[p](protocol.part(dealt, p), *held[p]) for p in (0, 1)]  # noqa: B023
      ready = inference.stack(*timed("prepare", parties))
      env: protocol.Env = {}
      for step in steps:
        layer, last = plan.circuit.operations[step.last - 1].layer, step.last - 1
        env = timed("online", functools.partial(step.fn, ready, own | theirs, env), layer, last)
      shares = inference.outputs(plan, env)
      answer = timed("online", lambda: inference.reveal(plan, shares), "output", -1)  # noqa: B023
      outputs.append(np.asarray(answer))
  seconds = {phase: value for phase, value in clock.seconds.items() if isinstance(phase, str)}
  online = {phase[1]: value for phase, value in clock.seconds.items() if isinstance(phase, tuple)}
  return Result(np.concatenate(outputs)[: len(images)], seconds, online, len(parts))


class Difference(NamedTuple):
  """How encrypted outputs compare with the clear.

  Attributes:
    largest: difference of a logit from float32; None where only the class is known.
    same: images of the same class.
    bitwise: whether the outputs equal the integer model's bit for bit; None where the plan is not
      exact.
  """

  largest: float | None
  same: int
  bitwise: bool | None


def compare(
  plan: planning.Plan,
  model: models.Model,
  weights: PyTree,
  images: Any,
  batch: int,
  outputs: np.ndarray,
) -> Difference:
  """Compares with float32 in the clear, and with the integer model, whose ranges it checks.

  Raises:
    ValueError: a value leaves the range planned for it; the message says in which images and layer.
  """
  logits_fn, run_clear = jax.jit(functions(model)["probabilities"]), inference.checker(plan)
  logits, integers = [], []
  for start, part in zip(range(0, len(images), batch), batches(images, batch), strict=True):
    try:
      integers.append(np.asarray(run_clear((weights, normalised(part)))))
    except ValueError as error:
      raise ValueError(
        f"images {start} to {min(start + batch, len(images)) - 1}: {error}"
      ) from error
    logits.append(np.asarray(logits_fn(weights, normalised(part))))
  wanted, exact = (np.concatenate(parts)[: len(images)] for parts in (logits, integers))
  bitwise = bool(np.array_equal(exact, outputs)) if plan.config.exact else None
  if outputs.ndim == 1:
    return Difference(None, int(np.sum(outputs == wanted.argmax(1))), bitwise)
  return Difference(
    float(np.abs(outputs - wanted).max()),
    int(np.sum(outputs.argmax(1) == wanted.argmax(1))),
    bitwise,
  )


# ---- what it cost


class Layer(NamedTuple):
  """Consecutive steps of one layer: seconds and bytes of one run of the protocol."""

  name: str
  steps: tuple[str, ...]
  seconds: float
  dealt: int
  sent: int
  rounds: int


def layers(plan: planning.Plan, rows: Sequence[planning.Row], result: Result) -> list[Layer]:
  """The rows of a plan by layer, with the mean time measured; what a step computes alone counts to
  its end's layer.
  """
  named = [row if row.operation >= 0 else row._replace(layer="output") for row in rows]
  seconds = {number: value / result.runs for number, value in result.online.items()}
  last = len(plan.circuit.operations) - 1
  ends = (
    rows[-2].operation if len(rows) > 1 else -1
  )  # what follows the last step that has a row counts to it
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


def published_bytes(plan: planning.Plan) -> int:
  """Bytes of D = W - B, which the data owner receives once per model."""
  owned = [o for o in plan.circuit.operands if o.map is not None and o.owner == MODEL_OWNER]
  return sum(math.prod(o.shape) for o in owned) * plan.config.dtype.itemsize
