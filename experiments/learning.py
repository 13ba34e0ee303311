"""From settings to functions: the model, its loss, the sites' recipe, the algorithm and the
aggregator.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import private
from experiments.settings import Train, fractions
from primia_jax import (
  algorithms,
  federated,
  local,
  models,
  pretrained,
  robust,
  secagg,
  site_privacy,
  sites,
)
from primia_jax.data import augment
from primia_jax.privacy.plan import Plan, SiteLevel, StepPlan
from primia_jax.secagg import graph
from primia_jax.types import Array, Key, LossFn, ModelState, Params

AUGMENTATIONS = {
  "none": augment.Augmentation(),
  "light": augment.Augmentation(
    rotation_degrees=8, translation=0.05, scale=0.1, contrast=0.2, brightness=0.1
  ),
  "strong": augment.Augmentation(
    rotation_degrees=12,
    translation=0.08,
    scale=0.15,
    shear_degrees=5,
    contrast=0.4,
    brightness=0.15,
    gamma=0.4,
    noise=0.03,
    blur=1.0,
    cutout=0.3,
  ),
}
SERVER_OPTIMIZERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
ALGORITHMS = ("fedavg", "fedprox", *SERVER_OPTIMIZERS, "scaffold", "fednova", "fedbn")
_CORRUPT_FRACTION = 0.1  # of a site's peers, with which the degree of a sparse graph reckons
_LOST_FRACTION = 0.1  # of the sites, with which it reckons where they are lost in earnest
_MIN_FRACTION_BITS = 10  # an update's numbers are off by less than 1/2048
_COUNT_BITS = 32  # of the sums of a few counts, whatever a ring of updates has
_DROPOUTS = 1  # use of the seed
_INITIAL = 7  # what the key of the initial parameters is folded with
_MEAN, _STD = (
  0.5,
  0.25,
)  # of a typical radiograph; fixed, so that no statistic of anybody's images is needed


def check(settings: Train, federated: bool = True) -> None:
  """Checks what no single part can check by itself, before any work; what only a federation needs
  if it is one.

  Raises:
    ValueError: naming the setting and the cure.
  """
  s = settings
  choices = {
    "algorithm": ALGORITHMS,
    "weighting": ("examples", "uniform"),
    "optimizer": ("sgd", "momentum", "adam", "adamw"),
    "schedule": ("constant", "cosine"),
    "channels": (1, 3),
    "secagg": ("pairwise", "bell", "none"),
    "norm": ("", *models.NORMS),
    "pool": models.POOLS,
  }
  for name, allowed in choices.items():
    if getattr(s, name) not in allowed:
      raise ValueError(f"{name}={getattr(s, name)!r}; use one of {', '.join(map(str, allowed))}")
  for name in (
    "rounds",
    "num_sites",
    "batch_size",
    "image_size",
    "learning_rate",
    "phantom_images",
  ):
    if not getattr(s, name) > 0:
      raise ValueError(f"{name}={getattr(s, name)} must be positive")
  for name in (
    "sites_per_round",
    "sync_batches",
    "patience",
    "sites_in_memory",
    "secagg_peers",
    "warmup_rounds",
    "mixup",
  ):
    if getattr(s, name) < 0:
      raise ValueError(f"{name}={getattr(s, name)} must not be negative")
  for name in ("validation_fraction", "test_fraction"):
    if not 0 < getattr(s, name) < 1:
      raise ValueError(f"{name}={getattr(s, name)} must lie between 0 and 1")
  if s.sites_per_round > s.num_sites:
    raise ValueError(f"sites_per_round={s.sites_per_round} of num_sites={s.num_sites}; 0 takes all")
  if not s.sync_batches and s.sync_epochs < 1:
    raise ValueError(f"sync_epochs={s.sync_epochs} must be at least 1, or set sync_batches")
  if s.algorithm == "scaffold" and s.optimizer != "sgd":
    raise ValueError(
      f"scaffold is sound with optimizer=sgd only, not {s.optimizer} (Karimireddy et al. 2020)"
    )
  if s.algorithm == "fednova" and s.optimizer not in ("sgd", "momentum"):
    raise ValueError(
      f"fednova needs optimizer=sgd or momentum, not {s.optimizer}: it must know the steps' weights"
    )
  if s.algorithm in ("scaffold", "fednova") and s.keep_optimizer:
    raise ValueError(
      f"{s.algorithm} starts the sites' optimiser anew each round; leave keep_optimizer off"
    )
  if s.keep_optimizer and 0 < s.sites_per_round < s.num_sites and s.sites_in_memory:
    raise ValueError(
      "keep_optimizer needs every site's state in memory; leave sites_in_memory at 0"
    )
  kind = s.partition.partition(":")[0]
  if kind not in ("auto", "iid", "unequal", "dirichlet", "column"):
    raise ValueError(f"partition={s.partition!r}; use auto, iid, unequal, dirichlet or column:NAME")
  fractions(s.site_fractions)
  if s.pretrained and not pathlib.Path(s.pretrained).is_file():
    raise FileNotFoundError(f"pretrained={s.pretrained}: there is no such file")
  if s.placement not in ("auto", "mesh", "processes"):  # these would start JAX
    sites.parse_placement(s.placement)
  if not 0 <= s.dropout_rate < 1:
    raise ValueError(f"dropout_rate={s.dropout_rate} must lie in [0, 1)")
  if s.dp_average and s.algorithm == "fedbn":
    raise ValueError(
      "dp_average averages global parameters, and fedbn keeps some at each site; use dp_average=0"
    )
  augmentation(s.augment)
  model_config(s, 3)
  private.check(s, federated)
  if federated:
    _check_aggregation(s)
    if s.placement == "processes":
      _check_processes(s)


def _check_aggregation(settings: Train) -> None:
  """Refuses what the library would refuse once the images are loaded."""
  s = settings
  num_sites = s.sites_per_round or s.num_sites
  by_rule = aggregator(s, num_sites).rule is not None
  if by_rule and (s.weighting != "uniform" or s.algorithm in ("scaffold", "fednova")):
    raise ValueError(
      f"aggregation={s.aggregation} treats all sites alike, but {s.algorithm} with "
      f"weighting={s.weighting} weighs "
      "their messages; use weighting=uniform, and neither scaffold nor fednova"
    )
  kind, _, bad = s.aggregation.partition("=")
  if kind == "krum" and num_sites <= 2 * int(bad) + 2:
    raise ValueError(
      f"aggregation={s.aggregation} needs more than {2 * int(bad) + 2} sites a round; there are "
      f"{num_sites}"
    )
  if s.dropout_rate and is_secure(s) and not s.secagg_threshold:
    raise ValueError(
      f"dropout_rate={s.dropout_rate} loses sites, which masks survive with a secagg_threshold only"
    )
  if s.norm == "batch" and not is_secure(s) and s.algorithm != "fedbn":
    raise ValueError(
      f"norm=batch under aggregation={s.aggregation}: each site's BatchNorm statistics would leave "
      f"it in the clear; "
      "use aggregation=secure, norm=group, or algorithm=fedbn, which keeps them at the site"
    )


def _check_processes(settings: Train) -> None:
  s = settings
  if not is_secure(s):
    raise ValueError(
      f"placement=processes sends nothing but masked sums, and not aggregation={s.aggregation} "
      f"with secagg={s.secagg}; "
      "use aggregation=secure and secagg=pairwise or bell"
    )
  if s.algorithm == "fedbn" or 0 < s.sites_per_round < s.num_sites:
    raise ValueError("placement=processes works with all sites in every round, and not with fedbn")
  if s.dropout_rate:
    raise ValueError(
      f"dropout_rate={s.dropout_rate} simulates losses, and placement=processes has them in "
      f"earnest: end a process"
    )
  if s.sites_in_memory:
    raise ValueError(
      f"sites_in_memory={s.sites_in_memory}: with placement=processes each holds its own site; use "
      f"0"
    )
  if s.dp == "patient" and s.data == "phantom":
    raise ValueError(
      "dp=patient with placement=processes: the phantom has one image a patient; use dp=example"
    )


def augmentation(text: str) -> augment.Augmentation:
  """Reads the setting `augment`.

  Raises:
    ValueError: an unknown name or a value that is no number.
  """
  if text in AUGMENTATIONS:
    return AUGMENTATIONS[text]
  known = [field.name for field in dataclasses.fields(augment.Augmentation)]
  values: dict[str, float] = {}
  for part in text.split(","):
    name, _, value = part.partition("=")
    try:
      values[name.strip()] = int(value) if name.strip() == "elastic_grid" else float(value)
    except ValueError:
      raise ValueError(
        f"augment: {part!r} is not NAME=NUMBER; or use {', '.join(AUGMENTATIONS)}"
      ) from None
  if unknown := sorted(set(values) - set(known)):
    raise ValueError(f"augment: unknown {unknown}; there are {', '.join(known)}")
  return augment.Augmentation(**values)  # type: ignore[arg-type]


def model_config(settings: Train, num_classes: int) -> models.ModelConfig:
  """The model that the settings describe; `models.build` checks it."""
  size = settings.image_size
  stem = settings.stem or ("7x7" if size >= 160 else "3x3/2" if size >= 48 else "3x3")
  config = models.ModelConfig(
    name=settings.model,
    num_classes=num_classes,
    image_shape=(size, size, settings.channels),
    norm=settings.norm or None,
    pool=settings.pool,
    weight_standardisation=settings.weight_standardisation,
    width=settings.width,
    dropout=settings.dropout,
    stem=stem if settings.model == "resnet18" else "7x7",
    head=settings.head or "dense",
  )
  models.build(config)
  return config


def normalise(images: Array) -> Array:
  """uint8 images, or float32 ones in [0, 1], as models take them."""
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 255
  return (images - _MEAN) / _STD


def prepare(settings: Train) -> Callable[[Key, Array, Array], tuple[Array, Array]]:
  """(key, uint8 images, targets [B, L]) -> augmented, mixed and normalised images, and their
  targets.
  """
  config = augmentation(settings.augment)

  def apply(key: Key, images: Array, targets: Array) -> tuple[Array, Array]:
    augment_key, mixup_key = jax.random.split(key)
    images = augment.augment(augment_key, images.astype(jnp.float32) / 255, config)
    if settings.mixup:
      mixed = augment.mixup(mixup_key, images, targets, settings.mixup)
      images, targets = mixed.images, augment.mixed_labels(mixed, targets.shape[-1])
    return normalise(images), targets

  return apply


def schedule(settings: Train) -> Callable[[Array], Array]:
  """The sites' learning rate as a function of time in rounds: linear warm-up, then constant or
  cosine.
  """
  peak, warmup, rounds = settings.learning_rate, settings.warmup_rounds, float(settings.rounds)

  def rate(time: Array) -> Array:
    decay = jnp.float32(1)
    if settings.schedule == "cosine":
      done = jnp.clip((time - warmup) / max(rounds - warmup, 1e-6), 0, 1)
      decay = 0.5 * (1 + jnp.cos(jnp.pi * done))
    return peak * jnp.minimum((time + 0.05) / max(warmup, 0.05), 1.0) * decay

  return rate


def is_secure(settings: Train) -> bool:
  """Whether updates are masked."""
  return settings.aggregation == "secure" and settings.secagg != "none"


def loss(settings: Train, model: models.Model, num_classes: int, prepared: bool = False) -> LossFn:
  """What a site minimises; `prepared` where images are `models.features` already."""
  as_they_are = lambda key, images, targets: (images, targets)
  prepare_fn = as_they_are if prepared else prepare(settings)
  return local.classification_loss(model.apply, prepare_fn, num_classes, settings.label_smoothing)


def recipe(
  settings: Train, loss_fn: LossFn, steps: local.Steps, privacy: Plan | None = None
) -> local.Recipe:
  """How a site trains, by its plan of private steps if it has one."""
  optimizers: dict[str, local.Optimizer] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=settings.momentum),
    "adam": optax.adam,
    "adamw": functools.partial(optax.adamw, weight_decay=settings.weight_decay),
  }
  how = optimizers[settings.optimizer], schedule(settings)
  if isinstance(privacy, StepPlan):
    return privacy.recipe(*how)
  return local.Recipe(steps, local.gradients(loss_fn), None, *how)


def steps(settings: Train, sizes: tuple[int, ...]) -> local.Steps:
  """What a site does in a round; the smallest and largest site's sizes become public."""
  by_batches = settings.sync_batches > 0
  return local.epochs(
    settings.batch_size,
    max(sizes),
    min_examples=min(sizes),
    num_epochs=None if by_batches else settings.sync_epochs,
    num_steps=settings.sync_batches if by_batches else None,
  )


