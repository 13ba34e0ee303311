"""Extraction by queries: what a clinic's questions tell about a model that it may only ask.

Under encrypted inference the data owner sees outputs and nothing else, each truncated to the plan's
output unit (`output_units`). That protects no model from its own answers: a linear one is solved
for exactly from one query more than it has inputs, up to the unit (`solve_linear`; Tramer et al.
2016, section 4.1), and any other is imitated the better the more it is asked (`surrogate`). Only a
limit on queries, or answers that say less (`--output=label`), bound it. `rounded` stands in for the
protocol where thousands of queries are simulated; its outputs differ from the protocol's by what
truncations inside the network lose (`mpc.Private.check` says how much).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax.metrics import clopper_pearson
from primia_jax.mpc import Plan
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
