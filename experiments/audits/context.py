"""What the parts of an audit share: the run, its images and its model, read once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from primia_jax import models
from primia_jax.attacks import learned, views
from primia_jax.data.dataset import Dataset
from primia_jax.data.sites import Part
from primia_jax.privacy import ledger
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.chain import Chain
from primia_jax.types import Array, Key, LossFn, ModelState, Params, PyTree

from .. import folders, inputs, ledgers, model_files, settings, transcripts
from ..configs import Train, tasks
from ..configs.model import normalise

ARM = "federated"  # the folder of the arm that is audited
_PUBLIC, _FEWEST = 1024, 64  # public images of a learned prior, at most and at least


@dataclasses.dataclass(frozen=True)
class Effort:
  """How hard to attack."""

  audit_seed: int = settings.setting(0, "seed of the attacks")
  candidates: int = settings.setting(
    300, "images of the sites, and as many others, that an attacker tries to tell apart"
  )
  victims: int = settings.setting(
    8, "images of which an attacker tries to reconstruct or recognise the update"
  )
  restarts: int = settings.setting(1, "restarts of a reconstruction")
  iterations: int = settings.setting(600, "steps of a reconstruction; the literature takes 4,800")
  canaries: int = settings.setting(3072, "canaries of the empirical epsilon, in runs of 64")
  shadows: int = settings.setting(
    8, "shadow models of the membership attack, an even number; the literature takes 64 and more"
  )
  grid_images: int = settings.setting(
    96, "--grid: images of all sites together in its largest cell; the literature takes 512 a site"
  )
  attacked_rounds: int = settings.setting(3, "recorded rounds that are attacked, spread evenly")

  def __post_init__(self):
    for name, value in settings.flat(self).items():
      least = {"audit_seed": 0, "shadows": 8}.get(name, 1)
      settings.require(value >= least, name, value, f"must be at least {least}")
    even = self.shadows % 2 == 0
    settings.require(even, "shadows", self.shadows, "must be even, for complementary halves")


class Trained(NamedTuple):
  """The model of a finished run.

  Attributes:
    model: its functions.
    params, model_state: of the model, or of the first site's where FedBN was used.
    label_names: the classes.
    config: of the model.
  """

  model: models.Model
  params: Params
  model_state: ModelState
  label_names: tuple[str, ...]
  config: models.ModelConfig


@dataclasses.dataclass(frozen=True)
class Context:
  """A finished run, as the parts of an audit see it.

  Attributes:
    run_dir: its folder.
    output: where pictures go.
    effort: how hard to attack.
    note: tells the progress bar what is at work.
  """

  run_dir: pathlib.Path
  output: pathlib.Path
  effort: Effort
  note: Callable[[str], None] = lambda text: None

  @functools.cached_property
  def config(self) -> Train:
    """The run's settings.

    Raises:
      ValueError: parts of its model were frozen.
    """
    config = folders.settings_of(str(self.run_dir))
    if config.model.first_trained:
      raise ValueError(
        f"run_dir={self.run_dir} was trained with first_trained={config.model.first_trained}: "
        "audits attack whole models; audit a run that trains all parts"
      )
    return config

  @functools.cached_property
  def images(self) -> inputs.Inputs:
    """The run's images, by its own settings.

    Raises:
      ValueError, FileNotFoundError: they are not there any more, or have changed.
    """
    try:
      return inputs.site_images(self.config)
    except (FileNotFoundError, ValueError) as error:
      raise ValueError(f"{error} (the data of the run in {self.run_dir})") from error

  @functools.cached_property
  def trained(self) -> Trained:
    """The model that the run ended with."""
    model, trained, label_names, config = model_files.load_model(str(self.run_dir))
    return Trained(model, *trained[0], label_names, config)

  @functools.cached_property
  def loss_fn(self) -> LossFn:
    """The sites' loss of images as stored, or float32 in [0, 1]; without augmentation."""
    smoothing = self.config.training.label_smoothing

    def prepare(key: Key, images: Array, targets: Array) -> tuple[Array, Array]:
      return normalise(images), targets

    num_classes = len(self.trained.label_names)
    loss = tasks.of(self.config.model.model).loss
    return loss(self.trained.model.apply, prepare, num_classes, smoothing)

  @property
  def of_pixels(self) -> bool:
    """Whether the model gives each pixel a class, so that labels are masks [N, H, W]."""
    return tasks.of(self.config.model.model).of_pixels

  @functools.cached_property
  def fingerprint(self) -> str:
    """A hash of the run: its settings, its report and what was recorded."""
    out = hashlib.sha256()
    for name in (folders.RUN, "metrics.json", "model.json"):
      out.update((self.run_dir / name).read_bytes())
    if self.has_transcript:
      for path in transcripts.paths(self.run_dir / ARM).values():
        out.update(f"{path.name} {path.stat().st_size}".encode())
    return out.hexdigest()

  @property
  def has_transcript(self) -> bool:
    """Whether the run was recorded."""
    return any((self.run_dir / ARM / transcripts.FOLDER).glob("round_*.npz"))

  def rounds(self) -> list[views.Round]:
    """Some recorded rounds, spread evenly over the run, the first and the last among them.

    Raises:
      FileNotFoundError: the run was not recorded.
    """
    paths = list(transcripts.paths(self.run_dir / ARM).values())
    chosen = np.linspace(0, len(paths) - 1, min(self.effort.attacked_rounds, len(paths)))
    return [transcripts.read(paths[int(i)]) for i in np.unique(chosen.round())]

  @functools.cached_property
  def ledgers(self) -> list[Ledger]:
    """What each site was charged; empty without differential privacy."""
    if self.config.privacy.dp == "none":
      return []
    chain = Chain(
      ledgers.folder(self.config.privacy, self.config.data, self.run_dir), read_only=True
    )
    return ledger.of_run(self.run_dir / ARM / ledger.LEDGER, chain)

  @functools.cached_property
  def prior(self) -> PyTree | None:
    """The parameters of an autoencoder of public images; None where there are too few of them."""
    test = self.images.test
    public = np.asarray(test.images[np.arange(min(_PUBLIC, len(test.labels)))])
    if len(public) < _FEWEST:
      return None
    self.note("learned prior, from public images")
    training = learned.Training(steps=1000, batch_size=32)
    key = jax.random.key(self.effort.audit_seed)
    train = jax.jit(lambda images: learned.train(key, images, training).params)
    return train(public.astype(np.float32) / 255)

  @property
  def data_name(self) -> str:
    """What titles say of the images."""
    data = self.config.data.site_data or self.config.data.data
    return "synthetic phantom" if data == "phantom" else data


def protection(config: Train, num_sites: int = 1) -> str:
  """What stands between an adversary and a site's images, where it sees the sum of some sites."""
  parts = [f"sum of {num_sites} sites"] if num_sites > 1 else []
  if (p := config.privacy).dp != "none":
    budget = (
      f"epsilon {p.target_epsilon:g}" if p.target_epsilon else f"noise {p.noise_multiplier:g}"
    )
    parts.append(f"dp={p.dp}, {budget}")
  return ", ".join(parts) or "none"


def take(dataset: Dataset, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(images as stored, labels int32) of some images; masks in place of labels where it has any."""
  labels = dataset.labels if dataset.masks is None else dataset.masks
  return np.asarray(dataset.images[index]), np.asarray(labels)[index].astype(np.int32)


def sites_of(part: Part, sites: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """(indices, the site of each) of all images of some sites."""
  index = [part.sites[i] for i in sites]
  return np.concatenate(index), np.repeat(sites, [len(rows) for rows in index])


def jitted(fn: Callable) -> Callable:
  """fn, compiled, with host arrays as results."""
  run = jax.jit(fn)
  return lambda *args: jax.tree.map(np.asarray, run(*args))
