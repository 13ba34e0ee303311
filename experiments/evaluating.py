"""What a hospital's process does in an evaluation: it scores its own images, sums with the others
what it counted, and writes two reports: of all sites together, and of its own images for itself.
"""

from __future__ import annotations

import functools
import json
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import durable, evaluation, metrics
from primia_jax.data.dataset import Dataset
from primia_jax.metrics import ScoreCounts
from primia_jax.privacy.ledger import Ledgers
from primia_jax.secagg import pinning
from primia_jax.secagg.errors import Refused

from . import (
  admission,
  evaluations,
  noised_counts,
  noised_report,
  opened,
  pooled_report,
  processes,
  report,
)
from .configs import tasks
from .configs.scoring import Evaluate
from .evaluations import Model
from .report import Arm

OWN, SUMS = "own", "sums.json"  # in the folder of results
_NOISED = {"confusion", "table"}  # of counts with noise


class Summed(NamedTuple):
  """What all sites have counted together.

  Attributes:
    counts: of all images; with noise "confusion" and "table", as `metrics.NoisedCounts` has them.
    sites: numbers of the sites in the sum.
    fewest_patients: the largest floor of all sites.
  """

  counts: ScoreCounts | dict[str, np.ndarray]
  sites: tuple[int, ...]
  fewest_patients: int


def check(config: Evaluate, model: Model, dataset: Dataset) -> None:
  """Refuses images that cannot be scored.

  Raises:
    ValueError: there are none, too many, or they are of another task or other classes.
  """
  most = config.scoring.most_images
  if not len(dataset):
    raise ValueError(f"{dataset.name}: this site has no test images to score; leave it out")
  if len(dataset) > most:
    raise ValueError(
      f"most_images={most}: this site has more images to score; raise it at all sites"
    )
  tasks.check(model.config.name, dataset)
  if dataset.label_names != model.label_names:
    raise ValueError(
      f"{dataset.name} has the classes {list(dataset.label_names)}, and the model "
      f"{list(model.label_names)}; give them in the model's order"
    )


def run(
  config: Evaluate,
  model: Model,
  dataset: Dataset,
  seat: processes.Seat,
  folder: pathlib.Path,
  floor: int = 0,
  has_patients: bool = False,
  warnings: Mapping[str, str] = types.MappingProxyType({}),
  ledger_dir: pathlib.Path | None = None,
) -> dict[str, Any]:
  """Scores this site's images, sums with the others, and writes both reports.

  A sum that was opened is kept: a site that is started again writes its reports from it, and takes
  part in no second one, whose difference might tell one site's counts.

  Args:
    config: of the evaluation.
    model: that is scored.
    dataset: this site's images, which `check` has passed.
    seat: of this process.
    folder: for the results; made where it is missing.
    floor: fewest patients in a count that this site lets be told.
    has_patients: the site has named whose its images are, so that its own intervals resample
      patients.
    warnings: what a reader must know of these images before the scores.
    ledger_dir: of these images' ledger, with noise.

  Returns:
    What `metrics.json` of all sites together holds.

  Raises:
    Refused, Lost: as `processes.meet`; or a site scores another model, or other classes.
    ValueError, FileNotFoundError: as `noised_counts.begin` and `check_budget`.
  """
  predict = tasks.of(model.config.name).predictor(model.apply)
  probabilities = predict(model.trained, dataset.images)
  for name in _missing(dataset):
    print(f"this site has no image of {name}, and adds nothing to its counts")
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  path = folder / SUMS
  charges: Ledgers | None = None
  if config.scoring.dp_count_noise:
    assert ledger_dir is not None
    of_ledger = folder, ledger_dir, has_patients
    charges = noised_counts.begin(config, len(model.label_names), dataset, seat, *of_ledger)
  if seat.site is not None and path.is_file():
    print(f"the sum was opened before and is in {path}; the reports are written from it")
    summed = _read(path)
  else:
    summed = _sum(config, model, dataset, probabilities, seat, floor, charges)
    durable.replace(path, _bytes(summed))
    if seat.site is not None:
      admission.note_scored(seat.site, summed.sites)
  about, is_shared = evaluations.about(config, model), seat.site is None and not config.data.sources
  own = about | dict(warnings)
  if charges is not None:
    own |= noised_counts.statement(charges, seat.number)
  _own_report(folder / OWN, config, dataset, probabilities, seat.number, own, has_patients)
  about |= warnings if is_shared else {}
  where = dataset.name if is_shared else "each site's own images"
  of_report, counts = (folder, config, model.label_names, where), summed.counts
  if isinstance(counts, dict):
    return noised_report.write(*of_report, counts, summed.sites, about)
  return pooled_report.write(*of_report, counts, summed.sites, summed.fewest_patients, about)


def _exact(config: Evaluate, dataset: Dataset, probabilities: Any) -> ScoreCounts:
  scoring = config.scoring
  bins = scoring.score_bins, scoring.confidence_bins
  counts = metrics.score_counts(dataset.labels, probabilities, dataset.groups, *bins)
  if max(counts.squares) / evaluation.SQUARES > scoring.most_images:
    raise ValueError(
      f"most_images={scoring.most_images}: patients of this site have so many images that the sums "
      "have no room for them; raise it at all sites"
    )
  return counts


