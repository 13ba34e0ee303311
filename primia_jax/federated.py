"""Federated rounds: what a site sends, how messages are summed, what the server computes.

An `Algorithm` says what one site computes and what the server does with the sum of the sites'
messages; a `Summation` says how that sum is formed; a `Placement` says where the sites run.
`federate` joins the three. Only messages leave a site; they include training loss and counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax import prng
from primia_jax.sites import Placement
from primia_jax.summation import Outcome, Purpose, Session, Summation
from primia_jax.types import Array, Key, Metrics, ModelState, Params, PyTree, Site

# Uses of a run's key, folded in first: no two draw from the same stream.
ORDER, STEPS, SAMPLING = 0, 1, 3


def fresh_secrets(round: int, purpose: Purpose, ids: np.ndarray) -> np.ndarray:
  """A secret for each site from the operating system, never the same twice: [K, 8] uint32."""
  return prng.random_keys(len(ids))


class Sites(NamedTuple):
  """The sites of a round, and what it needs of them.

  Attributes:
    ids: [K] int32, their numbers.
    load: site numbers -> Site, stacked, as host or device arrays. On several processes it is asked
      for the sites of its own process only; for none, in a round without them: arrays of no rows.
    class_weights: [L] float32, the weight of an example of each class; None for 1.
    sites_per_load: the most sites that are loaded at a time; None for all at once.
    secrets: (round, purpose, site numbers) -> [K, 8] uint32, the secrets of the sites' noise and
      batches in this sum. Anything but `fresh_secrets` repeats noise and is not private; it is for
      tests and for runs that say so.
  """

  ids: np.ndarray
  load: Callable[[np.ndarray], Site]
  class_weights: Array | None = None
  sites_per_load: int | None = None
  secrets: Callable[[int, Purpose, np.ndarray], np.ndarray] = fresh_secrets


def in_memory(stacked: Site, class_weights: Array | None = None) -> Sites:
  """All sites of a stacked `Site`, whose data stay in memory.

  Args:
    stacked: [K, ...] host arrays.
    class_weights: see `Sites`.
  """
  rows = {int(i): row for row, i in enumerate(stacked.id)}

  def load(ids: np.ndarray) -> Site:
    if np.array_equal(ids, stacked.id):
      return stacked
    chosen = np.array([rows[int(i)] for i in ids], np.int32)
    return jax.tree.map(lambda a: a[chosen], stacked)

  return Sites(np.asarray(stacked.id, np.int32), load, class_weights)


class Global(NamedTuple):
  """What the server sends to every site of a round."""

  params: Params
  model_state: ModelState
  server_state: PyTree  # the algorithm's own, e.g. SCAFFOLD's control variate
  round: Array  # int32, from 0
  key: Key  # public randomness of the whole run
  class_weights: Array | None = None  # [L], the weight of an example of each class


class Message(NamedTuple):
  """What one site sends in a training round, or the sum over sites of it; float32 throughout.

  Attributes:
    update: the site's change of the model, weighted; what robust rules and noise treat.
    weight: scalar, the sum of the weights in `update`.
    metrics: `Metrics` up to a factor common to all sites.
    more: what else an algorithm sends.
  """

  update: PyTree
  weight: Array
  metrics: Metrics
  more: PyTree = ()


class Algorithm(NamedTuple):
  """A federated algorithm.

  Attributes:
    name: as a user writes it.
    init_server: params -> the server's own state.
    init_site: (params, model_state) -> one site's initial state.
    site: (Global, site state, Site) -> (Message, site state). The state stays at the site.
    server: (Global, sum of messages) -> (params, model_state, server state, training metrics up to
      a common factor).
    personal: (Global, site state) -> the (params, model_state) that this site uses.
    uniform: every message counts the same and only their mean matters, as robust rules need.
    shares_statistics: model_state (BatchNorm statistics) is part of the message.
    tells: server state -> named scalars of the coming round, for logs.
  """

  name: str
  init_server: Callable[[Params], PyTree]
  init_site: Callable[[Params, ModelState], PyTree]
  site: Callable[[Global, PyTree, Site], tuple[Message, PyTree]]
  server: Callable[[Global, Message], tuple[Params, ModelState, PyTree, Metrics]]
  personal: Callable[[Global, PyTree], tuple[Params, ModelState]]
  uniform: bool
  shares_statistics: bool
  tells: Callable[[PyTree], dict[str, Array]] = lambda server_state: {}


class State(NamedTuple):
  """The state of a federated run.

  Attributes:
    params, model_state: the global model.
    server_state: the algorithm's own.
    site_state: [S, ...], each site's own; under `sites.own_process` that of one site, [1, ...].
    round: int32, rounds begun. A refused round counts too, so that another attempt draws other
      batches.
  """

  params: Params
  model_state: ModelState
  server_state: PyTree
  site_state: PyTree
  round: Array


class Info(NamedTuple):
  """What a round reports, all of it computed from the opened sum.

  Attributes:
    loss, accuracy: means over the round's training examples, as the sites saw them while training;
      NaN where sites do not send them, as private ones do not. Under a robust rule, what the rule
      makes of the sites' sums.
    update_norm: L2 norm of the change of the global parameters.
    out_of_range: sites whose message did not fit the encoding; the round is applied only if 0.
    survivors: numbers of the sites whose message is in the sum.
    tells: see `Algorithm.tells`, of this round.
  """

  loss: Array
  accuracy: Array
  update_norm: Array
  out_of_range: Array
  survivors: np.ndarray
  tells: dict[str, Array]


class FederatedAlgorithm(NamedTuple):
  """A federated algorithm bound to a summation and a placement.

  Attributes:
    init: (params, model_state={}) -> State.
    step: (key, State, Sites) -> (State, Info). A lost site adds nothing to the sum and keeps its
      state. It raises `secagg.RoundAborted` if too many are lost; continue with the State's round
      advanced by one.
  """

  init: Callable[..., State]
  step: Callable[[Key, State, Sites], tuple[State, Info]]


def over_sites(
  site_fn: Callable[[Any, PyTree, Site], tuple[PyTree, PyTree]],
  summation: Summation,
  placement: Placement,
  purpose: Purpose,
) -> Callable[..., tuple[PyTree, PyTree, Outcome]]:
  """Runs a function at each site and opens the sum of the messages: the only way out of a site.

  Args:
    site_fn: (shared, site_state, Site) -> (message, site_state). The Site's
      secret is fresh for this sum.
    summation: how the sum is formed.
    placement: where the site axis runs.
    purpose: of the sum.

  Returns:
    (shared, round, Sites, site_state [K, ...] = ()) -> (sum of messages, site_state [K, ...] of the
    sites that run here, Outcome). Where each site has a process, one whose site is not among them
    is told the sum. It raises a ValueError under jit, vmap or grad, where keys would serve twice,
    and for sites that the summation, the placement or the loader cannot serve; and the summation's
    own errors.
  """

  def one(shared: Any, inputs: PyTree) -> tuple[PyTree, PyTree]:
    site, row, site_state = inputs
    message, site_state = site_fn(shared, site_state, site)
    sent = summation.send(message, row)
    return ((), (sent, site_state)) if summation.stacks else (sent, site_state)

  def shapes_of(shared: Any, site_state: PyTree, site: Site) -> PyTree:
    of_one = lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
    inputs = jax.tree.map(of_one, (site_state, site))
    return jax.eval_shape(site_fn, shared, *inputs)[0]

  run = placement.sum_over_sites(one)
  add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))

  def apply(shared: Any, round: Array | int, sites: Sites, site_state: PyTree = ()):
    _refuse_traced((shared, site_state, jnp.zeros(())))
    ids = np.asarray(sites.ids, np.int32)
    here = placement.rows(ids)
    if placement.is_own_process != summation.between_processes:
      raise ValueError(
        f"{summation.name!r} does not sum over the placement {placement.name!r}: summation.over "
        "and sites.own_process go together"
      )
    if summation.between_processes and not len(here):  # it is a sum of other processes
      like = _load(sites, ids[here], np.zeros((0, 8), np.uint32))
      form = lambda: shapes_of(shared, site_state, like)
      total, outcome = summation.end(summation.begin(int(round), purpose, ids, form), None)
      return total, site_state, outcome
    per_load = len(here) if sites.sites_per_load is None else sites.sites_per_load
    if per_load < 1:
      raise ValueError(f"sites_per_load={per_load}; give at least 1, or None for all at once")
    some = per_load < len(here) or not np.array_equal(ids, np.arange(len(ids)))
    if some and len(here) < len(ids) and not summation.between_processes:
      raise ValueError(
        f"with several processes each runs its own sites, and all take part at once, not "
        f"{ids.tolist()}"
      )
    whole, secrets = per_load >= len(here), sites.secrets(int(round), purpose, ids[here])
    cut = lambda tree, part: tree if whole else jax.tree.map(lambda a: a[part], tree)
    session: Session | None = None
    total, outs = None, []
    for start in range(0, len(here), per_load):
      part = slice(start, start + per_load)
      site = placement.put(_load(sites, ids[here][part], secrets[part]))
      had = cut(site_state, part)
      if session is None:  # once the first sites are loaded, since messages are shaped by them
        shapes = lambda site=site, had=had: shapes_of(shared, had, site)
        session = summation.begin(int(round), purpose, ids, shapes)
        rows = session.rows(here)
      summed, out = run(shared, (site, placement.put(cut(rows, part)), had))
      _refuse_traced((summed, out))  # where the site function closes over a traced value
      total = summed if total is None else add(total, summed)
      outs.append(out)
    out = outs[0] if len(outs) == 1 else jax.tree.map(lambda *o: jnp.concatenate(o), *outs)
    stack, site_state = out if summation.stacks else ((), out)
    assert session is not None  # there is at least one site here
    message, outcome = summation.end(session, stack if summation.stacks else total)
    return message, site_state, outcome

  return apply


def _refuse_traced(tree: PyTree) -> None:
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
    raise ValueError(
      "a sum inside jit, vmap or grad would use its masks and noise again whenever the compiled "
      "function runs; call it outside of them (its site functions are compiled by themselves)"
    )


def _load(sites: Sites, ids: np.ndarray, secrets: Any) -> Site:
  loaded = sites.load(ids)
  if isinstance(loaded.id, np.ndarray) and not np.array_equal(loaded.id, ids):
    raise ValueError(
      f"the loader was asked for sites {ids.tolist()} and returned sites {loaded.id.tolist()}"
    )
  if loaded.secret is not None:
    raise ValueError(
      "the loader returned a secret; leave Site.secret None, since each sum draws one"
    )
  return loaded._replace(secret=secrets)


def federate(
  algorithm: Algorithm, summation: Summation, placement: Placement, num_sites: int
) -> FederatedAlgorithm:
  """Joins an algorithm, a summation and a placement, and refuses unsound combinations.

  Who learns what: with `summation.masked` and `over`, the server learns the sum of the messages and
  what it computes from it; with `clear` or a robust rule it sees each site's message.

  Args:
    algorithm, summation, placement: what is joined.
    num_sites: S, all sites, whether or not a round takes all of them.

  Raises:
    ValueError: for a robust rule with messages that do not count the same; from `init` and `step`,
      for model statistics that would leave a site in the clear.
  """
  if summation.is_rule and not algorithm.uniform:
    raise ValueError(
      f"the robust rule {summation.name!r} treats all sites alike, but {algorithm.name} weighs its "
      "messages; use uniform weighting and an algorithm such as FedAvg"
    )
  train = over_sites(algorithm.site, summation, placement, Purpose.TRAINING)
  everyone = np.arange(num_sites)

  def check_statistics(model_state: ModelState) -> None:
    if jax.tree.leaves(model_state) and algorithm.shares_statistics and not summation.hides:
      raise ValueError(
        f"the model's statistics (BatchNorm) would leave each site in the clear under "
        f"{summation.name!r}; use secure aggregation, GroupNorm, or FedBN, which keeps them at the "
        "site"
      )

  def init(params: Params, model_state: ModelState | None = None) -> State:
    model_state = {} if model_state is None else model_state
    check_statistics(model_state)
    one, here = algorithm.init_site(params, model_state), len(placement.rows(everyone))
    site_state = jax.tree.map(lambda a: np.broadcast_to(np.asarray(a), (here, *np.shape(a))), one)
    start = (params, model_state, algorithm.init_server(params), jnp.zeros((), jnp.int32))
    params, model_state, server_state, zero = placement.replicate(start)
    return State(params, model_state, server_state, placement.put(site_state), zero)

  @jax.jit
  def serve(key, state: State, message, out_of_range):
    """The server's part. Nothing of a site is in it, so that it is one program at all sites."""
    before = Global(state.params, state.model_state, state.server_state, state.round, key)
    params, model_state, server_state, metrics = algorithm.server(before, message)
    after = State(params, model_state, server_state, (), state.round + 1)
    usable = out_of_range == 0
    after = jax.tree.map(lambda new, old: jnp.where(usable, new, old), after, state)
    after = after._replace(round=state.round + 1)
    change = jax.tree.map(jnp.subtract, after.params, state.params)
    count = jnp.where(metrics.num_examples > 0, metrics.num_examples, jnp.nan)
    told = algorithm.tells(state.server_state)
    return after, (metrics.loss / count, metrics.correct / count, optax.tree.norm(change), told)

  @jax.jit
  def keep(held, had, site_state, rows, counted, out_of_range):
    """What the sites keep of a round; `held` is that of all sites here, and `rows` say which."""
    counts = counted & (out_of_range == 0)
    stays = lambda new, old: jnp.where(counts.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    site_state = jax.tree.map(stays, site_state, had)
    if rows is None:
      return site_state
    return jax.tree.map(lambda old, new: old.at[rows].set(new), held, site_state)

  def rows_of(ids: np.ndarray) -> np.ndarray | None:
    """The rows of these sites among those that are kept here; None for all of them."""
    if placement.is_own_process:
      return None if len(placement.rows(ids)) else np.zeros(0, np.int32)
    return None if np.array_equal(ids, everyone) else ids

  def step(key: Key, state: State, sites: Sites) -> tuple[State, Info]:
    check_statistics(state.model_state)
    ids = np.asarray(sites.ids, np.int32)
    if len(ids) and (np.max(ids) >= num_sites or np.min(ids) < 0):
      raise ValueError(f"site numbers {ids.tolist()}; the run has sites 0 to {num_sites - 1}")
    rows, had = rows_of(ids), state.site_state
    if rows is not None:
      had = jax.tree.map(lambda a: a[rows], had)
    key = placement.replicate(key)
    weights = None if sites.class_weights is None else placement.replicate(sites.class_weights)
    shared = Global(state.params, state.model_state, state.server_state, state.round, key, weights)
    message, site_state, outcome = train(shared, int(state.round), sites._replace(ids=ids), had)
    counted = placement.put(np.isin(ids[placement.rows(ids)], outcome.survivors))
    kept = state.site_state
    if rows is None or len(rows):
      kept = keep(kept, had, site_state, rows, counted, outcome.out_of_range)
    bare = state._replace(site_state=())
    bare, (loss, accuracy, norm, told) = serve(key, bare, message, outcome.out_of_range)
    state = bare._replace(site_state=kept)
    return state, Info(loss, accuracy, norm, outcome.out_of_range, outcome.survivors, told)

  return FederatedAlgorithm(init, step)


def sample_sites(key: Key, round_index: int, num_sites: int, num_sampled: int) -> np.ndarray:
  """Draws the sites of a round without replacement; every party draws the same.

  Returns:
    [num_sampled] int32, sorted.

  Raises:
    ValueError: for more sites than there are, or fewer than one.
  """
  if not 1 <= num_sampled <= num_sites:
    raise ValueError(
      f"num_sampled={num_sampled} of num_sites={num_sites} sites; give a number from 1 to "
      f"{num_sites}"
    )
  if num_sampled == num_sites:
    return np.arange(num_sites, dtype=np.int32)
  round_key = jax.random.fold_in(jax.random.fold_in(key, SAMPLING), round_index)
  drawn = jax.random.permutation(round_key, num_sites)[:num_sampled]
  return np.sort(np.asarray(drawn, np.int32))
