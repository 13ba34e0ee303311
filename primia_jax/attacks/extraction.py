"""Extraction by queries: what a clinic's questions tell about a model that it may only ask.

Under encrypted inference the data owner sees outputs and nothing else, each truncated to the plan's
output unit (`output_units`). That protects no model from its own answers: a linear one is solved
for exactly from one query more than it has inputs, up to the unit (`solve_linear`; Tramer et al.
2016, section 4.1), and any other is imitated better with every query (`surrogate`). Only a
limit on queries, or answers that say less (`--output=label`), bound it. `rounded` stands in for the
protocol where thousands of queries are simulated; its outputs differ from the protocol's by what
truncations inside the network lose (`mpc.Private.check` says how much).

A data owner that leaves the semi-honest protocol needs few queries (`by_shifts`, with `shifted`):
it adds what it likes to a ReLU's input, and so chooses which units answer, and on which side of the
kink. Tags on its openings or a helper in its place stop that (`mpc.Config.client`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax.metrics import clopper_pearson
from primia_jax.mpc import Plan
from primia_jax.mpc.multiprocess import Party
from primia_jax.types import Array, Key, Params, PyTree

Answer = Literal["logits", "probabilities", "label"]


def output_units(plan: Plan) -> tuple[float, ...]:
  """What one unit of each secret output of a plan stands for: no answer says less than that."""
  return tuple(v.scale for v in plan.circuit.outputs if hasattr(v, "scale"))


def rounded(outputs: Array | np.ndarray, unit: float) -> Array:
  """Outputs as whole multiples of a unit, the next below, as exact truncation gives them."""
  return jnp.floor(outputs / unit) * unit


def solve_linear(
  queries: np.ndarray, answers: np.ndarray, answer: Answer = "logits"
) -> tuple[np.ndarray, np.ndarray]:
  """The kernel and bias of a linear model from its answers, by least squares in float64.

  It is exact for exact answers. Answers that are off by at most u in each number move the solution
  by at most u sqrt(Q) over the least singular value of [queries, 1], in each column's norm.

  Args:
    queries: [Q, D], of rank D + 1 together with a column of ones.
    answers: [Q, L] logits, or probabilities, all above 0.
    answer: which of these. From probabilities follows the model up to what its probabilities do not
      depend on: column 0 of kernel and bias is then 0 by choice.

  Returns:
    kernel [D, L], bias [L].

  Raises:
    ValueError: for labels alone, too few or dependent queries, or probabilities of 0.
  """
  if answer == "label":
    raise ValueError("answer='label' gives no equations; train a surrogate on labels instead")
  queries, answers = np.asarray(queries, np.float64), np.asarray(answers, np.float64)
  design = np.concatenate([queries, np.ones((len(queries), 1))], axis=1)
  if (rank := np.linalg.matrix_rank(design)) < design.shape[1]:
    raise ValueError(
      f"{len(queries)} queries fix {rank} of {design.shape[1]} unknowns of each output; ask at "
      f"least {design.shape[1]} independent ones"
    )
  if answer == "probabilities":
    if np.min(answers) <= 0:
      raise ValueError("a probability is 0, whose logarithm says nothing; leave such queries out")
    answers = np.log(answers) - np.log(answers[:, :1])
  solved = np.linalg.lstsq(design, answers, rcond=None)[0]
  return solved[:-1], solved[-1]


def targets(outputs: Array, answer: Answer) -> Array:
  """What a surrogate learns from answers to its queries: probabilities [Q, L].

  Args:
    outputs: [Q, L] logits or probabilities, or [Q] labels with L = their largest + 1.
    answer: which of these.
  """
  if answer == "label":
    return jax.nn.one_hot(outputs, int(jnp.max(outputs)) + 1, dtype=jnp.float32)
  return jax.nn.softmax(outputs) if answer == "logits" else outputs


class State(NamedTuple):
  """A surrogate while it learns."""

  params: Params
  opt_state: PyTree


class Attack(NamedTuple):
  """A surrogate's training.

  Attributes:
    init: parameters -> State.
    step: (key, State, queries [M, ...], targets [M, L], num_queries) -> (State, loss of the batch);
      it learns from the first num_queries alone, so that one compiled function serves a whole curve
      over numbers of queries.
  """

  init: Callable[[Params], State]
  step: Callable[[Key, State, Array, Array, Array], tuple[State, Array]]


def surrogate(
  predict_fn: Callable[[Params, Array], Array],
  optimizer: optax.GradientTransformation,
  batch_size: int,
) -> Attack:
  """Imitates a model by cross-entropy with its answers (Tramer et al. 2016; Orekondy et al. 2019).

  Args:
    predict_fn: (params, images) -> logits, of the attacker's own model.
    optimizer: of its training.
    batch_size: queries of a step, drawn with replacement.
  """

  def step(key, state, queries, targets, num_queries):
    index = jax.random.randint(key, (batch_size,), 0, num_queries)

    def loss_fn(params: Params) -> Array:
      logits = predict_fn(params, queries[index])
      return jnp.mean(optax.softmax_cross_entropy(logits, targets[index]))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state), loss

  return Attack(lambda params: State(params, optimizer.init(params)), step)


def learn(
  attack: Attack, num_steps: int
) -> Callable[[Key, Params, Array, Array, Array], tuple[Params, Array]]:
  """Makes (key, params, queries, targets, num_queries) -> (params, last loss), for jit and vmap."""

  def run(key, params, queries, targets, num_queries):
    def body(i, carry):
      return attack.step(jax.random.fold_in(key, i), carry[0], queries, targets, num_queries)

    start = attack.init(params), jnp.zeros((), jnp.float32)
    state, loss = jax.lax.fori_loop(0, num_steps, body, start)
    return state.params, loss

  return run


class Agreement(NamedTuple):
  """The share of images to which two models give the same class, and its exact 95 % interval."""

  value: float
  low: float
  high: float


def agreement(one: Array | np.ndarray, other: Array | np.ndarray) -> Agreement:
  """Of two models' outputs [N, L] on images that were no queries."""
  same = np.argmax(np.asarray(one), axis=-1) == np.argmax(np.asarray(other), axis=-1)
  return Agreement(float(same.mean()), *clopper_pearson(int(same.sum()), same.size))