def _sum(
  config: Evaluate,
  model: Model,
  dataset: Dataset,
  probabilities: Any,
  seat: processes.Seat,
  floor: int,
  charges: Ledgers | None,
) -> Summed:
  """Meets the other sites, and sums with them; with a ledger, counts that carry noise."""
  n, most = config.scoring.num_sites, config.scoring.most_images
  if floor > most:
    raise ValueError(
      f"fewest_patients={floor} of this site is above most_images={most}, so no count could be "
      f"told; lower it in site.toml, or have the coordinator offer a larger most_images"
    )
  counts: Any = None
  kept = opened.keeper(seat.own, seat.number, pinning.needed(seat.own))
  marked = opened.marks(kept, dataset.images)
  if charges is None:
    opened.check_images(kept, model.sha256, marked)
    counts = _exact(config, dataset, probabilities)
  else:
    noised_counts.check_budget(charges, seat)
  own = {"model": model.sha256, "classes": list(model.label_names), "fewest_patients": floor}
  place, said = processes.connect(config, seat, json.dumps(own).encode())
  assert place.joined is not None
  if charges is None:
    place.joined.exchange.opens = functools.partial(opened.note_images, kept, model.sha256, marked)
  with place.together():
    largest = agreed(seat.number, own, said, config.scoring.most_images)
    summation = place.masked(config.scoring.sums())
    add: Any = evaluation.score_summing(summation, place.placement)
    if charges is not None:
      noised_counts.charge(charges, seat)
      counts = noised_counts.counted(config, dataset, probabilities)
      add = evaluation.count_summing(summation, place.placement)
    total, sites = add(range(n), jax.tree.map(lambda a: np.asarray(a)[None], counts))
  return Summed(total, tuple(sites.tolist()), largest)


def agreed(number: int, own: Mapping[str, Any], said: Mapping[int, bytes], most: int) -> int:
  """Compares what all sites score; returns the largest floor of patients.

  Args:
    number: of this site.
    own: what it has told.
    said: what all have told, as JSON, by site.
    most: images that all have agreed a site may score; a floor above it would hide every count.

  Raises:
    Refused: a site scores another model, has other classes or another order of them, or tells
      something else.
  """
  floors = []
  for i, told in sorted(said.items()):
    try:
      theirs = dict(json.loads(told))
      model, classes = str(theirs["model"]), list(map(str, theirs["classes"]))
      floor = int(theirs["fewest_patients"])
      if not 0 <= floor <= most:
        raise ValueError(f"fewest_patients={floor}, and most_images={most}")
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
      what = f"site {i} has not told what it scores ({error!r})"
      raise Refused(number, "hello", "malformed", what) from error
    if model != own["model"]:
      what = f"site {i} scores the model {model[:12]}, and this site {own['model'][:12]}"
      raise Refused(number, "hello", "inconsistent", f"{what}; give all the same model")
    if classes != own["classes"]:
      what = f"site {i} has the classes {classes}, and this site {own['classes']}"
      raise Refused(number, "hello", "inconsistent", f"{what}; give all the same, in one order")
    floors.append(floor)
  return max(floors)


def _own_report(
  folder: pathlib.Path,
  config: Evaluate,
  dataset: Dataset,
  probabilities: Any,
  number: int,
  about: Mapping[str, Any],
  has_patients: bool,
) -> None:
  """What this site alone may see: the report and the predictions of its own images."""
  data = config.data.data or "this site's part of the images"
  folder.mkdir(mode=0o700, exist_ok=True)
  names = dataset.columns.get("path", [f"image {i}" for i in range(len(dataset))])
  ids = [str(name) for name in names]
  table = folder / "predictions.csv"
  report.predictions_csv(table, ids, dataset.labels, probabilities, dataset.label_names)
  report.write_report(
    folder,
    title=f"Evaluation at site {number} alone",
    data_name=dataset.name,
    arms={"trained": Arm(dataset.labels, probabilities)},
    label_names=dataset.label_names,
    facts=report.Facts({"data": data} | dict(about), dataset.notes),
    groups=dataset.groups if has_patients else None,
    main_arm="trained",
    seed=config.seed,
  )


def _missing(dataset: Dataset) -> Sequence[str]:
  counts = np.bincount(dataset.labels, minlength=len(dataset.label_names))
  return [name for name, n in zip(dataset.label_names, counts, strict=True) if not n]


def _bytes(summed: Summed) -> bytes:
  known = summed.counts if isinstance(summed.counts, dict) else summed.counts._asdict()
  counts = {name: np.asarray(a).tolist() for name, a in known.items()}
  return json.dumps(summed._asdict() | {"counts": counts}).encode()


def _read(path: pathlib.Path) -> Summed:
  try:
    found = json.loads(path.read_text())
    counts: Any = {name: np.asarray(a, np.float64) for name, a in found["counts"].items()}
    counts = counts if set(counts) == _NOISED else ScoreCounts(**counts)
    return Summed(counts, tuple(found["sites"]), int(found["fewest_patients"]))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error!r}); restore it") from error
