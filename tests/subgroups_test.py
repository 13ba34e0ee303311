"""Scores of subgroups: exact values, intervals that cover, and no small count."""

import jax
import numpy as np
import pytest

from primia_jax import metrics, subgroups
from primia_jax.disclosure import Policy, Suppressed
from primia_jax.metrics import intervals
from primia_jax.subgroups import NOT_GIVEN, OUTSIDE, Members

KEY = jax.random.key(0)


def answers(labels, right, num_classes=2):
  """Probabilities whose largest is the truth where `right`, and else the next class."""
  said = np.where(right, labels, (labels + 1) % num_classes)
  return np.where(np.eye(num_classes)[said] == 1, 0.8, 0.2 / (num_classes - 1))


def made(*groups):
  """Images of subgroups, each (name, right of class 0, wrong, right of class 1, wrong)."""
  rows = [
    (name, label, right)
    for name, *counts in groups
    for (label, right), n in zip([(0, 1), (0, 0), (1, 1), (1, 0)], counts, strict=True)
    for _ in range(n)
  ]
  values, labels, right = map(np.array, zip(*rows, strict=True))
  return labels, answers(labels, right == 1), subgroups.members("sex", values)


def test_two_groups_of_known_accuracy_have_exactly_these_scores_and_gaps():
  labels, probabilities, of = made(("F", 36, 4, 27, 3), ("M", 30, 10, 12, 8))
  table = subgroups.table(labels, probabilities, of, KEY)
  women, men = table.rows
  assert (women.name, women.images, men.name, men.images) == ("F", 70, "M", 60)
  assert women.accuracy.value == pytest.approx(63 / 70)
  assert men.accuracy.value == pytest.approx(42 / 60)
  for row, matrix in ((women, [[36, 4], [3, 27]]), (men, [[30, 10], [8, 12]])):
    assert row.mcc.value == pytest.approx(float(metrics.mcc(np.array(matrix))))
    assert row.accuracy.low < row.accuracy.value < row.accuracy.high
  gap = table.accuracy
  assert (gap.best, gap.worst) == ("F", "M")
  assert gap.value == pytest.approx(63 / 70 - 42 / 60)
  assert gap.high - gap.value == pytest.approx(gap.value - gap.low)
  # Of two groups the interval is the ordinary one of a difference of proportions.
  deviation = (0.9 * 0.1 / 70 + 0.7 * 0.3 / 60) ** 0.5
  assert gap.high - gap.value == pytest.approx(1.96 * deviation, rel=0.1)
  assert table.mcc.value == pytest.approx(women.mcc.value - men.mcc.value)
  assert subgroups.table(labels, probabilities, of, KEY) == table


def test_the_interval_of_a_largest_gap_holds_zero_as_often_as_it_says():
  """Ten equal groups: the largest gap is far from zero, and its interval seldom excludes it. That
  of the pair alone, chosen for its size, would do so often.
  """
  rng, num, outside, alone = np.random.default_rng(1), 40, 0, 0
  of = Members(tuple("abcdefghij"), np.repeat(np.arange(10), 50))
  for trial in range(num):
    labels = rng.integers(0, 2, 500)
    p = answers(labels, rng.random(500) < 0.7)
    gap = subgroups.table(labels, p, of, jax.random.key(trial), num_resamples=200).accuracy
    outside += not gap.low <= 0 <= gap.high
    alone += gap.value > 1.96 * (2 * 0.7 * 0.3 / 50) ** 0.5
  assert outside <= 6  # 5 % of 40, and three standard deviations
  assert alone >= 15


def test_the_gap_between_classes_is_of_sensitivities():
  labels = np.repeat([0, 1, 3], [40, 40, 20])
  right = np.concatenate([np.arange(40) < 38, np.arange(40) < 20, np.arange(20) < 15])
  p = answers(labels, right, 4)
  gap = subgroups.class_gap(labels, p, "abcd", KEY)
  assert (gap.best, gap.worst) == ("a", "b")
  assert gap.value == pytest.approx(38 / 40 - 20 / 40)
  assert 0 < gap.low < gap.value
  alone = subgroups.class_gap(labels[:40], p[:40], "abcd", KEY)
  assert alone is None


def test_a_gap_is_never_said_to_be_larger_than_it_can_be():
  labels, probabilities, of = made(("a", 10, 0, 9, 1), ("b", 1, 4, 0, 5))
  gap = subgroups.table(labels, probabilities, of, KEY).accuracy
  assert gap.value == pytest.approx(0.85)
  assert 0 < gap.low < gap.value < gap.high == 1


def test_patients_of_a_subgroup_are_drawn_together():
  labels, probabilities, of = made(("F", 40, 10, 40, 10), ("M", 40, 10, 40, 10))
  groups = np.arange(200) // 10  # all right or all wrong
  width = lambda one: one.high - one.low
  single, whole = (
    subgroups.table(labels, probabilities, of, KEY, groups=g) for g in (None, groups)
  )
  for a, b in zip(single.rows, whole.rows, strict=True):
    assert width(b.accuracy) == pytest.approx(10**0.5 * width(a.accuracy), rel=0.15)
  assert width(whole.accuracy) > 2 * width(single.accuracy)


def test_scores_that_are_not_defined_are_in_no_gap():
  labels, probabilities, of = made(("a", 10, 2, 0, 0), ("b", 9, 3, 7, 5), ("", 1, 9, 1, 9))
  table = subgroups.table(labels, probabilities, of, KEY)
  a, _, missing = table.rows
  assert np.isnan(a.mcc.value)
  assert missing.name == NOT_GIVEN
  assert table.mcc is None
  assert (table.accuracy.best, table.accuracy.worst) == ("a", "b")  # not the worst of all
  one = subgroups.table(labels, probabilities, Members(("all",), np.zeros_like(labels)), KEY)
  assert (len(one.rows), one.accuracy, one.mcc) == (1, None, None)