# ---- a data owner that deviates


def shifted(party: Party, shifts: Mapping[int, np.ndarray]) -> Party:
  """A party that falsifies what it opens, and computes on as if the values were the true ones.

  Args:
    party: its honest part of one inference, from `mpc.multiprocess`.
    shifts: by round, what it changes in its message, from the message's start on: ring elements
      (uint32 or uint64), which are added, or bytes (uint8), which are flipped.
  """
  message, number = next(party), 0
  while True:
    shift = shifts.get(number)
    other = yield message if shift is None else _changed(message, shift)
    if shift is not None:  # what both open is the sum, so its own view is shifted as well
      other = _changed(other, shift)
    number += 1
    try:
      message = party.send(other)
    except StopIteration as end:
      return end.value


def _changed(message: bytes | memoryview, shift: np.ndarray) -> bytes:
  content = np.frombuffer(message, np.uint8).copy()
  if shift.nbytes > content.size:
    raise ValueError(f"a shift of {shift.nbytes} bytes for a message of {content.size}")
  words = content[: shift.nbytes].view(shift.dtype)
  words[:] = words ^ shift.reshape(-1) if shift.dtype == np.uint8 else words + shift.reshape(-1)
  return content.tobytes()


class Extracted(NamedTuple):
  """A network relu(x @ hidden + hidden_bias) @ kernel + bias, as an attacker sees it."""

  hidden: np.ndarray
  hidden_bias: np.ndarray
  kernel: np.ndarray
  bias: np.ndarray
  num_queries: int

  @property
  def num_parameters(self) -> int:
    return sum(v.size for v in self[:4])


def by_shifts(
  ask: Callable[[np.ndarray, np.ndarray], np.ndarray],
  num_inputs: int,
  num_hidden: int,
  shift: float,
  size: float = 1.0,
) -> Extracted:
  """A network with one hidden layer, from answers under shifts of its ReLUs' inputs.

  The attack on semi-honest inference of Lehmkuhl et al. (USENIX Security 2021, section 3), in which
  the client's shares of a linear layer's result carry an additive error. A shift of -`shift` makes
  a unit 0 and one of +`shift` makes it linear. So each query is a set of linear equations in the
  parameters of the units that were left alive. It takes 1 + 2 H + D ceil(H / L) queries, less than
  one a parameter, and is exact up to the answers' rounding over `shift` and `size`.

  Args:
    ask: (x [D], shifts [H]) -> relu(x @ hidden + hidden_bias + shifts) @ kernel + bias, [L].
    num_inputs: D.
    num_hidden: H.
    shift: more than any |x @ hidden + hidden_bias|; twice as much must be in the gate's range.
    size: of the one number in x that is not 0.
  """
  zero, num_queries = np.zeros(num_inputs), 0

  def answer(x: np.ndarray, alive: np.ndarray, by: float) -> np.ndarray:
    nonlocal num_queries
    num_queries += 1
    shifts = np.full(num_hidden, -shift)
    shifts[alive] = by
    return np.asarray(ask(x, shifts), np.float64)

  bias = answer(zero, np.array([], int), 0)
  kernel, hidden_bias = np.zeros((num_hidden, len(bias))), np.zeros(num_hidden)
  for j in range(num_hidden):
    low, high = (answer(zero, np.array([j]), by * shift) for by in (1.0, 1.5))
    kernel[j] = (high - low) / (0.5 * shift)
    hidden_bias[j] = np.linalg.lstsq(kernel[j, :, None], low - bias, rcond=None)[0][0] - shift
  hidden = np.zeros((num_inputs, num_hidden))
  for i in range(num_inputs):
    x = size * (np.arange(num_inputs) == i)
    for start in range(0, num_hidden, len(bias)):
      alive = np.arange(start, min(start + len(bias), num_hidden))
      rest = answer(x, alive, shift) - bias - (hidden_bias[alive] + shift) @ kernel[alive]
      hidden[i, alive] = np.linalg.lstsq(kernel[alive].T, rest, rcond=None)[0] / size
  return Extracted(hidden, hidden_bias, kernel, bias, num_queries)
