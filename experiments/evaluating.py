"""What a hospital's process does in an evaluation: it scores its own images, sums with the others
what it counted, and writes two reports: of all sites together, and of its own images for itself.
"""

from __future__ import annotations

import json
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax import durable, evaluation, metrics
from primia_jax.data.dataset import Dataset
from primia_jax.metrics import ScoreCounts
from primia_jax.secagg.errors import Refused

from . import admission, evaluations, pooled_report, processes, report
from .configs import tasks
from .configs.scoring import Evaluate
from .evaluations import Model
from .report import Arm

OWN, SUMS = "own", "sums.json"  # in the folder of results
_LARGEST_FLOOR = 1_000_000  # of patients, that another site may ask for


class Summed(NamedTuple):
  """What all sites have counted together.

  Attributes:
    counts: of all images.
    sites: numbers of the sites in the sum.
    fewest_patients: the largest floor of all sites.
  """

  counts: ScoreCounts
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

  Returns:
    What `metrics.json` of all sites together holds.

  Raises:
    Refused, Lost: as `processes.meet`; or a site scores another model, or other classes.
  """
  predict = tasks.of(model.config.name).predictor(model.apply)
  probabilities = predict(model.trained, dataset.images)
  for name in _missing(dataset):
    print(f"this site has no image of {name}, and adds nothing to its counts")
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  path = folder / SUMS
  if seat.site is not None and path.is_file():
    print(f"the sum was opened before and is in {path}; the reports are written from it")
    summed = _read(path)
  else:
    summed = _sum(config, model, dataset, probabilities, seat, floor)
    durable.replace(path, _bytes(summed))
    if seat.site is not None:
      admission.note_scored(seat.site, summed.sites)
  about, is_shared = evaluations.about(config, model), seat.site is None and not config.data.sources
  own = about | dict(warnings)
  _own_report(folder / OWN, config, dataset, probabilities, seat.number, own, has_patients)
  about |= warnings if is_shared else {}
  where = dataset.name if is_shared else "each site's own images"
  return pooled_report.write(folder, config, model.label_names, where, *summed, about)


def _sum(
  config: Evaluate, model: Model, dataset: Dataset, probabilities: Any, seat: Any, floor: int
) -> Summed:
  """Meets the other sites, and sums with them."""
  n, scoring = config.scoring.num_sites, config.scoring
  bins = scoring.score_bins, scoring.confidence_bins
  counts = metrics.score_counts(dataset.labels, probabilities, dataset.groups, *bins)
  if max(counts.squares) / evaluation.SQUARES > scoring.most_images:
    raise ValueError(
      f"most_images={scoring.most_images}: patients of this site have so many images that the sums "
      "have no room for them; raise it at all sites"
    )
  own = {"model": model.sha256, "classes": list(model.label_names), "fewest_patients": floor}
  place, said = processes.connect(config, seat, json.dumps(own).encode())
  assert place.joined is not None
  exchange = place.joined.exchange
  with processes.leaving(place.joined.carrier, seat.number):
    largest = agreed(seat.number, own, said)
    summation = config.aggregation.build_counts(n, n, float(scoring.most_images), exchange)
    rows = ScoreCounts(*(np.asarray(a)[None] for a in counts))
    total, sites = evaluation.score_summing(summation, place.placement)(range(n), rows)
  exchange.close()
  return Summed(total, tuple(sites.tolist()), largest)


def agreed(number: int, own: Mapping[str, Any], said: Mapping[int, bytes]) -> int:
  """Compares what all sites score; returns the largest floor of patients.

  Args:
    number: of this site.
    own: what it has told.
    said: what all have told, as JSON, by site.

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
      if not 0 <= floor <= _LARGEST_FLOOR:
        raise ValueError(f"fewest_patients={floor}")
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
  counts = {name: np.asarray(a).tolist() for name, a in summed.counts._asdict().items()}
  return json.dumps(summed._asdict() | {"counts": counts}).encode()


def _read(path: pathlib.Path) -> Summed:
  try:
    found = json.loads(path.read_text())
    counts = ScoreCounts(**{name: np.asarray(a, np.float64) for name, a in found["counts"].items()})
    return Summed(counts, tuple(found["sites"]), int(found["fewest_patients"]))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error!r}); restore it") from error
