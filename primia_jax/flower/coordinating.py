"""The ServerApp: the coordinator of a run over the nodes that a SuperLink knows.

It needs no data and no model. Its folder holds its identity and the roster, one line for each sum,
and how the run ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from primia_jax import durable
from primia_jax.secagg import coordinator, keys, meeting, pinning, roster
from primia_jax.secagg import messages as msg
from primia_jax.secagg.carrier import Ask
from primia_jax.secagg.errors import Aborted, Lost, Rejected

SUMS, ENDING, IDENTITY = "sums.jsonl", "ending.json", "identity"  # in the coordinator's folder
_LOCK = "lock"
_PAUSE = 0.3  # seconds between two looks for answers
_LEAST = 60.0  # seconds that a message lives: an ending that nobody waits for must still arrive

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
    folder: the coordinator's. Where it has a roster, only its members take part; any other node is
      turned away, and the run goes on.
    num_sites: how many sites must come.
    timeout: seconds that a stage may take.

  Raises:
    Aborted: as `coordinator.coordinate`.
    ValueError, FileNotFoundError: the roster is missing, damaged, or of other members; or another
      run is under way, which goes on.
    OSError: the folder cannot be written. Of every error the folder says why, if it still can.
  """
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  with _alone(folder):
    _run(grid, folder, num_sites, timeout)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
  """Keeps a second run out: its messages would take the sites from the first one."""
  with (folder / _LOCK).open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it ends with the process, a killed one too
    except BlockingIOError:
      why = (
        f"another run is under way in {folder}; wait until it has ended, or end it with flwr stop"
      )
      print(why, flush=True)  # for Flower's log of the run; the folder is the other run's
      raise ValueError(why) from None
    yield


def _run(grid: Any, folder: pathlib.Path, num_sites: int, timeout: float) -> None:
  """`run`, alone in the folder."""
  (folder / ENDING).unlink(missing_ok=True)

  def tell(report: coordinator.Report) -> None:
    try:
      with (folder / SUMS).open("a") as file:
        file.write(json.dumps(coordinator.numbers(report)) + "\n")
    except OSError as error:  # a full disk does not say which file
      raise OSError(error.errno, error.strerror, str(folder / SUMS)) from error

  ending: dict[str, Any] = {"failed": "", "left": {}, "turned away": []}

  def turn_away(why: str) -> None:
    ending["turned away"].append(why)
    print(why, flush=True)

  try:
    known, identity = _members(folder, num_sites)
    members = None if known is None else {i: m.public for i, m in known.sites.items()}
    nodes = _nodes(grid, num_sites, timeout, members is None)
    ask, sites = over(grid, nodes, members, turn_away), range(num_sites)
    ending["left"] = coordinator.coordinate(ask, sites, identity, timeout, tell)
  except BaseException as error:
    why = str(error) if isinstance(error, Aborted) else f"{type(error).__name__}: {error}"
    ending["failed"] = "; ".join([why, *ending["turned away"]])
    raise
  finally:
    durable.replace(folder / ENDING, json.dumps(ending, indent=2).encode())


def _members(folder: pathlib.Path, num_sites: int) -> tuple[roster.Roster | None, keys.Identity]:
  """The coordinator's roster and its identity; no roster in a trial."""
  known = pinning.needed(folder)
  if known is None:
    return None, meeting.own_identity(folder / IDENTITY)
  own = pinning.own_identity(folder / IDENTITY)
  if known.coordinator.public != own.public:
    raise ValueError(f"{folder}: roster {known.serial} has another key for the coordinator")
  if len(known.sites) != num_sites:
    raise ValueError(
      f"num-sites={num_sites}, and roster {known.serial} of {folder} has {len(known.sites)} sites; "
      "give its number in --run-config"
    )
  roster.check_numbers(known)
  return known, own