def told(*groups, floor=10, patients=None):
  """(name, count, accuracy, MCC) of each subgroup: whether it is told."""
  labels, probabilities, of = made(*groups)
  policy = Policy(fewest_patients=floor)
  table = subgroups.table(
    labels, probabilities, of, KEY, patients=patients, policy=policy, num_resamples=5
  )
  hidden = [[isinstance(x, Suppressed) for x in row[1:]] for row in table.rows]
  return ["".join("-+"[not x] for x in row) for row in hidden], table


def test_floors_hide_small_subgroups_what_tells_them_and_the_gap():
  large = (30, 12, 30, 12)
  assert told(("a", *large), ("b", *large))[0] == ["+++", "+++"]
  # One of 7 images: the total would tell it, so the smaller of the others goes, too.
  found, table = told(("a", 40, 12, 40, 12), ("b", 3, 1, 2, 1), ("c", 31, 12, 31, 12))
  assert found == ["+++", "---", "---"]
  assert str(table.rows[1].images) == "suppressed (<10)"
  assert table.accuracy is None
  found, _ = told(("a", *large), ("b", 3, 1, 2, 1))
  assert found == ["---", "---"]
  # 40 images of which 4 are wrong: how many there are is told, and not how many are right. The
  # total of wrong images would tell it, so another accuracy goes, too.
  found, _ = told(("a", *large), ("b", 18, 2, 18, 2), ("c", 30, 11, 30, 12))
  assert found == ["+++", "+--", "+--"]
  # 13 of 40 wrong, but only 3 of class 0: an MCC tells the cells beside accuracy and count.
  found, _ = told(("a", *large), ("b", 17, 3, 10, 10), ("c", 30, 11, 30, 12))
  assert found == ["+++", "++-", "++-"]
  assert told(("a", *large), ("b", 3, 1, 2, 1), floor=0)[0] == ["+++", "+++"]


def test_accuracies_of_subgroups_do_not_tell_a_total_that_the_report_hides():
  """Nine images of all are false alarms, so a report hides its accuracy; that of subgroups and
  their sizes would tell it.
  """
  found, _ = told(("a", 30, 5, 30, 12), ("b", 30, 4, 30, 12))
  assert found == ["+--", "+--"]


def test_floors_count_patients():
  groups = ("a", 30, 12, 30, 12), ("b", 30, 12, 30, 12)
  num = sum(sum(g[1:]) for g in groups)
  assert told(*groups, patients=np.arange(num) // 2)[0] == ["++-", "++-"]  # 6 patients a cell
  assert told(*groups, patients=np.arange(num) // 50)[0] == ["---", "---"]


def test_values_become_subgroups():
  of = subgroups.members("sex", np.array(["M", "F", "", " M", "nan", "not given"]))
  assert of.names == ("F", "M", NOT_GIVEN)
  assert of.of.tolist() == [1, 0, 2, 1, 2, 2]
  assert subgroups.members("site", np.array([10, 9, 10])).names == ("9", "10")
  assert subgroups.members("score", np.array([2.5, np.nan])).names == ("2.5", NOT_GIVEN)
  assert subgroups.members("view", np.array([b"PA", b"AP"])).names == ("AP", "PA")
  ages = np.array(["17.9", "18", "0", "", "200", "-1", "64"])
  of = subgroups.members("age", ages, (0, 18, 65, 200))
  assert of.names == ("0 to below 18", "18 to below 65", OUTSIDE, NOT_GIVEN)
  assert of.of.tolist() == [0, 1, 0, 3, 2, 2, 1]


@pytest.mark.parametrize(
  ("values", "edges", "said"),
  [
    (np.arange(30), (), "age has 30 values, more than 20; give edges .* age:0:18:65:200"),
    ([f"p{i}" for i in range(21)], (), "has 21 values, more than 20; take a column with fewer"),
    (["30", "058Y"], (0, 50), "age has the value '058Y', which is not a number"),
    (["", "nan"], (), "age has no value for any test image"),
    (np.zeros((4, 2)), (), r"holds \(2,\) values an image"),
  ],
)
def test_columns_without_subgroups_are_refused(values, edges, said):
  with pytest.raises(ValueError, match=said):
    subgroups.members("age", values, edges)


def test_subgroups_and_labels_of_other_images_are_refused():
  of = Members(("a",), np.zeros(3, int))
  with pytest.raises(ValueError, match="3 images are in subgroups, and there are 2 labels"):
    subgroups.table(np.array([0, 1]), np.full((2, 2), 0.5), of, KEY)


def test_draws_are_of_whole_groups_and_matrices_count_them():
  groups = np.array([0, 0, 1, 2])
  times = np.concatenate(list(intervals.draws(4, 2, KEY, groups, 50)))
  assert times.shape == (50, 4)
  assert (times[:, 0] == times[:, 1]).all()
  assert set(times[:, [0, 2, 3]].sum(1)) == {3}
  labels, said = np.array([0, 1, 1, 0]), np.array([0, 0, 1, 1])
  for row, matrix in zip(times, intervals.matrices(labels, said, 2, times), strict=True):
    expected = np.zeros((2, 2), int)
    np.add.at(expected, (labels, said), row)
    np.testing.assert_array_equal(matrix, expected)
