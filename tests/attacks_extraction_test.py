"""Extraction by queries: linear models solved for, others imitated, and the real protocol asked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import mpc
from primia_jax.attacks import extraction

D, L = 6, 3
RNG = np.random.default_rng(0)
KERNEL, BIAS = RNG.normal(size=(D, L)).astype(np.float32), RNG.normal(size=L).astype(np.float32)
QUERIES = RNG.normal(size=(60, D)).astype(np.float32)
UNIT = 2.0**-10


def logits_of(queries):
  return queries.astype(np.float64) @ KERNEL + BIAS


def test_one_query_more_than_inputs_solves_a_linear_model():
  kernel, bias = extraction.solve_linear(QUERIES[: D + 1], logits_of(QUERIES[: D + 1]))
  np.testing.assert_allclose(kernel, KERNEL, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(bias, BIAS, rtol=1e-9, atol=1e-9)
  with pytest.raises(ValueError, match="6 queries fix 6 of 7 unknowns"):
    extraction.solve_linear(QUERIES[:D], logits_of(QUERIES[:D]))


def test_probabilities_give_all_that_they_depend_on():
  p = np.asarray(jax.nn.softmax(logits_of(QUERIES).astype(np.float32)))
  kernel, bias = extraction.solve_linear(QUERIES[: D + 1], p[: D + 1], "probabilities")
  got = jax.nn.softmax(jnp.asarray(QUERIES @ kernel + bias, jnp.float32))
  np.testing.assert_allclose(got, p, atol=1e-4)
  np.testing.assert_array_equal(kernel[:, 0], 0)
  with pytest.raises(ValueError, match="no equations"):
    extraction.solve_linear(QUERIES, p, "label")
  with pytest.raises(ValueError, match="probability is 0"):
    extraction.solve_linear(QUERIES, np.zeros_like(p), "probabilities")


@pytest.mark.parametrize("num_queries", [D + 1, 60])
def test_rounded_answers_bound_the_error(num_queries):
  queries = QUERIES[:num_queries]
  answers = extraction.rounded(jnp.asarray(logits_of(queries), jnp.float32), UNIT)
  assert np.all((logits_of(queries) - answers >= -1e-6) & (logits_of(queries) - answers <= UNIT))
  kernel, bias = extraction.solve_linear(queries, answers)
  design = np.concatenate([queries, np.ones((num_queries, 1))], axis=1)
  most = UNIT * np.sqrt(num_queries) / np.linalg.svd(design, compute_uv=False)[-1]
  errors = np.linalg.norm(np.concatenate([kernel - KERNEL, (bias - BIAS)[None]]), axis=0)
  assert np.all((errors > 0) & (errors <= most))


def test_the_protocols_own_answers_are_solved():
  """The stand-in is the protocol up to a unit, and its answers extract the model as well."""
  private = mpc.secret(
    lambda w, x: x @ w["kernel"] + w["bias"],
    {"kernel": KERNEL, "bias": BIAS},
    examples=QUERIES,
    config=mpc.Config(32, 10, 14),
  )
  (unit,) = extraction.output_units(private.plan)
  answers = np.stack([private(q) for q in QUERIES[: D + 1]])
  np.testing.assert_array_equal(answers, np.round(answers / unit) * unit)
  stand_in = extraction.rounded(jnp.asarray(logits_of(QUERIES[: D + 1]), jnp.float32), unit)
  worst = max(private.check(q).error for q in QUERIES[: D + 1])
  assert np.abs(answers - stand_in).max() <= worst + unit
  kernel, bias = extraction.solve_linear(QUERIES[: D + 1], answers)
  design = np.concatenate([QUERIES[: D + 1], np.ones((D + 1, 1))], axis=1)
  most = worst * np.sqrt(D + 1) / np.linalg.svd(design, compute_uv=False)[-1]
  assert np.linalg.norm(kernel - KERNEL, axis=0).max() <= most
  assert 1e-9 < np.abs(bias - BIAS).max() <= most


@pytest.mark.parametrize("answer", ["logits", "label"])
def test_a_surrogate_agrees_the_more_it_asks(answer):
  """A victim MLP; four queries say little of it, 400 nearly all."""
  predict = lambda params, x: jax.nn.relu(x @ params[0]) @ params[1]
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  make = lambda: (draw(D, 8), draw(8, L))
  victim, mine, queries, held_out = make(), make(), draw(400, D), draw(500, D)
  outputs = predict(victim, queries)
  outputs = jnp.argmax(outputs, axis=-1) if answer == "label" else extraction.rounded(outputs, UNIT)
  attack = extraction.surrogate(predict, optax.sgd(0.1, momentum=0.9), batch_size=32)
  learn = jax.jit(extraction.learn(attack, 500))
  targets = extraction.targets(outputs, answer)
  found = []
  for num_queries in (4, 400):
    params, _ = learn(jax.random.key(4), mine, queries, targets, jnp.int32(num_queries))
    found.append(extraction.agreement(predict(params, held_out), predict(victim, held_out)))
  assert found[0].high < 0.82 < 0.87 < found[1].low, found


def test_agreement_by_hand():
  got = extraction.agreement(np.eye(3)[[0, 1, 2, 2]], np.eye(3)[[0, 1, 2, 1]])
  assert got.value == 0.75
  assert got.low < 0.75 < got.high
