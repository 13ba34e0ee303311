"""The rounds of a run, one after the other, and what happens between them."""

from __future__ import annotations

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
    scores: on validation images; None where the round was aborted.
    aborted: why; empty where it was not.
  """

  number: int
  ids: np.ndarray
  state: federated.State
  info: federated.Info | None
  scores: evaluation.Scores | None
  aborted: str = ""


def rounds(
  step: Callable[[Key, federated.State, federated.Sites], tuple[federated.State, federated.Info]],
  validate: Callable[[Key, federated.State], evaluation.Scores],
  key: Key,
  state: federated.State,
  everybody: federated.Sites,
  num_rounds: int,
  num_sampled: int,
  before: Callable[[list[int]], bool] = lambda ids: True,
) -> Iterator[Round]:
  """Plays rounds until there were `num_rounds`, and yields each as it ends.

  Args:
    step: of `federated.federate`.
    validate: scores a state.
    key: of the run.
    state: to go on from.
    everybody: all sites.
    num_rounds: rounds in all, those before `state` included.
    num_sampled: sites in a round.
    before: called with a round's sites before anything of it is released, e.g. to charge a ledger;
      False ends the run.

  Raises:
    RuntimeError: a site's update did not fit the encoding of secure aggregation, or training
      diverged.
  """
  num_sites = len(everybody.ids)
  for index in range(int(state.round), num_rounds):
    ids = federated.sample_sites(key, index, num_sites, num_sampled)
    if not before(ids.tolist()):
      return
    try:
      state, info = step(key, state, everybody._replace(ids=ids))
    except secagg.RoundAborted as error:
      state = state._replace(round=state.round + 1)
      yield Round(index + 1, ids, state, None, None, str(error))
      continue
    if int(info.out_of_range):
      raise RuntimeError(
        f"round {index + 1}: at {int(info.out_of_range)} of {len(ids)} sites the update held a "
        "number beyond secagg_max_abs or not finite. The round was not applied. If training "
        "diverges, lower --learning_rate; else raise --secagg_max_abs. Start again with another "
        "--run_dir, since a run keeps its settings"
      )
    yield Round(index + 1, ids, state, info, validate(key, state))
