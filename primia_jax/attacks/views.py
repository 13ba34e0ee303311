"""Threat points as data: what each adversary saw of a round, from a transcript of it.

A simulation records single messages that its secure aggregation would have hidden; each function
here keeps what one adversary really has, and drops the rest. With differential privacy at the sites
the same functions apply: what is recorded was noised before it was sent.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from primia_jax.federated import Message
from primia_jax.types import Array, ModelState, Params


class Model(NamedTuple):
  """A global model, as all sites and the server know it."""

  params: Params
  model_state: ModelState


class Round(NamedTuple):
  """What crossed in one round of training; host arrays.

  Attributes:
    number: of the round, from 1.
    ids: [K] int32, numbers of the sites whose message was in the sum.
    before, after: the global model.
    messages: [K, ...], each site's message before it was masked.
    total: the opened sum.
    class_weights: [L] float32, known to all; None for 1.
  """

  number: int
  ids: np.ndarray
  before: Model
  after: Model
  messages: Message
  total: Message
  class_weights: Array | None = None


class View(NamedTuple):
  """What an adversary has of a round: the model that sites started from, and changes of it.

  Attributes:
    threat: who attacks and what it sees, as `evidence.Evidence` says it.
    number: of the round.
    before: the global model.
    updates: [V, ...] changes of the parameters, each the weighted mean over some sites (FedNova:
      per step, as its messages are).
    weights: [V] float32, the sum of these sites' weights.
    sites: for each, the numbers of the sites that are in it.
  """

  threat: str
  number: int
  before: Model
  updates: Params
  weights: np.ndarray
  sites: tuple[tuple[int, ...], ...]


class ThreatPoint(NamedTuple):
  """An adversary: its name, who it is, what it sees, and what it is assumed to do or to know."""

  name: str
  who: str
  sees: str
  assumed: str


EACH, SUM, PEER, MALICIOUS, PUBLIC = "server_each", "server_sum", "peer", "malicious", "public"
THREATS = (
  ThreatPoint(
    EACH, "honest server without secure aggregation", "each site's update, by site",
    "it follows the protocol, and knows the architecture and all hyperparameters",
  ),
  ThreatPoint(
    SUM, "honest server with secure aggregation", "the sum over a round's sites only",
    "the same; masks hide single updates",
  ),
  ThreatPoint(
    PEER, "one other site", "the global model before and after each round, less its own update",
    "it knows the sum of the weights, which is public where sites are processes, and follows from "
    "the public sizes where there are two; of two sites, what is left is the other's update",
  ),
  ThreatPoint(
    MALICIOUS, "malicious server", "what it sees as a server, of parameters and modules that it "
    "chose", "sites train what they are sent, unless they look at it first",
  ),
  ThreatPoint(PUBLIC, "anyone who gets the model", "the final model only", "nothing of any round"),
)  # fmt: skip


def server_each(one: Round) -> View:
  """What a server sees without secure aggregation: each site's update, [K, ...]."""
  weights = np.asarray(one.messages.weight, np.float32)
  updates = jax.tree.map(lambda u: _over(u, weights), one.messages.update[0])
  threat = "honest server, each site's update"
  sites = tuple((i,) for i in one.ids.tolist())
  return View(threat, one.number, one.before, updates, weights, sites)


def server_sum(one: Round) -> View:
  """What a server sees with secure aggregation: the mean over the sites, [1, ...]."""
  weights = np.asarray(one.total.weight, np.float32).reshape(1)
  updates = jax.tree.map(lambda u: _over(np.asarray(u)[None], weights), one.total.update[0])
  threat = f"honest server, the sum of {len(one.ids)} sites"
  return View(threat, one.number, one.before, updates, weights, (tuple(one.ids.tolist()),))


def peer(one: Round, site: int) -> View:
  """What one of the sites learns of the others: the change of the model, its own update taken off.

  Of two sites this is the other's update up to rounding: of float32 numbers as large as the
  parameters, and of the sum's fixed point, both divided by the other's share of the weight.

  Args:
    one: a round of an algorithm whose server adds the mean update (FedAvg, FedProx, SCAFFOLD).
    site: its number.

  Returns:
    The weighted mean over all other sites, [1, ...].

  Raises:
    ValueError: the site was not in the round, was alone in it, or the server did something else
      with the mean.
  """
  if site not in one.ids or len(one.ids) < 2:
    raise ValueError(f"site={site} has no peers in round {one.number} of sites {one.ids.tolist()}")
  row = int(np.flatnonzero(one.ids == site)[0])
  total, own = (np.float32(w) for w in (one.total.weight, one.messages.weight[row]))

  def others(old: Array, new: Array, mine: Array, summed: Array) -> np.ndarray:
    change = np.asarray(new, np.float32) - np.asarray(old, np.float32)
    mean = np.asarray(summed) / total
    room = 1e-3 * np.abs(mean).max(initial=0) + 1e-5 * np.abs(old).max(initial=0)
    if np.abs(change - mean).max(initial=0) > room:
      raise ValueError(
        f"round {one.number}: the server did not add the mean update, so the change of the model "
        "is no peer's view; use a run of fedavg, fedprox or scaffold"
      )
    return ((change * total - np.asarray(mine[row])) / (total - own))[None]

  models = one.before.params, one.after.params
  updates = jax.tree.map(others, *models, one.messages.update[0], one.total.update[0])
  rest = tuple(i for i in one.ids.tolist() if i != site)
  whose = f"site {rest[0]}'s update" if len(rest) == 1 else f"the sum of {len(rest)} other sites"
  weights = np.asarray([total - own], np.float32)
  return View(f"peer (site {site}), {whose}", one.number, one.before, updates, weights, (rest,))


def public(last: Round) -> Model:
  """What the recipient of the model has: the model after the last round."""
  return last.after


def _over(sums: Array | np.ndarray, weights: np.ndarray) -> np.ndarray:
  updates = np.asarray(sums, np.float32)
  return updates / weights.reshape(-1, *(1,) * (updates.ndim - 1))
