"""Every fault at every message of a session, and the table of what comes of it.

`PYTHONPATH=.:tests python tests/service_faults_test.py` prints docs/service_faults.md.
"""

import pathlib
import sys
import tempfile
import time

import numpy as np
import pytest
import service_proxy
import service_world
from service_world import CLINIC, Pipe, W, X, dealt, faults, inference, places

from primia_jax import mpc
from primia_jax.service import folders, frames
from primia_jax.service.errors import PeerLate, PeerLost, Refused, SessionEnded

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "service_faults.md"
RNG = np.random.default_rng(0)
KINDS = [  # in the order of a session
  frames.HELLO, frames.WELCOME, frames.PREPARE, frames.ACCEPTED, frames.READY, frames.QUESTION,
  frames.SHARES_1, frames.SHARES_0, frames.OUTPUT,
]  # fmt: skip


# ---- faults: (the sender's messages so far, this one last; the other side's; the sender's in an
# earlier session) -> what the receiver finds


def flipped(first, last):
  """One bit of a part of the message."""

  def fault(seen, other, before):
    spoiled = bytearray(seen[-1])
    bit = int(RNG.integers(8 * len(spoiled[:first]), 8 * len(spoiled[:last])))
    spoiled[bit // 8] ^= 1 << bit % 8
    return [bytes(spoiled)]

  return fault


def encoded(**change):
  """The message with another header, and a checksum that fits."""

  def fault(seen, other, before):
    place = frames.Place(seen[-1][5], frames.session_of(seen[-1]), len(seen) - 1)
    place = place._replace(**{k: v(getattr(place, k)) for k, v in change.items()})
    return [frames.encode(place, seen[-1][frames.HEADER_BYTES :])]

  return fault


def of_another_plan(seen, other, before):
  terms = frames.decode_terms(memoryview(seen[-1])[frames.HEADER_BYTES :])
  place = frames.Place(seen[-1][5], frames.session_of(seen[-1]))
  return [frames.encode(place, frames.encode_terms(terms._replace(plan=bytes(32))))]


def late(seen, other, before):
  return [PeerLate("nothing came for 60 s")]


def slow(seen, other, before):
  time.sleep(0.002)
  return [seen[-1]]


AN_INFERENCE = (3 + 9, 2 + 9)  # messages of each side


def party_of(seen):
  """Who sent these messages."""
  return int(frames.kind_of(seen[0]) == frames.HELLO)


FAULTS = {
  "the sender is killed": lambda seen, other, before: [PeerLost("the connection ended")],
  "the sender stalls": late,
  "slow, but in time": slow,
  "a bit of the header flips": flipped(0, frames.HEADER_BYTES),
  "a bit of the payload flips": flipped(frames.HEADER_BYTES, None),
  "random bytes": lambda seen, other, before: [RNG.bytes(len(seen[-1]))],
  "nothing is in it": lambda seen, other, before: [b""],
  "only its header comes": lambda seen, other, before: [seen[-1][: frames.HEADER_BYTES]],
  "its last byte is missing": lambda seen, other, before: [seen[-1][:-1]],
  "a byte too many": lambda seen, other, before: [seen[-1] + b"\0"],
  "a million bytes too many": lambda seen, other, before: [seen[-1] + bytes(10**6)],
  "it comes twice": lambda seen, other, before: [seen[-1]] * 2,
  "it comes after the sender's next": None,  # see `Faulty`
  "the sender's message before": lambda seen, other, before: seen[-2:-1],
  "that of the inference before": lambda seen, other, before: [
    seen[-1 - AN_INFERENCE[party_of(seen)]]
  ],
  "that of an earlier session": lambda seen, other, before: [before[len(seen) - 1]],
  "the receiver's own message": lambda seen, other, before: other[-1:],
  "of another kind": encoded(kind=lambda kind: kind % 8 + 1),
  "of another number": encoded(number=lambda number: number + 1),
  "of another session": encoded(session=lambda session: session[::-1]),
  "of another plan": of_another_plan,
}
ONLY = {  # faults that not every message can have
  "a bit of the payload flips": set(KINDS) - {frames.READY},
  "only its header comes": set(KINDS) - {frames.READY},
  "the sender's message before": set(KINDS) - {frames.HELLO, frames.WELCOME},
  "that of the inference before": set(KINDS) - {frames.HELLO, frames.WELCOME},
  "the receiver's own message": set(KINDS) - {frames.HELLO},
  "of another session": set(KINDS) - {frames.HELLO},
  "of another plan": {frames.HELLO, frames.WELCOME},
}


NOT_OF_SCORES = "that of the inference before", "of another plan"  # see `service_scores_test`


class Faulty(Pipe):
  """A pipe with a fault at one message."""

  def __init__(self, name, place, before):
    super().__init__(self.spoil)
    self.name, self.place, self.before, self.held = name, place, before[place[0]], None

  def spoil(self, sender, number, message):
    if (sender, number) == self.place:
      if FAULTS[self.name]:
        return FAULTS[self.name](self.sent[sender], self.sent[1 - sender], self.before)
      self.held = message
      return []
    if self.held and sender == self.place[0]:
      held, self.held = self.held, None
      return [message, held]
    return [message]

  def receive(self, party, idle=False):
    if self.held and party == self.place[0]:  # both wait
      self.held = None
      self.put(1 - party, late((), (), ()))
    return super().receive(party, idle)


def outcome(world, both, name, place, before):
  """What both sides end with, model owner first."""
  of = (both[0] / CLINIC, both[1])
  left = [set(folders.unused(folder)) for folder in of]
  pipe, images = Faulty(name, place, before), [X]
  if name == "that of the inference before":
    pipe.place, images = (place[0], place[1] + AN_INFERENCE[place[0]]), [X, -X]
  ends = inference(world, both, pipe, images)
  if not isinstance(ends[1], SessionEnded):  # then it is right
    (ends[1],) = ends[1]
    np.testing.assert_array_equal(ends[1], mpc.check(world.plan, (W, X)))
  taken = [old - set(folders.unused(folder)) for old, folder in zip(left, of, strict=True)]
  assert len(taken[1]) <= len(images)
  assert taken[0] <= taken[1]  # what only the clinic used up cannot serve, either
  online = (frames.QUESTION, *frames.SHARES)
  asked = sum(frames.kind_of(m) == frames.QUESTION for m in pipe.sent[1])
  assert len(taken[0]) >= asked
  assert asked or not any(frames.kind_of(m) in online for sent in pipe.sent for m in sent)
  for folder, numbers in zip(of, taken, strict=True):
    for number in numbers:
      with pytest.raises(Refused, match="were used"):
        folders.take(folder, number)
  words = [type(end).__name__ if isinstance(end, SessionEnded) else "right" for end in ends]
  return words


def row(world, root, name):
  """`faults` of one kind, in sessions of one inference."""
  pipe, kinds = Pipe(), ONLY.get(name, KINDS)
  assert inference(world, dealt(world, root / "before", 1), pipe)[0] is None
  both = dealt(world, root / "now", 2 * len(places(pipe.sent, kinds)))
  return faults(pipe.sent, kinds, lambda place: outcome(world, both, name, place, pipe.sent))


def cell(found):
  """The receiver's ends, and those of the sender where they are not what a lost peer finds."""
  words = []
  for receiver, sender in sorted(found):
    usual = sender == ("right" if receiver == "right" else "PeerLost")
    words.append(receiver if usual else f"{receiver} (sender: {sender})")
  return ", ".join(words)


def line(name, found):
  """A line of the table."""
  return f"| {name} | {' | '.join(cell(found.get(kind, ())) for kind in KINDS)} |"


@pytest.fixture(scope="module")
def world():
  return service_world.world()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_message_ends_as_the_table_says(world, tmp_path, name):
  """No answer is wrong, both sides end, and no correlations serve again."""
  assert line(name, row(world, tmp_path, name)) in DOCS.read_text().splitlines()


def test_the_table_has_no_line_that_nothing_tests():
  lines = [text.split(" | ")[0][2:] for text in DOCS.read_text().splitlines() if text[:2] == "| "]
  of_scores = [name for name in FAULTS if name not in NOT_OF_SCORES]
  others = ["", "---", *of_scores, "", "---", *service_proxy.EXPECTED]
  assert lines == ["", "---", *FAULTS, *others]


def test_without_its_checksum_a_flipped_bit_is_a_wrong_answer(world, tmp_path, monkeypatch):
  monkeypatch.setattr(frames, "checksum", lambda header, payload: bytes(8))
  pipe = Pipe(lambda sender, number, message: [message])
  inference(world, dealt(world, tmp_path / "before", 1), pipe)
  place, name = (0, len(pipe.sent[0]) - 1), "a bit of the payload flips"
  with pytest.raises(AssertionError, match="Arrays are not equal"):
    outcome(world, dealt(world, tmp_path / "now", 1), name, place, pipe.sent)


# ---- the document


def document(rows, of_scores):
  """docs/service_faults.md, from the lines of its tables."""
  names, rule = " | ".join(frames.NAMES[kind] for kind in KINDS), " --- |" * (1 + len(KINDS))
  messages = [f"| | {names} |", f"|{rule}", *rows]
  wire = [f"| {name} | {what} |" for name, what in service_proxy.EXPECTED.items()]
  wire = ["| | |", "| --- | --- |", *wire]
  return TEXT.format(
    messages="\n".join(messages), scores="\n".join(of_scores), wire="\n".join(wire)
  )


TEXT = """# What faults do to a session of encrypted inference

Made by `PYTHONPATH=.:tests python tests/service_faults_test.py > docs/service_faults.md`. The tests
do each fault at every message of a session, in every round, and compare with these tables.

A session ends with the right answer or with a named error on both sides (`service.errors`), never
with a wrong answer. Errors come at once. A side that hears nothing waits for
`Limits.timeout` (60 s by default), between inferences for `Limits.idle` (600 s), and a session
lasts for `Limits.session` (an hour) at most. The clinic marks its correlations as used before it
sends PREPARE, and takes the mark back only if the model owner refuses. The model owner marks its
own before it sends ACCEPTED. A half without the other is of no use, so none serves twice, after any
of these faults. A folder that is put back to an earlier state is another thing: `docs/service.md`.

## A message that is not as it should be

Each column is a message (`service/frames.py`; SHARES are those of every round), and each cell what
its receiver ends with. The sender then finds that its peer is lost (PeerLost), unless the cell says
another thing.

{messages}

Two outcomes in a cell are those of different rounds. A message of an earlier session can begin a
new one, which then ends at the next message. A checksum finds accidents only: a *party* that sends
other shares on purpose is not found here, and nobody else can send any, because of TLS.

## A score

The messages of a session of `primia-score` that no other session has; its inferences are as above.
The vendor charges all images before it sends ACCEPTED. What a session has not reached when it ends
serves another time, on both sides (`tests/service_scores_test.py`).

{scores}

TOTAL_1 is the hospital's, and with it the vendor has the result, where it is opened to both.

## The network between them

What either side ends with when the bytes of the TLS connection suffer this, at several places of
the handshake and the session, in either direction (`tests/service_network_test.py`).

{wire}
"""


def main():
  import service_scores_test as of_scores  # here, since it imports this module

  def lines(module, world, names):
    for name in names:
      with tempfile.TemporaryDirectory() as root:
        yield module.line(name, module.row(world, pathlib.Path(root), name))

  names = list(of_scores.PLACES)
  head = [f"| | {' | '.join(names)} |", f"|{' --- |' * (1 + len(names))}"]
  rows = list(lines(sys.modules[__name__], service_world.world(), FAULTS))
  with tempfile.TemporaryDirectory() as root:
    score = of_scores.World(pathlib.Path(root))
    print(document(rows, head + list(lines(of_scores, score, of_scores.FAULTS))), end="")


if __name__ == "__main__":
  main()
