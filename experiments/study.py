"""A case study as steps: each is a run of another program in a folder of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags as absl_flags

from primia_jax.data.sites import site_sizes

from . import presets, refusals, settings
from .configs import Train

ARMS = ("pooled", "local", "federated", "secure", "private", "encrypted", "attacked")


class Study(NamedTuple):
  """What a study trains.

  Attributes:
    about: in a line, for `--help`.
    plain: flags of the arms without differential privacy.
    private: flags of the private arms.
    epsilons: budgets of the private arms.
    strict: further flags of the private arms up to epsilon 1.
    seeds: of the runs.
    private_seeds: of the private arms; empty for the same.
    arms: of `ARMS`, those that it takes by default.
    encrypted: flags of the encrypted answers.
    attacks: parts of the audit of the federation whose updates are in the clear.
    pooled: further flags of the pooled arm, which sees as many images as all sites together.
  """

  about: str
  plain: tuple[str, ...]
  private: tuple[str, ...]
  epsilons: tuple[float, ...]
  strict: tuple[str, ...] = ()
  seeds: tuple[int, ...] = (0, 1, 2)
  private_seeds: tuple[int, ...] = ()
  arms: tuple[str, ...] = ARMS
  encrypted: tuple[str, ...] = ()
  attacks: str = "threats,recognition,numbers"
  pooled: tuple[str, ...] = ()


class Step(NamedTuple):
  """A run of a program.

  Attributes:
    folder: below that of the study.
    module: of the program.
    flags: of the program, without its folder.
    to: the flag that names the folder.
    made: the file in the folder that is written last.
  """

  folder: str
  module: str
  flags: tuple[str, ...]
  to: str
  made: str


# The private last layer of an ImageNet network, as docs/results.md gives it.
_LAST_LAYER: dict[str, Any] = {
  "private": ("--preset=chest_xray_private_pretrained",),
  "strict": ("--rounds=30", "--learning_rate=1"),
  "private_seeds": (0, 1, 2, 3, 4),
}
_LITE: dict[str, Any] = {
  **_LAST_LAYER,
  "epsilons": (1.0, 3.0, 6.0, 8.0),
  "encrypted": (
    "--batch=1", "--ring_bits=64", "--fraction_bits=18", "--calibration_images=64", "--margin=4",
  ),
  "attacks": "threats",
  # eight epochs: as many images as three hospitals' 49 rounds of eight batches
  "pooled": ("--rounds=8", "--sync_batches=0", "--sync_epochs=1", "--warmup_rounds=0.5"),
}  # fmt: skip
STUDIES = {
  "phantom": Study(
    "synthetic images",
    (),
    (
      "--model=scatter_linear", "--augment=none", "--noclass_weights", "--optimizer=momentum",
      "--learning_rate=0.0002", "--schedule=constant", "--warmup_rounds=0", "--rounds=30",
      "--average_last=0.5", "--validation_fraction=0", "--batch_size=75", "--dp=example",
      "--l2_clip_norm=25",
    ),
    (8.0,),
    encrypted=("--ring_bits=32", "--fraction_bits=8", "--calibration_images=8", "--margin=8"),
  ),
  "chest_xray": Study(
    "paediatric chest X-rays, a small network of 96 pixels, on two cores",
    ("--preset=chest_xray",),
    epsilons=(6.0,),
    encrypted=("--batch=16",),
    **_LAST_LAYER,
  ),
  "chest_xray_pretrained": Study(
    "paediatric chest X-rays, an ImageNet network trained whole, on two cores",
    ("--preset=chest_xray_pretrained",),
    arms=("pooled", "local", "secure", "private", "encrypted"),
    **_LITE,
  ),
  "chest_xray_pretrained_224": Study(
    "the same at 224 pixels; a federated arm takes 46 minutes on one core",
    ("--preset=chest_xray_pretrained_224",),
    arms=("pooled", "secure", "private"),
    **_LITE,
  ),
  "primia": Study(
    "PriMIA's own training of ResNet-18 at 224 pixels, for whoever has ImageNet weights "
    "(--train_flags=--pretrained=FILE), and hours or an accelerator",
    ("--preset=primia",),
    epsilons=(6.0,),
    arms=("pooled", "local", "secure"),
    encrypted=("--batch=4",),
    attacks="threats",
    **_LAST_LAYER,
  ),
}  # fmt: skip


def configured(arguments: Sequence[str]) -> Train:
  """The settings of a run by flags of `train_federated` or `train_pooled`, with presets.

  Raises:
    ValueError: naming the flag, its value and the cure.
  """
  values = absl_flags.FlagValues()
  settings.define_flags(Train, values)
  presets.define_flag(values)
  absl_flags.DEFINE_list("baselines", [], "", flag_values=values)
  absl_flags.DEFINE_boolean("tensorboard", False, "", flag_values=values)
  refusals.parse(presets.expanded(["flags", *arguments], values), values)
  return settings.from_flags(Train, values)


def private_flags(
  study: Study, epsilon: float, pooled: bool, more: Sequence[str] = ()
) -> tuple[str, ...]:
  """Flags of a private arm. Pooled training takes as large a share of all images in a step as the
  largest site takes of its own, and so as many steps.

  Args:
    study: whose arm it is.
    epsilon: the budget of a run.
    pooled: all images are in one place.
    more: further flags, which win.

  Raises:
    ValueError: a flag is wrong, or nothing says how large the sites are.
  """
  strict = study.strict if epsilon <= _STRICT else ()
  all_flags = (*study.private, *strict, *more, f"--target_epsilon={epsilon:g}")
  config = configured(all_flags)
  if not pooled:
    return all_flags
  h, source = config.hospitals, config.data.data
  shares = settings.fractions(h.site_fractions)
  if source != "phantom" and shares is None:
    raise ValueError(
      f"site_fractions is empty, with data={source}: the pooled private arm's batch follows from "
      "the sites' sizes; give site_fractions"
    )
  sizes = site_sizes(_MANY, h.num_sites, shares)
  batch = math.ceil(config.training.batch_size * sum(sizes) / max(sizes))
  return (*all_flags, f"--batch_size={batch}")


def steps(
  study: Study,
  seeds: Sequence[int],
  epsilons: Sequence[float],
  arms: Sequence[str],
  data: str = "",
  more: Sequence[str] = (),
  more_private: Sequence[str] = (),
  effort: Sequence[str] = (),
  private_seeds: Sequence[int] = (),
) -> list[Step]:
  """The runs of a study, in order. Sites alone, encrypted answers and attacks have the first seed
  only.

  Args:
    study: the study.
    seeds, epsilons, arms: what of it.
    data: the images, as `train_federated` takes them; empty takes the study's own.
    more, more_private: further flags of training without and with differential privacy.
    effort: further flags of the attacks.
    private_seeds: seeds of the private arms; empty takes `seeds`.

  Raises:
    ValueError: an arm needs another one that is left out, a private flag is wrong, or a flag is the
      study's own.
  """
  for arm, needs in (("local", "secure"), ("encrypted", "secure"), ("attacked", "federated")):
    if arm in arms and needs not in arms:
      raise ValueError(f"arms={','.join(arms)}: {arm} is about the model of {needs}; add {needs}")
  for flag in (*more, *more_private):
    if (name := flag.lstrip("-").partition("=")[0]) in _OWN:
      raise ValueError(
        f"{flag} in train_flags or private_flags: a study decides {name} itself; leave it out"
      )
  source = (f"--data={data}",) if data else ()
  made: list[Step] = []

  def train(name: str, seed: int, flags: Sequence[str], is_pooled: bool = False) -> None:
    module = "train_pooled" if is_pooled else "train_federated"
    alone = () if is_pooled or any(f.startswith("--baselines=") for f in flags) else _ALONE
    all_flags = (*flags, f"--seed={seed}", *alone)
    made.append(Step(f"seed_{seed}/{name}", module, all_flags, "run_dir", "metrics.json"))

  plain = (*study.plain, *more, *source)
  private = [
    (f"private_{'pooled_' * is_pooled}{epsilon:g}", is_pooled,
     private_flags(study, epsilon, is_pooled, (*more_private, *source)))
    for epsilon in (epsilons if "private" in arms else ())
    for is_pooled in (False, True)
  ]  # fmt: skip
  seeds_of_private = (private_seeds or seeds) if private else ()
  for seed in dict.fromkeys((*seeds, *seeds_of_private)):
    is_first = seed == seeds[0]
    of_plain = arms if seed in seeds else ()
    if "pooled" in of_plain:
      train("pooled", seed, (*study.plain, *study.pooled, *more, *source), is_pooled=True)
    if "secure" in of_plain:
      beside = ("--baselines=local",) if is_first and "local" in arms else _ALONE
      train("secure", seed, (*plain, "--aggregation=secure", *beside))
    if "federated" in of_plain:
      recorded = ("--record_transcript",) if is_first and "attacked" in arms else ()
      train("federated", seed, (*plain, "--aggregation=clear", *recorded))
    for name, is_pooled, flags in private if seed in seeds_of_private else ():
      train(name, seed, flags, is_pooled)
  first = f"seed_{seeds[0]}"
  if "encrypted" in arms:
    asked = f"--checkpoint={{study}}/{first}/secure", "--images=run"
    flags = (*asked, *study.encrypted, "--check")
    made.append(Step("encrypted", "infer_encrypted", flags, "output_dir", "costs.json"))
  if "attacked" in arms:
    flags = (f"--run_dir={{study}}/{first}/federated", f"--parts={study.attacks}", *effort)
    made.append(Step("attacked", "audit_privacy", flags, "output_dir", "privacy_report.md"))
  return made


_STRICT = 1.0  # budgets up to this take `Study.strict`
_MANY = 10**6  # images, so that sites' shares of them are whole numbers
_ALONE = ("--baselines=",)
_OWN = (  # settings that make an arm what it is called, or that the study's report cannot show
  "data", "site_data", "seed", "run_dir", "baselines", "aggregation", "multi_label",
  "label_columns", "fewest_patients", "record_transcript",
)  # fmt: skip
