"""The rounds of a run, one after the other, and what happens between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from primia_jax import evaluation, federated, secagg
from primia_jax.types import Key


class Round(NamedTuple):
  """One round that has ended.

  Attributes:
    number: from 1.
    ids: the sites that took part.
    state: after the round.
    info: see `federated.Info`; None where the round was aborted.
    scores: on validation images; None without validation, or where the round was aborted.
    seconds: what the round and its validation took.
    aborted: why; empty where it was not.
  """

  number: int
  ids: np.ndarray
  state: federated.State
  info: federated.Info | None
  scores: evaluation.Scores | None
  seconds: float
  aborted: str = ""


def rounds(
  step: Callable[[Key, federated.State, federated.Sites], tuple[federated.State, federated.Info]],
  validate: Callable[[Key, federated.State], evaluation.Scores] | None,
  key: Key,
  state: federated.State,
  everybody: federated.Sites,
  num_rounds: int,
  num_sampled: int,
  before: Callable[[list[int]], bool] = lambda ids: True,
  secagg_max_abs: float = float("inf"),
) -> Iterator[Round]:
  """Runs rounds until there have been `num_rounds`, and yields each as it ends.

  A round begins when the caller asks for it, so that the caller can save the last one first.

  Args:
    step: of `federated.federate`.
    validate: scores a state; None where no validation images are used.
    key: of the run.
    state: to continue from.
    everybody: all sites that may be drawn for a round.
    num_rounds: rounds in all, those before `state` included.
    num_sampled: sites in a round.
    before: called with a round's sites before anything of it is released, e.g. to charge a ledger;
      False ends the run.
    secagg_max_abs: the setting, for the error message.

  Raises:
    RuntimeError: a site's update did not fit the encoding of secure aggregation, or training
      diverged.
  """
  for index in range(int(state.round), num_rounds):
    ids = everybody.ids[federated.sample_sites(key, index, len(everybody.ids), num_sampled)]
    if not before(ids.tolist()):
      return
    started = time.perf_counter()
    took = lambda started=started: time.perf_counter() - started
    try:
      state, info = step(key, state, everybody._replace(ids=ids))
    except secagg.RoundAborted as error:
      state = state._replace(round=state.round + 1)
      yield Round(index + 1, ids, state, None, None, took(), str(error))
      continue
    if int(info.out_of_range):
      raise RuntimeError(
        f"round {index + 1}: at {int(info.out_of_range)} of {len(ids)} sites the update held a "
        f"number beyond secagg_max_abs={secagg_max_abs} or not finite. The round was not applied. "
        "If training diverges, lower --learning_rate; else raise --secagg_max_abs. Start again "
        "with another --run_dir, since a run keeps its settings"
      )
    scores = None if validate is None else validate(key, state)
    yield Round(index + 1, ids, state, info, scores, took())
