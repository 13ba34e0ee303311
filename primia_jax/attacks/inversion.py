"""Gradient inversion: images whose simulated update matches the one that was seen.

Who learns what: whoever sees one client's update and the model before it, an honest but curious
server without secure aggregation, may learn the client's images. Attacks differ in the distance
(`attacks.matching`), in what is known of images (`attacks.priors`, `attacks.learned`) and in the
client that they simulate (`attacks.updates`):

  DLG (Zhu et al. 2019)        matching.l2, Adam without signs, no penalty; `with_labels` searches
                               labels as well, under `labels.soft_loss`
  Geiping et al. 2020          matching.cosine, signed Adam, total variation, a box
  Yin et al. 2021              the same with priors.batch_norm and priors.group
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from primia_jax.attacks import matching
from primia_jax.attacks.updates import Seen, Simulate
from primia_jax.types import Array, Key, PyTree

RESTARTS = "restarts"  # the name of the axis over which `run` maps


@dataclasses.dataclass(frozen=True)
class Settings:
  """How to search.

  Attributes:
    distance: (simulated update, seen update) -> scalar, of `attacks.matching`.
    steps: how many; the step size falls by `decay` after 3/8, 5/8 and 7/8 of them.
    rate: step size of Adam, in units of the variables: for pixels, of images in [0, 1].
    signed: take only the signs of the gradient.
    decay: see `steps`; 1 for a constant step size.
  """

  distance: Callable[[PyTree, PyTree], Array] = matching.cosine
  steps: int = 2000
  rate: float = 0.025
  signed: bool = True
  decay: float = 0.1

  def __post_init__(self):
    for name in ("steps", "rate", "decay"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name}={getattr(self, name)} must be positive")


class Variables(NamedTuple):
  """What the search moves, and which images it means.

  Attributes:
    draw: key -> variables, a pytree of float arrays.
    images: variables -> [B, H, W, C].
    project: variables -> the nearest ones that are allowed.
    labels: variables -> [B, L] probabilities of classes, in place of `Seen.labels`; None where
      labels are known.
  """

  draw: Callable[[Key], PyTree]
  images: Callable[[PyTree], Array]
  project: Callable[[PyTree], PyTree] = lambda variables: variables
  labels: Callable[[PyTree], Array] | None = None


class State(NamedTuple):
  """The state of one search.

  Attributes:
    variables: of the next step.
    opt_state: of Adam.
    best: the variables with the least objective so far.
    objective: float32, theirs; infinite at first.
  """

  variables: PyTree
  opt_state: optax.OptState
  best: PyTree
  objective: Array


class Info(NamedTuple):
  """Of one step, before it moved: the objective, and the distance that is part of it."""

  objective: Array
  distance: Array


class Attack(NamedTuple):
  """An attack.

  Attributes:
    init: key -> State.
    step: (State, Seen) -> (State, Info).
    images: State -> [B, H, W, C], those with the least objective so far.
    steps: how many steps `run` takes.
    labels: State -> [B, L], theirs; None where labels are known.
  """

  init: Callable[[Key], State]
  step: Callable[[State, Seen], tuple[State, Info]]
  images: Callable[[State], Array]
  steps: int
  labels: Callable[[State], Array] | None = None


class Found(NamedTuple):
  """The outcome of R restarts.

  Attributes:
    images: [R, B, H, W, C].
    objective: [R], the least of each; the attacker selects by it.
    trace: of each restart and step, [R, T].
    labels: [R, B, L] probabilities of classes; None where labels are known.
  """

  images: Array
  objective: Array
  trace: Info
  labels: Array | None = None


def pixels(shape: tuple[int, int, int, int], spread: float = 0.25) -> Variables:
  """The pixels [B, H, W, C] themselves, boxed to [0, 1]; they begin as noise of standard deviation
  `spread` around 1/2.
  """
  return Variables(
    lambda key: 0.5 + spread * jax.random.normal(key, shape, jnp.float32),
    lambda variables: variables,
    lambda variables: jnp.clip(variables, 0, 1),
  )


def with_labels(images: Variables, batch_size: int, num_classes: int) -> Variables:
  """Images and their labels, searched together (Zhu et al. 2019, algorithm 1): labels are the
  softmax of numbers that begin as noise.
  """

  def draw(key: Key) -> PyTree:
    image_key, label_key = jax.random.split(key)
    logits = jax.random.normal(label_key, (batch_size, num_classes), jnp.float32)
    return {"images": images.draw(image_key), "labels": logits}

  return Variables(
    draw,
    lambda variables: images.images(variables["images"]),
    lambda variables: {**variables, "images": images.project(variables["images"])},
    lambda variables: jax.nn.softmax(variables["labels"]),
  )


def inversion(
  simulate: Simulate,
  variables: Variables,
  settings: Settings | None = None,
  penalty: Callable[[Seen, Array], Array] | None = None,
) -> Attack:
  """Makes an attack.

  Args:
    simulate: the client, as in `attacks.updates`.
    variables: what to move, such as `pixels(shape)` or `learned.codes(...)`.
    settings: how to search.
    penalty: (Seen, images) -> scalar that is added to the distance: a weighted sum of
      `attacks.priors`. Weights may be traced, so that several are tried under one `vmap`.

  Returns:
    The attack. `step` may be mapped over anything: restarts share `Seen`, images do not.
  """
  settings = settings or Settings()
  boundaries = {settings.steps * i // 8: settings.decay for i in (3, 5, 7)}
  optimizer = optax.adam(optax.piecewise_constant_schedule(settings.rate, boundaries))

  def objective(values: PyTree, seen: Seen) -> tuple[Array, Info]:
    images = variables.images(values)
    if variables.labels is not None:
      seen = seen._replace(labels=variables.labels(values))
    distance = settings.distance(simulate(seen, images), seen.update)
    total = distance if penalty is None else distance + penalty(seen, images)
    return total, Info(total, distance)

  def init(key: Key) -> State:
    values = variables.draw(key)
    return State(values, optimizer.init(values), values, jnp.float32(jnp.inf))

  def step(state: State, seen: Seen) -> tuple[State, Info]:
    towards, info = jax.grad(objective, has_aux=True)(state.variables, seen)
    is_best = info.objective < state.objective
    best = jax.tree.map(lambda a, b: jnp.where(is_best, a, b), state.variables, state.best)
    if settings.signed:
      towards = jax.tree.map(jnp.sign, towards)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
      moves, opt_state = optimizer.update(towards, state.opt_state)
    moved = variables.project(optax.apply_updates(state.variables, moves))
    return State(moved, opt_state, best, jnp.where(is_best, info.objective, state.objective)), info

  of = lambda take: None if take is None else lambda state: take(state.best)
  images = lambda state: variables.images(state.best)
  return Attack(init, step, images, settings.steps, of(variables.labels))


def run(attack: Attack, key: Key, seen: Seen, num_restarts: int = 1) -> Found:
  """Runs restarts side by side. May be jitted, and mapped over `key` and fields of `seen`.

  Raises:
    ValueError: for fewer than one restart.
  """
  if num_restarts < 1:
    raise ValueError(f"num_restarts={num_restarts} must be at least 1")

  def one(key: Key) -> Found:
    state, trace = jax.lax.scan(
      lambda state, _: attack.step(state, seen), attack.init(key), None, attack.steps
    )
    labels = None if attack.labels is None else attack.labels(state)
    return Found(attack.images(state), state.objective, trace, labels)

  return jax.vmap(one, axis_name=RESTARTS)(jax.random.split(key, num_restarts))


def selected(found: Found) -> Array:
  """[B, H, W, C]: what the attacker takes, the restart with the least objective."""
  return found.images[jnp.argmin(found.objective)]
