"""Every message that crosses the boundary of a site's process, for its `disclosure.md`.

Each is written down before it leaves, or as it comes, in the site's own folder: its type and size,
and nothing of what is in it. So the list holds over crashes and restarts, and a message of a new
type cannot be left out of it: `KINDS` says of each type what it is, and a test that it has all.
"""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

from primia_jax import durable
from primia_jax.disclosure import Crossing
from primia_jax.secagg import messages as msg
from primia_jax.secagg.carrier import Carrier

FILE = "messages.jsonl"  # in the folder of what a site keeps of a run
PREFIX = "message "  # of a row's name
_SENT, _HEARD = "sent", "heard"
_ALL, _COORDINATOR = "coordinator and all sites", "coordinator"


class Kind(NamedTuple):
  """What a type of message is.

  Attributes:
    what: it holds.
    readers: who can read it.
    protection: what keeps them from learning more.
    charge: what ledgers are charged for it.
  """

  what: str
  readers: str
  protection: str = "nothing in it is of a patient"
  charge: str = "nothing"


_SIGNED = "signed; nothing in it is of a patient"
KINDS: dict[type, Kind] = {
  msg.Advert: Kind("a site's keys for one sum", _ALL, _SIGNED),
  msg.Roster: Kind("the keys of all sites of a sum", _ALL, _SIGNED),
  msg.Shares: Kind(
    "shares of a site's masks, a box for each peer", "the peer of each box",
    "sealed to the peer; fewer shares than the threshold tell nothing",
  ),
  msg.Delivery: Kind(
    "the boxes for this site", "this site",
    "sealed to this site; fewer shares than the threshold tell nothing",
  ),
  msg.MaskedInput: Kind(
    "a site's update, counts or scores under masks", _ALL,
    "masks: only the sum over enough sites opens", "as the rows above",
  ),
  msg.Survivors: Kind("which sites are in a sum", _ALL, "none: training needs it"),
  msg.Consent: Kind("a site's signature of that list", _ALL, _SIGNED),
  msg.Consents: Kind("the signatures of all sites", _ALL, _SIGNED),
  msg.Answer: Kind(
    "shares that open the sum, of each peer", _ALL,
    "they open the masks of the sum, and of no site alone",
  ),
  msg.Evidence: Kind(
    "what opens the sum over the survivors: keys, masked inputs and shares of their masks", _ALL,
    "none of the sum, which training needs; masks: nothing else opens", "as the rows above",
  ),
  msg.Hello: Kind(
    "a site's public key, the digest of what its operator approved, and how many images to train "
    "and to validate on, how many patients and most images of one it has, with its classes", _ALL,
    "signed; the floors of the policy refuse small sites", "nothing: exact counts",
  ),
  msg.Start: Kind(
    "the round and a digest of the state that a site starts from, the sites of that round, and "
    "what ledgers were charged", _ALL, "signed; charges are public",
    "nothing: noised class counts in it are charged already",
  ),
  msg.Word: Kind(
    "which rounds a site has saved, with their sites and the digest of each state; or the global "
    "model, for one that lacks it",
    _ALL, "none: the model is made of the sums", "as the global model",
  ),
  msg.Invitation: Kind("the coordinator's public key", "this site"),
  msg.Relayed: Kind("what all sites have said", _ALL, "as said"),
  msg.Bond: Kind("a site's signature of the sum that its keys are for", _ALL, _SIGNED),
  msg.Bonds: Kind("the same signatures of all sites", _ALL, _SIGNED),
  msg.Together: Kind("a damaged message", "this site"),
  msg.Terms: Kind("what a sum is of: identities, sizes, ring, quorum", _ALL),
  msg.Proposal: Kind("the terms of a sum that a site wants, and its keys", _ALL, _SIGNED),
  msg.Recalled: Kind(
    "what all sites have said at the meeting, for one that was lost and is back", "this site",
    "as said",
  ),
  msg.Returning: Kind("which sites are back, and which site is to give the state", _ALL),
  msg.Resumed: Kind(
    "the state that the others go on from, signed, for a site that is back", "this site",
    "none: the model is made of the sums", "as the global model",
  ),
  msg.Ended: Kind("that a site leaves, and why", _COORDINATOR, "errors of the protocol alone"),
  msg.Dismissed: Kind("that a site is out of the run, and why", "this site"),
}  # fmt: skip


