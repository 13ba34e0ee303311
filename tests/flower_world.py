"""A federation of vectors for tests of what goes wrong: no training, and all else as in a run.

Each site is a thread with the binaries' own meeting, agreement on the state to start from, ledger
and records. Its update in a round is a vector that depends on site and round only.
"""

import contextlib
import json
import os
import threading
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
import secagg_carried
from experiments_runs import TINY

from experiments import processes, rejoining, settings, starts
from experiments.checkpoints import Best
from primia_jax import durable, federated, secagg
from primia_jax.privacy import accounting, agreeing, ledger
from primia_jax.privacy.chain import Chain
from primia_jax.privacy.plan import Plan
from primia_jax.secagg import carrier, coordinator, meeting
from primia_jax.secagg import messages as msg

SIZE = 5  # of a vector
TOLD_A_RUN = 9  # messages to a site, in a run of one round
DEADLINE = 60.0  # seconds after which a test says that something hangs
_TICK = 0.01
CONFIG = settings.replace(
  TINY, placement="flower", secagg_threshold=2, secagg_colluding=0, num_sites=3
)
PLAN = Plan("example", 1e-5, 10, float("inf"), 1, (accounting.gaussian("update", 1.0),), (), False)


class Killed(BaseException):
  """The end of a process, which nothing in it outlives."""


class Files:
  """The last two states of a site, in place of orbax's checkpoints."""

  def __init__(self, folder):
    self.folder = folder

  @property
  def rounds(self):
    return sorted(int(path.stem) for path in self.folder.glob("*.npy"))

  def restore(self, state, best, step):
    data = (self.folder / f"{step}.npy").read_bytes()
    params = jnp.asarray(np.frombuffer(data, np.uint32))
    return state._replace(params=params, round=jnp.int32(step)), best, ""

  def save(self, number, state):
    for later in [n for n in self.rounds if n > number]:  # these rounds are repeated
      (self.folder / f"{later}.npy").unlink()
    durable.replace(self.folder / f"{number}.npy", np.asarray(state.params).tobytes())
    for early in self.rounds[:-2]:
      (self.folder / f"{early}.npy").unlink()


def quick():
  """A context in which nothing waits for the disk: these tests cut no power."""
  patch = pytest.MonkeyPatch()
  patch.setattr(os, "fsync", lambda descriptor: None)
  return contextlib.closing(types.SimpleNamespace(close=patch.undo))


def update(site, number):
  """What a site adds in a round."""
  return np.random.default_rng((site, number)).integers(0, 2**32, SIZE, dtype=np.uint32)


def site(root, number, end, rounds, config=CONFIG, take=None):
  """One start of a site's process: the state that it ends with.

  `take` says which sites a round takes; None takes all.
  """
  num_sites = config.hospitals.num_sites
  seat = processes.Seat(number, DEADLINE, processes.own_folder(root / "own", number))
  place, _ = processes.meet(config, end, seat)
  joined, path, files = place.joined, seat.own / ledger.LEDGER, Files(seat.own)
  threshold = config.aggregation.secagg_threshold
  take = take or (lambda round: tuple(range(num_sites)))
  secure = secagg.secure_sum(len(take(0)), threshold=threshold if threshold > 0 else None)
  with processes.leaving(end, number):
    zero = jnp.zeros(SIZE, jnp.uint32)
    initial = federated.State(zero, (), (), (), jnp.int32(0))
    best = Best((), (), (), (), jnp.float32(0), jnp.int32(0))
    untrained, back = starts.Kept(initial, best, ""), None
    if joined.is_back:
      back = rejoining.come_back(joined, number, untrained, files, path)
      kept, told = back.kept, back.ledgers
    else:
      kept = starts.catch_up(joined, number, untrained, files)
      told = starts.agree(joined, number, initial, kept.state, ledger.public(path))
    agreeing.reconcile(told, path, PLAN, 2)
    charges = ledger.Ledgers(PLAN, path, Chain(seat.own / "ledger"), [None] * num_sites)

    def step(key, state, sites):
      shape = {"w": np.empty(SIZE, np.uint32)}
      taken = take(int(state.round))
      begun = joined.exchange.begin(shape, int(state.round), 1, secure, sites=taken)
      made = {"w": update(number, int(state.round))}
      total = joined.exchange.finish(begun, made)
      state = state._replace(params=state.params + total["w"], round=state.round + 1)
      return state, types.SimpleNamespace(survivors=np.array(joined.exchange.survivors))

    step, state = starts.recorded(joined, step), kept.state
    begun = int(state.round)
    for n in range(begun, rounds):
      if back is None or n > begun:
        rejoining.roll_call(joined, number, state, best, None, path)
      charges.spend_round([*take(n)])
      state, _ = step(None, state, None)
      files.save(int(state.round), state)
  joined.exchange.close()
  return np.asarray(state.params)


