"""What all runs cost a unit together: the sum over runs, whatever sites it was dealt to."""

import numpy as np
import pytest

from primia_jax.privacy import accounting, histories, ledger, plan
from primia_jax.privacy.accounting import Ledger, gaussian, spend
from primia_jax.privacy.chain import Chain

DELTA = 1e-3
NOISE = {name: gaussian("gradients", sigma) for name, sigma in (("one", 2.0), ("other", 3.0))}
IMAGES = np.arange(12 * 4, dtype=np.uint8).reshape(12, 2, 2, 1)


@pytest.fixture
def chain(tmp_path):
  return Chain(tmp_path / "ledger")


def plan_of(delta=DELTA, unit="example"):
  return plan.Plan(unit, delta, 8, float("inf"), 1, (NOISE["one"],), (), False)


def records(chain, index, groups=None, images=IMAGES):
  return [ledger.record(chain, str(i) if groups is None else groups[i], images[i]) for i in index]


def run(chain, sites, is_private=True, **options):
  """A run whose sites hold these records."""
  path = chain.folder.parent / f"{len(chain.entries)}.json"
  return ledger.Ledgers(plan_of(**options), path, chain, sites, is_private)


def spent(*releases, delta=DELTA):
  out = Ledger("example", delta)
  for release, times in releases:
    out = spend(out, release, times)
  return accounting.epsilon(out)


def told(chain):
  """(units, runs, times of each release) of every history."""
  return sorted(
    (
      one.num_units,
      len(one.runs),
      sorted((r.noise_multiplier, r.times) for r in one.ledger.releases),
    )
    for one in histories.histories(chain)
  )


def test_runs_that_share_units_add_up_whatever_sites_they_are_dealt_to(chain):
  """The first has 0 to 7 at two sites, the second 4 to 11 at four: the worst unit was in both."""
  first = run(chain, [records(chain, range(4)), records(chain, range(4, 8))])
  first.spend(NOISE["one"], [0, 1])
  first.spend(NOISE["one"], [1])
  second = run(chain, [records(chain, range(i, 12, 4)) for i in (4, 5, 6, 7)])
  second.spend(NOISE["other"]._replace(times=3), [0, 1, 2, 3])
  assert told(chain) == [(4, 1, [(2.0, 1)]), (4, 1, [(3.0, 3)]), (4, 2, [(2.0, 2), (3.0, 3)])]
  worst = histories.worst(histories.histories(chain))
  both = spent((NOISE["one"], 2), (NOISE["other"], 3))
  assert worst.epsilon == both > max(first.epsilon, second.epsilon)


def test_equal_releases_of_two_runs_are_one_line_that_counts_both(chain):
  for _ in range(2):
    run(chain, [records(chain, range(4))]).spend(NOISE["one"], [0])
  assert told(chain) == [(4, 2, [(2.0, 2)])]
  groups = [entry for entry in chain.entries if entry["kind"] == "group"]
  assert len(groups) == 1  # equal sites are written once


def test_an_image_is_known_by_its_pixels_and_by_its_id(chain):
  """Under another name, and at another size; nothing else is known again."""
  run(chain, [records(chain, [0])]).spend(NOISE["one"], [0])
  renamed = records(chain, [0], groups={0: "elsewhere.png"})
  resized = records(chain, [0], images=IMAGES[:, :1])
  strange = records(chain, [1])
  for one in (renamed, resized, strange):
    run(chain, [one]).spend(NOISE["one"], [0])
  assert told(chain) == [(1, 1, [(2.0, 1)]), (1, 3, [(2.0, 3)])]


def test_a_patient_is_one_unit_and_is_charged_the_most_of_a_run(chain):
  """Two images of one patient, at one site in the first run and at two in the second."""
  groups = dict.fromkeys(range(2), "anna") | {2: "ben"}
  run(chain, [records(chain, range(3), groups)]).spend(NOISE["one"], [0])
  second = run(chain, [records(chain, [0, 2], groups), records(chain, [1], groups)])
  second.spend(NOISE["other"], [0, 1])
  second.spend(NOISE["other"], [1])
  assert told(chain) == [(1, 2, [(2.0, 1), (3.0, 1)]), (1, 2, [(2.0, 1), (3.0, 2)])]


def test_an_image_that_occurs_twice_in_a_run_is_charged_its_dearer_site(chain):
  twice = np.concatenate([IMAGES[:3], IMAGES[:1]])
  of = lambda index: records(chain, index, images=twice)
  run(chain, [of([0, 1]), of([2, 3])]).spend(NOISE["one"]._replace(times=5), [1])
  assert told(chain) == [(2, 1, [(2.0, 5)])]  # 2, and 0 = 3


def test_noise_that_anyone_can_repeat_leaves_no_claim_to_its_units(chain):
  run(chain, [records(chain, [0])], is_private=False).spend(NOISE["one"], [0])
  run(chain, [records(chain, [0]), records(chain, [1])]).spend(
    NOISE["one"]._replace(times=9), [0, 1]
  )
  known = histories.histories(chain)
  assert sorted(one.is_private for one in known) == [False, True]
  assert histories.worst(known).epsilon == float("inf")


def test_the_claim_is_at_the_least_delta_of_all_or_at_a_given_one(chain):
  run(chain, [records(chain, [0])], delta=1e-2, unit="patient").spend(NOISE["one"], [0])
  run(chain, [records(chain, [0])], delta=1e-5).spend(NOISE["one"], [0])
  for delta, used in ((None, 1e-5), (1e-2, 1e-2)):
    (one,) = histories.histories(chain, delta)
    assert one.ledger.delta == used
    assert one.epsilon == spent((NOISE["one"], 2), delta=used)


def test_nothing_that_was_charged_nothing_is_listed(chain):
  assert histories.histories(chain) == []
  run(chain, [records(chain, [0]), records(chain, [1])]).spend(NOISE["one"], [1])
  assert told(chain) == [(1, 1, [(2.0, 1)])]
  run(chain, [records(chain, [2])])  # begun only
  assert told(chain) == [(1, 1, [(2.0, 1)])]


def test_the_worst_is_found_among_those_that_no_other_contains(chain, monkeypatch):
  sites = [records(chain, [i]) for i in range(6)]
  first = run(chain, sites)
  for i in range(6):
    first.spend(NOISE["one"]._replace(times=1 + i), [i])
  run(chain, [*sites[:1]]).spend(NOISE["other"]._replace(times=20), [0])
  computed, epsilon = [], accounting.epsilon
  monkeypatch.setattr(accounting, "epsilon", lambda one: computed.append(one) or epsilon(one))
  worst = histories.worst(histories.histories(chain))
  assert len(computed) == 2
  monkeypatch.undo()
  assert worst.epsilon == max(one.epsilon for one in histories.histories(chain))


def test_an_agreed_charge_of_a_site_elsewhere_names_no_unit(chain):
  """Where each site has a process, that process charges its units, and no other."""
  here = run(chain, [records(chain, [0]), None])
  there = run(chain, [None, records(chain, [1])])
  for one in (here, there):
    one.spend(NOISE["one"], [0, 1])
  assert told(chain) == [(1, 1, [(2.0, 1)])] * 2
