"""The settings of the binaries: a dataclass field is a flag, a line of `config.json` and a row of
the report.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from absl import flags


def _(default: Any, text: str) -> Any:
  return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Data:
  """Which images, in which form."""

  data: str = _(
    "phantom", "images: phantom (synthetic), folder:PATH (a folder or tar), npz:PATH, or tfds:NAME"
  )
  image_size: int = _(64, "height and width in pixels to which images are resized")
  channels: int = _(1, "1 (grey) or 3 (RGB)")
  label_names: str = _(
    "", "classes in order, separated by commas; empty takes what the source says"
  )
  data_dir: str = _("", "tfds: folder of the prepared data sets; empty takes TFDS's default")
  manual_dir: str = _(
    "", "tfds: folder of the original images, for the builders that come with primia_jax"
  )
  phantom_images: int = _(800, "phantom: training images, all sites together")


@dataclasses.dataclass(frozen=True)
class Train(Data):
  """Everything that decides the result of a training run."""

  seed: int = _(0, "seed of everything random but the secret masks")
  num_sites: int = _(3, "hospitals that train together")
  partition: str = _(
    "auto",
    "how images are dealt to sites: iid, unequal, dirichlet (non-IID), column:NAME (such as "
    "column:folder), or auto: "
    "the phantom's own sites, else dirichlet; a patient's images are never split",
  )
  site_fractions: str = _(
    "", "unequal, dirichlet: sizes of the sites, such as 0.5,0.3,0.2; empty: equal, or drawn"
  )
  dirichlet_alpha: float = _(
    2.0, "dirichlet: 0.1 makes very different sites, 100 nearly equal ones"
  )
  validation_fraction: float = _(
    0.15, "share of each site's patients held out to choose the best round"
  )
  test_fraction: float = _(
    0.2, "share of patients held out for testing where the data have no test split"
  )

  model: str = _("cnn", "cnn, leaf_cnn, mlp, resnet18, vgg16, scatter_linear or scatter_cnn")
  norm: str = _("", "group, batch or none; empty takes the model's own")
  pool: str = _("max", "max or mean")
  width: float = _(1.0, "factor on the number of channels")
  stem: str = _(
    "", "resnet18: 7x7 (large images), 3x3/2 or 3x3 (small ones); empty chooses by image size"
  )
  head: str = _("", "vgg16: dense (torchvision's) or mean; empty takes dense")
  weight_standardisation: bool = _(False, "standardise convolution kernels")
  dropout: float = _(0.0, "rate before the last layer")
  pretrained: str = _(
    "", "torchvision state dict (.pth or .safetensors) of resnet18 or vgg16 to start from"
  )

  algorithm: str = _(
    "fedavg", "fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad, scaffold, fednova or fedbn"
  )
  weighting: str = _("examples", "sites count by their number of examples, or uniform")
  proximal: float = _(0.01, "fedprox: strength of the pull towards the global model")
  server_learning_rate: float = _(
    0.01, "fedadam, fedyogi, fedadagrad, fedavgm: the server's learning rate"
  )
  server_momentum: float = _(0.9, "fedavgm: the server's momentum")
  rounds: int = _(18, "synchronisations")
  sites_per_round: int = _(0, "sites drawn at random for each round; 0 takes all")
  sync_epochs: int = _(1, "epochs over its own images that a site trains between synchronisations")
  sync_batches: int = _(0, "synchronise every so many batches instead; 0 counts epochs")
  batch_size: int = _(16, "images in a training step")
  optimizer: str = _("adam", "the sites' optimiser: sgd, momentum, adam or adamw")
  momentum: float = _(0.9, "momentum: its decay")
  weight_decay: float = _(0.01, "adamw: its strength")
  learning_rate: float = _(0.002, "highest learning rate of the sites")
  schedule: str = _("cosine", "constant, or cosine: down to 0 over all rounds")
  warmup_rounds: float = _(1.0, "rounds of linear warm-up")
  keep_optimizer: bool = _(False, "sites keep their optimiser's state from round to round")
  class_weights: bool = _(
    True, "weigh classes by inverse frequency; the counts are summed under secure aggregation"
  )
  label_smoothing: float = _(0.0, "in [0, 1)")
  augment: str = _(
    "light",
    "none, light, strong, or NAME=VALUE,... of primia_jax.data.augment.Augmentation, such as "
    "noise=0.02",
  )
  mixup: float = _(0.0, "MixUp's alpha; 0 mixes nothing")
  patience: int = _(0, "stop after so many rounds without a better MCC on validation; 0 never")

  aggregation: str = _(
    "secure",
    "secure, clear, or a robust rule in the clear: median, trimmed_mean=FRACTION, krum=BAD_SITES",
  )
  secagg_bits: int = _(
    32,
    "secure: bits of a masked number of an update (of counts 32 at least); more than 32 need "
    "JAX_ENABLE_X64=1",
  )
  secagg_max_abs: float = _(
    32.0, "secure: largest magnitude in a site's update; larger ones stop the run"
  )
  secagg_peers: int = _(
    0, "secure: peers of each site, an even number; 0 takes all others, or what bell asks for"
  )
  dropout_rate: float = _(
    0.0,
    "chance that a site is lost in a round, to simulate; half of them before and half after they "
    "mask",
  )
  secagg: str = _(
    "pairwise",
    "secure: pairwise (masks with all others), bell (with a sparse graph of peers), or none",
  )
  secagg_threshold: int = _(
    0,
    "secure: how many of a site and its peers must answer to unmask a round; 0 tolerates no loss, "
    "-1 takes over two "
    "thirds, as 0 does with placement=processes, where fewer trust the server to follow the "
    "protocol",
  )

  dp: str = _(
    "none",
    "differential privacy of each site's: none, example or patient (DP-SGD), or site (its update)",
  )
  dp_noise: str = _(
    "site",
    "dp: the noise: site (drawn by each site, fresh at each step); dp=example or patient: banded "
    "or tree (DP-FTRL: "
    "noise that cancels from step to step, batches in a fixed order, for sites that cannot "
    "sample); dp=site: "
    "distributed (each site a share of it, before masking)",
  )
  dp_bands: int = _(
    0,
    "dp_noise=banded: bands, each of which takes the memory of a gradient; 0 takes what batches "
    "allow, at most 16",
  )
  target_epsilon: float = _(
    0.0, "dp: the budget; the noise follows from it, or with noise_multiplier the rounds; 0 none"
  )
  delta: float = _(
    0.0, "dp: chance that epsilon does not bound; 0 takes 1 / images of the largest site"
  )
  noise_multiplier: float = _(
    0.0,
    "dp: standard deviation of the noise over the clipping norm; with banded and tree, of the one "
    "Gaussian mechanism "
    "that the whole run amounts to; with dp_clip_quantile, of updates and of what moves their clip "
    "together; 0 takes "
    "target_epsilon's",
  )
  l2_clip_norm: float = _(
    1.0,
    "dp: largest L2 norm of what one image, patient or site adds to a sum; with dp_clip_quantile, "
    "of round 1",
  )
  dp_clip_quantile: float = _(
    0.0,
    "dp=site: the share of sites whose updates shall be within the clip, which follows it from "
    "round to round (Andrew "
    "et al. 2021), e.g. 0.5; sites then tell, under noise, whether theirs was within; 0 keeps "
    "l2_clip_norm",
  )
  dp_clip_rate: float = _(
    0.2,
    "dp_clip_quantile: how fast the clip moves: a round changes its logarithm by this times the "
    "share's error",
  )
  dp_clipping: str = _(
    "flat", "dp: flat, per_layer, or automatic (every gradient scaled to the norm)"
  )
  dp_augmentations: int = _(
    1, "dp: augmented copies of an image, whose mean gradient is clipped as one"
  )
  dp_count_noise: float = _(
    20.0,
    "dp with class_weights: standard deviation of the noise on each site's class counts, of images "
    "or patients",
  )
  dp_average: float = _(
    0.0, "decay of the average over rounds of the parameters that are evaluated; 0 takes the last"
  )
  dp_seed: int = _(
    -1,
    "dp: a seed for noise and batches, to repeat a run that is then NOT PRIVATE; -1 takes entropy",
  )

  placement: str = _(
    "auto", "where sites run: loop, scan, vmap, chunk=C, mesh, processes, or auto, the fastest"
  )
  sites_in_memory: int = _(0, "load at most so many sites at a time; 0 keeps all in memory")


def define_flags(kind: type, values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines one flag for each field."""
  types = typing.get_type_hints(kind)
  define: dict[type, Any] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
  }
  for field in dataclasses.fields(kind):
    define[types[field.name]](field.name, field.default, field.metadata["help"], flag_values=values)