class World:
  """One start of all sites and their coordinator, over the carrier within the process.

  Nothing waits for a clock: a site or a coordinator that is silent for good counts as late at once.

  Attributes:
    said, told: the messages of each site, and to it, in order, as they were before any fault; empty
      bytes in their places where the world `keeps` nothing.
    results, errors: by site; the coordinator's error is under "coordinator".
    reports: of the sums.
    silent: (site, number of the first message that it says too late); or None.
    spoil_said, spoil_told: (site, number of its message, bytes) -> bytes; None: it never comes.
    restarts: sites whose program is started again once the others have lost them.
    on_ask: called with each number of the coordinator's questions before they are sent.
    on_hear, on_say: called with (site, number) before it hears, or says, that message.
  """

  def __init__(self, num_sites=3, keeps=True):
    self.num_sites, self.keeps = num_sites, keeps
    self.inner, self.ends = secagg_carried.in_process(range(num_sites), _TICK)
    self.said = {i: [] for i in range(num_sites)}
    self.told = {i: [] for i in range(num_sites)}
    self.results, self.errors, self.reports, self.asked = {}, {}, [], 0
    self.is_over = threading.Event()  # the coordinator's end
    self.killed, self.silent = set(), None
    self.restarts, self.reopened = set(), {i: threading.Event() for i in range(num_sites)}
    self.spoil_said = self.spoil_told = lambda site, number, data: data
    self.on_ask = lambda number: None
    self.on_hear = self.on_say = lambda site, number: None

  def ask(self, requests, timeout):
    made = dict(requests)
    if timeout:  # else it is a dismissal, which nobody answers
      self.on_ask(self.asked)
      self.asked += 1
      for i, data in requests.items():
        self.told[i].append(data if self.keeps else b"")
        made[i] = self.spoil_told(i, len(self.told[i]) - 1, data)
    heard = {i: data for i, data in made.items() if data is not None}
    waits = {i: d for i, d in heard.items() if not self.is_late(i)}
    answers = self.inner(waits, min(timeout, DEADLINE))
    self.inner({i: d for i, d in heard.items() if i not in waits}, 0.0)
    return {i: data for i, data in answers.items() if data is not None}

  def is_late(self, site):
    """Whether the site will not answer before all is over."""
    return (
      self.silent is not None
      and self.silent[0] == site
      and (len(self.said[site]) >= self.silent[1])
    )

  def end_of(self, site):
    """The site's end of the carrier."""
    inner, heard = self.ends[site], [0]

    def hear(limit):
      self.on_hear(site, heard[0])
      end = time.monotonic() + DEADLINE
      while True:
        try:
          data = inner.hear(limit)
        except TimeoutError:
          if self.is_over.is_set():
            raise
          assert time.monotonic() < end, f"site {site} hangs"
        else:
          heard[0] += 1
          return data

    def say(data):
      if site in self.killed:
        return
      number = len(self.said[site])
      self.on_say(site, number)
      self.said[site].append(data if self.keeps else b"")
      if (site, number) == self.silent:
        assert self.is_over.wait(DEADLINE), "the coordinator hangs"
      inner.say(self.spoil_said(site, number, data))

    return carrier.Carrier(hear, say, inner.close)

  def kill(self, site):
    """What a kill of its process does."""
    self.killed.add(site)
    self.ends[site].close()
    raise Killed

  def restart(self, site):
    """Opens its end again, when a sum has been without it."""
    end = self.ends[site].hear.__self__
    for waiting in (end.requests, end.answers):
      while not waiting.empty():
        waiting.get_nowait()
    end.is_closed = False
    self.killed.discard(site)
    self.reopened[site].set()

  def run(self, root, rounds=1, program=site, programs=None, tell=lambda report: None):
    """Runs to the end of all; programs are those of sites that run another."""
    (root / "own").mkdir(parents=True, exist_ok=True)

    def one(i):
      try:
        self.results[i] = (programs or {}).get(i, program)(root, i, self.end_of(i), rounds)
      except BaseException as error:
        if i in self.restarts:
          assert self.reopened[i].wait(DEADLINE), f"{i} is not missed"
          self.restarts.discard(i)
          return one(i)
        self.ends[i].close()
        self.errors[i] = error

    def coordinate():
      def told(report):
        tell(report)
        for i in self.restarts - set(report.opened.survivors):
          self.restart(i)
        if self.keeps:
          self.reports.append(report)

      try:
        identity = meeting.own_identity(root / "own" / "coordinator")
        coordinator.coordinate(self.ask, range(self.num_sites), identity, DEADLINE, told)
      except BaseException as error:
        self.errors["coordinator"] = error
      self.is_over.set()

    calls = [(coordinate,), *[(one, i) for i in range(self.num_sites)]]
    threads = [threading.Thread(target=f, args=args, daemon=True) for f, *args in calls]
    for thread in threads:
      thread.start()
    end = time.monotonic() + DEADLINE
    for thread in threads:
      thread.join(max(0.0, end - time.monotonic()))
      assert not thread.is_alive(), "a hang"
    return self


