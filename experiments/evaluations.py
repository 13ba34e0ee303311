"""The approval of an evaluation: which model hospitals score together, on which of their images.

The coordinator offers a finished model by its hash; each site compares its own copy of it, and
keeps that copy in its folder. Labels and their order, the form of the images, bins and seed are in
what all sites must have approved alike.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import flags

from primia_jax import approval, disclosure, models
from primia_jax.approval import Approval, NotApproved
from primia_jax.attacks import detection
from primia_jax.privacy import ledger
from primia_jax.secagg import pinning, roster
from primia_jax.types import ModelState, Params

from . import (
  approving,
  folders,
  imageless,
  inputs,
  model_files,
  refusals,
  scored_images,
  settings,
  site_folders,
)
from .approving import Held
from .configs.scoring import Evaluate
from .settings import names, setting
from .site_folders import Limits, Member, Own

PROGRAM = "evaluate"  # as config.json names it
PLACEHOLDER = "of-each-site"  # for the path of images


@dataclasses.dataclass(frozen=True)
class Finished:
  """The model that an evaluation scores; with offer and approve."""

  model: str = setting(
    "",
    "the model to evaluate: the folder of a finished run, or a checkpoint of PriMIA; with approve, "
    "this site's copy. Empty where sites are to train",
  )


NO_MODEL = Finished()  # sites are to train


class Model(NamedTuple):
  """A finished model, as `model_files.load_model` gives it, and what it takes for images.

  Attributes:
    apply: of the model.
    trained: parameters and state; a pair for each site where FedBN was used.
    label_names: in the order of its outputs.
    config: of the model.
    ct_window, grey_bits: of its images.
  """

  apply: Any
  trained: list[tuple[Params, ModelState]]
  label_names: tuple[str, ...]
  config: models.ModelConfig
  ct_window: str
  grey_bits: int

  @property
  def sha256(self) -> str:
    return detection.digest(self.trained).hex()


def load(path: str, classes: str = "") -> Model:
  """Loads a finished model whose scores hospitals can sum.

  Raises:
    ValueError, FileNotFoundError: there is none, or it gives masks or several labels an image.
  """
  if not path:
    raise ValueError("model is empty; name the finished run whose model is scored, --model=PATH")
  model, trained, label_names, config = model_files.load_model(path, classes)
  if model_files.is_multi(path) or config.name in models.SEGMENTERS:
    what = "masks" if config.name in models.SEGMENTERS else "any number of labels an image"
    raise ValueError(
      f"the model in {path} gives {what}, and the counts that hospitals sum are of images with one "
      "class each; score it at each hospital with primia-evaluate"
    )
  if wrong := [name for name in label_names if "," in name]:
    raise ValueError(f"the model in {path} has the class {wrong[0]!r}; a comma ends a class's name")
  form = model_files.ct_window(path), model_files.grey_bits(path)
  return Model(model.apply, trained, label_names, config, *form)


def form(model: Model) -> dict[str, Any]:
  """The settings that a model decides."""
  size, _, channels = model.config.image_shape
  return {
    "label_names": ",".join(model.label_names),
    "image_size": size,
    "channels": channels,
    "ct_window": model.ct_window,
    "grey_bits": model.grey_bits,
    "model_sha256": model.sha256,
  }


def names_of_shared() -> list[str]:
  """The names of the settings that all sites share."""
  return [name for name in settings.flat(Evaluate()) if name not in approving.SITES_OWN]


def multiprocess(given: Mapping[str, Any], own: Own) -> Evaluate:
  """The configuration as one site runs it; arguments and errors as `approving.multiprocess`."""
  fields = dataclasses.asdict(own)
  if own.data == site_folders.NO_IMAGES:
    fields = {"data": ""}
  return settings.replace(Evaluate(), **given, **fields)


def offered(config: Evaluate, model: Model) -> Approval:
  """What a configuration has a site score, by the site's own code and copy of the model."""
  known = settings.flat(config)
  shared = {name: known[name] for name in names_of_shared()}
  text = approval.shared({approving.PURPOSE: approving.EVALUATION, **shared})
  return approval.of(text, approving.code(), model.config.name, model.trained)


