"""The transcript of a run: what each adversary saw of it, kept by the simulation itself.

It holds each site's update as a server without secure aggregation sees it, so that attacks on it
can be compared with attacks on what was really shown. A run that is recorded is NOT PRIVATE: files
are readable by their owner only, and the report says so first. With differential privacy at the
sites, an update carries the noise that its ledger is charged for; which images were in a batch is
never kept.
"""

from __future__ import annotations

import functools
import io
import pathlib
from typing import Any

import jax
import numpy as np

from primia_jax import durable, federated
from primia_jax.attacks import recording, views
from primia_jax.types import Key, PyTree

from .configs import Train
from .starts import Step

FOLDER = "transcript"  # in the folder of the arm


def why(config: Train, arm: pathlib.Path) -> str:
  """What a report says of a recorded run."""
  noised = ""
  if config.privacy.dp != "none":
    noised = "; the updates carry the noise that the ledger is charged for"
  return (
    f"record_transcript=True: {arm / FOLDER} holds each site's update as a server without secure "
    f"aggregation sees it, and whoever reads it is such a server{noised}"
  )


def recorded(arm: pathlib.Path, seen: list[recording.Seen], step: Step) -> Step:
  """The step of a round, which then writes what crossed in it: before the round is used.

  A round that is repeated after a restart replaces what was kept of it.

  Args:
    arm: the folder of the arm.
    seen: where `recording.recorded` leaves what it saw.
    step: of the round.
  """
  folder = arm / FOLDER

  def recorded_step(key: Key, state: federated.State, sites: federated.Sites):
    seen.clear()
    after, info = step(key, state, sites)
    crossed = seen.pop()
    model = lambda s: views.Model(s.params, s.model_state)
    number = int(state.round) + 1
    one = views.Round(
      number, crossed.ids, model(state), model(after), crossed.messages, crossed.total,
      sites.class_weights,
    )  # fmt: skip
    folder.mkdir(mode=0o700, exist_ok=True)
    durable.replace(folder / f"round_{number:04}.npz", _packed(one))
    return after, info

  return recorded_step


def paths(arm: pathlib.Path) -> dict[int, pathlib.Path]:
  """The files of the rounds that were recorded, by number from 1, in order.

  Raises:
    FileNotFoundError: nothing was recorded.
  """
  found = {int(path.stem.rpartition("_")[2]): path for path in (arm / FOLDER).glob("round_*.npz")}
  if not found:
    raise FileNotFoundError(
      f"{arm / FOLDER} holds no transcript, without which nobody knows what an adversary saw; "
      "train with --record_transcript and another --run_dir"
    )
  return dict(sorted(found.items()))


def read(path: pathlib.Path) -> views.Round:
  """One round.

  Raises:
    ValueError: the file is damaged.
  """
  try:
    with np.load(path) as file:
      held = _nested({name: file[name] for name in file.files})
    one = functools.partial(dict.get, held)
    return views.Round(
      int(held["number"]), held["ids"], _model(held["before"]), _model(held["after"]),
      _message(held["messages"]), _message(held["total"]), one("class_weights"),
    )  # fmt: skip
  except (KeyError, OSError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error}); record the run again") from error


def _packed(one: views.Round) -> bytes:
  """The round as an npz file: an array for each leaf, by its path."""
  leaves = jax.tree_util.tree_leaves_with_path(one)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  buffer = io.BytesIO()
  arrays: dict[str, Any] = {name(path): np.asarray(leaf) for path, leaf in leaves}
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def _nested(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
  """Dictionaries within dictionaries, from paths with slashes."""
  out: dict[str, Any] = {}
  for path, array in arrays.items():
    *above, last = path.split("/")
    place = out
    for part in above:
      place = place.setdefault(part, {})
    place[last] = array
  return out


def _model(held: dict[str, Any]) -> views.Model:
  return views.Model(held["params"], held.get("model_state", {}))


def _message(held: dict[str, Any]) -> federated.Message:
  """A message; what an algorithm sends besides comes back as dictionaries."""
  params: PyTree = held["update"]["0"]
  update = params, held["update"].get("1", {})
  metrics = federated.Metrics(**held["metrics"])
  return federated.Message(update, held["weight"], metrics, held.get("more", ()))