def algorithm(
  settings: Train, recipe: local.Recipe, privacy: Plan | None = None
) -> federated.Algorithm:
  """The federated algorithm that the settings name, and what bounds and averages its updates."""
  out = _algorithm(settings, recipe)
  if isinstance(privacy, SiteLevel):
    noise = 0.0 if privacy.noise else privacy.noise_multiplier
    out = site_privacy.bounded(out, privacy.clip, noise)
  return algorithms.averaged(out, settings.dp_average) if settings.dp_average else out


def _algorithm(settings: Train, recipe: local.Recipe) -> federated.Algorithm:
  s = settings
  options = {"weighting": s.weighting, "keep_optimizer": s.keep_optimizer}
  if s.algorithm == "fedprox":
    return algorithms.fedprox(recipe, s.proximal, **options)
  if s.algorithm == "scaffold":
    return algorithms.scaffold(recipe, s.num_sites)
  if s.algorithm == "fednova":
    momentum = s.momentum if s.optimizer == "momentum" else 0.0
    return algorithms.fednova(recipe, momentum=momentum, weighting=s.weighting)  # type: ignore[arg-type]
  if s.algorithm == "fedbn":
    return algorithms.fedbn(
      recipe, lambda path: models.is_norm_parameter(path.split("/")), **options
    )
  if s.algorithm in SERVER_OPTIMIZERS:
    rate = s.server_learning_rate
    optimizer = {
      "fedavgm": optax.sgd(rate, s.server_momentum),
      "fedadam": optax.adam(rate, b2=0.99, eps=1e-3),  # Reddi et al. 2021, section 5
      "fedyogi": optax.yogi(rate, b2=0.99, eps=1e-3),
      "fedadagrad": optax.adagrad(rate, eps=1e-3),
    }[s.algorithm]
    return algorithms.fedopt(recipe, optimizer, **options)._replace(name=s.algorithm)
  return algorithms.fedavg(recipe, **options)  # type: ignore[arg-type]


