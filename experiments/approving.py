"""What a site offers and approves: settings that all share, code, model and start; and its own
images, counted under these settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import approval, disclosure, local, models, multilabel
from primia_jax.approval import Approval
from primia_jax.data.dataset import Dataset
from primia_jax.privacy import ledger

from . import imageless, inputs, settings
from .configs import Train, rehearse, tasks
from .configs.aggregation import Aggregation
from .configs.run import build_site_level
from .settings import names
from .site_folders import Limits, Member, Own

_CODE = ("*.py", "*.c", "*.h")
SITES_OWN = (*(field.name for field in dataclasses.fields(Own)), "site_data", "ledger_dir")
PURPOSE, TRAINING, EVALUATION = "purpose", "training", "evaluation"


class Held(NamedTuple):
  """A site's images.

  Attributes:
    of_class: the number of images by class, in the agreed order.
    patients: how many; 0 where they are unknown.
  """

  of_class: Mapping[str, int]
  patients: int

  @property
  def images(self) -> int:
    return sum(self.of_class.values())

  def __str__(self) -> str:
    if not self.images:
      return imageless.WORD
    listed = ", ".join(f"{name} {n}" for name, n in self.of_class.items() if n)
    missing = [name for name, n in self.of_class.items() if not n]
    lone = len(missing) == len(self.of_class) - 1
    said = f"{self.images} images of {f'{self.patients} patients' * bool(self.patients)}"
    said = said.removesuffix(" of ") + f": {listed}"
    if lone:
      return f"{said}; one class only, which is allowed: its model learns the others from the sums"
    return f"{said}; none of {', '.join(missing)}, which is allowed" if missing else said


def code() -> str:
  """The version, and a hash of all source files of the library and the programs."""
  out = hashlib.sha256()
  for package in (pathlib.Path(models.__file__).parents[1], pathlib.Path(__file__).parent):
    for path in sorted(one for pattern in _CODE for one in package.rglob(pattern)):
      out.update(f"{path.relative_to(package).as_posix()}\0".encode())
      out.update(hashlib.sha256(path.read_bytes()).digest())
  try:
    version = importlib.metadata.version("primia-jax")
  except importlib.metadata.PackageNotFoundError:
    version = "unknown"
  return f"{version} {out.hexdigest()}"


def shared(config: Train) -> str:
  """The settings that all sites share, as JSON in one form: label names and their order, image
  shape and preprocessing among them; where each site's images are is its own affair.
  """
  known = settings.flat(config)
  return approval.shared({name: known[name] for name in names_of_shared()})


def purpose(approved: Approval) -> str:
  """What is approved: a training or an evaluation."""
  return str(json.loads(approved.configuration).get(PURPOSE, TRAINING))


def names_of_shared() -> list[str]:
  """The names of the settings that all sites share."""
  return [name for name in settings.flat(Train()) if name not in SITES_OWN]


def multiprocess(given: Mapping[str, Any], own: Own) -> Train:
  """The configuration as one site among others runs it: it opens no source but its own, so that
  this one stands for all.

  Args:
    given: settings that sites share, by name; others are at their defaults.
    own: where its images are.

  Raises:
    ValueError: the settings do not go together.
  """
  if "," in own.data:
    raise ValueError(f"data={own.data!r}: a comma ends the name of a source; use a path without")
  fields = dataclasses.asdict(own)
  num_sites = given.get("num_sites", Train().hospitals.num_sites)
  source = ",".join([fields.pop("data")] * num_sites)
  return settings.replace(Train(), **given, **fields, site_data=source)


def leaving(config: Train) -> list[str]:
  """The kinds of numbers that leave each site in a run, of `disclosure.KINDS`."""
  p, is_counted = config.privacy, config.training.class_weights
  kinds = [disclosure.UPDATES, disclosure.EXACT_COUNTS]  # sites tell how many images they have
  if is_counted and p.dp != "none" and p.dp_count_noise:
    kinds.append(disclosure.NOISED_COUNTS)
  return [*kinds, disclosure.METRICS] if p.validates else kinds


def label_names(config: Train) -> tuple[str, ...]:
  """The agreed classes.

  Raises:
    ValueError: the configuration names none.
  """
  if not (agreed := names(config.data.label_names)):
    raise ValueError(
      "label_names is empty in the configuration: sites apart must agree on classes and their "
      "order before they read an image; have the coordinator set --label_names"
    )
  return agreed


def with_own(config: Train, own: Own) -> Train:
  """The configuration with the images of one site."""
  return settings.replace(config, site_data="", ledger_dir="", **dataclasses.asdict(own))


def offered(config: Train) -> approval.Approval:
  """What a configuration has a site train, by the site's own code; raises as `rehearse`."""
  model_config = config.model.config(config.data, len(label_names(config)))
  start = config.model.initial(model_config, jax.random.key(config.seed))
  return approval.of(shared(config), code(), model_config.name, start)


