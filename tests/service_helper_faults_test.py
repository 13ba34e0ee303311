"""Every fault at every message between helper and model owner, and the table of what comes of it.

`PYTHONPATH=.:tests python tests/service_helper_faults_test.py` prints docs/helper_faults.md.
"""

import functools
import json
import os
import pathlib
import tempfile
import threading

import jax
import numpy as np
import pytest
import service_transcripts_test as transcripts
from mpc_reference import normal
from service_faults_test import FAULTS as OF_SESSIONS
from service_faults_test import Faulty, cell
from service_world import CLINIC, KEY, Pipe, dealt, faults, places

from primia_jax import mpc
from primia_jax.mpc import helping, multiprocess
from primia_jax.service import cards, folders, frames, receipts, sharing
from primia_jax.service import helping as sessions
from primia_jax.service.errors import Refused, SessionEnded
from primia_jax.service.helping import Asked, Desk

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "helper_faults.md"
W, X, OWNERS = normal(0, 6, 5), normal(1, 6), ("model_owner", "shared")
KINDS = [  # in the order of a session
  frames.HELLO, frames.QUESTION, frames.WELCOME, frames.PREPARE, frames.ACCEPTED, frames.READY,
  frames.SHARES_1, frames.SHARES_0, frames.OUTPUT,
]  # fmt: skip
FAULTS = [name for name in OF_SESSIONS if name != "that of the inference before"]
FIRST = {frames.HELLO, frames.QUESTION}  # what the helper sends before the session has a number
EMPTY = {frames.READY, frames.OUTPUT}
ONLY = {  # faults that not every message can have
  "a bit of the payload flips": set(KINDS) - EMPTY,
  "only its header comes": set(KINDS) - EMPTY,
  "the sender's message before": set(KINDS) - {frames.HELLO, frames.WELCOME},
  "the receiver's own message": set(KINDS) - FIRST,
  "of another session": set(KINDS) - FIRST,
  "of another plan": {frames.HELLO, frames.WELCOME},
}


def fn(w, x):
  return jax.nn.relu(x @ w)


class World:
  """A model owner, its helper and a dealer, in this process."""

  def __init__(self):
    config = mpc.Config(32, 10, 14, client="sharing")
    ranges = mpc.calibrate(fn, OWNERS, [(W, X)])
    self.plan = mpc.plan(fn, OWNERS, (W, X), config, ranges)
    self.model_owner = mpc.ModelOwner(self.plan, W)
    self.dealer = mpc.Dealer(self.plan, self.model_owner.tag)
    published = self.model_owner.publish(self.dealer.blind())
    self.helper, self.publication = helping.Helper(self.plan, published), published.publication
    self.online = tuple(multiprocess.online(self.plan, party) for party in (0, 1))
    card = json.loads(json.dumps(helping.card(self.plan, self.publication)))
    self.card = cards.Card(**card)


@pytest.fixture(scope="module")
def world():
  return World()


def assistance(world, both, pipe):
  """One request: what model owner and helper end with, an error or their shares of the outputs, and
  what the client has from the model owner.
  """
  desk, number, ends = Desk(0.3), os.urandom(16), [None, None, None]
  shares = [helping.parsed(world.plan, v) for v in sharing.shares(world.card, [X])]
  digest = helping.digest(world.publication)

  def submit():
    try:
      ends[2] = desk.submit(number, shares[0])
    except SessionEnded as error:
      ends[2] = error

  def serve():
    take = receipts.taking(KEY, CLINIC, both[0] / CLINIC)
    of = world.model_owner, world.online[0], world.publication, take, desk
    ends[0] = pipe.serve(functools.partial(sessions.serve_helper, *of))

  threads = [threading.Thread(target=target, daemon=True) for target in (submit, serve)]
  for thread in threads:
    thread.start()
  error = None
  try:
    ends[1] = sessions.assist(
      world.helper, world.online[1], world.publication,
      lambda: folders.Reserved(both[1], folders.unused(both[1])[0]), lambda inference: None,
      Asked(digest, number, shares[1]),
      lambda message: pipe.send(1, message), lambda idle=False: pipe.receive(1, idle),
    )  # fmt: skip
  except SessionEnded as e:
    ends[1] = error = e
  pipe.end(1, error)
  for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
  return ends


@pytest.mark.parametrize("is_masked", [True, False])
def test_every_message_of_fresh_requests_of_one_image_is_uniform(
  world, tmp_path, monkeypatch, is_masked
):
  """Between the servers, and what each has from and gives to the client; and not without masks."""
  if not is_masked:
    monkeypatch.setattr(
      sessions.sessions, "prepared_by", transcripts.unmasked(sessions.sessions.prepared_by)
    )
  count = transcripts.SESSIONS if is_masked else 8
  both, pipes, alone = dealt(world, tmp_path, count), [Pipe() for _ in range(count)], {}
  for pipe in pipes:
    for number, payload in enumerate(assistance(world, both, pipe)[1:]):
      alone.setdefault(("answer", number), []).append(np.frombuffer(payload, np.uint8))
    for number, payload in enumerate(sharing.shares(world.card, [X])):
      alone.setdefault(("share", number), []).append(np.frombuffer(payload, np.uint8))
  found = transcripts.gathered(pipes)
  assert len(found) == 2 * len(world.online[0].sizes) + 1  # QUESTION, the request's number
  alone = {place: np.stack(payloads) for place, payloads in alone.items()}
  if is_masked:
    transcripts.check_uniform(found | alone)
    return
  uniform = {p for p, v in found.items() if transcripts.positions(v) > transcripts.LEVEL}
  # the request's number, and the first opening, which the client's shares mask as well
  assert uniform == {(1, 1), (1, 3), (0, 3)}


