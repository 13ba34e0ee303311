"""Says what a private training run will cost, before it is run: epsilon against rounds, as a table and as a picture.

  python -m experiments.account --num_units=1500 --batch_size=64 --rounds=20 --target_epsilon=6 --output_dir=out

Nothing is read or trained; the figures are those that `train_federated` with the same settings and dp_noise=site would
report.
"""

import json
import math
import pathlib
from typing import Any, NamedTuple

from absl import flags
from matplotlib.figure import Figure

from experiments import plots, running
from primia_jax.privacy import accounting
from primia_jax.privacy.accounting import Ledger, Release
from primia_jax.privacy.mechanism import Mechanism, capacity, overflow_probability

_FAILURE = 1e-12  # as in private.py: probability that any batch of a run overflows; taken from delta
_ROWS = 10

flags.DEFINE_integer(
  "num_units", None, "images or patients of the largest site; with unit=site, sites (required)", required=True
)
flags.DEFINE_enum("unit", "example", accounting.UNITS, "whose presence is hidden")
flags.DEFINE_integer("batch_size", 0, "expected units of a batch; not for unit=site")
flags.DEFINE_float("sampling_rate", 0.0, "in place of batch_size: the probability that a unit is in a batch")
flags.DEFINE_integer("rounds", None, "rounds of training (required)", required=True)
flags.DEFINE_integer("sync_epochs", 1, "epochs of a round, of ceil(num_units / batch_size) steps each")
flags.DEFINE_float(
  "noise_multiplier", 0.0, "standard deviation of the noise over the clipping norm; 0 takes the target"
)
flags.DEFINE_float("target_epsilon", 0.0, "the budget; noise follows, or with noise_multiplier the rounds; 0 none")
flags.DEFINE_float("delta", 0.0, "chance that epsilon does not bound; 0 takes 1 / num_units")
flags.DEFINE_float(
  "count_noise", 0.0, "standard deviation of the noise on class counts, released once; 0 releases none"
)
flags.DEFINE_string("output_dir", "", "folder for account.json, epsilon.png and report.md; created; empty writes none")
FLAGS = flags.FLAGS


class Plan(NamedTuple):
  """A run's releases: those before training, and `num_steps` of one kind in each round."""

  start: Ledger
  release: Release
  num_steps: int


def check() -> None:
  """Refuses bad flags before any work."""
  for name in ("num_units", "rounds", "sync_epochs"):
    if getattr(FLAGS, name) < 1:
      raise ValueError(f"{name}={FLAGS[name].value} must be at least 1")
  for name in ("batch_size", "sampling_rate", "noise_multiplier", "target_epsilon", "delta", "count_noise"):
    if not 0 <= getattr(FLAGS, name) < math.inf:
      raise ValueError(f"{name}={FLAGS[name].value} must be finite and not negative")
  if not FLAGS.noise_multiplier and not FLAGS.target_epsilon:
    raise ValueError("give target_epsilon (noise follows) or noise_multiplier; without noise nothing is private")
  if FLAGS.unit == "site":
    if FLAGS.batch_size or FLAGS.sampling_rate or FLAGS.count_noise or FLAGS.sync_epochs != 1:
      raise ValueError(
        "unit=site releases one update of each site a round; leave out batch_size, sampling_rate, sync_epochs and "
        "count_noise"
      )
  elif bool(FLAGS.batch_size) == bool(FLAGS.sampling_rate):
    raise ValueError(f"unit={FLAGS.unit} needs one of batch_size and sampling_rate")
  elif FLAGS.batch_size > FLAGS.num_units:
    raise ValueError(f"batch_size={FLAGS.batch_size} exceeds num_units={FLAGS.num_units}; use at most that")
  elif FLAGS.sampling_rate > 1:
    raise ValueError(f"sampling_rate={FLAGS.sampling_rate} must lie in (0, 1]")
  accounting.ledger(FLAGS.unit, FLAGS.delta or 1 / FLAGS.num_units, FLAGS.num_units)