def over(
  grid: Any,
  nodes: Sequence[int],
  members: Mapping[int, bytes] | None = None,
  turn_away: Callable[[str], None] = lambda why: None,
) -> Ask:
  """The coordinator's end of a carrier over Flower's nodes.

  Which site a node belongs to is known from its first answer: a hello, signed for this run by the
  member that has the site's number (`meeting.answered`). Flower's node authentication keeps that
  node in its place. Any other node is told why it is turned away, for the whole run, and costs the
  sites nothing.

  Args:
    grid: Flower's.
    nodes: those that are there; with members, later ones are invited, too.
    members: number to public key, of a roster; without one whoever comes first has a number.
    turn_away: called with each node that is turned away and the reason.
  """
  of_site: dict[int, int] = {}
  invited: set[int] = set()

  def invite(sites: Mapping[int, bytes], timeout: float) -> dict[int, bytes]:
    (invitation,) = set(sites.values())
    sent, end = msg.decode(invitation), time.monotonic() + timeout
    assert isinstance(sent, msg.Invitation)
    said: dict[int, bytes] = {}
    refused, away, pending = set[int](), set[int](), set[str]()
    while len(said) < len(sites) and time.monotonic() < end:
      new = {*nodes, *(() if members is None else grid.get_node_ids())} - invited | away
      pending |= _push(grid, dict.fromkeys(sorted(new), invitation), timeout, True)
      invited.update(new)
      away.clear()
      for node, data in _pulled(grid, pending):
        if not data:  # its program has ended, or it was away: it is invited again
          away.update(() if members is None else (node,))
          continue
        try:
          site = meeting.answered(data, sent, members).site
          if site in said or site not in sites:
            raise Rejected(site, "hello", "repeated", "another node is that site's")
        except Rejected as error:
          refused.add(node)
          why = f"node {node} is turned away: {error}"
          turn_away(why)
          _push(grid, {node: msg.encode(msg.Dismissed(why.encode()))}, 0.0)
          continue
        of_site[site], said[site] = node, data
      if members is None and not pending:  # nobody else can come
        break
      if len(said) < len(sites):
        time.sleep(min(_PAUSE, timeout))
    silent = sorted(invited - refused - set(of_site.values()))  # they shall hear how it ends
    of_site.update(zip((i for i in sites if i not in said), silent, strict=False))
    return said

  def ask(requests: Mapping[int, bytes], timeout: float) -> dict[int, bytes]:
    if not invited:
      return invite(requests, timeout)
    to = {of_site[i]: request for i, request in requests.items() if i in of_site}
    answers = {i: data for i, data in _answers(grid, _push(grid, to, timeout), timeout) if data}
    return {i: answers[of_site[i]] for i in requests if of_site.get(i) in answers}

  return ask


def _answers(grid: Any, pending: set[str], timeout: float) -> Iterator[tuple[int, bytes]]:
  """The answers to messages, as they come; an error is none."""
  end = time.monotonic() + timeout
  while pending and time.monotonic() < end:
    yield from _pulled(grid, pending)
    if pending:
      time.sleep(min(_PAUSE, timeout))


def _push(
  grid: Any, requests: Mapping[int, bytes], timeout: float, waits: bool = False
) -> set[str]:
  """Sends one message to each node; returns the messages' names.

  `waits` is for the first message, for which a hospital's process may still have to start.
  """
  made = [
    Message(
      content=RecordDict({"primia": ConfigRecord({"message": request, "waits": waits})}),
      dst_node_id=node,
      message_type="query",
      ttl=max(timeout, _LEAST),
    )
    for node, request in requests.items()
  ]
  return set(grid.push_messages(made)) if made else set()


def _pulled(grid: Any, pending: set[str]) -> list[tuple[int, bytes]]:
  """(node, answer) of what has come, empty where it is an error; takes it out of `pending`."""
  out = []
  for answer in grid.pull_messages(pending) if pending else ():
    pending.discard(answer.metadata.reply_to_message_id)
    record = answer.content.get("primia") if answer.has_content() else None
    data = record.get("message") if isinstance(record, ConfigRecord) else b""
    out.append((answer.metadata.src_node_id, data if isinstance(data, bytes) else b""))
  return out


def _nodes(grid: Any, num_sites: int, timeout: float, exact: bool) -> list[int]:
  """The nodes, as soon as there are enough; where nobody can say who they are, exactly so many."""
  end = time.monotonic() + timeout
  while len(nodes := sorted(grid.get_node_ids())) < num_sites:
    if time.monotonic() > end:
      raise Lost(
        f"{len(nodes)} of {num_sites} SuperNodes are connected after {timeout:g} seconds; start "
        "the others, and register their keys"
      )
    time.sleep(_PAUSE)
  if exact and len(nodes) > num_sites:
    raise Lost(f"{len(nodes)} SuperNodes are connected for {num_sites} sites; stop the others")
  return nodes
