"""What each adversary saw of a recorded round, against what its sites computed."""

import jax
import numpy as np
import optax
import pytest
from federated_sites import IDS, KEY, NUM, build, by_hand, distance, load, recipe, same, start

from primia_jax import algorithms, secagg, summation
from primia_jax import federated as fed
from primia_jax.attacks import recording, views
from primia_jax.summation import Purpose

TWO = np.array([1, 3])
SECURE = secagg.secure_sum(2, max_abs=4.0)


def record(summed, ids, algorithm=None, rounds=1, dropouts=None):
  """Rounds as a simulation records them, and the last state."""
  seen, out = [], []
  lost = summation.losing(summed, lambda round, purpose, ids: dropouts)
  f = build(algorithm or algorithms.fedavg(recipe()), recording.recorded(lost, seen.append))
  state = f.init(start())
  for number in range(1, rounds + 1):
    before = state
    state, _ = f.step(KEY, state, fed.Sites(ids, load))
    one = seen.pop()
    assert (one.round, one.purpose, seen) == (number - 1, Purpose.TRAINING, [])
    models = (views.Model(s.params, s.model_state) for s in (before, state))
    out.append(views.Round(number, one.ids, *models, one.messages, one.total))
  return jax.tree.map(np.asarray, out), state


@pytest.fixture(scope="module")
def two():
  return record(summation.masked(SECURE), TWO, rounds=2)


@pytest.fixture(scope="module")
def three():
  return record(summation.clear(), np.array([0, 2, 4]))[0][0]


def take(tree, row=0):
  return jax.tree.map(lambda a: a[row], tree)


def change(site, round=0):
  y = by_hand(site, start(), round, None).params
  return jax.tree.map(lambda y, x: np.asarray(y) - x, y, start())


def test_recording_changes_no_bit(two):
  f, state = build(algorithms.fedavg(recipe()), summation.masked(SECURE)), None
  state = f.init(start())
  for _ in range(2):
    state, _ = f.step(KEY, state, fed.Sites(TWO, load))
  assert same(state, two[1])
  assert same(two[0][0].after, two[0][1].before)


def test_a_server_without_masks_sees_each_site_s_own_change(two, three):
  for one in (two[0][0], three):
    view = views.server_each(one)
    assert view.sites == tuple((i,) for i in one.ids.tolist())
    for row, site in enumerate(one.ids.tolist()):
      assert distance(take(view.updates, row), change(site)) < 1e-5
    np.testing.assert_allclose(view.weights, NUM[one.ids] / 20, rtol=1e-6)


def test_with_masks_it_sees_the_mean(two):
  one = two[0][0]
  mean = jax.tree.map(lambda *y: np.average(y, axis=0, weights=NUM[TWO]), *[change(i) for i in TWO])
  view = views.server_sum(one)
  assert distance(take(view.updates), mean) < 1e-5 + SECURE.error_bound * 20 / NUM[TWO].sum()
  assert view.sites == ((1, 3),)
  assert distance(take(view.updates), change(1)) > 0.01


def test_of_two_sites_each_sees_the_other_s_update(two):
  for one in two[0]:
    each = views.server_each(one)
    for row, (site, other) in enumerate(((1, 3), (3, 1))):
      view = views.peer(one, site)
      share = float(view.weights[0]) / NUM[TWO].sum() * 20
      quantum = SECURE.error_bound / float(view.weights[0])
      rounding = 1e-6 / share
      assert distance(take(view.updates), take(each.updates, 1 - row)) <= quantum + rounding
      assert view.sites == ((other,),)
      assert f"site {other}'s update" in view.threat


def test_of_three_sites_each_sees_the_mean_of_the_others(three):
  view = views.peer(three, 2)
  mean = jax.tree.map(lambda a, b: (20 * a + 5 * b) / 25, change(0), change(4))
  assert distance(take(view.updates), mean) < 1e-5
  assert view.sites == ((0, 4),)
  assert distance(take(view.updates), change(0)) > 0.01
  assert same(views.public(three), three.after)


def test_a_lost_site_is_not_seen():
  gone = np.array([False, True, False])
  dropouts = secagg.Dropouts(gone, ~gone & False)
  one = record(summation.clear(), np.array([0, 2, 4]), dropouts=dropouts)[0][0]
  assert one.ids.tolist() == [0, 4]
  assert distance(take(views.server_each(one).updates, 1), change(4)) < 1e-5


def test_what_is_no_view_is_refused(three):
  with pytest.raises(ValueError, match=r"site=1 has no peers in round 1 of sites \[0, 2, 4\]"):
    views.peer(three, 1)
  moved = jax.tree.map(lambda a: a + 0.1, three.after)
  with pytest.raises(ValueError, match=r"did not add the mean update.*fedavg"):
    views.peer(three._replace(after=moved), 0)
  between = summation.clear()._replace(between_processes=True)
  with pytest.raises(ValueError, match="record a simulation"):
    recording.recorded(between, print)
  server = optax.sgd(0.5)
  one = record(summation.clear(), IDS, algorithms.fedopt(recipe(), server))[0][0]
  with pytest.raises(ValueError, match="did not add the mean"):
    views.peer(one, 0)


def test_threat_points_have_a_view_each():
  names = [point.name for point in views.THREATS]
  assert len(set(names)) == len(names) == 5
  for name in set(names) - {views.MALICIOUS}:
    assert callable(getattr(views, name))
