"""How a site trains between two synchronisations, and how the server applies updates."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from primia_jax import algorithms, federated, local, models, step_average
from primia_jax.attacks import detection
from primia_jax.sites import Placement
from primia_jax.summation import Summation
from primia_jax.types import Array, LossFn

from ..settings import choose, require, setting

SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
_SYNC_BATCHES = 20
_AVERAGES = ("average_last", "average_decay")
_HEADS = ("head", "linear")  # of scatter_linear  # the last layer, in the parameters of models
ALGORITHMS = ("fedavg", "fedprox", *SERVER_OPTIMIZERS, "scaffold", "fednova", "fedbn")


@dataclasses.dataclass(frozen=True)
class Training:
  """A site's steps."""

  rounds: int = setting(60, "rounds of training at the sites, each followed by a synchronisation")
  sync_epochs: int = setting(
    0,
    "epochs over its own images that a site trains between synchronisations, in place of "
    "sync_batches. Sites and baselines then take unequal numbers of steps. With dp=example or "
    "patient a round is always of epochs, and 0 is one",
  )
  sync_batches: int = setting(
    0, f"batches that a site trains between synchronisations; 0 is {_SYNC_BATCHES}"
  )
  batch_size: int = setting(8, "images in a training step")
  optimizer: str = setting(
    "adam",
    "the sites' optimiser: sgd, momentum, adam, adamw, or adam_l2 (PyTorch's Adam, as PriMIA's: "
    "weight decay is a part of the gradient)",
  )
  momentum: float = setting(0.9, "optimizer=momentum: the decay")
  adam_beta1: float = setting(0.9, "adam, adamw, adam_l2: the decay of the mean of gradients")
  adam_beta2: float = setting(0.999, "adam, adamw, adam_l2: the decay of the mean of their squares")
  weight_decay: float = setting(0.01, "adamw, adam_l2: the strength of weight decay")
  learning_rate: float = setting(0.002, "highest learning rate of the sites")
  head_rate: float = setting(
    1.0, "factor on the learning rate of the last layer, which is new on pretrained weights"
  )
  schedule: str = setting("cosine", "constant, or cosine: down to 0 over all rounds")
  warmup_rounds: float = setting(1.0, "rounds of linear warm-up")
  keep_optimizer: bool = setting(True, "sites keep their optimiser's state from round to round")
  class_weights: bool = setting(
    True, "weigh classes by inverse frequency; the counts are summed under secure aggregation"
  )
  label_smoothing: float = setting(
    0.0, "share of a label that is spread evenly over all classes, in [0, 1)"
  )
  average_last: float = setting(
    0.0,
    "share of the rounds, the last ones, whose mean parameters are evaluated and kept; 0 takes one "
    "round's",
  )
  average_decay: float = setting(
    0.0,
    "decay, such as 0.995, of an exponential average of the parameters over steps, which is "
    "evaluated and kept. Sites send their averages' changes in the same sum as their updates, so "
    "messages are twice as large; 0 takes no such average",
  )
  patience: int = setting(
    0,
    "stop after this many rounds without a better MCC on validation images; 0 never stops, which "
    "a run without validation needs",
  )

  def __post_init__(self):
    choose("schedule", self.schedule, ("constant", "cosine"))
    choose("optimizer", self.optimizer, self._optimizers)
    for name in ("rounds", "batch_size", "learning_rate", "head_rate"):
      value = getattr(self, name)
      require(0 < value < math.inf, name, value, "must be positive and finite")
    for name in ("sync_batches", "sync_epochs", "patience", "warmup_rounds", "weight_decay"):
      value = getattr(self, name)
      require(0 <= value < math.inf, name, value, "must be finite and not negative")
    for name in ("momentum", "adam_beta1", "adam_beta2", "label_smoothing", *_AVERAGES):
      value = getattr(self, name)
      require(0 <= value < 1, name, value, "must lie in [0, 1)")
    if self.sync_epochs and self.sync_batches:
      raise ValueError(
        f"sync_epochs={self.sync_epochs} and sync_batches={self.sync_batches} both say how long a "
        "round is; give one of them"
      )

  def check_averages(self, dp_average: float, algorithm: str, dp: str) -> None:
    """Refuses averages of parameters that do not go together, or with what is trained.

    Args:
      dp_average, dp: of `Privacy`.
      algorithm: of `Federation`.

    Raises:
      ValueError: naming the setting and the cure.
    """
    given = {name: getattr(self, name) for name in _AVERAGES} | {"dp_average": dp_average}
    given = {name: value for name, value in given.items() if value}
    said = " and ".join(f"{name}={value}" for name, value in given.items())
    if len(given) > 1:
      raise ValueError(f"{said}: take one average of parameters, and 0 for the others")
    for name in given:
      if algorithm == "fedbn":
        raise ValueError(
          f"{said} averages global parameters, and fedbn keeps some at each site; use {name}=0"
        )
    if self.average_decay and dp == "site":
      raise ValueError(
        f"{said} with dp=site: a bound on one update of a site does not cover its average; use "
        "average_last, or average_decay=0"
      )

  def averaged(self, algorithm: federated.Algorithm) -> federated.Algorithm:
    """The algorithm, evaluated with the mean of the last rounds if the settings say so."""
    if not self.average_last:
      return algorithm
    last = max(1, round(self.average_last * self.rounds))
    return algorithms.averaged_from(algorithm, self.rounds - last)

  @property
  def _optimizers(self) -> dict[str, local.Optimizer]:
    betas = {"b1": self.adam_beta1, "b2": self.adam_beta2}
    decay = self.weight_decay
    return {
      "sgd": optax.sgd,
      "momentum": functools.partial(optax.sgd, momentum=self.momentum),
      "adam": functools.partial(optax.adam, **betas),
      "adamw": functools.partial(optax.adamw, weight_decay=decay, **betas),
      "adam_l2": lambda rate: optax.chain(
        optax.add_decayed_weights(decay), optax.adam(rate, **betas)
      ),
    }

  @property
  def batches(self) -> int:
    """Batches between synchronisations, where these are not counted in epochs."""
    return self.sync_batches or _SYNC_BATCHES

  def build_steps(self, sizes: Sequence[int]) -> local.Steps:
    """The steps of a round; the smallest and largest site's sizes become public."""
    return local.epochs(
      self.batch_size,
      max(sizes),
      min_examples=min(sizes),
      num_epochs=self.sync_epochs or None,
      num_steps=None if self.sync_epochs else self.batches,
    )

  def build_optimizer(self) -> local.Optimizer:
    """The sites' optimiser."""
    optimizer, factor = self._optimizers[self.optimizer], self.head_rate
    if factor == 1:
      return optimizer

    def scaled(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
      of_head = lambda path: getattr(path[0], "key", "") in _HEADS
      scale = lambda path, u: u * jnp.float32(factor) if of_head(path) else u
      return jax.tree_util.tree_map_with_path(scale, updates)

    return lambda rate: optax.chain(optimizer(rate), optax.stateless(scaled))

  def build_schedule(self) -> Callable[[Array], Array]:
    """Learning rate by time in rounds: linear warm-up, then constant or cosine."""
    peak, warmup, rounds = self.learning_rate, self.warmup_rounds, float(self.rounds)

    def rate(time: Array) -> Array:
      decay = jnp.float32(1)
      if self.schedule == "cosine":
        done = jnp.clip((time - warmup) / max(rounds - warmup, 1e-6), 0, 1)
        decay = 0.5 * (1 + jnp.cos(jnp.pi * done))
      return peak * jnp.minimum((time + 0.05) / max(warmup, 0.05), 1.0) * decay

    return rate


@dataclasses.dataclass(frozen=True)
class Federation:
  """How sites work together."""

  algorithm: str = setting(
    "fedavg", "fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad, scaffold, fednova or fedbn"
  )
  weighting: str = setting(
    "examples",
    "weight of a site: examples (its number of images; of patients with dp=patient), or uniform",
  )
  proximal: float = setting(0.01, "fedprox: strength of the pull towards the global model")
  server_learning_rate: float = setting(
    0.01, "fedadam, fedyogi, fedadagrad, fedavgm: the server's learning rate"
  )
  server_momentum: float = setting(0.9, "fedavgm: the server's momentum")
  sites_per_round: int = setting(
    0,
    "sites drawn at random for each round, from the seed, which all know, so that no privacy is "
    "claimed for the draw; 0 takes all",
  )
  placement: str = setting(
    "auto",
    "where sites run: loop, scan, vmap, chunk=C, mesh, auto (the fastest), or flower: a process "
    "for each site, whose messages Flower carries",
  )
  refuse_suspicious_models: bool = setting(
    False,
    "each site looks at the model before it trains it, on 16 of its own images, and ends the run "
    "if it looks made to reveal single images; costs 16 gradients a round",
  )

  def __post_init__(self):
    choose("algorithm", self.algorithm, ALGORITHMS)
    choose("weighting", self.weighting, ("examples", "uniform"))
    value = self.server_learning_rate
    require(0 < value < math.inf, "server_learning_rate", value, "must be positive and finite")
    value = self.proximal
    require(0 <= value < math.inf, "proximal", value, "must be finite and not negative")
    require(0 <= self.server_momentum < 1, "server_momentum", self.server_momentum,
            "must lie in [0, 1)")  # fmt: skip
    require(self.sites_per_round >= 0, "sites_per_round", self.sites_per_round, "is negative")

  def build(self, training: Training, recipe: local.Recipe, num_sites: int) -> federated.Algorithm:
    """The federated algorithm.

    Raises:
      ValueError: the algorithm does not go with the sites' optimiser.
    """
    keep, name = training.keep_optimizer, self.algorithm
    if name == "fednova" and training.optimizer not in ("sgd", "momentum"):
      raise ValueError(
        f"algorithm=fednova must know the weights of steps; use optimizer=sgd or momentum, not "
        f"{training.optimizer}"
      )
    if name == "fednova" and training.optimizer == "momentum" and keep:
      raise ValueError(
        "algorithm=fednova starts the sites' momentum anew each round; use --nokeep_optimizer"
      )
    if name == "scaffold" and training.optimizer != "sgd":
      raise ValueError(
        f"algorithm=scaffold is sound with optimizer=sgd only, not {training.optimizer} "
        "(Karimireddy et al. 2020)"
      )
    if name in ("fednova", "scaffold") and training.head_rate != 1:
      raise ValueError(
        f"head_rate={training.head_rate} with algorithm={name}, which assumes one learning "
        "rate for all parameters; use head_rate=1"
      )
    options: dict[str, Any] = {"weighting": self.weighting, "keep_optimizer": keep}
    if training.average_decay:
      if name not in ("fedavg", "fedprox"):
        raise ValueError(
          f"average_decay={training.average_decay} with algorithm={name}: only fedavg and fedprox "
          "average over steps; use one of them, average_last, or average_decay=0"
        )
      proximal = self.proximal if name == "fedprox" else 0.0
      return step_average.averaged(recipe, training.average_decay, proximal=proximal, **options)
    if name == "fedprox":
      return algorithms.fedprox(recipe, self.proximal, **options)
    if name == "scaffold":
      return algorithms.scaffold(recipe, num_sites)
    if name == "fednova":
      momentum = training.momentum if training.optimizer == "momentum" else 0.0
      return algorithms.fednova(recipe, momentum=momentum, weighting=self.weighting)  # type: ignore[arg-type]
    if name == "fedbn":
      is_norm = lambda path: models.is_norm_parameter(path.split("/"))
      return algorithms.fedbn(recipe, is_norm, **options)
    if name in SERVER_OPTIMIZERS:
      rate = self.server_learning_rate
      optimizer = {
        "fedavgm": optax.sgd(rate, self.server_momentum),
        "fedadam": optax.adam(rate, b2=0.99, eps=1e-3),  # Reddi et al. 2021, section 5
        "fedyogi": optax.yogi(rate, b2=0.99, eps=1e-3),
        "fedadagrad": optax.adagrad(rate, eps=1e-3),
      }[name]
      return algorithms.fedopt(recipe, optimizer, **options)._replace(name=name)
    return algorithms.fedavg(recipe, **options)  # type: ignore[arg-type]

  def join(
    self,
    algorithm: federated.Algorithm,
    summed: Summation,
    placement: Placement,
    num_sites: int,
    loss: LossFn,
  ) -> federated.FederatedAlgorithm:
    """The rounds, in which sites look at each model first if they are told to.

    Args:
      algorithm, summed, placement, num_sites: as for `federated.federate`.
      loss: of a batch, as the sites train.
    """
    rounds = federated.federate(algorithm, summed, placement, num_sites)
    if not self.refuse_suspicious_models:
      return rounds
    return rounds._replace(step=detection.guarded(rounds.step, loss, placement.rows))


def build_alone(recipe: local.Recipe, average_decay: float = 0.0) -> federated.Algorithm:
  """Ordinary training as a federation of one site, whose optimiser keeps its state."""
  if average_decay:
    alone = step_average.averaged(recipe, average_decay, weighting="uniform", keep_optimizer=True)
    return alone._replace(name="one site")
  return algorithms.fedavg(recipe, weighting="uniform", keep_optimizer=True, name="one site")
