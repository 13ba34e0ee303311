"""What may happen to a run between hospitals of which each round takes some, as `flower_events`."""

import contextlib
import functools

import numpy as np
from flower_events import again, coordinators, lying, of_all, sites
from flower_world import CONFIG, World, charged, expected, records, released, site

from experiments import settings
from primia_jax.secagg import messages as msg

SAMPLED = functools.partial(  # of four sites; the first round takes 0, 1 and 2
  site,
  config=settings.replace(CONFIG, num_sites=4),
  take=lambda round: tuple(sorted((round + i) % 4 for i in range(3))),
)


def sampled_is_killed(root, killed, kinds, moments):
  """A site of four is killed before any of the messages that it says, or hears, in round 1."""
  ends = []
  for kind in kinds:
    for at in moments:
      world, place = World(4), root / f"{kind}_{at}"

      def kill(number, n, at=at, world=world):
        if (number, n) == (killed, at):
          world.kill(number)

      setattr(world, kind, kill)
      world.run(place, program=SAMPLED)
      (report,) = world.reports
      in_sum = set(report.opened.survivors)
      assert {0, 1, 2} - {killed} <= in_sum <= {0, 1, 2}
      for i in set(range(4)) - {killed}:  # also the one that follows
        np.testing.assert_array_equal(world.results[i], expected(records(place, i)))
        assert charged(place, i) == released(world, i) == int(i != 3)
      ends.append((
        coordinators(world), sites(world), again(place, world, num_sites=4, program=SAMPLED)
      ))  # fmt: skip
  return tuple(map(of_all, zip(*ends, strict=True)))


def taken_is_killed(root):
  return sampled_is_killed(root, 1, ("on_say",), range(3, 8))


def follower_is_killed(root):
  """Before its word that it follows, or before it hears the sum."""
  ends = [
    sampled_is_killed(root, 3, (kind,), (at,)) for kind, at in (("on_say", 3), ("on_hear", 4))
  ]
  return tuple(map(of_all, zip(*ends, strict=True)))


def follower_is_told_another_sum(root):
  """The coordinator changes what it tells the site that this round does not take."""
  world = World(4)
  with lying() as lies:

    def spoil(i, n, data):
      with contextlib.suppress(ValueError):
        told = msg.apart(msg.decode(data))
        if i == 3 and isinstance(told[-1], msg.Evidence):
          return msg.encode(msg.together(*told[:-1], lies[-1]))
      return data

    world.spoil_told = spoil
    world.run(root, program=SAMPLED)
  assert "forged" in str(world.errors[3])
  start = again(root, world, num_sites=4, program=SAMPLED)
  return coordinators(world), sites(world), start


EVENTS = {
  "a round takes sites 0, 1 and 2 of four (`--sites_per_round=3`), and site 1 is killed at any "
  "message of it": taken_is_killed,
  "such a round, and site 3, which it does not take, is killed before it is told the sum": (
    follower_is_killed
  ),
  "such a round, and the coordinator plants a false sum at site 3": follower_is_told_another_sum,
}
