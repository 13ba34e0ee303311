import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from primia_jax import robust

GARBAGE = [np.nan, np.inf, -np.inf, 1e30, -1e30]


def everything(message):
  return message


def messages(num_sites, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=(num_sites, *shape)).astype(np.float32)
  return {
    "update": {"w": draw(4, 3), "b": draw(3)},
    "weight": np.ones(num_sites, np.float32),
    "metrics": draw(),
  }


def flat(tree):
  leaves = [np.asarray(a, np.float64) for a in jax.tree.leaves(tree)]
  return np.concatenate([a.reshape(len(a), -1) for a in leaves], axis=1)


def krum_by_hand(vectors, num_byzantine, num_kept):
  """The indices that Krum keeps, written literally as in Blanchard et al. 2017, section 4."""
  num_sites, scores = len(vectors), []
  for i in range(num_sites):
    others = sorted(np.sum((vectors[i] - vectors[j]) ** 2) for j in range(num_sites) if j != i)
    scores.append(sum(others[: num_sites - num_byzantine - 2]))
  return sorted(range(num_sites), key=scores.__getitem__)[:num_kept]


@settings(deadline=None, max_examples=25)
@given(
  hnp.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.just(4)), elements=st.floats(-100, 100, width=32)
  )
)
def test_median_and_trimmed_mean_against_numpy(m):
  num_sites = len(m)
  np.testing.assert_allclose(
    robust.median()(jnp.asarray(m)), np.median(m, axis=0), rtol=1e-6, atol=1e-30
  )
  for fraction in (0.0, 0.2, 0.34):
    cut = int(np.ceil(fraction * num_sites))
    if 2 * cut < num_sites:
      want = np.sort(m, axis=0)[cut : num_sites - cut].mean(0)
      np.testing.assert_allclose(
        robust.trimmed_mean(fraction)(jnp.asarray(m)), want, rtol=1e-4, atol=1e-4
      )


@pytest.mark.parametrize(("num_byzantine", "num_kept"), [(0, 1), (1, 1), (2, 1), (2, 3), (1, 6)])
def test_krum_against_numpy(num_byzantine, num_kept):
  for seed in range(5):
    m = messages(7, seed)
    kept = krum_by_hand(flat(m["update"]), num_byzantine, num_kept)
    got = jax.jit(robust.krum(num_byzantine, num_kept))(m)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(m), strict=True):
      np.testing.assert_allclose(a, b[kept].mean(0), rtol=1e-5, atol=1e-6)


def test_krum_looks_at_updates_only():
  m = messages(7)
  want = robust.krum(1)(m)
  noisy = m | {"metrics": 1e6 * np.arange(7, dtype=np.float32)}
  assert np.array_equal(robust.krum(1)(noisy)["update"]["w"], want["update"]["w"])
  whole = robust.krum(1, part=everything)(noisy)["metrics"]
  assert whole == 1e6 * krum_by_hand(flat(noisy), 1, 1)[0]


RULES = [robust.median(), robust.trimmed_mean(0.15), robust.krum(1), robust.krum(1, 3)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", GARBAGE)
def test_one_garbage_site_moves_the_mean_but_not_the_rule(rule, bad):
  m = messages(7)
  dirty = jax.tree.map(np.copy, m)
  for leaf in jax.tree.leaves(dirty["update"]):
    leaf[2] = bad
  honest = np.delete(flat(m["update"]), 2, axis=0)
  got = flat(jax.tree.map(lambda a: np.asarray(a)[None], rule(dirty)["update"]))[0]
  assert np.all(honest.min(0) - 1e-6 <= got)
  assert np.all(got <= honest.max(0) + 1e-6)
  mean = flat(dirty["update"]).mean(0)
  assert not np.any(np.abs(mean) <= 1e6)  # huge, infinite or NaN


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_sites_does_not_matter(rule):
  m = messages(7)
  order = np.array([3, 6, 0, 2, 5, 1, 4])
  shuffled = jax.tree.map(lambda a: a[order], m)
  for a, b in zip(jax.tree.leaves(rule(m)), jax.tree.leaves(rule(shuffled)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_impossible_rules_are_refused():
  for fraction in (-0.1, 0.5, float("nan")):
    with pytest.raises(ValueError, match="fraction"):
      robust.trimmed_mean(fraction)
  with pytest.raises(ValueError, match="leaves none"):
    robust.trimmed_mean(0.4)(messages(2))
  with pytest.raises(ValueError, match="num_byzantine=-1"):
    robust.krum(-1)
  with pytest.raises(ValueError, match="num_kept=0"):
    robust.krum(1, 0)
  with pytest.raises(ValueError, match="needs more than 6 sites"):
    robust.krum(2)(messages(6))
  with pytest.raises(ValueError, match="num_kept=7"):
    robust.krum(1, 7)(messages(7))
