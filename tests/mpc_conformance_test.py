"""The table of what encrypted inference accepts: a case's outcome and error, and the kept copy."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.conformance import case, cases, measure, table
from primia_jax.mpc.lowering import lower, rules_linear

DOCS = pathlib.Path(__file__).parents[1] / "docs" / "conformance.md"
CHOSEN = [
  ("arithmetic", "x * y", 1e-5),
  ("products", "x @ w + b", 1e-5),
  ("reductions", "argmax among equals", 0.0),
]


@pytest.mark.parametrize(("kind", "name", "bound"), CHOSEN)
def test_an_accepted_case(kind, name, bound):
  (found,) = (each for each in cases.CASES if (each.kind, each.name) == (kind, name))
  result = measure.measure(found)
  assert result.outcome == measure.ACCEPTED
  assert result.error <= bound
  assert result.rounds >= 2
  assert result.sent > 0
  assert result.dealt > 0


def one(make):
  return measure.measure(case.Case("kind", "name", make))


def test_other_outcomes():
  x = case.spread(-1, 1, 3)
  of = lambda fn: one(lambda: (fn, np.float32(1), x))
  assert of(lambda w, x: (x * w)[x > 0]).outcome == measure.REFUSED  # by JAX
  refused = of(lambda w, x: jax.lax.cond((x * w).sum() > 0, jnp.sin, jnp.cos, x))
  assert refused.outcome == measure.REFUSED
  assert refused.said.startswith("cond on a secret value at mpc_conformance_test.py")
  assert table.row(refused) == "| name | refused: cond on a secret value |  |  |  |  |"
  broken = of(lambda w, x: {}["missing"])
  assert (broken.outcome, broken.said) == (measure.BROKEN, "KeyError: 'missing'")

  def missing():
    raise ImportError("No module named 'haiku'")

  assert one(missing).outcome == measure.SKIPPED


@pytest.mark.parametrize(
  "crash",
  [
    lambda v: dict(zip(v, v[:1], strict=True)),
    lambda v: np.zeros(3).reshape(2),
    lambda v: next(iter([int("one")])),
  ],
)
def test_a_crash_inside_is_no_refusal(crash, monkeypatch):
  """A ValueError that a line of a rule did not raise itself; only a `raise` is a refusal."""
  # compiled as if it stood in the library
  inside = types.FunctionType(
    crash.__code__.replace(co_filename=rules_linear.__file__), crash.__globals__
  )
  monkeypatch.setitem(lower._RULES, "neg", lambda low, equation, inputs: inside([1, 2]))
  result = one(lambda: (lambda w, x: -(x * w), np.float32(1), case.spread(-1, 1, 3)))
  assert (result.outcome, result.said[:10]) == (measure.BROKEN, "ValueError")


def test_an_error_is_relative_where_numbers_are_large_and_absolute_elsewhere():
  inf, nan = np.inf, np.nan
  assert measure.largest_error([np.float32([0.5, 102.0])], [np.array([0.25, 100.0])]) == 0.25
  assert measure.largest_error([np.float32([0.25, 150.0])], [np.array([0.25, 100.0])]) == 0.5
  assert measure.largest_error([np.array([True])], [np.array([False])]) == 1
  assert measure.largest_error([np.array([1 + 1j])], [np.array([1.0])]) == 1
  assert measure.largest_error([np.array([nan, inf])], [np.array([nan, inf])]) == 0
  assert measure.largest_error([np.array([1.0])], [np.array([nan])]) == inf
  assert measure.largest_error([np.array([1.0])], [np.array([inf])]) == inf
  assert measure.largest_error([np.zeros((2, 1))], [np.zeros((1, 2))]) == inf


def test_a_table_names_its_cases():
  some = [case.Case("first", r"a | b_c", None), case.Case("second", "x[y] * z", None)]
  results = [measure.Result(some[0], measure.ACCEPTED, "", 1.5e-5, 3, 2000, 10)]
  results += [measure.Result(some[1], measure.REFUSED, "no | way at file.py:3; use z")]
  text = table.markdown(results)
  assert table.names(text) == table.listed(some)
  assert "| a \\| b\\_c | yes | 2e-05 | 3 | 2.0 kB | 10 B |" in text
  assert "| x\\[y\\] \\* z | refused: no \\| way |  |  |  |  |" in text
  assert "Of these 2 functions `mpc` runs 1" in text


def test_the_kept_table_has_every_case():
  pairs = [(each.kind, each.name) for each in cases.CASES]
  assert len(set(pairs)) == len(pairs)
  assert table.names(DOCS.read_text()) == table.listed(cases.CASES)


def test_the_kept_table_has_no_fault_and_no_large_error():
  rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| ")]
  assert not [row for row in rows if f"| {measure.BROKEN}" in row]
  errors = {
    row: float(row.split(" | yes | ")[1].split(" |")[0]) for row in rows if "| yes |" in row
  }
  assert len(errors) >= 440
  # ResNet-50 with random weights makes 2e-5 of rounding 200 times as large.
  assert all(row.startswith("| ResNet-50 |") for row, error in errors.items() if error > 1e-3)
  assert max(errors.values()) < 1e-2