def alone(settings: Train, recipe: local.Recipe) -> federated.Algorithm:
  """Ordinary training as a federation of one site, whose optimiser keeps its state."""
  out = algorithms.fedavg(recipe, weighting="uniform", keep_optimizer=True, name="one site")
  return algorithms.averaged(out, settings.dp_average) if settings.dp_average else out


def initial(settings: Train, config: models.ModelConfig, key: Key) -> tuple[Params, ModelState]:
  """The parameters that training starts from: pretrained, or drawn."""
  params, model_state = models.build(config).init(jax.random.fold_in(key, _INITIAL))
  if settings.pretrained:
    return pretrained.load_pretrained(settings.pretrained, params, model_state, new_head=True)
  return params, model_state


def aggregator(settings: Train, num_sites: int) -> federated.Aggregator:
  """How the updates of so many sites are combined.

  Raises:
    ValueError: an unknown rule, or one that cannot work with so many sites.
  """
  kind, _, argument = settings.aggregation.partition("=")
  if kind == "secure" and not argument:
    if not is_secure(settings):
      return federated.in_the_clear()
    config = secure_sum(settings, num_sites)
    if (
      config.fixed.fraction_bits < _MIN_FRACTION_BITS and settings.dp_noise != "distributed"
    ):  # has its own grid
      raise ValueError(
        f"secagg_bits={settings.secagg_bits} for {num_sites} sites and numbers up to "
        f"{config.max_abs} leave "
        f"{config.fixed.fraction_bits} fraction bits of {_MIN_FRACTION_BITS} at least, too coarse "
        f"for updates; raise "
        "secagg_bits or lower secagg_max_abs"
      )
    return federated.securely(config)
  if kind == "clear" and not argument:
    return federated.in_the_clear()
  if kind == "median" and not argument:
    return federated.by_rule("median", robust.median())
  try:
    if kind == "trimmed_mean":
      return federated.by_rule(settings.aggregation, robust.trimmed_mean(float(argument)))
    if kind == "krum":
      return federated.by_rule(settings.aggregation, robust.krum(int(argument)))
  except ValueError as error:
    raise ValueError(f"aggregation={settings.aggregation!r}: {error}") from error
  raise ValueError(
    f"aggregation={settings.aggregation!r}; use secure, clear, median, trimmed_mean=FRACTION or "
    f"krum=BAD_SITES"
  )


