"""Models whose lower parts stay as they are: only the upper parts are parameters of training.

Frozen parts depend on the image alone. They are neither sent, noised nor averaged, and where images
never change, what they make of each is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from primia_jax.models import classifier, resnet, vgg
from primia_jax.models.classifier import Model
from primia_jax.models.config import LITES, ModelConfig
from primia_jax.models.efficientnet import parts as parts_of_lite
from primia_jax.types import Array, ModelState, Params, PyTree


class Frozen(NamedTuple):
  """A model of frozen and trained parts.

  Attributes:
    model: the trained parts; in place of images it takes what `lower` makes of them.
    params, model_state: what the trained parts start from.
    lower: the frozen parts, float32 images [B, H, W, C] -> float32 [B, ...].
    whole: (params, model_state) of the trained parts -> those of the whole model, for the model
      that `build` makes.
  """

  model: Model
  params: Params
  model_state: ModelState
  lower: Callable[[Array], Array]
  whole: Callable[[Params, ModelState], tuple[Params, ModelState]]


def parts(config: ModelConfig) -> list[str]:
  """The parts that a model can be cut between, in order; empty where it cannot be cut."""
  if config.name in LITES:
    return parts_of_lite(config)
  return list({"resnet18": resnet.PARTS, "vgg16": vgg.PARTS}.get(config.name, ()))


def freeze(
  config: ModelConfig, params: Params, model_state: ModelState, first_trained: str
) -> Frozen:
  """Cuts a model: the parts before one are frozen, it and those after it are trained.

  Args:
    config: of the whole model.
    params, model_state: of the whole model, with the values that stay; `Frozen.whole` keeps them,
      too. Shapes suffice for what only needs shapes.
    first_trained: of `parts`, but not the first.

  Raises:
    ValueError: the model cannot be cut, has no such part, or nothing would be frozen.
  """
  known = parts(config)
  if not known:
    raise ValueError(
      f"{config.name} cannot be frozen in parts; models that can: resnet18, vgg16, "
      f"{', '.join(LITES)}"
    )
  if first_trained not in known[1:]:
    raise ValueError(
      f"first_trained={first_trained!r} is not a part of {config.name} with parts before it; use "
      f"one of {', '.join(known[1:])}"
    )
  cut = known.index(first_trained)
  begin = classifier.of_parts(config, 0, cut, config.image_shape)
  shown = jax.eval_shape(begin.init, jax.random.key(0))
  image = jax.ShapeDtypeStruct((1, *config.image_shape), jax.numpy.float32)
  passed, _ = jax.eval_shape(begin.apply, *shown, image)
  upper = classifier.of_parts(config, cut, None, passed.shape[1:])

  def split(tree: PyTree, template: PyTree) -> tuple[PyTree, PyTree]:
    return {k: tree[k] for k in template}, {k: v for k, v in tree.items() if k not in template}

  below_params, above_params = split(params, shown[0])
  below_state, above_state = split(model_state, shown[1])

  def lower(images: Array) -> Array:
    return begin.apply(below_params, below_state, images)[0]

  def whole(params: Params, model_state: ModelState) -> tuple[Params, ModelState]:
    return {**below_params, **params}, {**below_state, **model_state}

  return Frozen(upper, above_params, above_state, lower, whole)
