"""FedAvg, evaluated with an exponential average of the parameters over the sites' steps.

A site's average lies in the state of its optimiser. It follows the parameters after each step, and
changes none of them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from primia_jax import local
from primia_jax.algorithms import Weighting, fedavg
from primia_jax.federated import Algorithm, Global, Message, Site
from primia_jax.types import Array, Metrics, ModelState, Params, PyTree


class Averaged(NamedTuple):
  """The state of an optimiser that averages.

  Attributes:
    inner: the optimiser's own.
    average: of the parameters after each step.
    step: int32, the steps before this one, counted over all rounds.
  """

  inner: PyTree
  average: Params
  step: Array


def over_steps(optimizer: local.Optimizer, decay: float) -> local.Optimizer:
  """The optimiser, which also averages: a <- k a + (1 - k) y after the step that ends at y.

  Step t, from 0, keeps the share k = min(decay, (1 + t) / (10 + t)), as TensorFlow's
  ExponentialMovingAverage does, so that the parameters at the start are soon forgotten.

  Args:
    optimizer: learning rate -> optax's transformation.
    decay: in [0, 1).

  Returns:
    learning rate -> a transformation whose updates are those of the optimiser, and whose state is
    an `Averaged`. Its `update` must be given the parameters.

  Raises:
    ValueError: for a decay outside [0, 1).
  """
  if not 0 <= decay < 1:
    raise ValueError(f"decay={decay} of the average over steps must lie in [0, 1)")

  def build(rate: Array) -> optax.GradientTransformation:
    inner = optimizer(rate)

    def init(params: Params) -> Averaged:
      return Averaged(inner.init(params), params, jnp.int32(0))

    def update(grads: Params, state: Averaged, params: Params):
      updates, inner_state = inner.update(grads, state.inner, params)
      t = state.step.astype(jnp.float32)
      keep = jnp.minimum(jnp.float32(decay), (1 + t) / (10 + t))
      after = optax.apply_updates(params, updates)
      average = jax.tree.map(lambda a, y: keep * a + (1 - keep) * y, state.average, after)
      return updates, Averaged(inner_state, average, state.step + 1)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]

  return build


def averaged(
  recipe: local.Recipe,
  decay: float,
  *,
  weighting: Weighting = "examples",
  keep_optimizer: bool = False,
  proximal: float = 0.0,
) -> Algorithm:
  """FedAvg or FedProx, evaluated with the average over steps in place of the parameters.

  The server keeps the average a. Each site goes on with it over its own steps to a_i and sends w_i
  (a_i - a) besides its update, in the same sum: a <- a + sum w_i (a_i - a) / sum w_i. A message is
  twice as large. Where all sites take equally many steps, a is the average of the sites' mean
  parameters after each step. BatchNorm's statistics are not averaged. Training is not changed.

  Where steps are private at each site, this costs no privacy: a_i is made of parameters that the
  steps' noise protects already. Without, a sum of averages tells of the sites what one of updates
  does. Neither a rule nor a bound on updates covers what is sent besides them, so those refuse
  this algorithm.

  Args:
    recipe: how a site trains.
    decay: see `over_steps`.
    weighting, keep_optimizer: see `algorithms.fedavg`.
    proximal: see `algorithms.fedprox`; 0 for FedAvg.

  Raises:
    ValueError: for a decay outside [0, 1).
  """
  name = "fedprox" if proximal else "fedavg"
  algorithm = fedavg(
    recipe._replace(optimizer=over_steps(recipe.optimizer, decay)), weighting=weighting,
    keep_optimizer=True, proximal=proximal, name=name,
  )  # fmt: skip

  def kept(state: Averaged) -> PyTree:
    return state.inner if keep_optimizer else ()

  def init_site(params: Params, model_state: ModelState) -> PyTree:
    state = algorithm.init_site(params, model_state)
    return state | {"optimizer": kept(state["optimizer"])}

  def site(server: Global, site_state: PyTree, site: Site) -> tuple[Message, PyTree]:
    own = site_state["optimizer"]
    if not keep_optimizer:
      own = recipe.optimizer(jnp.float32(0)).init(server.params)
    begun = Averaged(own, server.server_state, server.round * recipe.steps.max_steps)
    message, after = algorithm.site(server, site_state | {"optimizer": begun}, site)
    change = lambda a, before: message.weight * (a - before)
    more = jax.tree.map(change, after["optimizer"].average, server.server_state)
    return message._replace(more=more), after | {"optimizer": kept(after["optimizer"])}

  def serve(server: Global, total: Message) -> tuple[Params, ModelState, PyTree, Metrics]:
    params, model_state, _, metrics = algorithm.server(server, total)
    mean = lambda a, t: a + t / total.weight
    return params, model_state, jax.tree.map(mean, server.server_state, total.more), metrics

  return algorithm._replace(
    init_server=lambda params: params,
    init_site=init_site,
    site=site,
    server=serve,
    personal=lambda server, site_state: (server.server_state, server.model_state),
    uniform=False,
  )