def agreed(approved: Approval, own: Own) -> Evaluate:
  """The configuration that a site has approved, with its own images.

  Raises:
    NotApproved: the approval is for code with other settings.
  """
  found = json.loads(approved.configuration)
  del found[approving.PURPOSE]
  if changed := set(found) ^ set(names_of_shared()):
    raise NotApproved(
      f"this code and the approved configuration differ in the settings {sorted(changed)}; approve "
      "the configuration again with primia-site approve"
    )
  return multiprocess(found, own)


def configuration(text: str, model: Model, run: str, num_sites: int) -> Evaluate:
  """The configuration that flags of `primia-evaluate` make for a model.

  Args:
    text: the flags.
    model: that is scored.
    run: its folder. If it is of a training, whose images may come from the same sources, the
      images that training held out are scored, unless the flags say otherwise.
    num_sites: of the roster.

  Raises:
    ValueError: naming the flag, its value and the cure.
  """
  values = flags.FlagValues()
  settings.define_flags(Evaluate, values)
  refusals.parse(["settings", *refusals.words("settings", text)], values)
  present = lambda name: values[name].present
  decided = form(model) | {"num_sites": num_sites}
  for name, value in decided.items():
    if present(name) and values[name].value != value:
      raise ValueError(
        f"{name}={values[name].value} in settings: the model or the roster says {value!r}; leave "
        "it out"
      )
  given = {name: values[name].value for name in names_of_shared() if present(name)}
  kind = str(values["data"].value).partition(":")[0] if present("data") else "folder"
  held = {} if present("held_out") and present("seed") else _of_training(run)
  return multiprocess(held | given | decided, Own(f"{kind}:{PLACEHOLDER}"))


def _of_training(run: str) -> dict[str, Any]:
  if not (pathlib.Path(run).expanduser() / folders.RUN).is_file():
    return {}
  trained = folders.settings_of(str(pathlib.Path(run).expanduser()))
  return {"seed": trained.seed, "held_out": trained.hospitals.test_fraction}


def check(config: Evaluate, limits: Limits) -> None:
  """Refuses an evaluation beyond a site's limits.

  Raises:
    ValueError: naming the limit and the setting.
  """
  policy = limits.policy()
  policy.check_sum(config.fewest_in_sum)
  n = config.scoring.num_sites
  approving.check_colluding(config.aggregation, n, n, limits)
  if config.scoring.dp_count_noise:
    policy.check(disclosure.NOISED_COUNTS)
    return
  for kind in (disclosure.EXACT_COUNTS, disclosure.METRICS):
    try:
      policy.check(kind)
    except ValueError as error:
      raise ValueError(
        f"{error}; an evaluation with dp_count_noise=0 sums exact counts of scores. Have the "
        "coordinator offer one with --dp_count_noise"
      ) from error


def check_copy(config: Evaluate, model: Model, path: str) -> None:
  """Refuses a copy that is not the model offered.

  Raises:
    ValueError: naming what differs, on both sides.
  """
  offered, known = form(model), settings.flat(config)
  for name, what in (("label_names", "classes, or another order of them"),
                     ("model_sha256", "parameters")):  # fmt: skip
    if known[name] != offered[name]:
      raise ValueError(
        f"model={path} has other {what}: {name}={offered[name]}, and the coordinator offers "
        f"{known[name]}; ask the coordinator for the model"
      )
  for name, value in offered.items():
    if known[name] != value:
      raise ValueError(
        f"{name}={known[name]!r} of the configuration, and the model in {path} takes {value!r}; "
        "have the coordinator offer it again"
      )


