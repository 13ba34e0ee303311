import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import prng
from primia_jax.privacy import adaptive, distributed, distributed_cost

SECRET = prng.derive(jnp.arange(8, dtype=jnp.uint32), 8)


def test_an_update_is_clipped_and_says_whether_it_had_to_be():
  tree = {"a": jnp.full((2, 2), 3.0), "b": jnp.full(5, 0.1, jnp.bfloat16)}
  norm = math.sqrt(4 * 9 + 5 * float(jnp.bfloat16(0.1)) ** 2)
  for clip, within in ((norm * 1.01, True), (norm * 0.99, False), (0.5, False)):
    clipped, was_below = adaptive.clip_update(tree, clip)
    assert bool(was_below) == within
    factor = min(1.0, clip / norm)
    np.testing.assert_allclose(clipped["a"], 3.0 * factor, rtol=1e-4)
    assert clipped["b"].dtype == jnp.bfloat16
    length = math.sqrt(
      sum(float(jnp.sum(jnp.square(a.astype(jnp.float32)))) for a in jax.tree.leaves(clipped))
    )
    assert length <= clip * 1.001


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_becomes_zero(bad):
  clipped, was_below = adaptive.clip_update([jnp.ones(3), jnp.asarray([1.0, bad])], 1.0)
  assert not any(np.any(a) for a in clipped)
  assert not was_below


def test_zero_stays_zero():
  clipped, was_below = adaptive.clip_update([jnp.zeros(3)], 1.0)
  assert not np.any(clipped[0])
  assert was_below


def test_a_fixed_clip_never_moves():
  config = adaptive.Clip(2.0)
  state = adaptive.update(config, adaptive.init(config), jnp.float32(7.0), 10)
  assert float(state.l2_clip_norm) == 2.0
  assert adaptive.update_noise_multiplier(1.3, config) == 1.3


@pytest.mark.parametrize(("quantile", "start"), [(0.2, 30.0), (0.5, 1e-2)])
def test_the_clip_finds_the_quantile_by_distributed_noise(quantile, start):
  """Norms are log-normal; bits go through the whole mechanism, with noise and rounding."""
  num_sites = 100
  config = adaptive.Clip(start, quantile, 0.3, num_sites / 20)
  noise = distributed.DistributedNoise(
    1, num_sites, num_sites, 0.5, 2 * config.count_stddev, num_bits=20, num_stddevs=8.0
  )
  norms = jnp.asarray(np.exp(np.random.default_rng(0).normal(size=num_sites)), jnp.float32)
  secrets = jax.vmap(lambda i: prng.derive(SECRET, i))(jnp.arange(num_sites, dtype=jnp.uint32))

  def one_round(state, t):
    key = jax.random.key(t)

    def site(norm, secret):
      bit = adaptive.centred(adaptive.clip_update(norm[None], state.l2_clip_norm)[1])
      return distributed.encode(bit[None], key, secret, (t,), noise)

    total = jnp.sum(jax.vmap(site)(norms, secrets), axis=0, dtype=jnp.uint32)
    state = adaptive.update(config, state, distributed.decode(total, key, noise)[0], num_sites)
    return state, state.l2_clip_norm

  _, clips = jax.lax.scan(one_round, adaptive.init(config), jnp.arange(120, dtype=jnp.uint32))
  found = math.exp(float(np.mean(np.log(np.asarray(clips)[-40:]))))
  assert abs(np.mean(np.asarray(norms) <= found) - quantile) < 0.06


def test_the_step_is_geometric():
  config = adaptive.Clip(2.0, 0.5, 0.2, 1.0)
  state = adaptive.update(config, adaptive.init(config), jnp.float32(2.0), 8)  # 6 of 8 within
  assert float(state.l2_clip_norm) == pytest.approx(2.0 * math.exp(-0.2 * (0.75 - 0.5)), rel=1e-6)


def test_the_two_releases_together_cost_what_one_would():
  config = adaptive.Clip(1.0, 0.5, 0.2, 3.0)
  z = 1.1
  z_updates = adaptive.update_noise_multiplier(z, config)
  assert z_updates > z
  assert z_updates**-2 + (2 * config.count_stddev) ** -2 == pytest.approx(z**-2)
  with pytest.raises(ValueError, match="count_stddev"):
    adaptive.update_noise_multiplier(6.0, config)
  costs = [
    distributed_cost.rdp(
      distributed.DistributedNoise(1, 4, 4, clip, z, num_bits=24, num_stddevs=8.0), (8.0,)
    )[1][0]
    for clip, z in ((1.0, z_updates), (0.5, 2 * config.count_stddev), (1.0, z))
  ]
  assert costs[0] + costs[1] == pytest.approx(costs[2], rel=1e-3)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((0.0,), "l2_clip_norm"),
    ((1.0, 1.0), "target_quantile"),
    ((1.0, 0.5, 0.0), "learning_rate"),
    ((1.0, 0.5), "count_stddev"),
  ],
)
def test_what_cannot_be_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    adaptive.Clip(*arguments)
