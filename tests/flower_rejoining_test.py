"""A site that is killed and started again comes back in a later round of the same run."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flower_world import (
  CONFIG,
  SIZE,
  Killed,
  World,
  charged,
  decoded,
  expected,
  killed_once,
  quick,
  records,
  released,
  site,
)

from experiments import processes, settings, starts
from experiments.checkpoints import Best
from primia_jax import federated
from primia_jax.secagg import Refused, exchange, meeting
from primia_jax.secagg import messages as msg

MEETING, A_SUM, ROUNDS = 3, 5, 5  # messages of a site; rounds of a run
LATER = ("Proposal", "Consent", "Answer")  # of a sum whose keys were agreed on in the one before


@pytest.fixture(autouse=True)
def _quick():
  with quick():
    yield


@pytest.mark.parametrize("stage", range(len(LATER)), ids=LATER)
def test_a_site_killed_at_any_stage_is_back_in_a_later_round_and_nothing_is_lost(tmp_path, stage):
  """In the second round; it is the first site, whose place another takes as giver of the state."""
  world = killed_once(0, MEETING + A_SUM + stage).run(tmp_path, ROUNDS)
  assert world.errors == {}
  who = [report.opened.survivors for report in world.reports]
  assert who[0] == who[3] == who[4] == (0, 1, 2)
  assert who.count((1, 2)) == 1  # it is in the sum into which its input has gone, or in the next
  for i in range(3):
    np.testing.assert_array_equal(world.results[i], expected(records(tmp_path, 1)))
    assert charged(tmp_path, i) >= released(world, i)
  assert charged(tmp_path, 0) == charged(tmp_path, 1) == ROUNDS
  world = World().run(tmp_path, ROUNDS + 1)  # the next start finds nothing amiss
  assert world.errors == {}
  assert charged(tmp_path, 0) == ROUNDS + 1


def test_a_site_that_gives_another_state_is_named_and_the_next_one_gives_it(tmp_path, capsys):
  """Site 1 lies whenever it is to give the state; site 2 gives it in the round after."""
  world = killed_once(0, MEETING + A_SUM)

  def lie(number, n, data):
    message = decoded(data)
    gives = number == 1 and n > MEETING and isinstance(message, msg.Word) and message.told
    return msg.encode(msg.Word(1, b"\1" * 4 + message.told[4:])) if gives else data

  world.spoil_said = lie
  world.run(tmp_path, ROUNDS)
  assert world.errors == {}
  who = [report.opened.survivors for report in world.reports]
  assert who == [(0, 1, 2), (1, 2), (1, 2), (0, 1, 2), (0, 1, 2)]
  said = capsys.readouterr().out
  assert "is not what the others signed; site 1 was to give it" in said
  np.testing.assert_array_equal(world.results[0], expected(records(tmp_path, 1)))


def test_a_site_that_comes_back_while_another_stays_away_is_in_the_next_sums(tmp_path):
  """Of five, the last is gone for good, so that before each round all look for it."""
  config = settings.replace(CONFIG, num_sites=5, secagg_threshold=3, phantom_images=60)
  world = World(5)

  def kill(number, n):
    if (number, n) == (4, MEETING + 1) or (number, n, *world.restarts) == (
      1,
      MEETING + A_SUM + 1,
      1,
    ):
      world.kill(number)

  world.on_say, world.restarts = kill, {1}
  world.run(tmp_path, ROUNDS, functools.partial(site, config=config))
  assert {i: type(error) for i, error in world.errors.items()} == {4: Killed}
  who = [report.opened.survivors for report in world.reports]
  assert who == [(0, 1, 2, 3), (0, 2, 3), *[(0, 1, 2, 3)] * 3]
  for i in range(4):
    np.testing.assert_array_equal(world.results[i], expected(records(tmp_path, 0)))


def test_a_site_that_comes_back_is_killed_again_at_any_message_and_the_others_go_on(tmp_path):
  """At its word that it is there, at its Start, and at its next Proposal."""
  for extra in range(3):
    root, at = tmp_path / str(extra), MEETING + A_SUM + 1
    world = killed_once(1, at)
    first = world.on_say

    def kill(number, n, first=first, world=world, again=at + extra):
      if number == 1 and n == again and not world.restarts:
        world.kill(1)
      first(number, n)

    world.on_say = kill
    world.run(root, ROUNDS)
    assert {i: type(error) for i, error in world.errors.items()} == {1: Killed}
    assert len(world.reports) == ROUNDS
    np.testing.assert_array_equal(world.results[0], world.results[2])
    again = World().run(root, ROUNDS + 1)
    assert again.errors == {}
    np.testing.assert_array_equal(again.results[1], expected(records(root, 0)))


LIKE = starts.Kept(
  federated.State(jnp.zeros(SIZE, jnp.uint32), (), (), (), jnp.int32(0)),
  Best((), (), (), (), jnp.float32(0), jnp.int32(0)),
  "",
)


def planting(world):
  """A coordinator that gives site 1 a state of its own making, as if the others had signed it, and
  shows these what they expect of site 1. Where nobody checks signatures, it works.
  """
  true = []

  def spoil(site, n, data):
    message = decoded(data)
    if site == 1 and isinstance(message, msg.Resumed):
      planted = b"\1" * 4 + message.state[4:]
      state = starts.of_bytes(planted, LIKE).state
      found = starts.digest(state, processes.settings_of(CONFIG))
      said = {i: msg.decode(one) for i, one in message.starts.items()}
      true.append(said[0].state)
      said = {i: msg.encode(one._replace(state=found)) for i, one in said.items()}
      return msg.encode(msg.Resumed(said, planted))
    if isinstance(message, msg.Relayed) and true and 1 in message.said and site != 1:
      start = msg.decode(message.said[1])._replace(state=true[0])
      return msg.encode(msg.Relayed({1: msg.encode(start)}))
    return data

  world.spoil_told = spoil
  return world


@pytest.mark.parametrize("protected", [True, False])
def test_a_coordinator_cannot_give_a_site_that_comes_back_another_state(
  tmp_path, monkeypatch, protected
):
  if not protected:
    monkeypatch.setattr(meeting, "is_signed", lambda *_: True)
    monkeypatch.setattr(exchange.Exchange, "bind", lambda self, public: None)
  world = planting(killed_once(1, MEETING + A_SUM + 1)).run(tmp_path, ROUNDS)
  if protected:
    assert isinstance(world.errors[1], Refused)
    assert "a site's message is not signed for this run" in str(world.errors[1])
    assert sorted(world.results) == [0, 2]
    return
  assert world.errors == {}
  right = expected(records(tmp_path, 0))
  np.testing.assert_array_equal(world.results[0], right)
  assert np.any(world.results[1] != right)  # it has trained on from what was planted


@pytest.mark.parametrize("shown", ["alike", "apart"])
def test_sites_that_are_shown_other_returns_are_in_no_sum_together(tmp_path, shown):
  """Site 2 is not shown that site 1 is back, as if it were to be in a smaller sum."""
  world = killed_once(1, MEETING + A_SUM)

  def spoil(site, n, data):
    message = decoded(data)
    hides = shown == "apart" and site == 2 and len(world.said[2]) > MEETING + A_SUM
    if hides and isinstance(message, msg.Relayed):
      return msg.encode(msg.Relayed({}))
    return data

  world.spoil_told = spoil
  world.run(tmp_path, ROUNDS)
  who = [report.opened.survivors for report in world.reports]
  assert who[:3] == [(0, 1, 2), (0, 2), (0, 1, 2) if shown == "alike" else (0, 1)]
  assert (2 in world.errors) == (shown == "apart")