def plan() -> Plan:
  """What the flags ask for, with noise calibrated where none is given."""
  n, delta = FLAGS.num_units, FLAGS.delta or 1 / FLAGS.num_units
  start = accounting.ledger(FLAGS.unit, delta, n)
  counts = (accounting.gaussian("class counts", FLAGS.count_noise),) if FLAGS.count_noise else ()
  for release in counts:
    start = accounting.spend(start, release)
  what, rate, num_steps, overflow = "updates", 1.0, 1, 0.0
  if FLAGS.unit != "site":
    rate = FLAGS.sampling_rate or FLAGS.batch_size / n
    num_steps = FLAGS.sync_epochs * (-(-n // FLAGS.batch_size) if FLAGS.batch_size else math.ceil(1 / rate))
    total = num_steps * FLAGS.rounds
    sampler = Mechanism(
      noise_multiplier=1.0, sampling_rate=rate, max_units=capacity(n, rate, total, _FAILURE), unit=FLAGS.unit
    )
    what, rate, overflow = "gradients", sampler.sampling_rate, overflow_probability(sampler, n, total) / total
  sigma = FLAGS.noise_multiplier or accounting.calibrate(
    FLAGS.target_epsilon, delta, rate, num_steps * FLAGS.rounds, counts, overflow
  )
  return Plan(start, accounting.gaussian(what, sigma, rate, overflow), num_steps)


def table(plan: Plan, rounds: int) -> list[dict[str, Any]]:
  """Epsilon by both accountants after about ten of the rounds, the last among them."""
  shown = sorted({-(-rounds * i // _ROWS) for i in range(1, _ROWS + 1)})
  rows = []
  for r in shown:
    spent = accounting.spend(plan.start, plan.release, r * plan.num_steps)
    by = {name: accounting.epsilon(spent, name) for name in accounting.ACCOUNTANTS}
    rows.append({"round": r, "steps": r * plan.num_steps, **by})
  return rows


def picture(rows: list[dict[str, Any]], target: float, path: pathlib.Path, title: str) -> None:
  """Draws epsilon against rounds; what is infinite has no point."""
  figure = Figure(figsize=(7.2, 4.6), layout="constrained")
  axes = figure.add_subplot()
  names = {"pld": "privacy loss distributions (claimed)", "rdp": "Renyi divergences"}
  for (key, name), colour, dash in zip(names.items(), (plots.BLUE, plots.ORANGE), plots.DASHES, strict=False):
    points = [(row["round"], row[key]) for row in rows if math.isfinite(row[key])]
    if points:
      x, y = zip(*points, strict=True)
      axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.8, marker="o", markersize=3.5, label=name)
  if target:
    axes.axhline(target, color=plots.INK, linestyle=":", linewidth=1.3, label=f"target {target:g}")
  end = rows[-1]
  if math.isfinite(end["pld"]):
    label = f"end: epsilon {end['pld']:.3g} after round {end['round']}"
    axes.plot(end["round"], end["pld"], "*", color=plots.INK, markersize=12, linestyle="none", label=label)
  axes.set(xlabel="round", ylabel="epsilon", xlim=(0, end["round"] * 1.03))
  axes.set_ylim(bottom=0)
  axes.xaxis.set_major_locator(plots.MaxNLocator(integer=True, min_n_ticks=1))
  plots._tidy(axes)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(frameon=False, fontsize=9)
  if not any(math.isfinite(row[key]) for row in rows for key in names):
    axes.text(0.5, 0.5, "epsilon is infinite", transform=axes.transAxes, ha="center", color=plots.INK)
  plots._save(figure, path, title)


def _shown(value: float) -> str:
  return f"{value:.4g}" if math.isfinite(value) else "infinite"


def main() -> None:
  check()
  chosen = plan()
  rounds, stops = FLAGS.rounds, None
  if FLAGS.noise_multiplier and FLAGS.target_epsilon:
    a_round = chosen.release._replace(times=chosen.num_steps)
    stops = accounting.steps_within(FLAGS.target_epsilon, chosen.start, a_round, rounds)
    if not stops:
      raise ValueError(
        f"target_epsilon={FLAGS.target_epsilon:g} does not allow one round at "
        f"noise_multiplier={FLAGS.noise_multiplier:g}; raise either"
      )
    rounds = min(rounds, stops)
  rows = table(chosen, rounds)
  spent = accounting.spend(chosen.start, chosen.release, rounds * chosen.num_steps)
  site = FLAGS.unit == "site"
  facts = {
    "mechanism": "Gaussian noise added by each site to its clipped update"
    if site
    else "DP-SGD: per-unit gradients clipped and summed, batches drawn by Poisson sampling, noise added by the site",
    "noise multiplier": round(chosen.release.noise_multiplier, 6),
    "noise from": "noise_multiplier" if FLAGS.noise_multiplier else f"target_epsilon={FLAGS.target_epsilon:g}",
    "rounds": f"{rounds}, of {chosen.num_steps} step{'s' * (chosen.num_steps > 1)} each"
    + (f"; the budget ends training before round {FLAGS.rounds}" if rounds < FLAGS.rounds else ""),
    **accounting.statement([spent]),
    "protected from": "everybody outside the site, the server included"
    if site
    else "whoever sees updates, sums or models: server, other sites, users of the model; not the site itself",
    "not covered": "validation images, and tuning: several runs on the same data add up",
  }
  width = max(map(len, facts))
  for key, value in facts.items():
    print(f"{key:{width}}  {value}")
  print(f"\n{'round':>8} {'steps':>9} {'PLD':>10} {'RDP':>10}   (epsilon)")
  for row in rows:
    print(f"{row['round']:8,} {row['steps']:9,} {_shown(row['pld']):>10} {_shown(row['rdp']):>10}")
  if not FLAGS.output_dir:
    return
  output = pathlib.Path(FLAGS.output_dir)
  output.mkdir(parents=True, exist_ok=True)
  finite = [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in rows]
  names = ("num_units", "unit", "batch_size", "sampling_rate", "rounds", "sync_epochs", "noise_multiplier",
           "target_epsilon", "delta", "count_noise")  # fmt: skip
  result = {"flags": {name: FLAGS[name].value for name in names}, "statement": facts, "rows": finite,
            "ledger": json.loads(accounting.to_json(spent))}  # fmt: skip
  (output / "account.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
  sigma = chosen.release.noise_multiplier
  title = f"Privacy of one {FLAGS.unit}, delta {chosen.start.delta:.3g}, noise multiplier {sigma:.4g}"
  picture(rows, FLAGS.target_epsilon, output / "epsilon.png", title)
  lines = ["# Privacy account", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items()), "",
           "| round | steps | epsilon (PLD) | epsilon (RDP) |", "|--:|--:|--:|--:|",
           *(f"| {r['round']} | {r['steps']} | {_shown(r['pld'])} | {_shown(r['rdp'])} |" for r in rows), "",
           "![epsilon against rounds](epsilon.png)"]  # fmt: skip
  (output / "report.md").write_text("\n".join(lines) + "\n")
  print(f"\nReport: {output / 'report.md'}")


if __name__ == "__main__":
  running.start(main)
