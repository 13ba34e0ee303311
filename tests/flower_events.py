"""What may happen to a run between hospitals besides a fault of one message.

Each function plays an event in a folder, checks that nothing is lost by it, and returns how the
coordinator ends, how the sites end, and what comes of the next start of all.
"""

import contextlib
import errno
import functools
import json
import pathlib
import time

import numpy as np
import pytest
from flower_world import (
  CONFIG,
  TOLD_A_RUN,
  Killed,
  World,
  charged,
  expected,
  killed_once,
  records,
  released,
  site,
)

from experiments import messages_crossed, settings
from primia_jax import durable
from primia_jax.privacy import chain, ledger
from primia_jax.secagg import Aborted, keys, meeting, opening, pinning, roster
from primia_jax.secagg import messages as msg

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "flower_faults.md"
RIGHT = "right"


def named(error):
  """An ending in a word; what a person must read is an error that says what is wrong."""
  assert error is None or isinstance(error, (Aborted, Killed, OSError, ValueError)), repr(error)
  assert error is None or str(error) or isinstance(error, Killed)
  return RIGHT if error is None else type(error).__name__


def coordinators(world):
  return named(world.errors.get("coordinator"))


def sites(world):
  """How the sites end: in a word where all end alike."""
  ends = [named(world.errors.get(i)) for i in range(world.num_sites)]
  return ends[0] if len(set(ends)) == 1 else ", ".join(f"{i}: {end}" for i, end in enumerate(ends))


def again(root, *worlds, rounds=2, gaps=(), num_sites=3, program=site):
  """The next start, which must continue: in all folders is one state, that of the sums recorded.
  Sites that were away have gaps in their records.
  """
  world = World(num_sites).run(root, rounds=rounds, program=program)
  worlds = [*worlds, world]
  assert world.errors == {}, world.errors
  for i in range(num_sites):
    known = records(root, 0 if i in gaps else i)
    np.testing.assert_array_equal(world.results[i], expected(known))
    np.testing.assert_array_equal(world.results[i], world.results[0])
    assert charged(root, i) >= sum(released(one, i) for one in worlds)
  return RIGHT


def of_all(ends):
  """One word for what came of an event at each of several moments."""
  return " or ".join(sorted(set(ends)))


def coordinator_is_killed(root):
  ends = []
  for number in range(TOLD_A_RUN):
    world, place = World(), root / str(number)

    def kill(n, at=number):
      if n == at:
        raise Killed

    world.on_ask = kill
    world.run(place)
    assert coordinators(world) == "Killed"
    ends.append((sites(world), again(place, world)))
  return "killed", *map(of_all, zip(*ends, strict=True))


def second_coordinator(root):
  """An invitation to another run comes to all sites, at any moment."""
  stranger, ends = keys.identity(), []
  for number in range(1, TOLD_A_RUN):
    world, place = World(), root / str(number)
    invitation = msg.encode(msg.Invitation(stranger.public, bytes(32)))
    world.spoil_told = lambda i, n, data, at=number, made=invitation: made if n == at else data
    world.run(place)
    assert all("invites to another run" in str(world.errors[i]) for i in range(3))
    ends.append((coordinators(world), sites(world), again(place, world)))
  return tuple(map(of_all, zip(*ends, strict=True)))


def other_coordinator(root):
  first = World().run(root)
  own = root / "own" / "coordinator"
  kept = own.read_bytes()
  own.unlink()
  world = World().run(root, rounds=2)
  assert "the coordinator shows another identity" in str(world.errors[0])
  own.write_bytes(kept)
  return coordinators(world), sites(world), again(root, first, world)


def swapped_key(root):
  first = World().run(root)
  own = root / "own" / "site_1" / "identity"
  kept = own.read_bytes()
  own.unlink()
  world = World().run(root, rounds=2)
  assert "site 1 shows another identity" in str(world.errors[0])
  own.write_bytes(kept)
  return coordinators(world), sites(world), again(root, first, world)


@contextlib.contextmanager
def lying():
  """A list of what a coordinator may pass on and sign: another input of site 0 than it has sent."""
  lies, honest = [], opening.evidence

  def evidence(state, identity):
    message = state.received[2][0]
    other = message._replace(vectors=tuple(v ^ np.uint32(1) for v in message.vectors))
    received = (*state.received[:2], {**state.received[2], 0: other}, *state.received[3:])
    lies.append(honest(state._replace(received=received), identity))
    return honest(state, identity)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(opening, "evidence", evidence)
    yield lies