def secure_sum(settings: Train, num_sites: int, max_abs: float | None = None) -> secagg.SecureSum:
  """The encoding and masks of a sum of updates, or of counts up to max_abs; `threshold` counts a
  site and its peers.
  """
  peers, threshold = settings.secagg_peers, settings.secagg_threshold
  if settings.placement == "processes" and not threshold:
    threshold = -1  # processes may end at any time, so the protocol between them always has one
  if peers == (settings.sites_per_round or settings.num_sites) - 1:
    peers = 0  # all others in a round means all others in the sums over all sites, too
  if settings.secagg == "bell" and not peers:
    apart = (
      settings.placement == "processes"
    )  # where the server is not trusted, and the setting loses no site
    lost = _LOST_FRACTION if apart else settings.dropout_rate
    peers, needed = graph.degree_for(num_sites, _CORRUPT_FRACTION, lost, malicious_server=apart)
    threshold = threshold if threshold > 0 or (apart and peers == num_sites - 1) else needed
  holders = (peers or num_sites - 1) + 1
  return secagg.secure_sum(
    num_sites,
    settings.secagg_max_abs if max_abs is None else max_abs,
    num_bits=settings.secagg_bits if max_abs is None else max(settings.secagg_bits, _COUNT_BITS),
    num_peers=peers or None,
    threshold=2 * holders // 3 + 1 if threshold < 0 else threshold or None,
  )


