"""Federated rounds: what a site sends, how the messages are combined, and what the server makes of
their sum.

An `Algorithm` says what one site computes and what the server does with the sum of the sites'
messages; an `Aggregator` says how that sum is formed (in the clear, under masks, or by a robust
rule); `federated` joins the two over a placement of the site axis. A message is all that ever
leaves a site, training loss and counts included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax import prng, secagg, sites
from primia_jax.secagg import simulation
from primia_jax.secagg.exchange import Terms
from primia_jax.types import Array, Key, Metrics, ModelState, Params, PyTree, Site

TRAINING, EVALUATION, COUNTING = range(
  3
)  # purposes: masks of one round are never used for two of them
ORDER, STEPS, GRAPH, SAMPLING = range(
  4
)  # uses of a run's key, folded in first: no two draw from the same stream


class Global(NamedTuple):
  """What the server sends to every site of a round."""

  params: Params
  model_state: ModelState
  server: PyTree  # the algorithm's own, e.g. SCAFFOLD's control variate
  round: Array  # int32, from 0
  key: Key  # public randomness of the whole run
  class_weights: Array | None = None  # [L], the weight of an example of each class


class Algorithm(NamedTuple):
  """A federated algorithm.

  Attributes:
    name: as a user writes it.
    init_server: params -> the server's own state.
    init_site: (params, model_state) -> what one site keeps from round to round.
    site: (Global, what the site keeps, Site) -> (message, what the site keeps). A message is a
      pytree of float32 whose sum over sites `server` understands.
    server: (Global, sum of messages) -> (params, model_state, server state, training metrics up to
      a common factor).
    personal: (Global, what a site keeps) -> (params, model_state) with which that site works.
    uniform: every message counts the same and only their mean matters, as robust rules need.
    shares_statistics: model_state (BatchNorm statistics) is part of the message.
  """

  name: str
  init_server: Callable[[Params], PyTree]
  init_site: Callable[[Params, ModelState], PyTree]
  site: Callable[[Global, PyTree, Site], tuple[PyTree, PyTree]]
  server: Callable[[Global, PyTree], tuple[Params, ModelState, PyTree, Metrics]]
  personal: Callable[[Global, PyTree], tuple[Params, ModelState]]
  uniform: bool
  shares_statistics: bool


class Aggregator(NamedTuple):
  """How the messages of a round become their sum.

  Attributes:
    name: as reports print it.
    protect: (message, site id, links, (round, purpose)) -> what the site sends.
    encode: as `protect`, without the masks: what sites apart give to an exchange, which masks; None
      where there are no ring elements.
    num_bits: k of the ring in which `encode` is summed.
    open: sum of what was sent -> (sum of messages, number of sites whose message was out of range).
    unmask: (sum of what was sent, the masks that lost sites leave in it, (round, purpose)) -> what
      `open` takes.
    rule: None for the sum over sites, or a robust rule on the messages stacked, [K, ...] -> [...];
      they are then seen one by one, and the result stands for the sum over one site.
    num_sites: how many sites a round must have; None for any number.
    num_peers: how many peers `links` hold for each site.
    threshold: how many of a site and its peers must answer when sites are lost; None where none may
      be lost, or where there are no peers and a lost site is simply absent.
    min_survivors: how many sites' messages must come, e.g. for the noise that each brings; else a
      round is aborted.
    secure: only the sum is seen.
  """

  name: str
  protect: Callable[[PyTree, Array, secagg.Links, tuple[Array, int]], PyTree]
  open: Callable[[PyTree], tuple[PyTree, Array]]
  rule: Callable[[PyTree], PyTree] | None = None
  num_sites: int | None = None
  num_peers: int = 0
  secure: bool = False
  threshold: int | None = None
  min_survivors: int = 1
  unmask: Callable[[PyTree, secagg.Residue, tuple[Array, int]], PyTree] = lambda total, *_: total
  encode: Callable[[PyTree, Array, secagg.Links, tuple[Array, int]], PyTree] | None = None
  num_bits: int = 0


class Linked(NamedTuple):
  """What connects the K sites for one sum, and which of them will be in it.

  Attributes:
    links: [K, P], where the sites run.
    counted: [K] bool, where the sites run.
    survivors: the rows of the sites that are in the sum.
    residue: the masks that the lost ones leave in it.
    purpose: what the sum is for.
  """

  links: secagg.Links
  counted: Array
  survivors: np.ndarray
  residue: secagg.Residue
  purpose: int


class Loader(NamedTuple):
  """Where the sites' data come from.

  Attributes:
    load: site numbers [K] -> Site, stacked, as host or device arrays.
    piece: at most so many sites are loaded at a time; None for all at once.
  """

  load: Callable[[np.ndarray], Site]
  piece: int | None = None


class State(NamedTuple):
  """The state of a federated run: the global model, the server's and the sites' own ([S, ...]), and
  rounds begun.

  A refused round counts too: another attempt must not use its masks again, nor draw the same
  batches.
  """

  params: Params
  model_state: ModelState
  server: PyTree
  sites: PyTree
  round: Array


class Info(NamedTuple):
  """What a round reports, all of it computed from the opened sum.

  Attributes:
    loss, accuracy: means over the round's training examples, as the sites saw them while training.
    update_norm: L2 norm of the change of the global parameters.
    out_of_range: sites whose message did not fit the encoding; unless 0, the round was not applied.
    survivors: sites whose message is in the sum.
  """

  loss: Array
  accuracy: Array
  update_norm: Array
  out_of_range: Array
  survivors: Array


class FederatedAlgorithm(NamedTuple):
  """A federated algorithm bound to an aggregator and a placement.

  Attributes:
    init: (params, model_state, num_sites) -> State.
    step: (key, State, site numbers [K], Loader, dealer_key [8] uint32, class_weights=None,
      dropouts=None) -> (State, Info), with class_weights [L] and `secagg.Dropouts`. A lost site
      adds nothing to the sum and keeps what it had. It raises `secagg.RoundAborted` where too many
      are lost; go on with the State's round advanced by one.
  """

  init: Callable[[Params, ModelState, int], State]
  step: Callable[..., tuple[State, Info]]


def in_the_clear() -> Aggregator:
  """The plain sum. The server sees every site's message; a sum that is not finite counts as one
  site out of range.
  """

  def open_total(total: PyTree) -> tuple[PyTree, Array]:
    finite = jnp.stack([jnp.isfinite(t).all() for t in jax.tree.leaves(total)]).all()
    return total, jnp.logical_not(finite).astype(jnp.uint32)

  return Aggregator("in the clear", lambda message, *_: message, open_total)


def alone() -> Aggregator:
  """One site that trains by itself (local or pooled training): nothing leaves it."""
  return in_the_clear()._replace(name="one site", num_sites=1, secure=True)


def by_rule(name: str, rule: Callable[[PyTree], PyTree]) -> Aggregator:
  """A robust rule on single messages, which the server sees one by one; see `robust`."""
  return in_the_clear()._replace(name=name, rule=rule)


def securely(config: secagg.SecureSum) -> Aggregator:
  """Secure aggregation: the server sees the sum of the messages only; see `secagg`."""
  bare = dataclasses.replace(config, masked=False)
  return Aggregator(
    name="secure aggregation",
    protect=lambda message, site_id, links, nonce: secagg.protect(
      message, site_id, links, nonce, config
    ),
    open=lambda total: secagg.open_sum(total, config),
    num_sites=config.num_sites,
    num_peers=config.num_peers if config.masked else 0,
    secure=config.masked,
    threshold=config.threshold if config.masked else None,
    unmask=lambda total, residue, nonce: secagg.unmask(total, residue, nonce, config),
    encode=lambda message, site_id, links, nonce: secagg.protect(
      message, site_id, links, nonce, bare
    ),
    num_bits=config.fixed.num_bits,
  )


def total_over_sites(
  site_fn: Callable[[Any, PyTree, Site], tuple[PyTree, PyTree]],
  aggregator: Aggregator,
  placement: sites.Placement,
  purpose: int,
) -> Callable[..., tuple[PyTree, PyTree, Array]]:
  """Runs a function at each site and opens the sum of the messages: the one way out of a site.

  Args:
    site_fn: (shared, what the site keeps, Site) -> (message, what the site keeps).
    aggregator: how the sum is formed.
    placement: where the site axis runs.
    purpose: TRAINING, EVALUATION or COUNTING.

  Returns:
    (shared, round, site numbers [K], Linked, kept [K, ...], Loader) -> (sum of messages, kept [K,
    ...] of all sites, number of sites out of range). It raises a ValueError for site numbers that
    are not distinct, or that the aggregator, the placement or the loader cannot serve. Apart, it
    raises what the exchange does.

  Raises:
    ValueError: for sites apart and an aggregator whose sums are not of masked ring elements.
  """
  exchange = placement.exchange
  if exchange is not None and not (aggregator.secure and aggregator.encode):
    raise ValueError(
      f"sites apart send nothing but masked ring elements, not {aggregator.name}; use `securely`"
    )
  protect = aggregator.protect if exchange is None else aggregator.encode
  assert protect is not None

  def one(shared, site_inputs):
    (shared, round_index), (site, links, counted, kept) = shared, site_inputs
    message, kept = site_fn(shared, kept, site)
    sent = protect(message, site.id, links, (round_index, purpose))
    sent = jax.tree.map(lambda a: jnp.where(counted, a, jnp.zeros_like(a)), sent)
    return (sent, kept) if aggregator.rule is None else ((), (sent, kept))

  run = sites.sum_over_sites(one, placement)
  add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
  rows_of = jax.jit(lambda sent, rows: jax.tree.map(lambda a: a[rows], sent))

  @jax.jit
  def finish(total, sent, residue, round_index):
    total = total if aggregator.rule is None else aggregator.rule(sent)
    return aggregator.open(aggregator.unmask(total, residue, (round_index, purpose)))

  def apply(shared, round_index, ids, linked: Linked, kept, loader: Loader):
    _check_ids(aggregator, ids)
    if aggregator.threshold is not None and linked.purpose != purpose:
      raise ValueError(
        f"keys of purpose {linked.purpose} for a sum of purpose {purpose}: what peers reveal of "
        f"them for one sum would "
        f"open the other; use link(aggregator, placement, {purpose})"
      )
    piece = len(ids) if loader.piece is None else loader.piece
    if piece < 1:
      raise ValueError(f"piece={piece} sites at a time; give at least 1, or None for all at once")
    several = exchange is not None or (placement.how == "mesh" and jax.process_count() > 1)
    if several and (piece < len(ids) or not np.array_equal(ids, np.arange(len(ids)))):
      raise ValueError(
        f"with several processes each runs its own sites: all take part at once, not {list(ids)}"
      )
    total, outs = None, []
    for start in range(0, len(ids), piece):
      rows = slice(start, start + piece)
      mine, theirs = sites.local_rows(ids[rows], placement), (linked.links, linked.counted, kept)
      if piece < len(ids):
        theirs = jax.tree.map(lambda a, rows=rows: a[rows], theirs)
      loaded = loader.load(mine)
      if isinstance(loaded.id, np.ndarray) and not np.array_equal(loaded.id, mine):
        raise ValueError(
          f"the loader was asked for sites {list(mine)} and returned sites {list(loaded.id)}"
        )
      inputs = (shared, round_index), (sites.put(loaded, placement), *theirs)
      if exchange is None:
        summed, out = run(*inputs)
      else:  # joins the others before it works, so that they see at once when it ends in the middle
        begun = exchange.begin(
          jax.eval_shape(run, *inputs)[0], _terms(aggregator, int(round_index), purpose)
        )
        summed, out = run(*inputs)
        summed = exchange.finish(begun, summed)
      total = summed if total is None else add(total, summed)
      outs.append(out)
    out = outs[0] if len(outs) == 1 else jax.tree.map(lambda *rows: jnp.concatenate(rows), *outs)
    sent, kept = ((), out) if aggregator.rule is None else out
    if len(linked.survivors) < len(ids):
      sent = rows_of(sent, linked.survivors)
    message, out_of_range = finish(total, sent, linked.residue, round_index)
    return message, kept, out_of_range

  return apply


def _terms(aggregator: Aggregator, round_index: int, purpose: int) -> Terms:
  a = aggregator
  return Terms(round_index, purpose, a.num_bits, a.num_peers, a.threshold, a.min_survivors)


def _check_ids(aggregator: Aggregator, ids: np.ndarray) -> None:
  if aggregator.num_sites not in (None, len(ids)):
    raise ValueError(
      f"{aggregator.name} was set up for {aggregator.num_sites} sites, but {len(ids)} take part"
    )
  if not len(ids) or len(np.unique(ids)) != len(ids) or np.min(ids) < 0:
    raise ValueError(
      f"site numbers {list(ids)}; a round needs at least one, all different and none negative"
    )


def link(
  aggregator: Aggregator, placement: sites.Placement, purpose: int = TRAINING
) -> Callable[..., Linked]:
  """Makes what connects a round's sites: pair keys from the dealer or, with a threshold, agreed and
  shared anew.

  Returns:
    (key, round, site numbers [K], dealer_key, dropouts=None) -> Linked. It raises
    `secagg.RoundAborted` where too many sites are lost, and a ValueError where the aggregator can
    do without none. Apart, a site has no peers, since the exchange masks, and a secret of its own,
    fresh from the operating system.
  """

  @jax.jit
  def draw(key, round_index, ids):
    graph_key = jax.random.fold_in(jax.random.fold_in(key, GRAPH), round_index)
    return secagg.peers(graph_key, ids, aggregator.num_peers)

  @jax.jit
  def deal(key, round_index, ids, dealer_key):
    return secagg.deal_links(dealer_key, ids, draw(key, round_index, ids))

  nothing = secagg.Residue(jnp.zeros((0, 8), jnp.uint32), jnp.zeros(0, jnp.int32))

  def connect(key, round_index, ids, dealer_key, dropouts) -> tuple[secagg.Links, secagg.Residue]:
    if not aggregator.num_peers:
      return secagg.Links(
        jnp.zeros((len(ids), 0), jnp.int32), jnp.zeros((len(ids), 0, 8), jnp.uint32)
      ), nothing
    if aggregator.threshold is None:
      return deal(key, round_index, ids, dealer_key), nothing
    nonce, peers = (int(round_index), purpose), np.asarray(draw(key, round_index, ids))
    session = simulation.setup(jnp.asarray(dealer_key), nonce, ids, peers, aggregator.threshold)
    lost_before = simulation.check(dropouts, len(ids))[0]
    return simulation.links_without(session, lost_before), simulation.recover(session, dropouts)

  def apply(key, round_index, ids, dealer_key, dropouts: secagg.Dropouts | None = None):
    ids = np.asarray(ids, np.int32)
    _check_ids(aggregator, ids)
    stages = simulation.check(dropouts, len(ids))
    if placement.exchange is not None:
      if stages.any():
        raise ValueError(
          "dropouts are simulated where one process plays all sites; sites apart are lost in "
          "earnest"
        )
      alone = secagg.Links(
        jnp.zeros((1, 0), jnp.int32), jnp.zeros((1, 0, 8), jnp.uint32), prng.random_key()[None]
      )
      return Linked(alone, jnp.ones(1, bool), np.arange(len(ids)), nothing, purpose)
    if aggregator.num_peers and aggregator.threshold is None and stages.any():
      raise ValueError(
        f"{aggregator.name} without a threshold can lose no site; give secagg.secure_sum a "
        f"threshold"
      )
    counted = ~stages[:2].any(axis=0)
    if np.sum(counted) < aggregator.min_survivors:
      least = f"{np.sum(counted)} sites' messages came, and {aggregator.min_survivors} must"
      raise secagg.RoundAborted(f"round aborted: {least}")
    links, residue = connect(key, round_index, ids, dealer_key, dropouts)
    links, here = sites.put(sites.local_rows((links, counted), placement), placement)
    return Linked(
      links, here, np.flatnonzero(counted), sites.replicate(residue, placement), purpose
    )

  return apply


def federated(
  algorithm: Algorithm, aggregator: Aggregator, placement: sites.Placement
) -> FederatedAlgorithm:
  """Joins an algorithm, an aggregator and a placement, and refuses unsound pairs.

  Who learns what: with `securely`, the server learns the sum of the messages (and what it computes
  from it); with `in_the_clear` or a robust rule it sees each site's message.

  Raises:
    ValueError: for a robust rule with messages that do not count the same.
  """
  if aggregator.rule is not None and not algorithm.uniform:
    raise ValueError(
      f"the robust rule {aggregator.name!r} treats all sites alike, but {algorithm.name} weighs "
      f"its messages; "
      "use uniform weighting and an algorithm such as FedAvg"
    )
  train = total_over_sites(algorithm.site, aggregator, placement, TRAINING)
  make_links = link(aggregator, placement)

  def init(params: Params, model_state: ModelState, num_sites: int) -> State:
    if jax.tree.leaves(model_state) and algorithm.shares_statistics and not aggregator.secure:
      raise ValueError(
        f"the model's statistics (BatchNorm) would leave each site in the clear under "
        f"{aggregator.name!r}; "
        "use secure aggregation, GroupNorm, or FedBN, which keeps them at the site"
      )
    one = algorithm.init_site(params, model_state)
    rows = len(sites.local_rows(np.arange(num_sites), placement))
    kept = jax.tree.map(lambda a: np.broadcast_to(np.asarray(a), (rows, *np.shape(a))), one)
    start = (params, model_state, algorithm.init_server(params), jnp.zeros((), jnp.int32))
    params, model_state, server, zero = sites.replicate(start, placement)
    return State(params, model_state, server, sites.put(kept, placement), zero)

  @jax.jit
  def finish(
    key, state: State, message, had, kept, ids, counted, out_of_range
  ) -> tuple[State, Info]:
    before = Global(state.params, state.model_state, state.server, state.round, key)
    params, model_state, server, metrics = algorithm.server(before, message)
    stays = lambda new, old: jnp.where(counted.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
    kept = jax.tree.map(stays, kept, had)
    all_kept = (
      kept
      if ids is None
      else jax.tree.map(lambda old, new: old.at[ids].set(new), state.sites, kept)
    )
    after = State(params, model_state, server, all_kept, state.round + 1)
    usable = out_of_range == 0
    after = jax.tree.map(lambda new, old: jnp.where(usable, new, old), after, state)._replace(
      round=after.round
    )
    change = jax.tree.map(jnp.subtract, after.params, state.params)
    count = jnp.maximum(metrics.num_examples, jnp.finfo(jnp.float32).tiny)
    info = metrics.loss / count, metrics.correct / count, optax.tree.norm(change), out_of_range
    return after, Info(*info, jnp.sum(counted, dtype=jnp.int32))

  def step(
    key: Key, state: State, ids: np.ndarray, loader: Loader, dealer_key: Array, class_weights=None,
    dropouts: secagg.Dropouts | None = None,
  ):  # fmt: skip
    ids = np.asarray(ids, np.int32)
    leaves = (
      jax.tree.leaves(state.sites) if placement.exchange is None else []
    )  # apart, of this site alone
    if leaves and np.max(ids, initial=0) >= leaves[0].shape[0]:
      raise ValueError(f"site numbers {list(ids)}; the state holds {leaves[0].shape[0]} sites")
    everyone = not leaves or np.array_equal(ids, np.arange(leaves[0].shape[0]))
    had = state.sites if everyone else jax.tree.map(lambda a: a[ids], state.sites)
    shared_key = sites.replicate(key, placement)
    weights = None if class_weights is None else sites.replicate(class_weights, placement)
    shared = Global(state.params, state.model_state, state.server, state.round, shared_key, weights)
    linked = make_links(key, np.asarray(state.round), ids, dealer_key, dropouts)
    message, kept, out_of_range = train(shared, state.round, ids, linked, had, loader)
    rows = None if everyone else ids
    state, info = finish(shared_key, state, message, had, kept, rows, linked.counted, out_of_range)
    if placement.exchange is not None:
      info = info._replace(survivors=jnp.int32(len(placement.exchange.sites)))
    return state, info

  return FederatedAlgorithm(init, step)


def sample_sites(key: Key, round_index: int, num_sites: int, num_sampled: int) -> np.ndarray:
  """Draws the sites of a round without replacement; sorted int32 [num_sampled], the same for
  everybody.

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
