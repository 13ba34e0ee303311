"""What a search over settings varies: PriMIA's space, and the settings of a trial."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import settings
from .configs import Train

if TYPE_CHECKING:
  import optuna

_WITH_BETAS = ("adam", "adamw", "adam_l2")
_WITH_DECAY = ("adamw", "adam_l2")
_FORM = "NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A|B|C"


@dataclasses.dataclass(frozen=True)
class Range:
  """The values of one setting: those between `low` and `high`, or `choices`.

  Attributes:
    low, high: the ends, which belong to it; whole numbers for a setting of whole numbers.
    is_log: drawn evenly by logarithm.
    step: of a grid from `low`; 0 for none.
    choices: the values, where they are few.
  """

  low: float = 0.0
  high: float = 0.0
  is_log: bool = False
  step: float = 0.0
  choices: tuple[str, ...] = ()

  def __str__(self) -> str:
    if self.choices:
      return "|".join(self.choices)
    return f"{self.low:g}:{self.high:g}{':log' * self.is_log}"

  def holds(self, value: Any) -> bool:
    """Whether a value may be drawn."""
    if self.choices:
      return value in self.choices
    on_grid = not self.step or math.isclose(
      (steps := (value - self.low) / self.step), round(steps), abs_tol=1e-9
    )
    return self.low <= value <= self.high and on_grid


Space = Mapping[str, Range]

# After PriMIA's find_config.py and torchlib/find_config_federated.py. Learning rates reach higher,
# for networks without pre-training.
_PRIMIA: dict[str, Range] = {
  "learning_rate": Range(1e-5, 1e-2, is_log=True),
  "adam_beta1": Range(0.25, 0.95),
  "adam_beta2": Range(0.9, 0.9999),
  "weight_decay": Range(1e-6, 0.1, is_log=True),
  "augment": Range(choices=("none", "light", "strong")),
  "mixup": Range(0, 1, step=0.1),
  "sync_batches": Range(2, 10),
}


def parse(text: str, config: Train) -> dict[str, Range]:
  """The space of the flag; empty takes PriMIA's, as far as the settings use it.

  Raises:
    ValueError: an unknown setting, a range that is none, or a setting that has no effect here.
  """
  if not text:
    return {name: range_ for name, range_ in _PRIMIA.items() if not _unused(name, config)}
  known, out = settings.flat(config), {}
  for part in settings.names(text):
    name, _, values = part.partition("=")
    if name not in known:
      raise ValueError(f"space: {name} is not a setting; name those of --helpfull, as {_FORM}")
    if why := _unused(name, config):
      raise ValueError(f"space: {name} {why}")
    out[name] = _range(name, values, known[name])
    for value in _ends(out[name], known[name]):
      trial_settings(config, {name: value})  # raises for values that a run refuses
  return out


def _unused(name: str, config: Train) -> str:
  """Why a setting cannot be searched; empty where it can."""
  t = config.training
  if name in ("adam_beta1", "adam_beta2") and t.optimizer not in _WITH_BETAS:
    return f"has no effect with optimizer={t.optimizer}; use one of {', '.join(_WITH_BETAS)}"
  if name == "weight_decay" and t.optimizer not in _WITH_DECAY:
    return f"has no effect with optimizer={t.optimizer}; use one of {', '.join(_WITH_DECAY)}"
  if name == "momentum" and t.optimizer != "momentum":
    return f"has no effect with optimizer={t.optimizer}; use optimizer=momentum"
  if name == "sync_batches" and t.sync_epochs:
    return f"has no effect with sync_epochs={t.sync_epochs}; use sync_epochs=0"
  if name in ("augment", "mixup") and config.model.model in _segmenters():
    return "is for classes of images here" if name == "mixup" else ""
  fixed = {**vars(config.data), **vars(config.hospitals), **vars(config.privacy)}
  if name in fixed or name in ("seed", "record_transcript", "placement", "rounds"):
    return "decides the images, their protection or how long a trial is, and is the same in all"
  return ""


def _segmenters() -> Any:
  from primia_jax import models

  return models.SEGMENTERS


def _range(name: str, text: str, default: Any) -> Range:
  choices = tuple(filter(None, text.split("|")))
  if isinstance(default, str | bool) or len(choices) > 1:
    if not choices or isinstance(default, bool):
      raise ValueError(f"space: {name}={text!r} names no values; write {_FORM}")
    if not isinstance(default, str):
      raise ValueError(f"space: {name}={text!r}: numbers have a range; write {name}=LOW:HIGH")
    return Range(choices=choices)
  low, _, rest = text.partition(":")
  high, _, kind = rest.partition(":")
  try:
    made = Range(float(low), float(high), kind == "log")
  except ValueError as error:
    raise ValueError(f"space: {name}={text!r} ({error}); write {_FORM}") from error
  fits = kind in ("", "log") and made.low < made.high and (made.low > 0 or not made.is_log)
  if isinstance(default, int):
    fits = fits and made.low.is_integer() and made.high.is_integer()
  if not fits or not math.isfinite(made.low + made.high):
    raise ValueError(
      f"space: {name}={text!r} is not a range from a smaller to a larger number; write {_FORM}"
    )
  return made


def _ends(range_: Range, default: Any) -> tuple[Any, ...]:
  return range_.choices or tuple(type(default)(end) for end in (range_.low, range_.high))


def draw(trial: optuna.Trial, space: Space, config: Train) -> dict[str, Any]:
  """Asks a trial for a value of each setting."""
  known = settings.flat(config)
  out: dict[str, Any] = {}
  for name, r in space.items():
    if r.choices:
      out[name] = trial.suggest_categorical(name, list(r.choices))
    elif isinstance(known[name], int):
      out[name] = trial.suggest_int(name, int(r.low), int(r.high), log=r.is_log)
    elif r.step:
      out[name] = trial.suggest_float(name, r.low, r.high, step=r.step)
    else:
      out[name] = trial.suggest_float(name, r.low, r.high, log=r.is_log)
  return out


def given(space: Space, config: Train) -> dict[str, Any] | None:
  """The settings that the search was given, as a draw; None if the space does not hold them."""
  known = settings.flat(config)
  if "sync_batches" in space and not known["sync_batches"]:
    known["sync_batches"] = config.training.batches
  values = {name: known[name] for name in space}
  return values if all(space[name].holds(value) for name, value in values.items()) else None


def trial_settings(config: Train, values: Mapping[str, Any]) -> Train:
  """The settings of a trial. Where it synchronises after other numbers of batches, its rounds are
  as many as make equally many steps.
  """
  changes = dict(values)
  if "sync_batches" in changes:
    steps = config.training.rounds * config.training.batches
    changes["rounds"] = max(1, round(steps / max(1, changes["sync_batches"])))
  return settings.replace(config, **changes)