def min_survivors(secure: secagg.SecureSum) -> int | None:
  """The fewest sites in a sum for which noise is calibrated, in proportion to the threshold; None
  without one.
  """
  if secure.threshold is None:
    return None
  return max(2, -(-secure.num_sites * secure.threshold // (secure.num_peers + 1)))


def private_aggregator(
  settings: Train,
  num_sites: int,
  privacy: Plan | None,
  params: Params,
  model_state: ModelState,
) -> federated.Aggregator:
  """How updates are combined: `aggregator`, or with noise that the sites make together."""
  if not isinstance(privacy, SiteLevel) or privacy.noise is None:
    return aggregator(settings, num_sites)
  return site_privacy.noised(
    privacy.noise, secure_sum(settings, num_sites), params, model_state, privacy.clip
  )


def dropouts(settings: Train, round_index: int, num_sites: int) -> secagg.Dropouts | None:
  """The sites that a simulated round loses, each at the setting's rate, half of them before they
  mask.
  """
  if not settings.dropout_rate:
    return None
  rng = np.random.default_rng((settings.seed, _DROPOUTS, round_index))
  lost, early = rng.random(num_sites) < settings.dropout_rate, rng.random(num_sites) < 0.5
  return secagg.Dropouts(lost & early, lost & ~early)
