"""When an attack's outcome says something."""

import pytest

from primia_jax.attacks.evidence import Evidence, beats_chance, verdict

SUCCESS = Evidence("server", "attack", "none", "rate", 0.9, (0.7, 0.98), 0.1)
FAILURE = SUCCESS._replace(value=0.12, interval=(0.05, 0.25))


@pytest.mark.parametrize(
  ("one", "said"),
  [
    (SUCCESS, "succeeds"),
    (FAILURE, "inconclusive"),  # without a control
    (FAILURE._replace(control=SUCCESS), "at chance"),
    (FAILURE._replace(control=FAILURE), "inconclusive"),
    (FAILURE._replace(control=SUCCESS._replace(chance=None)), "inconclusive"),
    (SUCCESS._replace(chance=None), "no chance level"),
    (SUCCESS._replace(interval=None), "succeeds"),
    (SUCCESS._replace(value=0.1, interval=None, control=SUCCESS), "at chance"),
    (SUCCESS._replace(interval=(0.1, 0.98), control=SUCCESS), "at chance"),
  ],
)
def test_failure_says_something_only_beside_a_success(one, said):
  assert verdict(one) == said
  assert beats_chance(one) is (None if one.chance is None else said == "succeeds")