def check(config: Train, limits: Limits) -> None:
  """Refuses a configuration beyond a site's limits.

  Raises:
    ValueError: naming the limit and the setting.
  """
  rehearse(config)
  if not config.in_processes:
    raise ValueError(
      f"placement={config.federation.placement} of the configuration: hospitals apart train with "
      "placement=flower; have the coordinator set it"
    )
  policy = limits.policy()
  for kind in leaving(config):
    policy.check(kind)
  check_sums(config, limits)
  of_pixels = tasks.of(config.model.model).of_pixels
  if limits.fewest_patients and (of_pixels or config.data.is_multi):
    raise ValueError(
      f"fewest_patients={limits.fewest_patients} of this site, and the report has no floors for "
      f"scores of {'masks' if of_pixels else 'several labels an image'}; set it to 0 if exact ones "
      "may be told"
    )
  rounds, p = config.training.rounds, config.privacy
  if 0 < limits.max_rounds < rounds:
    raise ValueError(f"rounds={rounds} of the configuration, and max_rounds={limits.max_rounds}")
  if limits.max_epsilon and p.dp == "none":
    raise ValueError(
      f"max_epsilon={limits.max_epsilon:g} of this site, and dp=none of the configuration protects "
      "nobody, so that epsilon is infinite"
    )
  if 0 < limits.max_epsilon < p.target_epsilon:
    raise ValueError(
      f"target_epsilon={p.target_epsilon:g} of the configuration, and "
      f"max_epsilon={limits.max_epsilon:g} of this site"
    )


def check_sums(config: Train, limits: Limits) -> None:
  """Refuses sums of updates that are of too few sites for a site's limits.

  Raises:
    ValueError: naming the limit.
  """
  limits.policy().check_sum(config.fewest_in_sum)
  check_colluding(config.aggregation, config.hospitals.num_sites, config.sites_in_round, limits)


def check_colluding(
  aggregation: Aggregation, num_sites: int, sites_in_round: int, limits: Limits
) -> None:
  """Refuses sums that fewer colluding sites open than the limit says; two sites alone learn each
  other's part in any case. Raises as `Aggregation.check_survives`.
  """
  if num_sites > 2 and limits.fewest_colluding:
    aggregation.check_survives(num_sites, sites_in_round, limits.fewest_colluding)


def protection(config: Train, held: Held) -> str:
  """What protects a run, in words, for the operator who approves it.

  Args:
    config: of the run.
    held: this site's images. Where no budget is set, epsilon is that of sites of as many.
  """
  p = config.privacy
  said = [_cost(config, held), config.aggregation.said(config.sites_in_round)]
  said.append("exact validation counts leave" if p.validates else "no validation")
  return "; ".join(said)


def _cost(config: Train, held: Held) -> str:
  p, rounds = config.privacy, config.training.rounds
  if p.dp == "none":
    return "no privacy (dp=none)"
  if p.target_epsilon:
    return f"epsilon at most {p.target_epsilon:g} of each {p.dp}"
  model = config.model.trained(config.model.config(config.data, len(label_names(config))))
  if p.dp == "site":
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
    epsilon, units = build_site_level(config, models.num_parameters(shapes)).epsilon(rounds), 0
  elif units := held.patients if p.by_patient else held.images:
    loss = local.classification_loss(model.apply, config.augment.build(), len(held.of_class))
    epsilon = p.build_steps(config.training, loss, [units]).epsilon(rounds)
  else:
    return f"epsilon of each {p.dp} as the sizes of sites decide"
  alike = f", for sites of {units} {p.dp}s" * bool(units)
  return f"epsilon {ledger.claim(epsilon)} of each {p.dp}{alike}"


def held(config: Train, member: Member) -> Held:
  """Counts a site's images, for its own eyes, without decoding them.

  Raises:
    ValueError, FileNotFoundError: the source is missing or wrong, or has other classes.
  """
  agreed = label_names(config)
  data = with_own(config, member.own).data if member.has_images else None
  if data is None or imageless.is_empty(data.data):
    return Held(dict.fromkeys(agreed, 0), 0)
  inputs.source(data)
  return counted(inputs.listed(data, agreed).values(), agreed, data.is_multi)


def counted(splits: Iterable[Dataset], agreed: Sequence[str], is_multi: bool = False) -> Held:
  """Counts the images of splits whose labels are of the agreed classes."""
  splits = list(splits)
  labels = np.concatenate([one.labels for one in splits])
  if is_multi:
    counts = multilabel.findings(labels, len(agreed)).sum(0).tolist()
  else:
    counts = np.bincount(labels, minlength=len(agreed)).tolist()
  knows = all(one.has_patient is not None and np.all(one.has_patient) for one in splits)
  patients = {str(group) for one in splits for group in one.groups} if knows else ()
  return Held(dict(zip(agreed, counts, strict=True)), len(patients))
