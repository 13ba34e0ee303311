"""The report of an evaluation by several hospitals whose counts carry noise."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from primia_jax import disclosure, metrics, score_noise, secagg
from primia_jax.disclosure import Crossing, Policy
from primia_jax.metrics import NoisedCounts
from primia_jax.privacy import ledger

from . import markdown, pooled_report, report
from .configs.scoring import Evaluate
from .markdown import PER_CLASS, SCALARS


def variance(config: Evaluate, num_classes: int, num_in_sum: int) -> float:
  """Of the noise in a number of a sum over so many sites."""
  s = config.scoring
  of_one = score_noise.variance(num_classes, s.score_bins, s.most_images, s.dp_count_noise)
  return num_in_sum * of_one


def write(
  folder: pathlib.Path,
  config: Evaluate,
  label_names: Sequence[str],
  data_name: str,
  counts: Mapping[str, np.ndarray],
  sites: Sequence[int],
  about: Mapping[str, Any],
) -> dict[str, Any]:
  """Writes `report.md`, `metrics.json` and `disclosure.md`; there are no pictures.

  Args:
    folder: an existing one; files of an earlier report in it are replaced.
    config: of the evaluation.
    label_names: the L classes.
    data_name: shown in every title; "synthetic phantom" for the phantom.
    counts: the opened sums, "confusion" and "table", as `metrics.NoisedCounts` has them.
    sites: numbers of the sites in the sum.
    about: what the report says of the settings.

  Returns:
    What `metrics.json` holds; null there means undefined.
  """
  known = NoisedCounts(
    counts["confusion"], counts["table"], variance(config, len(label_names), len(sites))
  )
  found = result(config, label_names, known, sites)
  crossed = crossed_by(config, label_names, len(sites))
  of_run = report.Facts(
    about,
    secure_aggregation=_facts_of_sums(config, len(sites)),
    privacy=facts(config, len(label_names), len(sites)),
    policy=Policy((disclosure.NOISED_COUNTS,), 0, config.fewest_in_sum),
    crossed=crossed,
  )
  found = report.jsonable(found | {"data": data_name} | of_run.told())
  of_run.write(folder, found["title"], found)
  (folder / "report.md").write_text(page(found), encoding="utf-8")
  return found


def result(
  config: Evaluate, label_names: Sequence[str], counts: NoisedCounts, sites: Sequence[int]
) -> dict[str, Any]:
  """The scores with their intervals; arguments as `write`."""
  names, deviation = list(label_names), math.sqrt(counts.variance)
  found, areas = metrics.noised_intervals(counts), {}
  entry = lambda field, *index: {
    end: np.asarray(getattr(getattr(found, end), field))[index] for end in ("value", "low", "high")
  }
  scores: dict[str, Any] = {field: entry(field) for field in SCALARS}
  scores |= {field: {name: entry(field, k) for k, name in enumerate(names)} for field in PER_CLASS}
  for k, name in enumerate(names):
    area, spread = metrics.noised_area(counts, k, [j for j in range(len(names)) if j != k])
    low, high = metrics.normal_interval(area, spread)
    value = np.clip(area.value, 0, 1)
    areas[name] = {"value": value, "low": low, "high": high, "error": area.error}
  return {
    "title": f"Evaluation by {len(sites)} sites, counts with noise",
    "sites": list(sites),
    "num_sites": config.scoring.num_sites,
    "num_examples": float(np.round(counts.confusion.sum(), 1)),
    "standard deviation of num_examples": len(names) * deviation,
    "label_names": names,
    "scores": scores,
    "roc_auc": areas,
    "confusion_matrix": np.round(counts.confusion, 1),
    "standard deviation of a count": deviation,
    "scores in bins": np.round(counts.table, 2),
    "intervals": {"level": 0.95, "kind": "normal, of sampling and noise together"},
  }


def _facts_of_sums(config: Evaluate, num_in_sum: int) -> dict[str, Any]:
  known = pooled_report.facts(config, num_in_sum)
  learns = (
    "the coordinator and every site's program learn the sums, with the noise of every site. No "
    "site's own counts are seen by anybody else; its noise would hide its patients even so"
  )
  ring = known["ring"].replace("counts are exact", "counts carry noise")
  return known | {"ring": ring, "who learns what": learns, "noise": "see Differential privacy"}


def facts(config: Evaluate, num_classes: int, num_in_sum: int) -> dict[str, Any]:
  """What the report says of the noise, and of what it costs."""
  stddev, cost = config.scoring.dp_count_noise, config.scoring.cost(num_classes)
  (release,) = cost.releases
  return {
    "mechanism": f"each site adds Gaussian noise of standard deviation {stddev:g} to each of its "
    "counts before it masks them; a patient counts 1, shared among the patient's images, and "
    f"changes all counts together by at most sqrt(1 + {num_classes}) in L2 norm",
    "standard deviation of a count in the sums": round(
      math.sqrt(variance(config, num_classes, num_in_sum)), 2
    ),
    "unit of privacy": "one patient; one image where a site does not know whose its images are",
    "delta": cost.delta,
    "epsilon of this evaluation, for a patient of any one site": ledger.claim(cost.epsilon(1)),
    "noise over the largest contribution of a patient": round(release.noise_multiplier, 4),
    "protected from": "everybody outside the site, the coordinator and all other sites included",
    "charged": "each site's own ledger, before its counts leave; so is a start that fails later",
    "not covered": "the other images of these patients, and what else was released of them: the "
    "ledger of each site has all its runs",
  }


def crossed_by(config: Evaluate, label_names: Sequence[str], num_in_sum: int) -> list[Crossing]:
  """What crossed the boundary of the sites."""
  size, n = len(label_names), config.scoring.num_sites
  numbers, needs = size**2 * (1 + config.scoring.score_bins), config.fewest_in_sum
  masked = secagg.bytes_per_number(config.scoring.sums()) * numbers
  epsilon = ledger.claim(config.scoring.cost(size).epsilon(1))
  charge = f"epsilon {epsilon} to the patients of each site"
  noise = f"noise of deviation {config.scoring.dp_count_noise:g}, and "
  return [
    Crossing("counts of scores, with noise", "each site", "coordinator and sites", num_in_sum,
             masked * num_in_sum, f"{noise}masks: only the sum over at least {needs} sites opens",
             charge),
    Crossing("sum of the counts, with noise", "all of them open it", "coordinator and sites", 1,
             0, "the noise of every site in it", "as the row above"),
    pooled_report.crossing_of_hellos(n, size),
  ]  # fmt: skip


def page(found: Mapping[str, Any]) -> str:
  """The text of `report.md`, of what `metrics.json` holds."""
  deviation, data = found["standard deviation of a count"], markdown.plain(found["data"])
  names = [markdown.plain(name) for name in found["label_names"]]
  accuracy = pooled_report.cell(found["scores"]["accuracy"], percent=True)
  spread = found["standard deviation of num_examples"]
  lines = [
    f"# {found['title']}: {data}",
    "",
    f"The sites {', '.join(map(str, found['sites']))} have scored the images of about "
    f"{found['num_examples']:,.0f} patients (standard deviation {spread:.0f}), each "
    f"its own. **Every count carries noise of standard deviation {deviation:.1f}**; epsilon below "
    f"bounds what it tells of one patient. Accuracy is {accuracy} %, and MCC "
    f"{pooled_report.cell(found['scores']['mcc'], False)}. A patient counts 1, shared among the "
    "patient's images.",
    "",
  ]
  if "synthetic phantom" in found["data"]:
    lines += [markdown.SYNTHETIC, ""]
  for what, why in markdown.warnings(found):
    lines += [f"**{what}**: {why}.", ""]
  lines += [
    *pooled_report.results(found),
    "",
    "Brackets hold normal 95 % intervals of sampling and noise together, by the slope of each "
    "score in the counts; the ends of a score's range cut them. That of ROC-AUC is wider by the "
    "error of the bins on either side. More images, or less noise, make them narrower. A score is "
    "undefined where noise leaves a class without a positive count.",
    "",
    *pooled_report.areas(found),
    "",
    "The errors of the bins are estimates here: they are made of counts with noise.",
    "",
    "## Confusion matrix",
    "",
    markdown.table(
      ["true (rows), predicted (columns)", *names],
      ([name, *cells] for name, cells in zip(names, found["confusion_matrix"], strict=True)),
    ),
    "",
    f"Each number is off by noise of standard deviation {deviation:.1f}; a small one may be zero "
    "in truth, and a negative one is small. Floors do not apply to counts with noise. Calibration "
    "is not summed: it would cost more.",
    "",
    *markdown.sections(found),
  ]
  return "\n".join([*lines, *markdown.ending(found)]) + "\n"
