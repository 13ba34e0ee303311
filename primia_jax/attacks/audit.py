"""Audits the claim of a plan of private steps: what its own run with canaries proves of epsilon."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.attacks import canaries, one_run
from primia_jax.attacks.canaries import Observed
from primia_jax.privacy import accounting
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.plan import StepPlan
from primia_jax.types import Array, Key


class Audit(NamedTuple):
  """What an audit found.

  Attributes:
    claim: epsilon by the ledger, of the gradients of the whole run.
    delta: of the claim and of all bounds.
    num_canaries: m, over all runs.
    num_guesses, num_right: about the transcript.
    epsilon: `one_run.f_dp_bound` from the transcript. From `claim` on, the claim is refuted.
    limit: what `epsilon` would be if all guesses were right; a larger claim cannot be refuted, and
      needs more canaries.
    any_epsilon: `one_run.epsilon_delta_bound` from the transcript, which assumes nothing about the
      mechanism.
    final_num_right, final_epsilon: `num_right` and `epsilon` from the final model alone.
    confidence: of each bound.
  """

  claim: float
  delta: float
  num_canaries: int
  num_guesses: int
  num_right: int
  epsilon: float
  limit: float
  any_epsilon: float
  final_num_right: int
  final_epsilon: float
  confidence: float


def audit(
  made: StepPlan,
  rounds: int,
  key: Key,
  *,
  num_runs: int = 1,
  norm: float = 10.0,
  num_guesses: int | None = None,
  confidence: float = 0.95,
) -> Audit:
  """Runs a plan with canaries, and says what epsilon their guessed presence proves.

  Args:
    made: a plan with `canaries.loss_fn`, e.g. from `canaries.plan_like`; its units are canaries.
    rounds: of one run.
    key: see `canaries.observe`.
    num_runs: runs with canaries and secrets of their own, which together count as one mechanism:
      the time of a run grows with the square of its canaries.
    norm: of a canary before clipping, over the clip norm. Several times it shows whether anything
      is clipped.
    num_guesses, confidence: see `judge`.

  Raises:
    ValueError: as `judge`.
  """
  return judge(watch(made, rounds)(key, num_runs, norm), made, rounds, num_guesses, confidence)


def watch(made: StepPlan, rounds: int) -> Callable[..., Observed]:
  """(key, number of runs, norm = 10) -> Observed of all their canaries; compiled once for many
  audits. See `audit`.
  """

  @jax.jit
  def run(keys: Key, norm: Array) -> Observed:
    runs = jax.lax.map(lambda key: canaries.observe(made, rounds, key, norm), keys)
    join = lambda a: jnp.moveaxis(a, 0, -2).reshape(*a.shape[1:-1], -1)
    return Observed(*map(join, runs))

  return lambda key, num_runs, norm=10.0: run(jax.random.split(key, num_runs), jnp.float32(norm))


def judge(
  observed: Observed,
  made: StepPlan,
  rounds: int,
  num_guesses: int | None = None,
  confidence: float = 0.95,
) -> Audit:
  """What is proved by what was observed, against the claim of a plan.

  Args:
    observed: of one run or several.
    made: the plan that is claimed to have run.
    rounds: of one run.
    num_guesses: fix it before anything is observed; None for `one_run.enough_guesses`.
    confidence: of each of the bounds.

  Raises:
    ValueError: for numbers out of range, or a release that is no number.
  """
  included, ledger = np.asarray(observed.included), claim(made, rounds)
  total = len(included)
  guesses = num_guesses
  if guesses is None:
    guesses = one_run.enough_guesses(ledger, total, confidence)
  # a canary that was never drawn looks as one that is out, so of sampled ones only ins are guessed
  out = 0 if made.strategy is None and made.sampling_rate < 1 else None
  right, final = (
    one_run.right_guesses(scores, included, guesses, out)
    for scores in canaries.scores(made, rounds, observed)
  )
  bound = lambda v: one_run.f_dp_bound(ledger, total, guesses, v, confidence)
  return Audit(
    claim=accounting.epsilon(ledger),
    delta=ledger.delta,
    num_canaries=total,
    num_guesses=guesses,
    num_right=right,
    epsilon=bound(right),
    limit=bound(guesses),
    any_epsilon=one_run.epsilon_delta_bound(total, guesses, right, ledger.delta, confidence),
    final_num_right=final,
    final_epsilon=bound(final),
    confidence=confidence,
  )


def claim(made: StepPlan, rounds: int) -> Ledger:
  """The ledger of a plan's gradients, without what is released before training."""
  return made.charge(Ledger(made.unit, made.delta), rounds)
