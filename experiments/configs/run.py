"""All settings of a training run, and the checks that concern several records of them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from primia_jax import federated, local, models, site_privacy, sites, summation
from primia_jax.privacy import plan

from ..settings import require, setting
from . import tasks
from .aggregation import Aggregation, Masked, min_survivors
from .comparison import Comparison
from .data import NO_IMAGES, Data, Hospitals
from .disclosure import Disclosure
from .model import Augment, Model
from .privacy import Privacy
from .training import SERVER_OPTIMIZERS, Federation, Training, build_alone

_NOMINAL_CLASSES = 3  # for building before the images are known


@dataclasses.dataclass(frozen=True)
class Train:
  """Everything that decides the result of a training run."""

  seed: int = setting(0, "seed of everything random except secret keys and private noise")
  record_transcript: bool = setting(
    False,
    "keep what crossed in each round, for audit_privacy: models, sums, and each site's own update "
    "as a server without secure aggregation sees it. The run is then NOT PRIVATE",
  )
  data: Data = dataclasses.field(default_factory=Data)
  hospitals: Hospitals = dataclasses.field(default_factory=Hospitals)
  model: Model = dataclasses.field(default_factory=Model)
  augment: Augment = dataclasses.field(default_factory=Augment)
  training: Training = dataclasses.field(default_factory=Training)
  federation: Federation = dataclasses.field(default_factory=Federation)
  aggregation: Aggregation = dataclasses.field(default_factory=Aggregation)
  privacy: Privacy = dataclasses.field(default_factory=Privacy)
  disclosure: Disclosure = dataclasses.field(default_factory=Disclosure)
  comparison: Comparison = dataclasses.field(default_factory=Comparison)

  def __post_init__(self):
    h, f, p = self.hospitals, self.federation, self.privacy
    require(0 <= self.seed < 2**32, "seed", self.seed, "must lie between 0 and 4294967295")
    if f.sites_per_round > h.num_sites:
      raise ValueError(
        f"sites_per_round={f.sites_per_round} of num_sites={h.num_sites}; 0 takes all"
      )
    if self.data.site_data:
      self._check_sources()
    if self.training.keep_optimizer and h.sites_in_memory and 0 < f.sites_per_round < h.num_sites:
      raise ValueError(
        f"keep_optimizer=True with sites_in_memory={h.sites_in_memory} and "
        f"sites_per_round={f.sites_per_round} needs every site's state in memory; use "
        "sites_in_memory=0 or --nokeep_optimizer"
      )
    if f.placement not in ("auto", "mesh", "flower"):  # these would start JAX
      sites.parse_placement(f.placement)
    self.training.check_averages(p.dp_average, f.algorithm, p.dp)
    if self.training.patience and not p.validates:
      raise ValueError(
        f"patience={self.training.patience} needs scores of validation images, which are unused "
        f"with dp={p.dp} and validation={p.validation}; use patience=0, or validation=exact, which "
        "releases them uncharged"
      )
    if not h.validation_fraction and p.validates:
      raise ValueError(
        f"validation_fraction={h.validation_fraction} holds no images out, and validation="
        f"{p.validation} with dp={p.dp} chooses the best round by them; use validation=none, or a "
        "fraction such as 0.15"
      )
    self._check_task()
    if self.model.first_trained:
      self._check_frozen()
    if p.dp != "none":
      self._check_privacy()

  @property
  def sites_in_round(self) -> int:
    """Sites that take part in a round."""
    return self.federation.sites_per_round or self.hospitals.num_sites

  @property
  def in_processes(self) -> bool:
    """Whether each site has a process of its own."""
    return self.federation.placement == "flower"

  def check_federation(self) -> None:
    """Refuses what cannot be federated; not called where all images train in one place.

    Raises:
      ValueError: naming the setting and the cure.
    """
    a, f, p = self.aggregation, self.federation, self.privacy
    if a.dropout_rate and a.is_secure and not a.secagg_threshold and not self.in_processes:
      raise ValueError(
        f"dropout_rate={a.dropout_rate} drops sites, and masked sums tolerate that only with a "
        "secagg_threshold"
      )
    if self.model.norm == "batch" and not a.is_secure and f.algorithm != "fedbn":
      raise ValueError(
        f"norm=batch under aggregation={a.aggregation}: each site's BatchNorm statistics would "
        "leave it in the clear; use aggregation=secure, norm=group, norm=affine with pretrained "
        "weights, or algorithm=fedbn, which keeps them at the site"
      )
    if p.dp_clip_quantile and a.aggregation not in ("secure", "clear"):
      raise ValueError(
        f"aggregation={a.aggregation} does not give the share of sites within the clip, which "
        "moves it; use secure or clear, or dp_clip_quantile=0"
      )
    if self.record_transcript and p.dp_noise == "distributed":
      raise ValueError(
        "record_transcript=True keeps single updates, and with dp_noise=distributed only their sum "
        "carries the noise that the ledger is charged for; use dp_noise=site, or no transcript"
      )
    if p.dp_noise == "distributed" and (not a.is_secure or not a.secagg_threshold):
      raise ValueError(
        "dp_noise=distributed protects the sum of at least secagg_threshold sites and no single "
        "update; use aggregation=secure and set secagg_threshold"
      )
    if self.in_processes:
      self._check_processes()
    self._check_floors()

  @property
  def fewest_in_sum(self) -> int:
    """The fewest sites over which a sum of this run may open."""
    n = self.sites_in_round
    if not self.aggregation.is_secure:
      return n
    return min_survivors(self.aggregation.secure_sum(n, n, self.in_processes)) or n

  def _check_floors(self) -> None:
    floor = self.disclosure.fewest_sites
    if floor and (least := self.fewest_in_sum) < floor:
      raise ValueError(
        f"fewest_sites={floor}, and a sum of this run may be of {least} sites; take more sites in "
        "a round, or a higher secagg_threshold"
      )
    of_pixels = tasks.of(self.model.model).of_pixels
    if self.disclosure.fewest_patients and (of_pixels or self.data.is_multi):
      what = f"model={self.model.model}" if of_pixels else "several labels an image"
      raise ValueError(
        f"fewest_patients={self.disclosure.fewest_patients} with {what}: the report has no floors "
        "for these scores; use 0"
      )

  def _check_frozen(self) -> None:
    if self.record_transcript:
      raise ValueError(
        f"first_trained={self.model.first_trained} with record_transcript=True: audits attack "
        "whole models; record a run that trains all parts"
      )

  def _check_sources(self) -> None:
    d, h = self.data, self.hospitals
    if d.data != Data().data:
      raise ValueError(
        f"data={d.data!r} and site_data={d.site_data!r}: give one of them; site_data has a source "
        "for each site"
      )
    if len(d.sources) != h.num_sites:
      raise ValueError(
        f"site_data={d.site_data!r} names {len(d.sources)} sources for num_sites={h.num_sites}; "
        "give one for each site"
      )
    if "phantom" in d.sources:
      raise ValueError(
        f"site_data={d.site_data!r}: the phantom is dealt to all sites; use data=phantom"
      )
    if h.partition != "auto" or h.site_fractions or h.sites_in_memory:
      raise ValueError(
        f"site_data deals no images and loads all of a site, so partition={h.partition}, "
        f"site_fractions={h.site_fractions!r} and sites_in_memory={h.sites_in_memory} have no "
        "meaning; leave them out"
      )

  def _check_task(self) -> None:
    t, name = self.training, self.model.model
    sources = self.data.sources or (self.data.data,)
    kinds = {source.partition(":")[0] for source in sources} - {NO_IMAGES}
    self.comparison.check(name in models.SEGMENTERS, self.data.is_multi, "phantom" in kinds)
    if self.data.is_multi:
      self._check_multi()
    if name not in models.SEGMENTERS:
      if "msd" in kinds:
        raise ValueError(
          f"model={name} classifies images, and msd:PATH has masks; use "
          f"--model={' or '.join(models.SEGMENTERS)}"
        )
      return
    if kinds - {"npz", "msd"}:
      raise ValueError(
        f"model={name} learns masks, and data={self.data.site_data or self.data.data} has none; "
        "use npz:PATH with train_masks, or msd:PATH"
      )
    if t.class_weights:
      raise ValueError(
        f"class_weights=True weighs images by class, and {name} learns masks, whose Dice loss "
        "weighs classes alike; use --noclass_weights"
      )
    if self.augment.mixup or t.label_smoothing:
      raise ValueError(
        f"mixup={self.augment.mixup} and label_smoothing={t.label_smoothing} are for classes of "
        f"images, and {name} learns masks; leave them out"
      )

  def _check_multi(self) -> None:
    if self.model.model in models.SEGMENTERS:
      raise ValueError(
        f"model={self.model.model} learns masks, and multi_label is for images with several classes"
      )
    if self.training.class_weights:
      raise ValueError(
        "class_weights=True weighs images by their class, and with multi_label an image has "
        "several; use --noclass_weights"
      )
    if self.record_transcript:
      raise ValueError(
        "record_transcript=True: audits attack images of one class; leave it out with multi_label"
      )

  def _check_privacy(self) -> None:
    f, p, t = self.federation, self.privacy, self.training
    if self.augment.mixup:
      raise ValueError(
        f"mixup={self.augment.mixup}: mixup blends the images of several units, so clipping bounds "
        "no single one; use mixup=0"
      )
    if self.model.norm == "batch":
      raise ValueError(
        "norm=batch mixes the images of a batch, which clipping cannot bound; use norm=group, or "
        "norm=affine with pretrained weights"
      )
    if p.dp != "site":
      if t.sync_batches:
        raise ValueError(
          f"sync_batches={t.sync_batches}: dp={p.dp} counts rounds in sync_epochs, of as many "
          "steps at every site; use sync_batches=0"
        )
      if t.class_weights and not p.dp_count_noise:
        raise ValueError(
          f"class_weights with dp_count_noise={p.dp_count_noise:g} releases exact class counts; "
          "set dp_count_noise, or --noclass_weights"
        )
      return
    if t.class_weights:
      raise ValueError(
        "class_weights=True: class counts of a site cannot be bounded as one unit's; use "
        "--noclass_weights with dp=site"
      )
    if f.weighting != "uniform":
      raise ValueError(
        f"weighting={f.weighting} reveals the sizes of sites, which dp=site protects; use "
        "weighting=uniform"
      )
    if f.algorithm not in ("fedavg", "fedprox", *SERVER_OPTIMIZERS):
      raise ValueError(
        f"dp=site bounds one update of a site, and {f.algorithm} sends more; use fedavg, fedprox, "
        + ", ".join(SERVER_OPTIMIZERS)
      )

  def _check_processes(self) -> None:
    a, h = self.aggregation, self.hospitals
    if self.record_transcript:
      raise ValueError(
        "record_transcript=True with placement=flower: a site's update never leaves its process "
        "unmasked, so only a simulation can record it; use another placement"
      )
    if self.privacy.dp != "none" and (seed := self.privacy.dp_seed) >= 0:
      raise ValueError(
        f"dp_seed={seed} with placement=flower: whoever knows it knows noise and batches of all "
        "sites, so that nobody is protected; leave dp_seed out, or use another placement"
      )
    if not a.is_secure:
      raise ValueError(
        f"placement=flower sends nothing but masked sums, and not aggregation={a.aggregation} "
        f"with secagg={a.secagg}; use aggregation=secure and secagg=pairwise or bell"
      )
    if a.dropout_rate:
      raise ValueError(
        f"dropout_rate={a.dropout_rate} simulates losses; with placement=flower sites are "
        "really lost: end a process"
      )
    if h.sites_in_memory:
      raise ValueError(
        f"sites_in_memory={h.sites_in_memory}: with placement=flower each holds its own site; use 0"
      )
    if self.privacy.by_patient and self.data.data == "phantom" and not self.data.site_data:
      raise ValueError(
        "dp=patient with placement=flower: the phantom has one image a patient; use dp=example"
      )


def rehearse(config: Train, is_federated: bool = True) -> None:
  """Builds everything that needs no images, so that the library's refusals come before work.

  Only what depends on the sizes of sites is refused later, e.g. a delta that is too large.

  Raises:
    ValueError, FileNotFoundError: naming the setting and the cure.
  """
  model_config = config.model.config(config.data, _NOMINAL_CLASSES)
  model, t = config.model.trained(model_config), config.training
  if config.model.pretrained:
    empty = jax.eval_shape(models.build(model_config).init, jax.random.key(0))
    config.model.load(model_config, *empty)
  task = tasks.of(config.model.model, config.data.is_multi)
  loss = task.loss(model.apply, task.augment(config.augment), _NOMINAL_CLASSES, t.label_smoothing)
  steps = t.build_steps((2 * t.batch_size,))
  recipe = local.Recipe(steps, local.gradients(loss), None, t.build_optimizer(), t.build_schedule())
  if not is_federated:
    if config.privacy.dp == "site":
      raise ValueError(
        "dp=site protects sites of a federation; one site alone has dp=example or patient"
      )
    if config.record_transcript:
      raise ValueError(
        "record_transcript=True: a site that trains alone sends nothing; use primia-train"
      )
    build_alone(recipe, t.average_decay)
    return
  config.check_federation()
  built = build_federation(config, recipe, model)
  num_sites = config.hospitals.num_sites
  federated.federate(built.algorithm, built.summation, sites.scan(), num_sites)
  n, of_counts = config.sites_in_round, 1.0
  config.aggregation.secure_sum(num_sites, n, config.in_processes, of_counts)


class Joined(NamedTuple):
  """How sites train together.

  Attributes:
    algorithm, summation: what is trained, and how updates are combined.
    privacy: of whole sites; None without.
  """

  algorithm: federated.Algorithm
  summation: summation.Summation
  privacy: plan.SiteLevel | None


def build_federation(
  config: Train, recipe: local.Recipe, model: models.Model, masked: Masked = summation.masked
) -> Joined:
  """Builds the rounds of a federation from how one site trains; `masked` as in `Aggregation.build`.

  Raises:
    ValueError: parts that do not go together.
  """
  n, processes, privacy, coding = config.sites_in_round, config.in_processes, None, None
  algorithm = config.federation.build(config.training, recipe, config.hospitals.num_sites)
  if config.privacy.dp == "site":
    params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    privacy = build_site_level(config, models.num_parameters(params))
    algorithm = site_privacy.private(algorithm, privacy)
    if privacy.noise is not None:
      secure = config.aggregation.secure_sum(n, n, processes)
      coding = site_privacy.distributed_noise(
        privacy.noise, secure, params, model_state, privacy.clip
      )
  summed = config.aggregation.build(n, processes, masked, coding)
  return Joined(algorithm, config.aggregation.losing(summed, config.seed), privacy)


def build_site_level(config: Train, num_parameters: int) -> plan.SiteLevel:
  """The plan of whole sites; see `Privacy.build_sites`."""
  least, n = None, config.sites_in_round
  if config.aggregation.is_secure:
    least = min_survivors(config.aggregation.secure_sum(n, n, config.in_processes))
  return config.privacy.build_sites(
    config.training,
    config.hospitals.num_sites,
    n,
    num_parameters,
    config.aggregation.secagg_bits,
    least,
    config.aggregation.num_colluding(n),
  )
