"""The loop over rounds, with a step that computes nothing."""

import jax
import numpy as np
import pytest

from experiments import loop
from primia_jax import evaluation, federated, secagg

KEY = jax.random.key(0)
SITES = federated.Sites(np.arange(5, dtype=np.int32), lambda ids: None)
SCORES = evaluation.Scores(np.eye(3), 0.5)


def state_at(round, params=0):
  return federated.State(params, {}, (), (), np.int32(round))


class Steps:
  """Counts what is released: calls of step and of validation, in order."""

  def __init__(self, aborted=(), out_of_range=()):
    self.aborted, self.out_of_range, self.calls = aborted, out_of_range, []

  def step(self, key, state, sites):
    number = int(state.round) + 1
    self.calls.append(("step", number, sites.ids.tolist()))
    if number in self.aborted:
      raise secagg.RoundAborted("round aborted: too few")
    outside = np.uint32(2 if number in self.out_of_range else 0)
    info = federated.Info(0.1, 0.2, 0.3, outside, sites.ids, {})
    return state._replace(params=state.params + 1, round=state.round + 1), info

  def validate(self, key, state):
    self.calls.append(("validate", int(state.round)))
    return SCORES

  def rounds(self, start=0, **options):
    options = {"num_rounds": 4, "num_sampled": 3} | options
    return loop.rounds(self.step, self.validate, KEY, state_at(start), SITES, **options)


def test_rounds_follow_one_another_and_each_is_validated():
  steps = Steps()
  done = list(steps.rounds())
  assert [one.number for one in done] == [1, 2, 3, 4]
  assert (
    [int(one.state.round) for one in done] == [one.state.params for one in done] == [1, 2, 3, 4]
  )
  drawn = [federated.sample_sites(KEY, i, 5, 3).tolist() for i in range(4)]
  assert [one.ids.tolist() for one in done] == drawn
  assert len(set(map(tuple, drawn))) > 1
  assert [call[:2] for call in steps.calls] == [
    (what, number) for number in (1, 2, 3, 4) for what in ("step", "validate")
  ]
  assert all(one.scores is SCORES and one.info and not one.aborted for one in done)
  assert all(one.seconds >= 0 for one in done)


def test_rounds_go_without_validation():
  steps = Steps()
  done = list(loop.rounds(steps.step, None, KEY, state_at(0), SITES, 2, 3))
  assert [(one.number, one.scores) for one in done] == [(1, None), (2, None)]
  assert all(one.info for one in done)


def test_an_aborted_round_counts_is_not_validated_and_the_next_goes_on_from_the_same_model():
  steps = Steps(aborted=(2,))
  done = list(steps.rounds())
  assert [one.number for one in done] == [1, 2, 3, 4]
  assert [one.state.params for one in done] == [1, 1, 2, 3]
  assert [int(one.state.round) for one in done] == [1, 2, 3, 4]
  assert done[1].aborted == "round aborted: too few"
  assert (done[1].info, done[1].scores) == (None, None)
  assert ("validate", 2) not in steps.calls
  assert len(done[1].ids) == 3


def test_nothing_is_released_before_before_allows_it_and_false_ends_the_run():
  steps, asked = Steps(), []

  def before(ids):
    asked.append((ids, len(steps.calls)))
    return len(asked) < 3

  done = list(steps.rounds(before=before))
  assert [one.number for one in done] == [1, 2]
  assert [ids for ids, _ in asked] == [
    federated.sample_sites(KEY, i, 5, 3).tolist() for i in (0, 1, 2)
  ]
  assert [count for _, count in asked] == [0, 2, 4]  # step and validation of the rounds before
  assert len(steps.calls) == 4


def test_an_aborted_round_was_charged():
  asked = []
  list(Steps(aborted=(1, 2, 3, 4)).rounds(before=lambda ids: asked.append(ids) or True))
  assert len(asked) == 4


def test_a_round_begins_only_when_it_is_asked_for():
  """So that the caller has saved the last one, whatever stops this one."""
  steps = Steps()
  rounds = steps.rounds()
  assert steps.calls == []
  assert next(rounds).number == 1
  assert [call[:2] for call in steps.calls] == [("step", 1), ("validate", 1)]
  rounds.close()
  assert len(steps.calls) == 2


def test_a_run_continues_with_the_sites_that_it_would_have_had():
  whole = list(Steps().rounds())
  for start in (2, 4):
    rest = list(Steps().rounds(start=start))
    assert [one.number for one in rest] == list(range(start + 1, 5))
    for one, expected in zip(rest, whole[start:], strict=True):
      np.testing.assert_array_equal(one.ids, expected.ids)


def test_an_update_out_of_range_ends_the_run_with_the_setting_and_is_not_yielded():
  steps = Steps(out_of_range=(2,))
  rounds = steps.rounds(secagg_max_abs=1.5)
  assert next(rounds).number == 1
  match = r"round 2: at 2 of 3 sites .* beyond secagg_max_abs=1\.5 .* raise --secagg_max_abs"
  with pytest.raises(RuntimeError, match=match):
    next(rounds)
  assert ("validate", 2) not in steps.calls
