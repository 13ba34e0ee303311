"""Federated algorithms, each a few lines over the contract of `federated`.

Notation: x global parameters, y_i a site's parameters after its steps, Delta_i = y_i - x, w_i = n_i
/ n_max the weight of a site with n_i examples (or 1), sums over the sites of a round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from primia_jax import local
from primia_jax.federated import ORDER, STEPS, Algorithm, Global, Message, Site
from primia_jax.types import Array, Metrics, ModelState, Params, PyTree

Weighting = Literal["examples", "uniform"]


def fedavg(
  recipe: local.Recipe,
  *,
  weighting: Weighting = "examples",
  keep_optimizer: bool = False,
  server_optimizer: optax.GradientTransformation | None = None,
  proximal: float = 0.0,
  stays: Callable[[str], bool] | None = None,
  name: str = "fedavg",
) -> Algorithm:
  """FedAvg (McMahan et al. 2017, algorithm 1): x <- x + sum w_i Delta_i / sum w_i.

  Args:
    recipe: how a site trains.
    weighting: by examples (by patients, for sites with units), or uniform.
    keep_optimizer: the site's optimiser keeps its state from round to round instead of starting
      anew.
    server_optimizer: the server applies it to the negative mean update as a gradient; None adds the
      mean update.
    proximal: see `fedprox`.
    stays: see `fedbn`.
    name: as reports print it.
  """
  if weighting not in ("examples", "uniform"):
    raise ValueError(f"weighting={weighting!r}; use 'examples' or 'uniform'")
  if proximal < 0:
    raise ValueError(f"proximal={proximal} must not be negative")

  def init_site(params: Params, model_state: ModelState) -> PyTree:
    optimizer = recipe.optimizer(jnp.float32(0)).init(params) if keep_optimizer else ()
    return {
      "optimizer": optimizer,
      "personal": _split(params, model_state, stays)[0],
      "noise": local.init_noise(recipe, params),
    }

  def personal(server: Global, site_state: PyTree) -> tuple[Params, ModelState]:
    return _join(site_state["personal"], (server.params, server.model_state))

  def site(server: Global, site_state: PyTree, site: Site) -> tuple[Message, PyTree]:
    start, statistics = personal(server, site_state)
    pull = lambda grads, params: jax.tree.map(
      lambda g, y, x: g + proximal * (y - x), grads, params, start
    )
    opt_state = site_state["optimizer"] if keep_optimizer else None
    correct, noise = pull if proximal else None, site_state["noise"]
    trained = _train(recipe, server, site, start, statistics, noise, correct, opt_state)
    weight = _weight(recipe, site, weighting)
    mine, shared = _split(trained.params, trained.model_state, stays)
    _, before = _split(start, statistics, stays)
    update = jax.tree.map(lambda y, x: weight * (y - x), shared, before)
    message = Message(update, weight, _scaled(recipe, trained.metrics))
    opt_state = trained.opt_state if keep_optimizer else ()
    return message, {"optimizer": opt_state, "personal": mine, "noise": trained.noise}

  def server(server: Global, total: Message) -> tuple[Params, ModelState, PyTree, Metrics]:
    mean = jax.tree.map(lambda t: t / total.weight, total.update)
    _, (params, model_state) = _split(server.params, server.model_state, stays)
    if server_optimizer is None:
      params, opt_state = jax.tree.map(jnp.add, params, mean[0]), ()
    else:
      gradient = jax.tree.map(jnp.negative, mean[0])
      updates, opt_state = server_optimizer.update(gradient, server.server_state, params)
      params = optax.apply_updates(params, updates)
    model_state = jax.tree.map(jnp.add, model_state, mean[1])
    everything = _join((params, model_state), (server.params, server.model_state))
    return *everything, opt_state, total.metrics

  def init_server(params: Params) -> PyTree:
    shared, _ = _split(params, {}, stays)[1]
    return () if server_optimizer is None else server_optimizer.init(shared)

  return Algorithm(
    name, init_server, init_site, site, server, personal, weighting == "uniform", stays is None
  )


def fedprox(recipe: local.Recipe, proximal: float, **kwargs) -> Algorithm:
  """FedProx (Li et al. 2020, eq. 2): FedAvg with proximal / 2 ||y - x||^2 added to every site's
  loss.
  """
  return fedavg(recipe, proximal=proximal, name="fedprox", **kwargs)


def fedopt(
  recipe: local.Recipe, server_optimizer: optax.GradientTransformation, **kwargs
) -> Algorithm:
  """FedOpt (Reddi et al. 2021, algorithm 2): the server's optimiser uses the negative mean update
  as a gradient.

  `optax.adam`, `yogi`, `adagrad` and `sgd(momentum=)` give FedAdam, FedYogi, FedAdagrad and
  FedAvgM. (The paper's FedAdam omits Adam's bias correction; optax applies it.)
  """
  return fedavg(recipe, server_optimizer=server_optimizer, name="fedopt", **kwargs)


def fedbn(recipe: local.Recipe, is_norm_parameter: Callable[[str], bool], **kwargs) -> Algorithm:
  """FedBN (Li et al. 2021): normalisation parameters and statistics never leave their site.

  Args:
    recipe: how a site trains.
    is_norm_parameter: parameter's path ("conv1/kernel") -> whether it stays at its site.
    **kwargs: as for `fedavg`.
  """
  return fedavg(recipe, stays=is_norm_parameter, name="fedbn", **kwargs)


def averaged(algorithm: Algorithm, decay: float) -> Algorithm:
  """The same algorithm, evaluated with an exponential average of the global parameters over rounds
  (De et al. 2022).

  Round t counts min(decay, (1 + t) / (10 + t)), as in TensorFlow's ExponentialMovingAverage. The
  server computes the average from sums that it has opened already, so it costs no privacy.

  Args:
    algorithm: one that keeps all parameters global.
    decay: in [0, 1).

  Raises:
    ValueError: for a decay outside [0, 1).
  """
  if not 0 <= decay < 1:
    raise ValueError(f"decay={decay} of the parameter average must lie in [0, 1)")
  return _averaged(algorithm, lambda t: jnp.minimum(decay, (1 + t) / (10 + t)))


def averaged_from(algorithm: Algorithm, first_round: int) -> Algorithm:
  """The same algorithm, evaluated with the plain mean of the global parameters after each round
  from one on (Polyak and Juditsky 1992); before it, with those of the round itself.

  The server computes the mean from sums that it has opened already, so it costs no privacy.

  Args:
    algorithm: one that keeps all parameters global.
    first_round: the first whose parameters count, from 0.

  Raises:
    ValueError: for a negative round.
  """
  if first_round < 0:
    raise ValueError(f"first_round={first_round} of the parameter average must not be negative")

  def keep(t: Array) -> Array:
    counted = jnp.maximum(t - first_round, 0)
    return counted / (counted + 1)

  return _averaged(algorithm, keep)


def _averaged(algorithm: Algorithm, keep_in: Callable[[Array], Array]) -> Algorithm:
  """The algorithm, evaluated with an average of which each round keeps a share."""
  inner = lambda server: server._replace(server_state=server.server_state["inner"])

  def init_server(params: Params) -> PyTree:
    return {"inner": algorithm.init_server(params), "average": params}

  def server(server: Global, total: Message) -> tuple[Params, ModelState, PyTree, Metrics]:
    params, model_state, state, metrics = algorithm.server(inner(server), total)
    keep = keep_in(server.round.astype(jnp.float32))
    average = jax.tree.map(
      lambda a, p: keep * a + (1 - keep) * p, server.server_state["average"], params
    )
    return params, model_state, {"inner": state, "average": average}, metrics

  return algorithm._replace(
    init_server=init_server,
    site=lambda server, site_state, site: algorithm.site(inner(server), site_state, site),
    server=server,
    personal=lambda server, site_state: (server.server_state["average"], server.model_state),
    tells=lambda state: algorithm.tells(state["inner"]),
  )


def scaffold(recipe: local.Recipe, num_sites: int, *, server_rate: float = 1.0) -> Algorithm:
  """SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II): control variates against drift
  between sites.

  Sites step along g - c_i + c. The new c_i is c_i - c + (x - y_i) / (sum of the steps' rates); the
  server adds sum (change of c_i) / num_sites to c. Sound for plain SGD only. Sites count uniformly.

  Args:
    recipe: how a site trains; its optimiser must be `optax.sgd` without momentum.
    num_sites: S, all sites, sampled or not.
    server_rate: the server's learning rate.

  Raises:
    ValueError: from `init`, for an optimiser that has a state (momentum, Adam).
  """

  def zeros(params: Params) -> PyTree:
    if _has_state(recipe, params):
      raise ValueError(
        "SCAFFOLD corrects plain gradient steps only; use optax.sgd without momentum"
      )
    return jax.tree.map(jnp.zeros_like, params)

  def init_site(params: Params, model_state: ModelState) -> PyTree:
    return {"control": zeros(params), "noise": local.init_noise(recipe, params)}

  def site(server: Global, site_state: PyTree, site: Site) -> tuple[Message, PyTree]:
    own = site_state["control"]
    correct = lambda grads, params: jax.tree.map(
      lambda g, own, c: g - own + c, grads, own, server.server_state
    )
    model, noise = (server.params, server.model_state), site_state["noise"]
    trained = _train(recipe, server, site, *model, noise, correct)
    update, statistics = _change(trained, server)
    of_control = lambda c, u: -c - u / trained.rate_sum
    change = jax.tree.map(of_control, server.server_state, update)
    metrics = _scaled(recipe, trained.metrics)
    message = Message((update, statistics), jnp.float32(1), metrics, change)
    return message, {"control": jax.tree.map(jnp.add, own, change), "noise": trained.noise}

  def server(server: Global, total: Message) -> tuple[Params, ModelState, PyTree, Metrics]:
    update, statistics = jax.tree.map(lambda t: t / total.weight, total.update)
    params = jax.tree.map(lambda x, u: x + server_rate * u, server.params, update)
    model_state = jax.tree.map(jnp.add, server.model_state, statistics)
    control = jax.tree.map(lambda c, t: c + t / num_sites, server.server_state, total.more)
    return params, model_state, control, total.metrics

  # Not uniform: the control variates enter as a sum over the round's sites, which a rule's one
  # message is not.
  return Algorithm(
    "scaffold", zeros, init_site, site, server, _global, uniform=False, shares_statistics=True
  )


def fednova(
  recipe: local.Recipe, *, momentum: float = 0.0, weighting: Weighting = "examples"
) -> Algorithm:
  """FedNova (Wang et al. 2020, eq. 6): averages directions per step, so that sites with more steps
  do not pull more.

  x <- x + tau_eff sum p_i Delta_i / a_i with p_i = w_i / sum w, tau_eff = sum p_i a_i, and a_i the
  accumulated weight of a site's gradients: its number of steps tau, or with momentum rho (tau - rho
  (1 - rho^tau) / (1 - rho)) / (1 - rho).

  Args:
    recipe: how a site trains; its optimiser must be `optax.sgd` with this momentum, its state
      starting anew each round.
    momentum: rho.
    weighting: by examples, or uniform.

  Raises:
    ValueError: for a momentum outside [0, 1), or, from `init`, for an optimiser that does not go
      with it.
  """
  if not 0 <= momentum < 1:
    raise ValueError(f"momentum={momentum} must lie in [0, 1)")
  most = float(_accumulated(jnp.float32(recipe.steps.max_steps), momentum))

  def site(server: Global, site_state: PyTree, site: Site) -> tuple[Message, PyTree]:
    trained = _train(recipe, server, site, server.params, server.model_state, site_state)
    update, statistics = _change(trained, server)
    weight = _weight(recipe, site, weighting)
    steps = _accumulated(trained.num_steps.astype(jnp.float32), momentum)
    direction = jax.tree.map(lambda u: weight * u / steps, update)
    sums = direction, jax.tree.map(lambda u: weight * u, statistics)
    more = weight * steps / most  # at most 1, whatever the number of steps
    message = Message(sums, weight, _scaled(recipe, trained.metrics), more)
    return message, trained.noise

  def server(server: Global, total: Message) -> tuple[Params, ModelState, PyTree, Metrics]:
    steps, (direction, statistics) = most * total.more / total.weight, total.update
    move = lambda x, d: x + steps * d / total.weight
    params = jax.tree.map(move, server.params, direction)
    add_mean = lambda x, u: x + u / total.weight
    model_state = jax.tree.map(add_mean, server.model_state, statistics)
    return params, model_state, (), total.metrics

  def nothing(params: Params) -> PyTree:
    if _has_state(recipe, params) != (momentum > 0):
      raise ValueError(
        f"FedNova was told momentum={momentum}; the sites' optimiser must be optax.sgd with just "
        f"that"
      )
    return ()

  init_site = lambda params, model_state: local.init_noise(recipe, params)
  return Algorithm(
    "fednova", nothing, init_site, site, server, _global, uniform=False, shares_statistics=True
  )


def _has_state(recipe: local.Recipe, params: Params) -> bool:
  return bool(jax.tree.leaves(jax.eval_shape(recipe.optimizer(jnp.float32(0)).init, params)))


def _accumulated(steps: Array, momentum: float) -> Array:
  return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def _global(server: Global, site_state: PyTree) -> tuple[Params, ModelState]:
  return server.params, server.model_state


def _train(recipe, server, site, params, model_state, noise, correct=None, opt_state=None):
  if opt_state is None:
    opt_state = recipe.optimizer(jnp.float32(0)).init(params)
  fold = jax.random.fold_in
  order_key = fold(fold(server.key, ORDER), site.id)
  key = fold(fold(fold(server.key, STEPS), server.round), site.id)
  now = local.Round(server.round, order_key, key, server.class_weights)
  return local.train(recipe, correct)(params, model_state, opt_state, noise, site, now)


def _change(trained: local.Trained, server: Global) -> tuple[Params, ModelState]:
  after, before = (trained.params, trained.model_state), (server.params, server.model_state)
  return jax.tree.map(jnp.subtract, after, before)


def _weight(recipe: local.Recipe, site: Site, weighting: Weighting) -> Array:
  if weighting == "uniform":
    return jnp.float32(1)
  # Of patients, where they are the unit: how many images a patient has is not public.
  return local.num_units(site).astype(jnp.float32) / recipe.steps.max_examples


def _scaled(recipe: local.Recipe, metrics: Metrics) -> Metrics:
  """Sums over a round, divided by the most examples of any round, so that they fit any message."""
  return jax.tree.map(lambda m: m / (recipe.steps.max_steps * recipe.steps.batch_size), metrics)


def _split(
  params: Params, model_state: ModelState, stays: Callable[[str], bool] | None
) -> tuple[PyTree, PyTree]:
  """Splits (params, model_state) into what stays at the site and what is shared; absent leaves
  are None.
  """
  if stays is None:
    return (), (params, model_state)
  is_mine = lambda path: stays(jax.tree_util.keystr(path, simple=True, separator="/"))
  mine = jax.tree_util.tree_map_with_path(lambda path, a: a if is_mine(path) else None, params)
  shared = jax.tree_util.tree_map_with_path(lambda path, a: None if is_mine(path) else a, params)
  return (mine, model_state), (shared, jax.tree.map(lambda a: None, model_state))


def _join(part: PyTree, whole: PyTree) -> PyTree:
  """Returns `whole`, with leaves from `part` where it has them."""
  if part == ():
    return whole
  return jax.tree.map(lambda a, b: b if a is None else a, part, whole, is_leaf=lambda a: a is None)
