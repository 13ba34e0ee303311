"""Computes what a private training run will cost before it runs: epsilon by round, as a table and a
picture, and the largest chance that somebody names the unit that was used among 10,000 candidates.

  primia-account --num_units=1500 --batch_size=64 --rounds=20 --target_epsilon=6 \\
    --output_dir=out
  primia-account --preset=chest_xray_private --num_units=1984
  primia-account --dp=site --dp_noise=distributed --delta=1e-3 --num_sites=50 \\
    --secagg_threshold=-1 --noclass_weights --weighting=uniform --rounds=20 --target_epsilon=8

It takes the flags of train_federated, reads no images and trains nothing. Given the true sizes of
the sites, its figures are digit for digit those of the run's own report, for a site that takes part
in every round of an uninterrupted run.

With --ledger_dir it sums what all runs on the same data were charged, at the least of their deltas
or at --delta:

  primia-account --ledger_dir=images.ledger
"""

import json
import math
import pathlib
from typing import Any

import jax
from absl import flags

from primia_jax import local, models
from primia_jax.privacy import accounting, ledger
from primia_jax.privacy.chain import Chain
from primia_jax.privacy.plan import Plan, SiteLevel, StepPlan
from primia_jax.privacy.reconstruction import NUM_CANDIDATES, reconstruction_bound

from . import folders, ledger_table, ledgers, presets, running, settings
from .configs import Train, rehearse
from .configs.run import build_site_level

_ROWS = 10

settings.define_flags(Train)
presets.define_flag()
flags.DEFINE_integer(
  "num_units", 0, "training images or patients of the largest site; not for dp=site", 0
)
flags.DEFINE_integer(
  "smallest_units",
  0,
  "dp_noise=banded or tree: training images or patients of the smallest site; 0 takes num_units",
  0,
)
flags.DEFINE_integer(
  "num_classes",
  3,
  "dp_noise=distributed: classes of the model, whose size decides what rounding costs",
  2,
)
flags.DEFINE_list("baselines", [], "ignored; presets of train_federated may set it")
flags.DEFINE_string(
  "output_dir", "", "folder for account.json, epsilon.png and report.md; empty writes no files"
)
FLAGS = flags.FLAGS
FLAGS.set_default("dp", "example")
flags.adopt_module_key_flags(settings)


def check_summed() -> None:
  """Refuses flags that a sum over a ledger would ignore."""
  names = {*settings.flat(Train()), "num_units", "smallest_units", "num_classes"}
  given = sorted(name for name in names - {"ledger_dir", "delta"} if FLAGS[name].present)
  if given:
    raise ValueError(
      f"ledger_dir={FLAGS.ledger_dir} sums what was charged, and takes delta and output_dir only; "
      f"leave out {', '.join(given)}, or leave out ledger_dir to forecast a run"
    )
  if not 0 <= FLAGS.delta < 1:
    raise ValueError(f"delta={FLAGS.delta} must lie in (0, 1); 0 takes the least of all runs")


def check(config: Train) -> None:
  """Refuses bad flags before any work."""
  dp = config.privacy.dp
  if dp == "none":
    raise ValueError("dp=none protects nobody, at no cost; use dp=example, patient or site")
  rehearse(config, is_federated=config.hospitals.num_sites > 1)
  given = [name for name in ("num_units", "smallest_units") if FLAGS[name].value]
  if dp == "site":
    if given:
      raise ValueError(
        f"{given[0]}={FLAGS[given[0]].value}: dp=site counts sites; use num_sites, and leave it out"
      )
  elif FLAGS.num_units < 1:
    raise ValueError(
      f"num_units={FLAGS.num_units}: give the number of the largest site's {dp}s, at least 1"
    )
  if not 0 <= FLAGS.smallest_units <= FLAGS.num_units:
    raise ValueError(
      f"smallest_units={FLAGS.smallest_units} must lie between 0 and num_units={FLAGS.num_units}"
    )


def plan(config: Train) -> StepPlan | SiteLevel:
  """What would protect a run: the very object by which it would train and be charged."""
  model = config.model.trained(config.model.config(config.data, FLAGS.num_classes))
  if config.privacy.dp == "site":
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
    return build_site_level(config, models.num_parameters(shapes))
  loss = local.classification_loss(model.apply, config.augment.build(), FLAGS.num_classes)
  sizes = [FLAGS.num_units, FLAGS.smallest_units or FLAGS.num_units]
  return config.privacy.build_steps(config.training, loss, sizes)


