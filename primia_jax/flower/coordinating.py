"""The ServerApp: the coordinator of a run over the nodes that a SuperLink knows.

It needs no data and no model. Its folder holds its identity, one line for each sum, and how the run
ended.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from primia_jax import durable
from primia_jax.secagg import coordinator, meeting
from primia_jax.secagg import messages as msg
from primia_jax.secagg.carrier import Ask
from primia_jax.secagg.errors import Aborted, Lost

SUMS, ENDING, IDENTITY = "sums.jsonl", "ending.json", "identity"  # in the coordinator's folder
_PAUSE = 0.3  # seconds between two looks for answers

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
  """Coordinates a run, by the configuration that `flwr run` was given."""
  config = context.run_config
  run(grid, pathlib.Path(str(config["folder"])), int(config["num-sites"]), float(config["timeout"]))


def run(grid: Any, folder: pathlib.Path, num_sites: int, timeout: float) -> None:
  """Coordinates a run, and writes down what it may know of it.

  Args:
    grid: Flower's.
    folder: the coordinator's.
    num_sites: how many sites must come.
    timeout: seconds that a stage may take.

  Raises:
    Aborted: as `coordinator.coordinate`.
    OSError: the folder cannot be written. Of every error the folder says why, if it still can.
  """
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  (folder / ENDING).unlink(missing_ok=True)
  identity = meeting.own_identity(folder / IDENTITY)

  def tell(report: coordinator.Report) -> None:
    try:
      with (folder / SUMS).open("a") as file:
        file.write(json.dumps(coordinator.numbers(report)) + "\n")
    except OSError as error:  # a full disk does not say which file
      raise OSError(error.errno, error.strerror, str(folder / SUMS)) from error

  ending: dict[str, Any] = {"failed": "", "left": {}}
  try:
    nodes = _nodes(grid, num_sites, timeout)
    ask, sites = over(grid, nodes), range(num_sites)
    ending["left"] = coordinator.coordinate(ask, sites, identity, timeout, tell)
  except BaseException as error:
    ending["failed"] = (
      str(error) if isinstance(error, Aborted) else f"{type(error).__name__}: {error}"
    )
    raise
  finally:
    durable.replace(folder / ENDING, json.dumps(ending, indent=2).encode())


def over(grid: Any, nodes: list[int]) -> Ask:
  """The coordinator's end of a carrier over Flower's nodes.

  Which site a node belongs to is known from its first answer, which names the site. A site whose
  node has another's number changes nothing but its own place: `meeting` and each sum check the
  signatures.

  Args:
    grid: Flower's.
    nodes: the nodes of all sites, in any order.
  """
  of_site: dict[int, int] = {}

  def ask(requests: Mapping[int, bytes], timeout: float) -> dict[int, bytes]:
    if of_site:
      answers = _ask(grid, {of_site[i]: request for i, request in requests.items()}, timeout)
      return {i: answers[of_site[i]] for i in requests if of_site[i] in answers}
    (invitation,) = set(requests.values())
    named: dict[int, bytes] = {}
    for node, data in _ask(grid, dict.fromkeys(nodes, invitation), timeout, True).items():
      try:
        site = getattr(msg.decode(data), "site", -1)
      except ValueError:
        continue
      if site in requests and site not in of_site:
        of_site[site], named[site] = node, data
    spare = iter(sorted(set(nodes) - set(of_site.values())))
    of_site.update({i: next(spare) for i in requests if i not in of_site})  # silent so far
    return named

  return ask


def _ask(
  grid: Any, requests: Mapping[int, bytes], timeout: float, waits: bool = False
) -> dict[int, bytes]:
  """Sends one message to each node and gathers the answers; an error is none.

  `waits` is for the first message, for which a hospital's process may still have to start.
  """
  lives = max(timeout, 60.0)  # an ending that nobody waits for must still arrive
  made = [
    Message(
      content=RecordDict({"primia": ConfigRecord({"message": request, "waits": waits})}),
      dst_node_id=node,
      message_type="query",
      ttl=lives,
    )
    for node, request in requests.items()
  ]
  pending, answers, end = set(grid.push_messages(made)), {}, time.monotonic() + timeout
  while pending and time.monotonic() < end:
    for answer in grid.pull_messages(pending):
      pending.discard(answer.metadata.reply_to_message_id)
      data = answer.content["primia"]["message"] if answer.has_content() else b""
      if isinstance(data, bytes) and data:
        answers[answer.metadata.src_node_id] = data
    if pending:
      time.sleep(min(_PAUSE, timeout))
  return answers


def _nodes(grid: Any, num_sites: int, timeout: float) -> list[int]:
  end = time.monotonic() + timeout
  while len(nodes := sorted(grid.get_node_ids())) < num_sites:
    if time.monotonic() > end:
      raise Lost(
        f"{len(nodes)} of {num_sites} SuperNodes are connected after {timeout:g} seconds; start "
        "the others, and register their keys"
      )
    time.sleep(_PAUSE)
  if len(nodes) > num_sites:
    raise Lost(f"{len(nodes)} SuperNodes are connected for {num_sites} sites; stop the others")
  return nodes
