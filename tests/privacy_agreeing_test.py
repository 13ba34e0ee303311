"""What sites take as their charges at a new start, and that no other can raise them."""

import json

import pytest

from primia_jax.privacy import accounting, agreeing, ledger
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.chain import Chain
from primia_jax.privacy.plan import Plan

UPDATE, COUNTS = accounting.gaussian("update", 1.0), accounting.gaussian("class counts", 8.0)
PLAN = Plan("example", 1e-5, 10, float("inf"), 1, (UPDATE,), (COUNTS,), False)
LEAST = 2  # others, whose word counts


def begin(path):
  return ledger.Ledgers(PLAN, path, Chain(path.parent / "chain"), [None] * 3)


def told_by(path, times, counts=None):
  """A site's process that has charged each site so many rounds; what it tells."""
  path.parent.mkdir()
  for site, count in enumerate(times):
    if count:
      begin(path).spend(UPDATE._replace(times=count), [site])
  if counts is not None:
    begin(path).keep_counts(counts)
  return ledger.public(path)


def rounds(*times):
  return [accounting.spend(Ledger("example", 1e-5), UPDATE, n) for n in times]


def agreed(tmp_path, charged, counts=(None, None, None), change=lambda said: said):
  """The ledgers of three processes at their next start, and the counts that they hold."""
  paths = [tmp_path / f"{i}" / ledger.LEDGER for i in range(3)]
  said = change({i: told_by(paths[i], charged[i], counts[i]) for i in range(3)})
  for path in paths:
    agreeing.reconcile(said, path, PLAN, LEAST)
  alike = [begin(path) for path in paths]
  again = [begin(path) for path in paths]  # a second look finds nothing to add
  for one, other in zip(alike, again, strict=True):
    assert one.ledgers == other.ledgers == alike[0].ledgers
    assert one.counts == other.counts == alike[0].counts
  return alike[0].ledgers, alike[0].counts, paths


def charged_to(path, site):
  """The rounds that the chain of a process charges to a site."""
  own = [e for e in Chain(path.parent / "chain").entries if e["kind"] == "charge"]
  return sum(e["release"]["times"] for e in own if site in e["sites"])


def test_a_site_is_charged_what_it_says_or_what_enough_others_know(tmp_path):
  """Site 0 has begun a round of which no other knows; site 1 has lost one that both others know."""
  ledgers, _, paths = agreed(tmp_path, ((3, 2, 2), (2, 1, 2), (2, 2, 2)))
  assert ledgers == rounds(3, 2, 2)
  assert [charged_to(path, 0) for path in paths] == [3, 3, 3]
  assert charged_to(paths[1], 1) == 2


def test_a_site_cannot_charge_another_however_much_it_says(tmp_path):
  """Without this, site 0's images would have no budget left: 999 rounds, by one other's word."""
  ledgers, _, paths = agreed(tmp_path, ((2, 2, 2), (999, 2, 999), (2, 2, 2)))
  assert ledgers == rounds(2, 2, 2)
  assert [charged_to(path, 0) for path in paths] == [2, 999, 2]  # its own page only


def test_two_that_collude_can_where_one_was_allowed_for(tmp_path):
  """So it is the number of sites that counts: with least=2 the word of two is taken."""
  ledgers, _, paths = agreed(tmp_path, ((2, 2, 2), (999, 2, 2), (999, 2, 2)))
  assert ledgers[0] == rounds(999)[0]
  assert charged_to(paths[0], 0) == 999


def test_a_site_that_lies_about_itself_harms_itself(tmp_path):
  ledgers, _, paths = agreed(tmp_path, ((2, 2, 2), (2, 50, 2), (2, 2, 2)))
  assert ledgers == rounds(2, 50, 2)
  assert charged_to(paths[0], 0) == 2


def test_a_process_that_has_nothing_takes_what_the_others_say(tmp_path):
  ledgers, counts, paths = agreed(
    tmp_path, ((0, 0, 0), (2, 2, 2), (2, 2, 2)), (None, [1.0, 2.0], [1.0, 2.0]),
    lambda said: said | {0: b""},
  )  # fmt: skip
  assert ledgers == rounds(2, 2, 2)
  assert charged_to(paths[0], 0) == 2
  assert counts == [1.0, 2.0]


def test_class_counts_of_one_site_alone_are_released_again(tmp_path):
  """Else one site could plant them, and the others would weigh classes as it likes."""
  _, counts, _ = agreed(tmp_path, ((1, 1, 1),) * 3, (None, [9e9, 0.0], None))
  assert counts is None


def test_different_class_counts_are_refused_by_name(tmp_path):
  with pytest.raises(ValueError, match=r"sites \[1\] tell other class counts than site 0"):
    agreed(tmp_path, ((1, 1, 1),) * 3, ([1.0, 2.0], [9e9, 0.0], [1.0, 2.0]))


def plain(**changes):
  release = UPDATE._asdict() | changes
  one = {"unit": "example", "delta": 1e-5, "releases": [release]}
  return json.dumps({"ledgers": [one] * 3, "counts": None}).encode()


@pytest.mark.parametrize(
  ("wrong", "words"),
  [
    (b"x", "Expecting value"), (b"[]", "list indices"), (b"{}", "'ledgers'"),
    (b"[" * 100000, ""), (b'{"ledgers": [{}], "counts": null}', "not a ledger"),
    (b'{"ledgers": [], "counts": null}', "ledgers of 0 sites, and there are 3"),
    (plain(what="a wish"), "a charge of 'a wish' that is not of the run"),
    (plain(noise_multiplier=0.01), "a charge of 'update' that is not of the run"),
    (plain(times=1.5), "a charge of 'update'"), (plain(times=10**400), "a charge of 'update'"),
    (plain().replace(b"1e-05", b"0.1"), "delta=0.1, not those of the run"),
    (plain().replace(b"null", b"[1e999]"), "class counts"),
  ],
)  # fmt: skip
def test_what_is_no_ledger_of_the_run_is_refused_by_name(tmp_path, wrong, words):
  with pytest.raises(ValueError, match=f"site 1 has told no ledgers of this run .*{words}"):
    agreeing.reconcile({0: b"", 1: wrong, 2: b""}, tmp_path / "x" / ledger.LEDGER, PLAN, LEAST)


def test_the_last_bits_of_another_machine_s_noise_are_the_same_charge(tmp_path):
  near = plain(noise_multiplier=1.0 + 1e-14)
  path = tmp_path / "0" / ledger.LEDGER
  agreeing.reconcile(dict.fromkeys(range(3), near), path, PLAN, LEAST)
  assert begin(path).ledgers == rounds(1, 1, 1)
