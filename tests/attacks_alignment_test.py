"""Candidates against updates: the arithmetic, and that members are told from strangers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import local
from primia_jax.attacks import alignment
from primia_jax.types import Batch

N, M, D, L, TAKEN = 40, 25, 120, 3, 6
RNG = np.random.default_rng(0)
SPREAD = np.exp(0.5 * RNG.normal(size=D)).astype(np.float32)


def draw(count):
  images = (RNG.normal(size=(count, D, 1, 1)) * SPREAD[:, None, None]).astype(np.float32)
  return images, RNG.integers(0, L, count).astype(np.int32)


def apply_fn(params, model_state, images, train=False, key=None):
  return images.reshape(images.shape[0], -1) @ params["w"], model_state


LOSS = local.classification_loss(apply_fn, lambda key, x, y: (x, y), L)
PARAMS = {"w": RNG.normal(size=(D, L)).astype(np.float32) / 9}
CANDIDATES, PUBLIC = draw(N), draw(M)


def gradient(params, images, labels):
  batch = Batch(images, labels, jnp.ones(len(labels), jnp.float32))
  return jax.grad(LOSS, has_aux=True)(params, {}, batch, jax.random.key(0))[0]["w"]


@pytest.fixture(scope="module")
def given():
  """Products for the step of the first candidates, and for one of strangers."""
  taken = [part[:TAKEN] for part in CANDIDATES]
  steps = [-0.3 * gradient(PARAMS, *batch) for batch in (taken, draw(TAKEN))]
  updates = {"w": np.stack(steps)}
  made = jax.jit(alignment.products(LOSS))(PARAMS, {}, updates, CANDIDATES, PUBLIC)
  return made, updates["w"].reshape(2, -1)


def test_scores_are_those_of_the_inverse_covariance(given):
  made, updates = given
  each = lambda images, labels: np.stack(
    [gradient(PARAMS, x[None], y[None]).ravel() for x, y in zip(images, labels, strict=True)]
  ).astype(np.float64)
  public, own = each(*PUBLIC), each(*CANDIDATES)
  mean = public.mean(0)
  for ridge in (0.1, 3.0):
    covariance = (public - mean).T @ (public - mean) / M
    covariance += ridge * np.trace(covariance) / D / L * np.eye(D * L)
    inverse, centred = np.linalg.inv(covariance), own - mean
    lengths = np.sqrt(np.einsum("ij,jk,ik->i", centred, inverse, centred))
    want = -(centred @ inverse @ updates.T) / lengths[:, None]
    np.testing.assert_allclose(alignment.scores(made, ridge), want, rtol=2e-3, atol=1e-4)
  plain = -(centred @ updates.T) / np.linalg.norm(centred, axis=1)[:, None]
  np.testing.assert_allclose(alignment.scores(made, np.inf), plain, rtol=1e-3, atol=1e-5)
  with pytest.raises(ValueError, match=r"ridge=0 must be positive"):
    alignment.scores(made, 0)


def test_members_are_told_from_strangers_and_strangers_from_nobody(given):
  is_member = np.arange(N) < TAKEN
  mine, others = alignment.scores(given[0], 0.3).T
  matched = alignment.pairs(is_member, CANDIDATES[1], 0)
  assert len(matched) == TAKEN
  assert np.sum(mine[matched[:, 0]] > mine[matched[:, 1]]) >= TAKEN - 1
  rank = lambda scores: np.mean(scores[is_member][:, None] > scores[~is_member][None])
  assert rank(mine) > 0.9
  assert 0.2 < rank(others) < 0.8


def test_pairs_are_within_a_group_and_each_candidate_is_in_one():
  rng = np.random.default_rng(1)
  is_member, groups = rng.random(200) < 0.4, rng.choice(["a", "b", "c"], 200)
  found = alignment.pairs(is_member, groups, 0)
  assert len(np.unique(found)) == found.size
  assert is_member[found[:, 0]].all()
  assert not is_member[found[:, 1]].any()
  assert np.array_equal(groups[found[:, 0]], groups[found[:, 1]])
  both = [min(np.sum(is_member & (groups == g)), np.sum(~is_member & (groups == g))) for g in "abc"]
  assert len(found) == sum(both)
  assert not np.array_equal(found, alignment.pairs(is_member, groups, 1))
  assert alignment.pairs(is_member[:1], groups[:1], 0).shape == (0, 2)
