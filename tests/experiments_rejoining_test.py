"""A site that is killed and comes back while the others train on: with models, on images."""

import functools

import flower_world
import jax
import numpy as np
import pytest
from experiments_apart import APART, train_site

from experiments import settings

CONFIG = settings.replace(APART, secagg_threshold=2, secagg_colluding=0)
BEFORE = 3 + 5 + 2 * 3  # what a site says at the meeting, in the first sum, and in two later ones


@pytest.mark.slow
def test_a_site_that_was_killed_trains_on_with_the_others(tmp_path, monkeypatch):
  """It was killed in the second round of four, and has its own momentum from the first."""
  monkeypatch.setattr(flower_world, "DEADLINE", 1200.0)
  world = flower_world.killed_once(1, BEFORE)
  world.run(tmp_path, 4, functools.partial(train_site, config=CONFIG))
  assert world.errors == {}
  who = [report.opened.survivors for report in world.reports]
  assert who == [*[(0, 1, 2)] * 3, *[(0, 2)] * 2, *[(0, 1, 2)] * 4]
  trained = [world.results[i] for i in range(3)]
  assert [[row["round"] for row in arm.rows] for arm in trained] == [
    [1, 2, 3, 4],
    [1, 3, 4],
    [1, 2, 3, 4],
  ]
  assert trained[1].facts["rounds without this site, or aborted"] == "1 of 4"
  for arm in trained[1:]:
    for a, b in zip(*map(jax.tree.leaves, (arm.models, trained[0].models)), strict=True):
      np.testing.assert_array_equal(a, b)
    assert [row["val_mcc"] for row in arm.rows if row["round"] != 2] == [
      row["val_mcc"] for row in trained[0].rows if row["round"] != 2
    ]