def approve(folder: pathlib.Path, member: Member, path: str, copy: str) -> None:
  """Records which model may be scored, and keeps this site's copy of it; prints it in two lines.

  Args:
    folder: of the site.
    member: of its `site.toml`.
    path: of the configuration that the coordinator sent.
    copy: of the model, here.

  Raises:
    ValueError, FileNotFoundError: it is beyond the site's limits, the copy is another model, or the
      site has no images to score.
  """
  config = _read(path)
  model = load(copy)
  check_copy(config, model, copy)
  check(config, member.limits)
  known = pinning.held(folder)
  if len(known.sites) != config.scoring.num_sites:
    raise ValueError(
      f"num_sites={config.scoring.num_sites} of {path}, and roster {known.serial} has "
      f"{len(known.sites)} sites; ask the coordinator which is right"
    )
  roster.check_numbers(known)
  shared = {name: settings.flat(config)[name] for name in names_of_shared()}
  held = held_here(multiprocess(shared, member.own), member)
  if member.role == site_folders.SITE:
    if not held.images:
      raise ValueError(
        f"data={member.own.data} of this site holds no images to score; have the coordinator make "
        "a roster without this site"
      )
    member.limits.policy().check_site(held.images)
  made = offered(config, model)
  keep(site_folders.run_of(folder, made), model)
  site_folders.record(folder, made)
  said = [name for name, n in held.of_class.items() if not n]
  missing = f"; none of {', '.join(said)}, which is allowed" if said else ""
  print(
    f"approved the evaluation of {model.config.name}, model {model.sha256[:12]}, classes "
    f"{', '.join(model.label_names)}, in {config.scoring.score_bins} bins, by "
    f"{config.scoring.num_sites} sites, {counts_leave(config)}; "
    f"{config.aggregation.said(config.scoring.num_sites)}; here {held.images} images{missing}"
  )
  print(f"digest, which all sites must have: {roster.spoken(approval.digest(made))}")


def counts_leave(config: Evaluate) -> str:
  """How counts leave the sites, in words."""
  if not config.scoring.dp_count_noise:
    return "exact counts, no privacy"
  cost = config.scoring.cost(len(names(config.data.label_names)))
  return (
    f"counts with noise of deviation {config.scoring.dp_count_noise:g}, which costs epsilon "
    f"{ledger.claim(cost.epsilon(1))}"
  )


def keep(folder: pathlib.Path, model: Model) -> None:
  """Keeps a copy of a model, which `load` reads."""
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  model_files.save_model(folder / "model", model.trained)
  about = {
    "label_names": list(model.label_names),
    "model": dataclasses.asdict(model.config),
    "ct_window": model.ct_window,
    "grey_bits": model.grey_bits,
    "multi_label": False,
  }
  (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n")


def _read(path: str) -> Evaluate:
  saved = settings.load(pathlib.Path(path).expanduser())
  if unknown := set(saved) - set(settings.flat(Evaluate())):
    raise ValueError(f"config={path} holds {sorted(unknown)}, which this version of the code lacks")
  return settings.replace(Evaluate(), **saved)


def is_one(path: str) -> bool:
  """Whether a configuration is that of an evaluation, and not of a training."""
  file = pathlib.Path(path).expanduser()
  return file.is_file() and settings.read_json(file).get("program") == PROGRAM


def held_here(config: Evaluate, member: Member) -> Held:
  """Counts the images that would be scored at a site, without decoding more than it must.

  Raises:
    ValueError, FileNotFoundError: as `scored_images.of_source`.
  """
  classes = names(config.data.label_names)
  if not member.has_images or imageless.is_empty(config.data.data):
    return Held(dict.fromkeys(classes, 0), 0)
  inputs.source(config.data)
  splits = inputs.listed(config.data, classes)
  if "test" not in splits and config.scoring.held_out:
    return approving.counted([scored_images.of_source(config, classes)], classes)
  return approving.counted([splits["test"]] if "test" in splits else splits.values(), classes)


def about(config: Evaluate, model: Model) -> dict[str, Any]:
  """What reports say of the settings, which are the same at all sites."""
  return {
    "model": model.config.name,
    "image_size": model.config.image_shape[0],
    "seed": config.seed,
    **dataclasses.asdict(config.scoring),
    "model_sha256": model.sha256,
  }