def from_flags(kind: type, values: flags.FlagValues = flags.FLAGS) -> Any:
  """Reads the settings back from the parsed flags."""
  return kind(**{field.name: values[field.name].value for field in dataclasses.fields(kind)})


def save(settings: Any, path: pathlib.Path) -> None:
  path.write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n")


def load(path: pathlib.Path) -> dict[str, Any]:
  """Reads `config.json`.

  Raises:
    FileNotFoundError: it is not there; the message says what makes one.
  """
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} does not exist; --run_dir must name the folder of a finished training run"
    )
  return json.loads(path.read_text())


def differences(old: Mapping[str, Any], new: Any) -> dict[str, tuple[Any, Any]]:
  """Returns the settings that differ, as name -> (old, new)."""
  now = dataclasses.asdict(new)
  return {name: (old.get(name), value) for name, value in now.items() if old.get(name) != value}


def names(text: str) -> tuple[str, ...]:
  """Splits "a,b" and drops blanks."""
  return tuple(part.strip() for part in text.split(",") if part.strip())


def fractions(text: str) -> tuple[float, ...] | None:
  """Reads "0.5,0.3,0.2"; None for the empty text.

  Raises:
    ValueError: a part is no number.
  """
  try:
    return tuple(float(part) for part in names(text)) or None
  except ValueError as error:
    raise ValueError(
      f"site_fractions={text!r}; write numbers separated by commas, such as 0.5,0.3,0.2"
    ) from error