def table(privacy: Plan, rounds: int) -> list[dict[str, Any]]:
  """Epsilon after about ten of the rounds, the last among them: the claim first, then by other
  accountants, then the largest chance to name the unit among 10,000 candidates.
  """
  by_curve = any(release.curve for release in privacy.releases)
  known = ("rdp",) if by_curve else accounting.ACCOUNTANTS
  shown = sorted({-(-rounds * i // _ROWS) for i in range(1, _ROWS + 1)})
  return [
    {
      "round": r,
      "steps": r * privacy.num_steps,
      **{name: privacy.epsilon(r, name) for name in known},
      "named": reconstruction_bound(privacy.spent(r)),
    }
    for r in shown
  ]


def _shown(value: float) -> str:
  return f"{value:.4g}" if math.isfinite(value) else "infinite"


def main() -> None:
  files = "account.json", "epsilon.png", "report.md"
  output = folders.to_write(FLAGS.output_dir, files) if FLAGS.output_dir else None
  if FLAGS.ledger_dir:
    check_summed()
    chain = Chain(pathlib.Path(FLAGS.ledger_dir).expanduser(), read_only=True)
    summary = ledgers.summary(chain, FLAGS.delta or None)
    ledger_table.show(summary)
    if output is not None:
      output.mkdir(parents=True, exist_ok=True)
      (output / "account.json").write_text(json.dumps(summary, indent=2) + "\n")
    return
  config = settings.from_flags(Train)
  check(config)
  privacy, most, rounds = plan(config), config.training.rounds, config.training.rounds
  target, given = config.privacy.target_epsilon, config.privacy.noise_multiplier
  if given and target and not privacy.whole_run:
    rounds = privacy.rounds_within(most)
    if not rounds:
      raise ValueError(
        f"target_epsilon={target:g} does not allow one round at noise_multiplier={given:g}; raise "
        "either"
      )
  rows, spent, sigma = table(privacy, rounds), privacy.spent(rounds), privacy.noise_multiplier
  moves = (
    isinstance(privacy, SiteLevel)
    and privacy.noise is not None
    and privacy.clip.target_quantile is not None
  )
  facts = {
    "noise multiplier" + " (of updates, besides that of their clip)" * moves: round(sigma, 6),
    "noise from": "noise_multiplier" if given else f"target_epsilon={target:g}",
    "rounds": f"{rounds}, of {privacy.num_steps} step{'s' * (privacy.num_steps > 1)} each"
    + (f"; the budget ends training before round {rounds + 1} of {most}" if rounds < most else ""),
    **ledgers.facts(config.privacy, privacy, [spent]),
  }
  ledger_table.show_facts(facts)
  known = [name for name in accounting.ACCOUNTANTS if name in rows[0]]
  print(
    f"\n{'round':>8} {'steps':>9}"
    + "".join(f" {name.upper():>10}" for name in known)
    + f" {'named':>10}   (epsilon; chance to name one {privacy.unit} among {NUM_CANDIDATES:,})"
  )
  for row in rows:
    print(
      f"{row['round']:8,} {row['steps']:9,}"
      + "".join(f" {_shown(row[name]):>10}" for name in known)
      + f" {ledger.percent(row['named']):>10}"
    )
  if output is None:
    return
  output.mkdir(parents=True, exist_ok=True)
  from . import plots  # here, because the import takes a second

  finite = [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows]
  names = ("num_units", "smallest_units", "num_classes")
  result = {
    "flags": {name: FLAGS[name].value for name in names},
    "config": settings.flat(config),
    "statement": facts,
    "rows": finite,
    "ledger": json.loads(ledger.to_json(spent)),
  }
  (output / "account.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
  title = (
    f"Privacy of one {config.privacy.dp}, delta {privacy.delta:.3g}, noise multiplier {sigma:.4g}"
  )
  plots.epsilon(rows, target, output / "epsilon.png", title)
  lines = [
    "# Privacy account",
    "",
    "| | |",
    "|---|---|",
    *(f"| {k} | {v} |" for k, v in facts.items()),
    "",
    "| round | steps |"
    + "".join(f" epsilon ({name.upper()}) |" for name in known)
    + f" chance to name one {privacy.unit} among {NUM_CANDIDATES:,} |",
    "|--:|--:|" + "--:|" * (len(known) + 1),
    *(
      f"| {r['round']} | {r['steps']} |"
      + "".join(f" {_shown(r[name])} |" for name in known)
      + f" {ledger.percent(r['named'])} |"
      for r in rows
    ),
    "",
    "![epsilon against rounds](epsilon.png)",
  ]
  (output / "report.md").write_text("\n".join(lines) + "\n")
  print(f"\nReport: {output / 'report.md'}")


if __name__ == "__main__":
  running.start(main)
