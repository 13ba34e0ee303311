"""The first ring that is accurate enough on every example, or a refusal with the best error."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpc_reference import OWNERS, normal

from primia_jax.mpc import clear, fitting
from primia_jax.mpc.circuit import Config

pytestmark = pytest.mark.usefixtures("x64")
W, X = normal(0, 2, 8, 8) / np.float32(3), normal(1, 4, 8)


def fn(w, x):
  return jax.nn.relu(x @ w[0]) @ w[1]


@pytest.mark.parametrize(("target", "ring"), [(0.05, 32), (5e-5, 64)])
def test_the_cheapest_ring_that_is_accurate_enough(target, ring):
  plan = fitting.fit(fn, OWNERS, [(W, X), (W, -X)], target)
  assert plan.config.num_bits == ring
  for x in (X, -X):
    assert jnp.abs(clear.check(plan, (W, x)) - fn(W, x)).max() <= target


def test_the_first_that_is_accurate_by_the_factor_asked_for():
  product, coarse, fine = lambda w, x: x @ w[0], (64, 6), (64, 12)
  chosen = lambda target, *candidates, spare=1.0: fitting.fit(
    product, OWNERS, [(W, X), (W, -X)], target, spare=spare, candidates=candidates
  )
  plan = chosen(1.0, coarse)
  most = max(float(jnp.abs(clear.check(plan, (W, x)) - product(W, x)).max()) for x in (X, -X))
  assert chosen(most * 1.01, coarse, fine).config.fraction_bits == 6
  assert chosen(most * 1.01, coarse, fine, spare=1.5).config.fraction_bits == 12
  assert chosen(most * 0.99, coarse, fine).config.fraction_bits == 12
  assert (
    chosen(most * 1.01, fine, coarse).config.fraction_bits == 12
  )  # cheapest first is the caller's order


def test_the_rest_of_the_configuration_is_kept():
  config = Config(64, 20, 24, comparison="fss", margin=3.0)
  got = fitting.fit(fn, OWNERS, [(W, X)], 0.1, config, candidates=[(16, 7), (32, 10)]).config
  assert got == Config(
    32, 10, 24, comparison="fss", margin=3.0
  )  # and 16 bits, which are too few, were passed over


@pytest.mark.parametrize(
  ("target", "reason"), [(1e-12, "no ring reaches"), (0.0, "use a positive number")]
)
def test_an_impossible_target_is_refused(target, reason):
  with pytest.raises(ValueError, match=reason):
    fitting.fit(fn, OWNERS, [(W, X)], target, candidates=((32, 10), (64, 12)))


def test_a_refusal_says_why_the_last_ring_was_too_small():
  with pytest.raises(
    ValueError, match=r"best error is \d.*; 16 bits with 7 of fraction are refused"
  ):
    fitting.fit(fn, OWNERS, [(W, X)], 1e-7, candidates=((32, 10), (16, 7)))


def test_a_ring_with_room_for_what_comparisons_decide_comes_first():
  """No example takes the score: in the narrow ring it would wrap, in the wide one it is right."""
  score = lambda w, x: jnp.where(x @ w[0] > 100, 3e5, 0.0) + 0.25
  of = lambda *rings: fitting.fit(score, OWNERS, [(W, X)], 0.1, candidates=rings)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    plan = of((24, 6), (32, 8))
  assert plan.config.num_bits == 32
  with pytest.warns(UserWarning, match="has no room"):
    assert of((24, 6)).config.num_bits == 24
