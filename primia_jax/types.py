"""Types and shape letters used throughout.

Letters in shape comments: S sites, K sites of one round, N examples, B batch, T local steps, H, W,
C image height, width, channels, L classes, D parameters, P peers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Key = jax.Array  # a typed key, jax.random.key(seed)
PyTree = Any
Params = PyTree  # what is trained: a pytree of float arrays
ModelState = (
  PyTree  # what is tracked but not trained, e.g. BatchNorm statistics; {} when there is none
)


class Batch(NamedTuple):
  """One batch, or several stacked along leading axes.

  Attributes:
    images: [..., B, H, W, C], uint8 as stored or float32 as the model takes it.
    labels: [..., B] int32, or [..., B, H, W] in segmentation.
    weights: [..., B] float32, of each example in the loss; 0 marks padding, which is ignored
      everywhere but in BatchNorm's statistics.
    numbers: [..., U] int32, the number within its site of each unit (example, or patient with all
      of its rows), -1 for padding. A unit's random keys are folded from its number and not from its
      place, so that no unit changes another's. None where keys are of the whole batch.
  """

  images: Array
  labels: Array
  weights: Array
  numbers: Array | None = None


class Site(NamedTuple):
  """One site's data, or that of K sites stacked on a leading axis [K].

  Attributes:
    id: int32. The number of the site, which is folded into its keys.
    images: [N, H, W, C] as stored; rows from `num_examples` on are padding.
    labels: [N] int32, or [N, H, W] in segmentation.
    num_examples: int32.
    secret: [8] uint32, known to the site alone, from which private training draws its batches and
      its noise. A loader leaves it None; every sum draws it afresh from the operating system.
    units: [N] int32, the patient of each image, numbered from 0, and -1 for padding. None if
      each image is its own unit.
  """

  id: Array
  images: Array
  labels: Array
  num_examples: Array
  secret: Array | None = None
  units: Array | None = None

  def __repr__(self) -> str:
    shown = self._replace(secret=None)._asdict()
    return f"Site({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class Metrics(NamedTuple):
  """Sums over examples, which add up over batches and sites; divide by `num_examples` for a
  mean.
  """

  loss: Array  # weighted sum of the losses
  correct: Array  # number of right answers
  num_examples: Array  # of non-zero weight


# (params, model_state, batch, key) -> (mean loss over the batch, (new model_state, Metrics))
LossFn = Callable[[Params, ModelState, Batch, Key], tuple[Array, tuple[ModelState, Metrics]]]
# (params, model_state, images, train, key) -> (logits [B, L], new model_state)
ApplyFn = Callable[..., tuple[Array, ModelState]]