def written_down(carrier: Carrier, path: pathlib.Path) -> Carrier:
  """A carrier that notes each message in a file, in which a crash may have left half a line: its
  message did not leave.

  Raises (of `hear` and `say`):
    OSError: naming the file, which cannot be written; the message then does not leave.
  """

  if path.is_file() and not (whole := path.read_bytes()).endswith(b"\n"):
    durable.replace(path, whole[: whole.rfind(b"\n") + 1])

  def note(way: str, data: bytes) -> None:
    if not data:  # no message
      return
    lines = [{"message": _name(one), "way": way, "bytes": size} for one, size in _parts(data)]
    try:
      with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:  # a full disk does not say which file
      raise OSError(error.errno, error.strerror, str(path)) from error

  def hear(limit: int) -> bytes:
    data = carrier.hear(limit)
    note(_HEARD, data)
    return data

  def say(data: bytes) -> None:
    note(_SENT, data)
    carrier.say(data)

  return Carrier(hear, say, carrier.close)


def listed(path: pathlib.Path) -> list[Crossing]:
  """The rows of all messages in a file, in the order in which their types first came.

  Raises:
    ValueError: a line is damaged.
  """
  found: dict[tuple[str, str], list[int]] = {}
  *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.is_file() else [""]
  try:
    for line in map(json.loads, lines):
      sizes = found.setdefault((line["message"], line["way"]), [0, 0])
      sizes[0] += 1
      sizes[1] += line["bytes"]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error}); restore it") from error
  return [_row(name, way, *sizes) for (name, way), sizes in found.items()]


def _row(name: str, way: str, messages: int, num_bytes: int) -> Crossing:
  outer, _, inner = name.partition(" ")
  kind = _BY_NAME.get(inner or outer, Kind("what is not a message of this version", "this site"))
  here, there = "this site", _COORDINATOR
  what = f"{PREFIX}{outer}: {f'the {inner} of all sites' if inner else kind.what}"
  ends = (here, kind.readers) if way == _SENT else (there, here)
  return Crossing(what, *ends, messages, num_bytes, kind.protection, kind.charge)


def _name(data: bytes) -> str:
  """The type of a message; of what is relayed, also that of what is in it."""
  kind = _kind(data)
  if kind is msg.Relayed:
    try:
      relayed = msg.decode(data)
    except ValueError:
      return kind.__name__
    assert isinstance(relayed, msg.Relayed)
    inner = {_kind(said) for said in relayed.said.values()} - {None}
    return " ".join([kind.__name__, *sorted(one.__name__ for one in inner if one)][:2])
  return "unknown" if kind is None else kind.__name__


def _parts(data: bytes) -> list[tuple[bytes, int]]:
  """The messages that travel as one, with their sizes."""
  whole = [(data, len(data))]
  if _kind(data) not in (msg.Together, msg.Proposal):
    return whole
  try:
    message = msg.decode(data)
    if isinstance(message, msg.Together):
      return [(one.data, len(one.data)) for one in message.parts]
    assert isinstance(message, msg.Proposal)
    if not (masked := message.masked):
      return whole
    inner = msg.decode(masked)
    parts = [one.data for one in inner.parts] if isinstance(inner, msg.Together) else [masked]
  except ValueError:
    return whole
  return [(data, len(data) - len(masked)), *[(one, len(one)) for one in parts]]


def _kind(data: bytes) -> type | None:
  """The type that these bytes begin as; None where there is none."""
  return msg.KINDS[data[0]] if data and data[0] < len(msg.KINDS) else None


_BY_NAME: dict[str, Kind] = {kind.__name__: what for kind, what in KINDS.items()}
