"""A model owner, a clinic and a dealer with folders of their own, for tests of the service."""

import functools
import queue
import threading
from typing import Any, NamedTuple

import jax
from mpc_reference import OWNERS, normal

from primia_jax import mpc
from primia_jax.mpc import multiprocess
from primia_jax.service import folders, frames, receipts, sessions
from primia_jax.service.errors import PeerLate, PeerLost, SessionEnded

CLINIC, KEY = "clinic-a", bytes(range(32))
W, X = normal(0, 6, 5), normal(1, 3, 6)


def fn(w, x):
  """The image multiplies a shared value, so that there is a question."""
  return jax.nn.relu(x @ w) * x[:, :5]


def planned():
  return mpc.plan(fn, OWNERS, (W, X), mpc.Config(32, 10, 14), mpc.calibrate(fn, OWNERS, [(W, X)]))


class World(NamedTuple):
  """All roles of a plan, and what each was dealt."""

  plan: Any
  model_owner: mpc.ModelOwner
  data_owner: mpc.DataOwner
  dealer: mpc.Dealer
  publication: Any
  online: tuple  # by party


@functools.cache
def world():
  """One for all test files: it compiles, and what it holds of an inference serves once anyhow."""
  plan = planned()
  model_owner = mpc.ModelOwner(plan, W)
  dealer = mpc.Dealer(plan, model_owner.tag)
  publication = model_owner.publish(dealer.blind())
  online = tuple(multiprocess.online(plan, party) for party in (0, 1))
  return World(plan, model_owner, mpc.DataOwner(plan, publication), dealer, publication, online)


def dealt(world, root, count):
  """The parties' folders, with correlations for `count` inferences."""
  both = folders.make(root / "model_owner"), folders.make(root / "clinic")
  folders.deal(world.dealer, count, both[0] / CLINIC, both[1])
  return both


class Pipe:
  """Two sides of a session in one process; `change` is what the network does to a message.

  It gives what the receiver finds in its place: messages, or a SessionEnded that is raised.
  """

  def __init__(self, change=lambda sender, number, message: [message], timeout=20.0):
    self.queues = queue.SimpleQueue(), queue.SimpleQueue()
    self.change, self.timeout = change, timeout
    self.sent = ([], [])

  def send(self, party, message):
    number = len(self.sent[party])
    self.sent[party].append(message)
    self.put(1 - party, self.change(party, number, message))

  def put(self, party, found):
    for v in found:
      self.queues[party].put(v)

  def receive(self, party, idle=False):
    try:
      found = self.queues[party].get(timeout=self.timeout)
    except queue.Empty:
      raise PeerLate("nothing came") from None
    if isinstance(found, SessionEnded):
      raise found
    return found

  def serve(self, session):
    """Sends what `session`(receive), the first side's, yields; returns what ended it early."""
    error = None
    try:
      for message in session(lambda idle=False: self.receive(0, idle)):
        self.send(0, message)
    except SessionEnded as e:
      error = e
    self.end(0, error)
    return error

  def end(self, party, error=None):
    """As the carrier does: a session that a side left early is lost to the other."""
    self.put(1 - party, [None if error is None else PeerLost("the connection ended")])


def faults(sent, kinds, outcome):
  """By kind of message: what its receiver and its sender end with.

  Args:
    sent: the messages of each side in a session without faults.
    kinds: of messages, which are to be changed.
    outcome: (sender, number of its message) -> words for both sides' ends.
  """
  found = {}
  for sender, number, kind in places(sent, kinds):
    words = outcome((sender, number))
    found.setdefault(kind, set()).add((words[1 - sender], words[sender]))
  return found


def places(sent, kinds):
  """(sender, number, kind) of each message of one of these kinds."""
  each = ((s, n, frames.kind_of(m)) for s, of in enumerate(sent) for n, m in enumerate(of))
  return [place for place in each if place[2] in kinds]


def inference(world, folder_of, pipe, images=(X,)):
  """One session over a pipe: what each side ended with, an error or (the clinic) the answers."""
  ends = [None, None]

  def serve():
    take = receipts.taking(KEY, CLINIC, folder_of[0] / CLINIC)
    of = world.model_owner, world.online[0], world.publication.publication, take
    ends[0] = pipe.serve(functools.partial(sessions.serve, *of))

  thread = threading.Thread(target=serve, daemon=True)
  thread.start()
  error = None
  try:
    asking = sessions.Asking(
      world.data_owner, world.online[1], world.publication.publication,
      lambda message: pipe.send(1, message), lambda idle=False: pipe.receive(1, idle),
    )  # fmt: skip
    answers = []
    for image in images:
      asking.prepare(folders.Reserved(folder_of[1], folders.unused(folder_of[1])[0]))
      answers.append(asking.ask(image))
    ends[1] = answers
  except SessionEnded as e:
    ends[1] = error = e
  pipe.end(1, error)
  thread.join(60)
  assert not thread.is_alive()
  return ends
