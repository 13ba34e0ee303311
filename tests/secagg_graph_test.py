import fractions
import math

import numpy as np
import pytest

from primia_jax.secagg import graph

KEY = np.arange(8, dtype=np.uint32) + 11


@pytest.mark.parametrize(
  ("num_sites", "degree"), [(2, 1), (5, 2), (6, 4), (6, 5), (9, 8), (11, 6), (200, 20)]
)
def test_neighbours_are_symmetric_regular_and_never_oneself(num_sites, degree):
  graphs = set()
  for round_index in range(5):
    got = graph.neighbours(KEY, num_sites, degree, round_index)
    assert got.shape == (num_sites, degree)
    assert got.dtype == np.int32
    of = [set(row) for row in got.tolist()]
    assert all(len(row) == degree and i not in row for i, row in enumerate(of))
    assert all(i in of[j] for i, row in enumerate(of) for j in row)
    assert np.array_equal(got, graph.neighbours(KEY.copy(), num_sites, degree, round_index))
    graphs.add(tuple(map(tuple, map(sorted, of))))
  assert (len(graphs) > 1) == (degree < num_sites - 1)


def test_neighbours_are_the_nearest_on_both_sides_of_one_circle():
  """The circle, read off from two neighbours each, gives the rows of six."""
  next_one = graph.neighbours(KEY, 12, 2)[:, 0]
  for i, row in enumerate(graph.neighbours(KEY, 12, 6)):
    ahead, behind = [i], [i]
    for _ in range(3):
      ahead.append(int(next_one[ahead[-1]]))
      behind.append(int(np.flatnonzero(next_one == behind[-1])[0]))
    assert row.tolist() == [*ahead[1:], *behind[1:]]


def test_every_place_of_the_circle_is_equally_likely():
  """How often two given sites are neighbours, over rounds: P / (K - 1)."""
  rounds = 3000
  count = sum(1 in graph.neighbours(KEY, 9, 2, r)[0] for r in range(rounds))
  assert abs(count - rounds / 4) < 4.5 * (rounds * 3 / 16) ** 0.5


@pytest.mark.parametrize(("num_sites", "degree"), [(1, 0), (1, 1), (6, 3), (6, 6), (6, 0), (6, -2)])
def test_impossible_degrees_are_refused(num_sites, degree):
  with pytest.raises(ValueError, match=f"degree={degree} among {num_sites}"):
    graph.neighbours(KEY, num_sites, degree)


def hypergeometric(population, marked, drawn, count):
  ways = lambda n, k: math.comb(n, k) if 0 <= k <= n else 0
  return fractions.Fraction(
    ways(marked, count) * ways(population - marked, drawn - count), ways(population, drawn)
  )


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize(
  ("num_sites", "corrupt", "dropout"), [(100, 0.1, 0.1), (300, 0.2, 0.1), (1000, 0.05, 0.1)]
)
def test_the_degree_meets_its_bounds_and_two_less_does_not(num_sites, corrupt, dropout, malicious):
  degree, threshold = graph.degree_for(num_sites, corrupt, dropout, 40, 30, malicious)
  num_corrupt, num_dropped = math.floor(corrupt * num_sites), math.floor(dropout * num_sites)

  def failures(degree, threshold):
    """log2 of the three bounds, by the definition, in fractions."""
    enough = 2 * threshold - degree - 1 if malicious else threshold
    captured = sum(
      hypergeometric(num_sites - 1, num_corrupt, degree, i) for i in range(enough, degree + 1)
    )
    lost = sum(
      hypergeometric(num_sites - 1, num_dropped, degree, i)
      for i in range(degree - threshold + 1, degree + 1)
    )
    apart = fractions.Fraction(num_sites**2, 2)
    for i in range(degree):
      apart *= fractions.Fraction(max(num_corrupt + num_dropped - i, 0), num_sites - i)
    return [float(p) for p in (num_sites * captured, apart, num_sites * lost)]

  assert degree % 2 == 0
  assert degree < num_sites - 1
  legal = lambda degree: range(
    (2 * (degree + 1) // 3 if malicious else (degree + 1) // 2) + 1, degree + 1
  )
  meets = lambda p: p[0] <= 2.0**-41 and p[1] <= 2.0**-41 and p[2] <= 2.0**-30
  assert threshold in legal(degree)
  assert meets(failures(degree, threshold))
  assert threshold == degree or not meets(failures(degree, threshold + 1))
  assert not any(meets(failures(degree - 2, t)) for t in legal(degree - 2))


def test_the_bounds_hold_of_circles_that_are_drawn():
  """At a security of 3 bits, so that failures are seen: no more often than allowed; at half the
  degree more often.
  """
  num_sites, corrupt, dropped, trials = 60, 12, 9, 400
  degree, threshold = graph.degree_for(num_sites, 0.2, 0.15, security=3, correctness=3)

  def failed(degree, threshold, trial):
    near = graph.neighbours(KEY, num_sites, degree, trial)
    kind = np.random.default_rng(trial).permutation(num_sites)
    bad, gone = np.isin(near, kind[:corrupt]), np.isin(near, kind[corrupt : corrupt + dropped])
    honest = np.isin(np.arange(num_sites), kind[corrupt + dropped :])
    seen, edge = set(), [int(np.flatnonzero(honest)[0])]
    while edge:
      seen.add(i := edge.pop())
      edge += [int(j) for j in near[i] if honest[j] and j not in seen]
    unsafe = np.any(bad.sum(1) >= threshold) or len(seen) < honest.sum()
    return unsafe, np.any(degree - gone.sum(1) < threshold)

  rate = lambda degree, threshold: np.mean(
    [failed(degree, threshold, t) for t in range(trials)], axis=0
  )
  unsafe, lost = rate(degree, threshold)
  assert unsafe <= 2.0**-3 + 3 * (2.0**-3 / trials) ** 0.5
  assert lost <= 2.0**-3 + 3 * (2.0**-3 / trials) ** 0.5
  half = degree // 4 * 2
  assert rate(half, graph.smallest_threshold(half + 1, False)).max() > 2.0**-3


@pytest.mark.parametrize(
  ("num_sites", "corrupt", "dropout", "malicious", "want"),
  [
    (2, 0, 0, True, (1, 2)),
    (3, 0.34, 0, False, (2, 3)),
    (5, 0.2, 0.2, False, (4, 4)),
    (5, 0.2, 0.4, False, (4, 3)),
    (5, 0.2, 0.2, True, (4, 4)),
    (20, 0.3, 0.3, True, (19, 14)),
  ],
)
def test_few_sites_are_all_neighbours(num_sites, corrupt, dropout, malicious, want):
  assert graph.degree_for(num_sites, corrupt, dropout, malicious_server=malicious) == want


@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    ((1, 0.1, 0.1), "num_sites=1"),
    ((5, 1.0, 0.1), "corrupt_fraction=1.0"),
    ((5, 0.1, -0.1), "dropout_fraction=-0.1"),
    ((5, 0.1, 0.6), "assume fewer"),
    ((5, 0.8, 0.4), "assume fewer"),
    ((5, 0.1, float("nan")), "dropout_fraction=nan"),
    ((10_000, 0.4, 0.4), "assume fewer"),
  ],
)
def test_what_no_graph_tolerates_is_refused(arguments, told):
  with pytest.raises(ValueError, match=told):
    graph.degree_for(*arguments)


