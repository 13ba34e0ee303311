"""Weights are tried beyond the first ones while the best is at an end."""

import math

import pytest

from primia_jax.attacks import tuning


def peak(at, asked):
  return lambda weight: asked.append(weight) or -abs(math.log(weight / at))


@pytest.mark.parametrize(
  ("at", "value", "asked"),
  [
    (0.3, 0.3, [0.1, 0.3, 1]),  # inside: no more is tried
    (10, 10, [0.1, 0.3, 1, 3, 10, 30]),  # as under noise, far above the first ones
    (0.01, 0.01, [0.1, 0.3, 1, 0.03, 0.01, 0.003]),
  ],
)
def test_the_grid_grows_until_the_best_is_inside(at, value, asked):
  tried = []
  assert tuning.tune((0.1, 0.3, 1.0), peak(at, tried)) == tuning.Tuned(value, False)
  assert tried == pytest.approx(asked)


@pytest.mark.parametrize(("at", "end"), [(1e4, 100), (1e-6, 0.001)])
def test_the_last_of_all_is_said_to_be(at, end):
  found = tuning.tune((0.1, 0.3, 1.0), peak(at, []))
  assert found == tuning.Tuned(end, True)
  assert str(found) == f"{end:g}, the best at the end of the grid"
  assert str(tuning.Tuned(end, False)) == f"{end:g}"


def test_nothing_lies_below_zero_and_no_number_never_wins():
  assert tuning.tune((0.0, 10.0), lambda w: -w) == tuning.Tuned(0.0, False)
  assert tuning.tune((1.0,), peak(0.3, [])).value == 0.3
  assert tuning.tune((0.1, 1.0), lambda w: math.nan if w > 0.5 else w, ladder=()).value == 0.1
  with pytest.raises(ValueError, match="no value to try"):
    tuning.tune((), lambda w: w)
