"""Pictures of finished runs, from their folders alone; see `plot`."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax.data import phantom
from primia_jax.mpc import pricing

from . import folders, lines, markdown, running, settings


class Picture(NamedTuple):
  """A picture to draw: the name of its file, and what draws it there."""

  name: str
  draw: Callable[[pathlib.Path], None]


class Score(NamedTuple):
  """The MCC of a run's main arm, with its bootstrap interval over test images, and the epsilon that
  was spent, to two digits (0 without privacy).
  """

  arm: str
  epsilon: float
  value: float
  low: float
  high: float


class Timed(NamedTuple):
  """An encrypted inference: seconds of computing as measured, and what it sends."""

  name: str
  seconds: float
  rounds: int
  num_bytes: int


# A link's round trip and bandwidth; primia-infer estimates by the first and the last, too.
LINKS = {
  "one site: 0.5 ms, 1 Gbit/s": pricing.LAN,
  "one city: 5 ms, 1 Gbit/s": pricing.Network(0.005, 1e9),
  "a country: 40 ms, 100 Mbit/s": pricing.WAN,
}


def curves(run: pathlib.Path) -> list[Picture]:
  """The training curves of each arm, also of a run that still trains.

  Raises:
    FileNotFoundError: no round has ended yet.
    ValueError: a line is damaged.
  """
  config = settings.load(run / folders.RUN)
  files = sorted(run.glob("*/rounds.jsonl"))
  if not files:
    raise FileNotFoundError(
      f"{run} has no rounds.jsonl yet; wait until the run's first round has ended"
    )
  sources = (config.get("site_data") or config["data"]).split(",")
  named = (pathlib.PurePath(one.partition(":")[2]).name for one in sources)
  data = phantom.NAME if sources == ["phantom"] else ", ".join(named)

  def draw(file: pathlib.Path) -> Callable[[pathlib.Path], None]:
    rows = lines.rows(file)
    from . import plots  # here, because the import takes a second

    return lambda path: plots.curves(rows, path, f"{rows[0]['arm']}: {data}")

  return [Picture(f"curves_{file.parent.name}.png", draw(file)) for file in files]


def roc(run: pathlib.Path) -> list[Picture]:
  """ROC curves of each arm's model, with the operating points of a human reader where the report
  has one.

  Raises:
    FileNotFoundError, ValueError: the run has no report, or no predictions of single images.
  """
  from . import plots, study_plots  # here, because the import takes a second

  result = _report(run)
  path = run / running.PREDICTIONS
  if not path.is_file():
    raise FileNotFoundError(
      f"{run} has no {running.PREDICTIONS}: its run is of another kind, is not finished, or keeps "
      "no predictions of single patients (--fewest_patients)"
    )
  names, made = result["label_names"], list[Picture]()
  readers = [(k, np.asarray(one["confusion_matrix"])) for k, one in result["references"].items()]
  with np.load(path) as saved:
    labels, found = saved["labels"], {k: saved[k] for k in saved.files if k != "labels"}
  for arm, probabilities in found.items():
    title = f"{result['title']} ({arm} model):\n{result['data']}"
    drawer: Callable[..., None] = plots.roc
    given: tuple[Any, ...] = labels, probabilities, names
    if readers:
      drawer, given = study_plots.reader, (*given, readers[0])
    draw = lambda path, drawer=drawer, given=given, title=title: drawer(*given, path, title)
    made.append(Picture(f"roc_{_slug(arm)}.png", draw))
  return made


def confusion(run: pathlib.Path) -> list[Picture]:
  """The confusion matrix of each arm, and of a human reader where the report has one.

  Raises:
    FileNotFoundError, ValueError: the run has no report, or its counts are suppressed.
  """
  from . import plots  # here, because the import takes a second

  result = _report(run)
  made = list[Picture]()
  for kind, of in (("model", result["arms"]), ("", result["references"])):
    for name, one in of.items():
      counts = _number(run, one["confusion_matrix"])
      title = f"{name} {kind}".rstrip() + f":\n{result['data']}"
      draw = lambda path, counts=counts, title=title: plots.confusion_matrix(
        counts, result["label_names"], path, title
      )
      made.append(Picture(f"confusion_{_slug(name)}.png", draw))
  return made


def epsilon(runs: Sequence[pathlib.Path]) -> list[Picture]:
  """MCC against epsilon of private runs, beside those of runs without privacy.

  Raises:
    FileNotFoundError, ValueError: a run has no report, its scores are suppressed, it is NOT PRIVATE
      for its seed or no training, none is private, or they were tested on different images.
  """
  from . import study_plots  # here, because the import takes a second

  results = {run: _report(run) for run in runs}
  if len(data := {(one["data"], one["num_examples"]) for one in results.values()}) > 1:
    told = ", ".join(f"{n} of {name}" for name, n in sorted(data))
    raise ValueError(f"run_dir names runs with different test images ({told}); name those of one")
  scores = [_score(run, one) for run, one in results.items()]
  private = [one for one in scores if one.epsilon]
  if not private:
    raise ValueError(
      f"none of the runs {', '.join(map(str, runs))} was private; name runs with --dp"
    )
  title = f"MCC against epsilon: {next(iter(data))[0]}"
  others = [one for one in scores if not one.epsilon]
  readers = {
    k: float(_number(runs[0], one["mcc"]))
    for k, one in next(iter(results.values()))["references"].items()
  }
  draw = lambda path: study_plots.budgets(private, others, readers, path, title)
  return [Picture("epsilon.png", draw)]


def latency(runs: Sequence[pathlib.Path]) -> list[Picture]:
  """The time of an encrypted inference over links of several kinds.

  Raises:
    FileNotFoundError, ValueError: a folder holds no costs.json of primia-infer.
  """
  from . import study_plots  # here, because the import takes a second

  times = [_timed(run) for run in runs]
  title = "Time of one encrypted inference, prepared beforehand"
  return [Picture("latency.png", lambda path: study_plots.latency(times, LINKS, path, title))]


def _report(run: pathlib.Path) -> dict[str, Any]:
  path = run / "metrics.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"run_dir={run} has no metrics.json; name the folder of a finished training run"
    )
  result = settings.read_json(path)
  if "references" not in result:
    raise ValueError(
      f"run_dir={run} is not a run that gives images one class; only curves are drawn"
    )
  return result


def _number(run: pathlib.Path, value: Any) -> np.ndarray:
  """A score or matrix of a report.

  Raises:
    ValueError: the report suppresses it, or it is undefined.
  """
  array = np.asarray(value)
  if value is None:
    raise ValueError(f"run_dir={run}: a score is undefined on its test images; leave the run out")
  if array.dtype.kind not in "iuf":
    raise ValueError(
      f"run_dir={run}: its report suppresses counts of few patients (--fewest_patients), and with "
      "them this picture"
    )
  return array


def _score(run: pathlib.Path, result: Mapping[str, Any]) -> Score:
  arm, config, privacy = result["main_arm"], result["config"], result["privacy"]
  if privacy and markdown.NOT_PRIVATE in privacy:
    raise ValueError(f"run_dir={run} is {markdown.NOT_PRIVATE}; leave it out")
  if not (run / folders.RUN).is_file():
    raise ValueError(
      f"run_dir={run} is an evaluation, which does not say whether its model is private; name the "
      "training run"
    )
  found = result["arms"][arm]["mcc"]
  value, low, high = (float(_number(run, found[k])) for k in ("value", "low", "high"))
  spent = [0.0]
  if privacy:
    spent = [row["epsilon"] for row in lines.rows(run / arm / "rounds.jsonl") if "epsilon" in row]
  return Score(f"{arm}, {config['model']}", float(f"{spent[-1]:.2g}"), value, low, high)


def _timed(run: pathlib.Path) -> Timed:
  path = run / "costs.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"run_dir={run} has no costs.json; name the --output_dir of primia-infer"
    )
  costs = settings.read_json(path)
  try:
    of = next(one for one in costs["phases"] if one["phase"] == "online")
    name = f"{costs['model']}, 2^{costs['config']['num_bits']}"
    if costs["images_in_a_run"] > 1:
      name = f"{name}, {costs['images_in_a_run']} images"
    return Timed(name, float(of["seconds"]), int(of["rounds"]), int(of["bytes"]))
  except (KeyError, StopIteration, TypeError) as error:
    raise ValueError(
      f"{path} is not of a simulated primia-infer of this version ({error!r}); run it again"
    ) from error


def _slug(name: str) -> str:
  return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


KINDS: dict[str, Callable[[Any], list[Picture]]] = {
  "curves": curves, "roc": roc, "confusion": confusion, "epsilon": epsilon, "latency": latency,
}  # fmt: skip
OF_SEVERAL = ("epsilon", "latency")


def of(kind: str, runs: Sequence[pathlib.Path]) -> list[Picture]:
  """The pictures of one kind; raises as its function."""
  return KINDS[kind](runs if kind in OF_SEVERAL else runs[0])


def drawn(folder: pathlib.Path, pictures: Sequence[Picture]) -> str:
  """Draws pictures in a folder, and returns their paths, one a line."""
  for picture in pictures:
    picture.draw(folder / picture.name)
  return "\n".join(str(folder / picture.name) for picture in pictures)