@pytest.mark.parametrize(
  ("sites", "threshold", "colluding", "malicious", "opens"),
  [
    ((10, 9), None, 8, False, 0),  # two honest sites, whose masks nobody else knows
    ((10, 9), None, 9, False, 1),
    ((10, 9), 7, 5, False, 0),
    ((10, 9), 7, 6, False, 1),  # of seven survivors, all but one
    ((10, 9), 7, 3, True, 0),
    ((10, 9), 7, 4, True, 1),  # 4 shares of both secrets, and 3 of each from six honest holders
    ((2, 1), None, 0, False, 0),
    ((2, 1), None, 1, False, 1),
    ((50, 10), None, 9, False, 0),
  ],
)
def test_collusion_that_no_circle_or_every_circle_withstands(
  sites, threshold, colluding, malicious, opens
):
  got = graph.chance_of_opening(*sites, threshold, colluding, malicious_server=malicious)
  assert got == opens


def test_the_chance_that_colluding_sites_open_a_message_bounds_what_is_drawn():
  num_sites, degree, threshold, colluding, trials = 40, 6, 4, 8, 2000
  bound = graph.chance_of_opening(num_sites, degree, threshold, colluding)
  caught = []
  for trial in range(trials):
    bad = np.random.default_rng(trial).permutation(num_sites) < colluding
    near = graph.neighbours(KEY, num_sites, degree, trial)
    caught.append(np.any(bad[near[~bad]].sum(1) >= threshold))
  assert 0.2 * bound < np.mean(caught) <= bound < 1
  assert graph.chance_of_opening(num_sites, 2 * degree, 2 * threshold, colluding) < bound
  assert graph.chance_of_opening(num_sites, degree, threshold, colluding, num_lost=20) > bound


def test_the_smallest_threshold_is_above_half_or_two_thirds():
  for n in range(1, 100):
    assert [graph.smallest_threshold(n, m) for m in (False, True)] == [
      next(t for t in range(n + 2) if 2 * t > n),
      next(t for t in range(n + 2) if 3 * t > 2 * n),
    ]


def test_parts_of_a_graph_are_found():
  circle = np.stack([np.arange(1, 9) % 8, np.arange(-1, 7) % 8], axis=1)
  present = lambda *lost: ~np.isin(np.arange(8), lost)
  for lost in ((), (3,), (3, 4), (0, 7)):
    np.testing.assert_array_equal(graph.reached(circle, present(*lost)), present(*lost))
  np.testing.assert_array_equal(np.flatnonzero(graph.reached(circle, present(2, 6))), [0, 1, 7])
  np.testing.assert_array_equal(np.flatnonzero(graph.reached(circle, present(0, 4))), [1, 2, 3])
  assert not graph.reached(circle, np.zeros(8, bool)).any()
