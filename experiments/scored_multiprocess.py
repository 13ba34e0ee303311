"""What `evaluate_encrypted --connect` does: a hospital scores a model at its owner's server."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from primia_jax.data.dataset import Dataset
from primia_jax.mpc import multiprocess
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.roles import DataOwner
from primia_jax.mpc.sharing import DATA_OWNER
from primia_jax.service import certificates, institutions, publications, scores
from primia_jax.service.channel import Limits
from primia_jax.service.publications import Received

from . import asking, caching, encrypted, inputs, progress, registers, scored
from .configs.data import Data
from .planned import Connect
from .scored import Score, Task

OWN = ("opened_to", "small_classes", "output_dir")  # the hospital's; the vendor decides the others
_REGISTER = "scored"  # folder of the hospital's key and register
_NO_LIMIT = 2**62  # the vendor counts the queries


class Asked(NamedTuple):
  """What a hospital is about to score.

  Attributes:
    folder: the hospital's.
    received: the publication.
    given: the flags, with what the vendor has decided.
    data: the hospital's.
    work: its labels, and the names of rows and columns.
    marks: of its images.
  """

  folder: pathlib.Path
  received: Received
  given: Score
  data: Dataset
  work: Task
  marks: list[str]

  @property
  def plan(self) -> Plan:
    """The plan."""
    return self.received.plan


def received(s: Connect, given: Score) -> tuple[pathlib.Path, Received, Score]:
  """The hospital's folder, the publication, and the flags with what the vendor has decided.

  Raises:
    ValueError, FileNotFoundError: the message names the flag and the cure.
  """
  folder = asking.check(s)
  scored.check_own(given)
  found = publications.received(folder, s.model, is_score=True)
  about = found.about
  if given.opened_to != about.opened_to:
    raise ValueError(
      f"opened_to={given.opened_to}: the vendor opens the result to {about.opened_to}; if the "
      f"hospital agrees, say so with --opened_to={about.opened_to}"
    )
  decided: dict[str, Any] = {"opened": about.output, "batch": about.images}
  if about.positive:
    decided |= {"positive": about.positive, "bins": about.bins}
  return folder, found, dataclasses.replace(given, **decided)


def asked(s: Connect, folder: pathlib.Path, found: Received, given: Score, config: Data) -> Asked:
  """Reads the labelled images; all but the connection is then known to fit.

  Raises:
    ValueError, FileNotFoundError: images, classes or correlations are missing, or an image is in an
      earlier result of this vendor's model.
  """
  names = found.about.label_names
  data, _ = inputs.images_to_test(config, 0, names)
  images = np.asarray(data.images)
  marks = registers.marks(folder / _REGISTER, images)
  labels, rows = scored.labelled(given, data, marks)
  model, learner = _of(found, s.model)
  registers.check_new(folder / _REGISTER, model, marks, learner)
  score, _, columns = scored.function(given, None, names)
  wanted = 2 if given.opened == "roc" else len(names), len(columns)
  if [tuple(out.shape) for out in found.plan.circuit.outputs] != [wanted]:
    raise ValueError(
      f"model={s.model}: its plan does not open {wanted} counts; ask the vendor again"
    )
  runs = scores.runs_of(found.plan, len(images))
  scores.check_count(found.plan, len(images))
  if (left := asking.unused(folder, s.model)) < runs:
    raise ValueError(
      f"data={config.data} has {len(images)} images, which need {runs} runs, and the dealer has "
      f"dealt for {left} that are unused; have it deal more (primia-deal)"
    )
  work = Task(score, labels, rows, columns)
  return Asked(folder, found, given, data, work, marks)


def _of(found: Received, name: str) -> tuple[str, str]:
  """A model as the hospital's register knows it, and the vendor if it learns the result."""
  vendor = certificates.name(found.server)
  learner = "" if found.about.opened_to == scores.HOSPITAL else vendor
  return f"{vendor}: {name}, {found.about.version}", learner


class Answer(NamedTuple):
  """What came of it.

  Attributes:
    counts: [R, C]; None if they are opened to the vendor alone.
    seconds: by phase.
    runs: of the protocol.
    sizes: bytes of each message of a run, each way.
  """

  counts: np.ndarray | None
  seconds: dict[str, float]
  runs: int
  sizes: tuple[int, ...]


def run(s: Connect, what: Asked) -> Answer:
  """Enters the images into the hospital's register, and scores them in one session.

  Raises:
    SessionEnded: there is no result.
  """
  start, images = time.perf_counter(), np.asarray(what.data.images)
  publication, server = what.received.publication, what.received.server
  owner = DataOwner(what.plan, publication)
  online = multiprocess.online(what.plan, DATA_OWNER, opens=False, kept=caching.programs())
  seconds = {"compile": time.perf_counter() - start}
  opened = f"{what.given.opened}, to {what.given.opened_to}"
  runs, (*_, labels) = scores.runs_of(what.plan, len(images)), what.plan.program.avals
  bar = progress.bar(
    total=runs, desc="batches", bar_format="{desc:<24} {bar:30} {n_fmt}/{total_fmt}  [{elapsed}]"
  )
  start = time.perf_counter()

  def parts() -> Any:
    parts = scored.parts(what.given.batch, what.work.labels, labels.shape[1], images)
    for part, of_rows in parts:
      yield encrypted.normalised(part), of_rows
      bar.update()

  with (
    progress.closing(bar),
    institutions.ask(
      what.folder, owner, publication.publication, s.connect, server, online,
      Limits(timeout=s.timeout, session=s.session_seconds),
      publications.model_folder(what.folder, s.model),
    ) as session,
  ):  # fmt: skip
    model, learner = _of(what.received, s.model)
    enter = lambda: registers.charge(
      what.folder / _REGISTER, model, opened, what.marks, _NO_LIMIT, learner
    )
    counts = session.score(parts(), len(images), what.given.opened_to, enter)
  seconds["score"] = time.perf_counter() - start
  if counts is not None:
    counts = counts[: len(what.work.rows)]
  return Answer(counts, seconds, runs, online.sizes)
