"""A case study as steps: each is a run of another program in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ARMS = ("pooled", "local", "federated", "secure", "private", "encrypted", "attacked")


class Study(NamedTuple):
  """What a study trains.

  Attributes:
    about: in a line, for `--help`.
    plain: flags of the arms without differential privacy.
    private: flags of the private arms.
    epsilons: budgets of the private arms.
    seeds: of the runs.
    arms: of `ARMS`, those that it takes by default.
    encrypted: flags of the encrypted answers.
    attacks: parts of the audit of the federation whose updates are in the clear.
  """

  about: str
  plain: tuple[str, ...]
  private: tuple[str, ...]
  epsilons: tuple[float, ...]
  seeds: tuple[int, ...] = (0, 1, 2)
  arms: tuple[str, ...] = ARMS
  encrypted: tuple[str, ...] = ()
  attacks: str = "threats,recognition,numbers"


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
    ("--preset=chest_xray_private_pretrained",),
    (6.0,),
    encrypted=("--batch=16",),
  ),
  "chest_xray_pretrained": Study(
    "paediatric chest X-rays, an ImageNet network trained whole, on two cores",
    ("--preset=chest_xray_pretrained",),
    ("--preset=chest_xray_private_pretrained",),
    (1.0, 3.0, 6.0, 8.0),
    arms=("pooled", "local", "secure", "private", "encrypted"),
    encrypted=(
      "--batch=1",
      "--ring_bits=64",
      "--fraction_bits=18",
      "--calibration_images=64",
      "--margin=4",
    ),
    attacks="threats",
  ),
  "chest_xray_pretrained_224": Study(
    "the same at 224 pixels, two hours an arm on two cores, or on an accelerator",
    ("--preset=chest_xray_pretrained_224",),
    ("--preset=chest_xray_private_pretrained",),
    (1.0, 3.0, 6.0, 8.0),
    arms=("pooled", "secure", "private"),
    attacks="threats",
  ),
}  # fmt: skip


def steps(
  study: Study,
  seeds: Sequence[int],
  epsilons: Sequence[float],
  arms: Sequence[str],
  data: str = "",
  more: Sequence[str] = (),
  more_private: Sequence[str] = (),
  effort: Sequence[str] = (),
) -> list[Step]:
  """The runs of a study, in order. Sites alone, encrypted answers and attacks have the first seed
  only.

  Args:
    study: the study.
    seeds, epsilons, arms: what of it.
    data: the images, as `train_federated` takes them; empty takes the study's own.
    more, more_private: further flags of training without and with differential privacy.
    effort: further flags of the attacks.

  Raises:
    ValueError: an arm needs another one that is left out, or a flag is the study's own.
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
    all_flags = (*flags, *source, f"--seed={seed}", *alone)
    made.append(Step(f"seed_{seed}/{name}", module, all_flags, "run_dir", "metrics.json"))

  for seed in seeds:
    plain, is_first = (*study.plain, *more), seed == seeds[0]
    if "pooled" in arms:
      train("pooled", seed, plain, is_pooled=True)
    if "secure" in arms:
      beside = ("--baselines=local",) if is_first and "local" in arms else _ALONE
      train("secure", seed, (*plain, "--aggregation=secure", *beside))
    if "federated" in arms:
      recorded = ("--record_transcript",) if is_first and "attacked" in arms else ()
      train("federated", seed, (*plain, "--aggregation=clear", *recorded))
    if "private" in arms:
      for epsilon in epsilons:
        flags = (*study.private, *more_private, f"--target_epsilon={epsilon:g}")
        train(f"private_{epsilon:g}", seed, flags)
        train(f"private_pooled_{epsilon:g}", seed, flags, is_pooled=True)
  first = f"seed_{seeds[0]}"
  if "encrypted" in arms:
    asked = f"--checkpoint={{study}}/{first}/secure", "--images=run"
    flags = (*asked, *study.encrypted, "--check")
    made.append(Step("encrypted", "infer_encrypted", flags, "output_dir", "costs.json"))
  if "attacked" in arms:
    flags = (f"--run_dir={{study}}/{first}/federated", f"--parts={study.attacks}", *effort)
    made.append(Step("attacked", "audit_privacy", flags, "output_dir", "privacy_report.md"))
  return made


_ALONE = ("--baselines=",)
_OWN = (  # settings that make an arm what it is called, or that the study's report cannot show
  "data", "site_data", "seed", "run_dir", "baselines", "aggregation", "multi_label",
  "label_columns", "fewest_patients", "record_transcript",
)  # fmt: skip