def killed_once(site, at):
  """A world in which a site is killed before it says a message, and started again."""
  world = World()

  def kill(number, n):
    if (number, n) == (site, at) and world.restarts:
      world.kill(number)

  world.on_say, world.restarts = kill, {site}
  return world


def released(world, site):
  """How many masked updates left a site."""
  kinds = [type(decoded(part)) for data in world.said[site] for part in parts(data)]
  return kinds.count(msg.MaskedInput)


def charged(root, site):
  """How many rounds a site's ledger was charged for itself."""
  chain = Chain(root / "own" / f"site_{site}" / "ledger", read_only=True)
  charges = [entry for entry in chain.entries if entry["kind"] == "charge"]
  return sum(entry["release"]["times"] for entry in charges if site in entry["sites"])


def records(root, site):
  """The sites of each round, as a site has recorded them."""
  saved = json.loads((root / "own" / f"site_{site}" / "states.json").read_text())
  return {int(n): tuple(sites) for n, (_, sites) in saved.items()}


def expected(rounds):
  """The state after these rounds: number from 1 to the sites of its sum."""
  total = np.zeros(SIZE, np.uint32)
  for number, sites in rounds.items():
    for i in sites if number else ():
      total += update(i, number - 1)
  return total


def parts(data):
  """The messages that travel as one; of a proposal with the first of a sum, that one besides."""
  message = decoded(data)
  if isinstance(message, msg.Together):
    return [one.data for one in message.parts]
  if isinstance(message, msg.Proposal) and message.masked:
    return [data, *parts(message.masked)]
  return [data]


def decoded(data):
  """The message, or None where it is none."""
  with contextlib.suppress(ValueError):
    return msg.decode(data)
  return None