def planted(root, at=range(3)):
  """The coordinator passes on an input that makes the sum another one; nobody goes on from it."""
  world = World()
  with lying() as lies:

    def spoil(i, n, data):
      with contextlib.suppress(ValueError):
        if i in at and isinstance(msg.decode(data), msg.Evidence):
          return msg.encode(lies[-1])
      return data

    world.spoil_told = spoil
    world.run(root)
  assert all("forged" in str(world.errors[i]) for i in at)
  return coordinators(world), sites(world), again(root, world)


def told_other_sums(root, rounds):
  """Site 1 takes other sums than the others, as a site that does not check them may."""
  take = opening.total

  def told(one, *evidence):
    return tuple(v + np.uint32(one.number == 1) for v in take(one, *evidence))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(opening, "total", told)
    return World().run(root, rounds=rounds)


def other_sums(root):
  world = told_other_sums(root, 2)
  assert [report.opened.survivors for report in world.reports] == [(0, 1, 2), (0, 2)]
  return coordinators(world), sites(world), again(root, world, rounds=3)


def other_last_sum(root):
  world = told_other_sums(root, 1)
  refused = World().run(root, rounds=2)
  assert all("start from another state" in str(refused.errors[i]) for i in range(3))
  for name in ("1.npy", "states.json"):
    (root / "own" / "site_1" / name).unlink()
  again(root, world, refused)
  ends = f"{sites(refused)}; {RIGHT} once what site 1 keeps is taken away"
  return coordinators(world), sites(world), ends


def other_settings(root):
  other = functools.partial(site, config=settings.replace(CONFIG, learning_rate=0.5))
  world = World().run(root, programs={1: other})
  assert all("it may have other settings" in str(world.errors[i]) for i in (0, 2))
  assert not any(released(world, i) for i in range(3))
  return coordinators(world), sites(world), again(root, world)


def other_roster(root):
  """Site 1 has accepted the next roster, and the others have not."""
  World().run(root, rounds=0)
  own = {i: meeting.own_identity(root / "own" / f"site_{i}" / "identity") for i in range(3)}
  server = meeting.own_identity(root / "own" / "coordinator")
  members = [roster.Member(i, f"hospital-{'abc'[i]}", own[i].public) for i in range(3)]
  members.append(roster.Member(None, "coordinator", server.public))
  made = {n: roster.make("vectors", n, members, []) for n in (1, 2)}
  accept = lambda i, n: pinning.accept(
    root / "own" / f"site_{i}", roster.encode(made[n]), own[i], roster.digest(made[n]).hex()
  )
  for i in range(3):
    accept(i, 1)
  accept(1, 2)
  world = World().run(root)
  assert "another roster" in str(world.errors[0])
  assert not any(released(world, i) for i in range(3))
  for i in (0, 2):
    accept(i, 2)
  return coordinators(world), sites(world), again(root, world)


