"""When an attack's outcome says something."""

import pytest

from primia_jax.attacks.evidence import EFFECT, Evidence, beats_chance, breaches, doubt, verdict
from primia_jax.metrics import clopper_pearson

SUCCESS = Evidence("server", "attack", "none", "rate", 0.9, (0.7, 0.98), 0.1)
FAILURE = SUCCESS._replace(value=0.09, interval=(0.02, 0.18), protection="sum of 3 sites")
WEAK = SUCCESS._replace(value=0.25, interval=(0.15, 0.4))
FAILS_ALONE = "it fails without protection, too"


@pytest.mark.parametrize(
  ("one", "said", "why"),
  [
    (SUCCESS, "succeeds", None),
    (FAILURE, "inconclusive", "there is no control"),
    (FAILURE._replace(control=SUCCESS), "at chance", ""),
    (FAILURE._replace(control=FAILURE), "inconclusive", FAILS_ALONE),
    (
      FAILURE._replace(control=SUCCESS._replace(interval=(0.1, 1))),
      "inconclusive",
      "too few tries",
    ),
    (FAILURE._replace(control=SUCCESS._replace(chance=None)), "inconclusive", "too few tries"),
    # on another model the same attack succeeds: that says nothing of the protection
    (FAILURE._replace(sibling=SUCCESS), "inconclusive", "there is no control"),
    (FAILURE._replace(control=FAILURE, sibling=SUCCESS), "inconclusive", FAILS_ALONE),
    # few tries exclude little
    (FAILURE._replace(interval=(0.0, 0.2), control=SUCCESS), "inconclusive", "too few tries"),
    (FAILURE._replace(value=0.01, control=SUCCESS), "inconclusive", "too few tries"),  # luck
    (SUCCESS._replace(interval=(0.1, 0.98), control=SUCCESS), "inconclusive", "too few tries"),
    (FAILURE._replace(control=WEAK), "inconclusive", "its control is not surely 0.1 above"),
    (SUCCESS._replace(chance=None), "no chance level", None),
    (SUCCESS._replace(interval=None), "succeeds", None),
    (SUCCESS._replace(value=0.1, interval=None, control=SUCCESS), "at chance", ""),
  ],
)
def test_failure_says_something_only_beside_a_success(one, said, why):
  assert verdict(one) == said
  assert beats_chance(one) is (None if one.chance is None else said == "succeeds")
  if why is not None:
    assert doubt(one).startswith(why)
    assert bool(doubt(one)) == bool(why)


def test_none_of_eight_named_is_not_at_chance_and_none_of_36_is():
  """Among 300 candidates, beside a control in which all are named."""
  for tries, said in ((8, "inconclusive"), (30, "inconclusive"), (36, "at chance")):
    control = SUCCESS._replace(value=1.0, interval=clopper_pearson(tries, tries), chance=1 / 300)
    none = control._replace(value=0.0, interval=clopper_pearson(0, tries), control=control)
    assert verdict(none) == said
    assert (none.interval[1] < 1 / 300 + EFFECT) == (said == "at chance")
  assert clopper_pearson(36, 36)[0] > 0.9
  assert clopper_pearson(32, 32)[0] < 0.9


def test_a_protection_is_breached_by_what_succeeds_in_spite_of_it():
  inside = SUCCESS._replace(control=SUCCESS, protection="sum of 3 sites", occurs=False)
  assert breaches(inside)
  assert not breaches(inside._replace(occurs=True))  # what somebody sees is told by itself
  assert not breaches(inside._replace(protection="none"))
  assert not breaches(inside._replace(assumed="all other images"))
  assert not breaches(FAILURE._replace(control=SUCCESS, occurs=False))
