"""The work of `evaluate_encrypted`: flags, rows, plan, and the runs of the protocol."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import models
from primia_jax.data.dataset import Dataset
from primia_jax.evaluation import batches
from primia_jax.mpc import clear, planning, roles, scoring
from primia_jax.mpc.messages import Correlations, Prepared
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.types import Array, PyTree

from . import encrypted, folders, progress
from .planned import Protocol
from .settings import choose, require, setting

OPENED = ("confusion", "accuracy", "roc")
RECEIVERS = ("hospital", "vendor", "both")
FILES = ("score.json", "plan.txt")


@dataclasses.dataclass(frozen=True)
class Opened:
  """What is opened, and to whom."""

  checkpoint: str = setting("", "vendor: folder of a finished training run")
  opened: str = setting(
    "confusion",
    "what is opened, and nothing else: confusion (the matrix of counts), accuracy (one bit: "
    "whether accuracy reaches --threshold), or roc (counts at --bins thresholds of the probability "
    "of --positive)",
  )
  opened_to: str = setting(
    "hospital", "who learns the result: hospital, vendor or both; both sides must name the same"
  )
  threshold: float = setting(0.0, "accuracy: the share of right answers to be reached, 0 to 1")
  positive: str = setting("", "roc: the class whose probability is compared")
  bins: int = setting(20, "roc: thresholds between 0 and 1, 1 to 100")
  small_classes: str = setting(
    "refuse",
    f"what becomes of a class of fewer than {scoring.FEWEST} different images, whose row would "
    "tell the classes of single ones: refuse, or merge it with the next larger class",
  )
  vendor_dir: str = setting(
    "", "vendor: folder of its register of opened results, created if needed; keep it"
  )
  hospital_dir: str = setting(
    "", "hospital: folder of the key of its images' marks, created if needed; keep it"
  )
  query_budget: int = setting(
    10_000, "vendor: images that all results of this model may count together, one query each"
  )
  output_dir: str = setting(
    "", "folder for score.json and plan.txt, created if needed; empty writes no files"
  )
  check: bool = setting(
    False, "also compute in the clear: compare with float32 and find values beyond their range"
  )


@dataclasses.dataclass(frozen=True)
class Score(Protocol, Opened):  # flags in the order of Opened, Protocol
  """What is opened, to whom, and by which protocol."""

  batch: int = setting(48, "images in one run of the protocol")


def check_own(s: Score) -> None:
  """Refuses wrong flags of the hospital before any work; raises as `check` does."""
  choose("opened_to", s.opened_to, RECEIVERS)
  choose("small_classes", s.small_classes, ("refuse", "merge"))
  if s.output_dir:
    folders.to_write(s.output_dir, FILES)


def check(s: Score) -> None:
  """Refuses wrong flags before any work.

  Raises:
    ValueError, FileNotFoundError: the message names the flag and the cure.
  """
  encrypted.check_protocol(s)
  check_own(s)
  choose("opened", s.opened, OPENED)
  if s.opened == "accuracy":
    require(0 < s.threshold <= 1, "threshold", s.threshold, "must lie above 0 and be at most 1")
  elif s.threshold:
    raise ValueError(
      f"threshold={s.threshold} belongs to --opened=accuracy, not {s.opened}; leave it out"
    )
  if s.positive and s.opened != "roc":
    raise ValueError(
      f"positive={s.positive!r} belongs to --opened=roc, not {s.opened}; leave it out"
    )
  require(1 <= s.bins <= 100, "bins", s.bins, "must be 1 to 100")
  require(s.query_budget > 0, "query_budget", s.query_budget, "must be positive")
  for name, whose in (("vendor_dir", "vendor"), ("hospital_dir", "hospital")):
    if not getattr(s, name):
      raise ValueError(
        f"{name} is empty; name the {whose}'s own folder, such as --{name}={whose}, and keep it"
      )
    folders.role(name, getattr(s, name))
  if pathlib.Path(s.vendor_dir).expanduser() == pathlib.Path(s.hospital_dir).expanduser():
    raise ValueError(
      f"vendor_dir={s.vendor_dir} is also hospital_dir; the vendor must not have the key of the "
      "images' marks: name two folders"
    )


class Task(NamedTuple):
  """What is scored, agreed before anything is dealt.

  Attributes:
    score: the function to be encrypted.
    labels: [N] integers, as rows of the result.
    rows, columns: names; of the result.
  """

  score: scoring.Score
  labels: np.ndarray
  rows: tuple[str, ...]
  columns: tuple[str, ...]


def task(s: Score, model: models.Model, data: Dataset, marks: list[str]) -> Task:
  """The function and the labels, once the images are known; raises as `labelled` and `function`."""
  score, _, columns = function(s, model, tuple(data.label_names))
  labels, rows = labelled(s, data, marks)
  return Task(score, labels, rows, columns)


def function(
  s: Any, model: models.Model | None, names: tuple[str, ...]
) -> tuple[scoring.Score, tuple[str, ...], tuple[str, ...]]:
  """What is computed, and the names of rows and columns if no classes are merged.

  Args:
    s: has opened, positive and bins.
    model: the model; None where only the names matter.
    names: of the classes.

  Raises:
    ValueError: there is no such class.
  """
  logits = encrypted.functions(model)["probabilities"] if model else lambda weights, images: images
  if s.opened == "confusion":
    return scoring.confusion(logits), names, names
  if s.opened == "accuracy":
    return scoring.right(logits), names, ("right",)
  if s.positive not in names:
    raise ValueError(f"positive={s.positive!r}; the model's classes are {', '.join(names)}")
  levels = [(i + 1) / (s.bins + 1) for i in range(s.bins)]
  columns = (*(f"{level:.3f}" for level in levels), "all")
  score = scoring.roc(logits, names.index(s.positive), levels)
  return score, ("other classes", s.positive), columns


def labelled(s: Score, data: Dataset, marks: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
  """The labels as numbers of rows, and the rows' names.

  Raises:
    ValueError: there are too few images, of a class or in all, or they have several labels each.
  """
  if data.is_multi:
    raise ValueError(
      "multi_label or label_columns: a score is of images of one class; leave it out"
    )
  names, labels = tuple(data.label_names), np.asarray(data.labels)
  merge, keys = s.small_classes == "merge", [mark.encode() for mark in marks]
  if s.opened == "confusion":
    rows = scoring.rows(labels, keys, names, merge)
    return rows.of_class[labels], rows.names
  if s.opened == "accuracy":
    scoring.rows(np.zeros(len(labels), int), keys, ("all",))
    return labels, names
  two, found = ("other classes", s.positive), (labels == names.index(s.positive)).astype(int)
  scoring.rows(found, keys, two)
  return found, two


def make_plan(
  s: Any, work: Task, model: models.Model, weights: PyTree, calibration: np.ndarray
) -> planning.Plan:
  """Chooses the ring by the logits, as `infer_encrypted` does, and plans; raises as that does.

  s is a `Score`, or a `planned.Planned`.
  """
  logits = encrypted.functions(model)["probabilities"]
  config = encrypted.choose_config(s, logits, encrypted.examples(weights, calibration))
  images = encrypted.normalised(calibration)
  return scoring.plan(work.score, weights, images, len(work.rows), s.batch, config)


class Result(NamedTuple):
  """What was opened, and what it took.

  Attributes:
    counts: as `Task` names them; None where only a bit is opened.
    bit: whether the threshold is reached; None where counts are opened.
    seconds: by phase, for all batches together; those of the first batch, which compiles, apart.
    runs: of the protocol.
  """

  counts: np.ndarray | None
  bit: bool | None
  seconds: dict[str, float]
  runs: int


def run(plan: planning.Plan, s: Score, work: Task, weights: PyTree, images: Any) -> Result:
  """Plays all roles, each with nothing but its own, and opens the sum.

  Args:
    plan: from `make_plan`.
    s: the flags.
    work: what is scored.
    weights: the vendor's.
    images: [N, H, W, C] uint8, the hospital's.
  """
  seconds: dict[str, float] = {}
  runs = -(-len(work.labels) // s.batch)
  bar = progress.bar(
    total=runs, desc="batches", bar_format="{desc:<24} {bar:30} {n_fmt}/{total_fmt}  [{elapsed}]"
  )

  def timed(phase: str, fn: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    out = jax.block_until_ready(fn())
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
    return out

  model_owner = timed("encode weights", lambda: roles.ModelOwner(plan, weights))
  dealer = timed("blind", lambda: roles.Dealer(plan, model_owner.tag))
  publication = timed("publish", lambda: model_owner.publish(dealer.blind()))
  data_owner = roles.DataOwner(plan, publication)
  online = roles.online(plan)
  vendor, hospital = scoring.Total(plan, MODEL_OWNER), scoring.Total(plan, DATA_OWNER)
  for number, (part, labels) in enumerate(parts(s.batch, work.labels, len(work.rows), images)):
    first = "first batch: " if number == 0 else ""
    ours, theirs = timed(f"{first}deal", dealer.deal)
    prepare = functools.partial(_prepared, model_owner, data_owner, ours, theirs)
    left, right = timed(f"{first}prepare", prepare)

    def answer(left=left, right=right, part=part, labels=labels) -> list[Array]:
      asked, question = data_owner.ask(right, encrypted.normalised(part), labels)
      return online(model_owner.answer(left, question), asked)

    shares = timed(f"{first}online", answer)
    vendor.add([v[MODEL_OWNER] for v in shares])
    hospital.add([v[DATA_OWNER] for v in shares])
    bar.update()
  bar.close()
  if s.opened == "accuracy":
    least = least_right(s, len(work.labels))
    bit = timed("open", lambda: scoring.at_least(vendor, hospital, least))
    return Result(None, bit, seconds, runs)
  return Result(timed("open", lambda: scoring.opened(vendor, hospital)), None, seconds, runs)


def _prepared(
  model_owner: roles.ModelOwner,
  data_owner: roles.DataOwner,
  ours: Correlations,
  theirs: Correlations,
) -> tuple[Prepared, Prepared]:
  both = model_owner.prepare(ours), data_owner.prepare(theirs)
  for prepared in both:
    prepared.block_until_ready()
  return both


def least_right(s: Score, num: int) -> int:
  """Right answers that reach the threshold; 0.7 of 10 is 7, whatever float64 makes of it."""
  return math.ceil(round(s.threshold * num, 6))


def parts(batch: int, of_rows: np.ndarray, num_rows: int, images: Any) -> Any:
  """(images, labels) of each batch; what fills the last batch has labels of 0."""
  for number, part in enumerate(batches(images, batch)):
    own = of_rows[number * batch : (number + 1) * batch]
    labels = np.zeros((batch, num_rows), np.float32)
    labels[np.arange(len(own)), own] = 1
    yield part, jnp.asarray(labels)


def in_the_clear(
  plan: planning.Plan, s: Score, work: Task, weights: PyTree, images: Any
) -> tuple[np.ndarray, np.ndarray]:
  """The counts of the integer model, whose ranges are checked, and those in float32.

  Raises:
    ValueError: a value leaves its planned range; the message names images and layer.
  """
  integers, plain = clear.checker(plan), jax.jit(work.score)
  found: Any = 0.0
  wanted: Any = 0.0
  for number, (part, labels) in enumerate(parts(s.batch, work.labels, len(work.rows), images)):
    given = weights, encrypted.normalised(part), labels
    try:
      found = found + np.asarray(integers(given), np.float64)
    except ValueError as error:
      first = number * s.batch
      raise ValueError(f"images {first} to {first + s.batch - 1}: {error}") from error
    wanted = wanted + np.asarray(plain(*given), np.float64)
  return np.rint(found).astype(int), np.rint(wanted).astype(int)