def clocks_off(root):
  """The clock of a process is a day ahead, then a day behind, from one look to the next."""
  real, day = time.time, [86400.0]

  def wrong():
    day[0] = -day[0]
    return real() + day[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(time, "time", wrong)
    world = World().run(root)
  return coordinators(world), sites(world), again(root, world)


def site_disk_is_full(root):
  """Each file that a site writes in a round, one after the other."""
  ends, number = [], 0
  while True:
    world, place, written = World(), root / str(number), [0]
    World().run(place, rounds=0)  # the first meeting has been
    write, append, adding = durable.replace, chain.Chain.append, durable.append

    def full(path, at=number, written=written):
      if path.name != "coordinator" and "site_1" in str(path):
        written[0] += 1
        if written[0] == at + 1:
          raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def replace(path, data, full=full, write=write):
      full(path)
      write(path, data)

    def add(path, line, full=full, adding=adding):
      full(path)
      adding(path, line)

    def appending(self, *entries, full=full, append=append):
      with chain._named(self.folder):
        full(self.path)
      return append(self, *entries)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(durable, "replace", replace)
      patch.setattr(durable, "append", add)
      patch.setattr(chain.Chain, "append", appending)
      world.run(place)
    if written[0] <= number:
      assert number > 3
      return tuple(map(of_all, zip(*ends, strict=True)))
    assert "No space left" in str(world.errors[1])
    ends.append((coordinators(world), sites(world), again(place, world)))
    number += 1


def site_cannot_note_messages(root):
  """From a message on, which is then not sent: its hello, its proposal, or its masked input."""
  ends, opening = [], pathlib.Path.open
  for number in (1, 7, 11):
    world, place, noted = World(), root / str(number), []

    def full(path, *given, at=number, noted=noted, **named):
      if path.name == messages_crossed.FILE and path.parent.name == "site_1":
        noted.append(path)
        if len(noted) > at:
          raise OSError(errno.ENOSPC, "No space left on device")  # it does not say where
      return opening(path, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(pathlib.Path, "open", full)
      world.run(place)
    assert f"site_1/{messages_crossed.FILE}" in str(world.errors[1])
    ends.append((coordinators(world), sites(world), again(place, world)))
  return tuple(map(of_all, zip(*ends, strict=True)))


def coordinator_disk_is_full(root):
  def tell(report):
    raise OSError(errno.ENOSPC, "No space left on device", "sums.jsonl")

  world = World().run(root, rounds=2, tell=tell)
  assert all("the coordinator has failed" in str(world.errors[i]) for i in range(3))
  return coordinators(world), sites(world), again(root, world, rounds=3)


def two_are_killed(root):
  world = World()

  def kill(number, at):
    if number and at == 5:  # its masked input
      world.kill(number)

  world.on_say = kill
  world.run(root)
  return coordinators(world), sites(world), again(root, world)


def other_charges(root):
  """Site 1 says that the others were charged a thousand rounds."""
  first = World().run(root)
  told = ledger.public

  def lies(path):
    said = told(path)
    if path.parent.name != "site_1":
      return said
    found = json.loads(said)
    for i in (0, 2):
      found["ledgers"][i]["releases"][0]["times"] = 1000
    return json.dumps(found).encode()

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ledger, "public", lies)
    world = World().run(root, rounds=2)
  assert [charged(root, i) for i in range(3)] == [2, 2, 2]
  return coordinators(world), sites(world), again(root, first, world, rounds=3)


def comes_back(root):
  """Before each message of the second sum, whose keys it has agreed on; it is in later ones of the
  same run.
  """
  ends = []
  for stage in range(3):
    place = root / str(stage)
    world = killed_once(1, 3 + 5 + stage).run(place, rounds=4)
    assert world.reports[-1].opened.survivors == (0, 1, 2)
    ends.append((coordinators(world), sites(world), again(place, world, rounds=5, gaps=(1,))))
  return tuple(map(of_all, zip(*ends, strict=True)))


EVENTS = {
  "the coordinator is killed, at any message": coordinator_is_killed,
  "a second coordinator invites, at any message": second_coordinator,
  "another coordinator, or its folder was lost": other_coordinator,
  "the folder of site 1 was lost, or another has its place": swapped_key,
  "the coordinator plants one false sum at all sites": planted,
  "the coordinator plants a false sum at site 1": functools.partial(planted, at=(1,)),
  "site 1 goes on from another sum than it opens": other_sums,
  "site 1 ends with another sum than it opens": other_last_sum,
  "site 1 has other settings": other_settings,
  "site 1 has another roster": other_roster,
  "site 1 says that the others were charged 1000 rounds": other_charges,
  "all clocks jump by two days": clocks_off,
  "the disk of site 1 is full, at any write": site_disk_is_full,
  "site 1 cannot note a message that it would send": site_cannot_note_messages,
  "the coordinator's disk is full": coordinator_disk_is_full,
  "two of three sites are killed": two_are_killed,
  "site 1 is killed at any message of a sum, and started again while the others go on": comes_back,
}

# What Flower itself has a part in: the coordinator, the sites, the next start. The tests that the
# document names compare.
OVER_FLOWER = {
  "a stranger's node says that it is site 0": (RIGHT, RIGHT, RIGHT),
  "a certificate that has expired, or is not valid yet": (
    "SuperNode ends, exit code 1", "Lost", RIGHT
  ),
  "site 1's clock is a day ahead, or six seconds": ("no node of site 1", "1: Lost", RIGHT),
  "site 1's SuperNode is killed": (RIGHT, "0: right, 1: Lost, 2: right", RIGHT),
  "a second run is started while one goes on": ("second: ValueError, first: right", RIGHT, RIGHT),
  "the SuperLink is killed": ("killed", "Lost", RIGHT),
}  # fmt: skip


def row(name):
  """The line of the table of what Flower has a part in."""
  return f"| {name} | {' | '.join(OVER_FLOWER[name])} |"