def outcome(world, both, name, place, before):
  """What both sides end with, model owner first."""
  of = both[0] / CLINIC, both[1]
  left = [set(folders.unused(folder)) for folder in of]
  pipe = Faulty(name, place, before)
  ends = assistance(world, both, pipe)
  if all(isinstance(end, bytes) for end in ends[1:]):  # then the client's answer is right
    (found,) = sharing.revealed(world.card, [ends[2], ends[1]])
    np.testing.assert_array_equal(found, mpc.check(world.plan, (W, X)))
  taken = [old - set(folders.unused(folder)) for old, folder in zip(left, of, strict=True)]
  kinds = {frames.kind_of(message) for sent in pipe.sent for message in sent}
  assert taken[0] <= taken[1]  # what only the helper used up cannot serve, either
  assert len(taken[1]) == (frames.PREPARE in kinds)  # nothing is, before both have the request
  if kinds & {frames.SHARES_0, frames.SHARES_1}:
    assert taken[0] == taken[1]
  for folder, numbers in zip(of, taken, strict=True):
    for number in numbers:
      with pytest.raises(Refused, match="were used"):
        folders.take(folder, number)
  return [type(end).__name__ if isinstance(end, SessionEnded) else "right" for end in ends[:2]]


def row(world, root, name):
  """`faults` of one kind, in sessions of one request."""
  pipe, kinds = Pipe(), ONLY.get(name, KINDS)
  ends = assistance(world, dealt(world, root / "before", 1), pipe)
  assert ends[0] is None
  assert all(isinstance(end, bytes) for end in ends[1:])
  both = dealt(world, root / "now", len(places(pipe.sent, kinds)))
  return faults(pipe.sent, kinds, lambda place: outcome(world, both, name, place, pipe.sent))


def line(name, found):
  """A line of the table."""
  return f"| {name} | {' | '.join(cell(found.get(kind, ())) for kind in KINDS)} |"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_message_ends_as_the_table_says(world, tmp_path, name):
  """No answer is wrong, both sides end, and correlations are used up on both or on neither."""
  assert line(name, row(world, tmp_path, name)) in DOCS.read_text().splitlines()


def test_the_table_has_no_line_that_nothing_tests():
  lines = [text.split(" | ")[0][2:] for text in DOCS.read_text().splitlines() if text[:2] == "| "]
  assert lines == ["", "---", *FAULTS]


def document(rows):
  """docs/helper_faults.md, from the lines of its table."""
  names, rule = " | ".join(frames.NAMES[kind] for kind in KINDS), " --- |" * (1 + len(KINDS))
  return TEXT.format("\n".join([f"| | {names} |", f"|{rule}", *rows]))


TEXT = """# What faults do between a helper and a model owner

Made by `PYTHONPATH=.:tests python tests/service_helper_faults_test.py > docs/helper_faults.md`. The
tests do each fault at every message of a session, in every round, and compare with this table.
`docs/service_faults.md` says the same of a clinic that is a party.

The helper opens a session with the model owner for each request of a client. HELLO and QUESTION say
what it is about and which request; WELCOME comes once the client's share is there, too. Only then
do both use up correlations: the model owner before it sends ACCEPTED, the helper after it. What the
model owner refuses is used up on neither side. Where the session ends otherwise after PREPARE, the
helper's stay marked as used. Any fault ends the session with a named error on both sides, or with
the right answer. Errors come at once. A side that hears nothing waits for
`Limits.timeout` (60 s by default), and for a request that only one server has, half as long.

Each cell is what the message's receiver ends with. The sender then finds that its peer is lost
(PeerLost), unless the cell says another thing. Two outcomes in a cell are those of different
rounds: with the last SHARES_1 the model owner has all that it needs.

{}

OUTPUT tells the helper that the model owner has its shares of the answer, too. Where it does not
come, the client has an answer from the model owner alone, which is a uniform number, and an error
from the helper. `primia-ask` waits for both servers at once. It names the one that gives no answer
and the reason that this gives, or ends after `--timeout`.
"""


def main():
  world, rows = World(), []
  for name in FAULTS:
    with tempfile.TemporaryDirectory() as root:
      rows.append(line(name, row(world, pathlib.Path(root), name)))
  print(document(rows), end="")


if __name__ == "__main__":
  main()
