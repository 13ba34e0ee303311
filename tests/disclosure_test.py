"""Disclosure control: what a policy suppresses and refuses, and the page of what crossed."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from primia_jax import disclosure
from primia_jax.disclosure import Crossing, Policy, Suppressed

TEN = Policy(fewest_patients=10, fewest_sites=3, fewest_images=20)


def test_a_suppressed_number_is_no_number_and_not_zero():
  hidden = TEN.count(0)
  assert str(hidden) == "suppressed (<10)" == f"{TEN.count(9)}"
  assert TEN.count(10) == 10
  assert hidden != 0
  assert hidden == TEN.count(9)  # nor does it tell which number it was
  for wrong in (float, int, bool, sum, lambda x: x + 1, lambda x: 0 + x, lambda x: x < 1):
    with pytest.raises(TypeError):
      wrong(hidden)
  with pytest.raises(TypeError):
    np.asarray([hidden], np.float64)
  with pytest.raises(TypeError):
    json.dumps(hidden)  # it is written on purpose, or not at all


def test_floors_refuse_with_the_number_that_is_missing():
  TEN.check_sum(3)
  TEN.check_site(20)
  TEN.check(disclosure.METRICS)
  with pytest.raises(ValueError, match="a sum over 2 sites; this site's policy needs at least 3"):
    TEN.check_sum(2)
  with pytest.raises(ValueError, match="fewer than fewest_images=20 images") as refused:
    TEN.check_site(17)
  assert "17" not in str(refused.value)
  only = Policy((disclosure.UPDATES,))
  with pytest.raises(ValueError, match=r"exact counts may not leave this site.*: sums of updates"):
    only.check(disclosure.EXACT_COUNTS)
  with pytest.raises(ValueError, match=r"leaves=\['images'\]; use some of"):
    Policy(("images",))
  with pytest.raises(ValueError, match="fewest_sites=-1 is negative"):
    Policy(fewest_sites=-1)
  assert Policy(fewest_patients=0).count(0) == 0


def test_a_score_is_suppressed_with_the_counts_that_it_tells():
  assert TEN.ratio(0.9, 90, 10) == 0.9
  assert TEN.ratio(0.98, 98, 2) == Suppressed(10)


@given(
  st.integers(1, 4).flatmap(
    lambda width: st.lists(
      st.lists(st.integers(0, 30), min_size=width, max_size=width), min_size=1, max_size=4
    )
  )
)
def test_totals_of_a_table_tell_no_suppressed_cell(rows):
  shown = TEN.table(rows)
  for line, true in [*zip(shown, rows, strict=True), *zip(zip(*shown), zip(*rows), strict=True)]:  # noqa: B905
    hidden = [isinstance(cell, Suppressed) for cell in line]
    assert all(h or cell == n for h, cell, n in zip(hidden, line, true, strict=True))
    assert all(h for h, n in zip(hidden, true, strict=True) if n < 10)
    assert sum(hidden) != 1 or len(line) == 1


def test_only_as_much_of_a_table_is_hidden_as_must_be():
  hidden = Suppressed(10)
  assert TEN.table([[50, 2], [30, 40]]) == [[hidden, hidden], [hidden, hidden]]
  assert TEN.table([[50, 20], [30, 40]]) == [[50, 20], [30, 40]]
  three = TEN.table([[3, 15, 50], [15, 60, 70], [50, 30, 40]])
  assert TEN.table(np.array([[50, 2], [30, 40]], np.int32)) == [[hidden] * 2] * 2  # as jax counts
  assert three == [[hidden, hidden, 50], [hidden, hidden, 70], [50, 30, 40]]


def test_the_page_lists_everything_that_crossed():
  crossed = [
    Crossing("masked update", "site 0", "server", 20, 123456, "masks", "epsilon 1.2"),
    Crossing("sum | open", "server", "all sites", 20, 7, "a sum over 3 sites", "nothing"),
  ]
  text = disclosure.markdown("run a", TEN, crossed, {"test images": TEN.count(3)})
  assert "| masked update | site 0 | server | 20 | 123,456 | masks | epsilon 1.2 |" in text
  assert "sum \\| open" in text
  assert "| test images | suppressed (<10) |" in text
  assert "| fewest sites in a sum | 3 |" in text
  assert "Nothing crossed." in disclosure.markdown("b", TEN, [])
