import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from primia_jax import native
from primia_jax.privacy import bookkeeping, clipping, grid, noise
from primia_jax.tapped import dense
from primia_jax.types import Batch, Metrics

SECRET = jnp.arange(8, dtype=jnp.uint32) + 11
KEY = jax.random.key(0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10**8), st.floats(0.01, 30), st.integers(1, 5000), st.sampled_from([1, 64]))
@example(172_276, 30.0, 1, 64)  # the noise's last level is a little too coarse
def test_a_grid_is_fine_fits_32_bits_and_has_the_noise_that_is_charged(
  dim, multiplier, units, fraction
):
  try:
    on = grid.choose(dim, multiplier, units, fraction=fraction)
  except ValueError:
    assert units * math.sqrt(dim) * 5 * multiplier > 2**18  # only where it is really large
    return
  assert on.limit + math.sqrt(dim) / 2 <= on.steps
  assert noise.stddev(on.level) == pytest.approx(on.steps * multiplier * fraction, rel=1e-12)
  assert units * on.steps + noise.largest(on.level) / fraction < 2**31
  assert math.sqrt(dim) / on.steps <= 0.1
  if math.sqrt(dim) / on.steps > 0.005:  # only where no finer grid has a level that fits
    for level in noise.LEVELS:
      steps = noise.stddev(level) / (multiplier * fraction)
      is_large = units * steps + noise.largest(level) / fraction >= 2**31
      assert is_large or steps * 0.005 < math.sqrt(dim)
    assert units * dim * multiplier >= 1e7 or on.level == max(noise.LEVELS)


def loss_fn(params, model_state, batch, key):
  """The gradient is x^T g over the rows of a unit, whatever the parameters are."""
  del key
  x, g = batch.images[..., 0], batch.images[..., 1]
  y = dense(x.reshape(-1, x.shape[-1]), params)
  weights = batch.weights.repeat(x.shape[1])[:, None]
  loss = jnp.sum(jnp.where(weights != 0, y * g.reshape(y.shape), 0.0))
  return loss, (model_state, Metrics(jnp.zeros(()), jnp.zeros(()), jnp.sum(batch.weights)))


SIZE, POSITIONS, UNITS = 24, 4, 6


def hostile_units(seed):
  """Units whose positions cancel, that are huge or tiny, or that mix all magnitudes."""
  rng = np.random.default_rng(seed)
  x, g = rng.normal(size=(2, UNITS, POSITIONS, SIZE))
  x[0], g[0] = x[0, :1] * 1e8, g[0, :1] * np.array([1, -1, 1, -1])[:, None]  # cancels to 0
  x[1], g[1] = 1e15 * x[1], 1e-10 * g[1]
  x[2] *= 10.0 ** rng.integers(-15, 15, (POSITIONS, SIZE))
  g[3] *= 10.0 ** rng.integers(-15, 15, (POSITIONS, SIZE))
  x[4], g[4] = x[4] * 1e-22, g[4] * 1e21
  return np.stack([x, g], -1).astype(np.float32)


FORMS = {"formed": (None, 2**22), "held": (True, 2**22), "by Gram matrices": (True, 0)}


@pytest.mark.parametrize("native_form", ["1", "0"])
@pytest.mark.parametrize("form", FORMS)
def test_hostile_units_add_apart_and_change_a_sum_by_no_more_than_the_clip(
  form, native_form, monkeypatch
):
  """Sums are exactly those of the units alone, and each is within C, in integers."""
  taps, cache = FORMS[form]
  monkeypatch.setattr(bookkeeping, "_CACHE_BYTES", cache)
  monkeypatch.setenv("PRIMIA_NATIVE", native_form)
  run = jax.jit(
    clipping.clipped_sum(
      loss_fn, l2_clip_norm=2.0, has_taps=taps and (lambda params: True),
      grid_of=lambda dim, units: grid.choose(dim, 1.0, units),
    )
  )  # fmt: skip
  params = jnp.zeros((SIZE, SIZE))
  for seed in range(4):
    images = jnp.asarray(hostile_units(seed))
    of = lambda weights, images=images: run(
      params, {}, Batch(images, jnp.zeros(UNITS, jnp.int32), jnp.asarray(weights)), KEY
    )[0]
    every, alone = of(np.ones(UNITS, np.float32)), []
    for i in range(UNITS):
      mine = of(np.eye(UNITS, dtype=np.float32)[i]).integers
      alone.append(np.asarray(mine, np.int64))
      rest = of(1 - np.eye(UNITS, dtype=np.float32)[i]).integers
      np.testing.assert_array_equal(np.asarray(every.integers) - rest, mine)
      assert np.linalg.norm(alone[-1]) <= every.grid.steps
    np.testing.assert_array_equal(sum(alone), every.integers)
    assert max(np.linalg.norm(one) for one in alone) > 0.95 * every.grid.steps


def test_one_float_sum_of_all_units_would_not_keep_them_apart():
  """The control: in one product over all units a unit of gradient 0 wipes out the others' sum."""
  images = hostile_units(0)
  x, g = images[..., 0], images[..., 1]
  together = lambda units: np.asarray(jnp.einsum("upk,upo->ko", x[units], g[units]), np.float64)
  others = [3, 5]
  change = together([0, *others]) - together(others)
  exact = np.einsum("pk,po->ko", x[0].astype(np.float64), g[0].astype(np.float64))
  assert np.linalg.norm(exact) == 0
  assert np.linalg.norm(change) > 1


def products_loss(params, model_state, batch, key):
  """The gradient of w is s t - c, elementwise, which the compiler can form in two ways."""
  del key
  s, t, c = batch.images[0, 0, 0], batch.images[0, 1, 0], batch.images[0, 2]
  zero = jnp.zeros(())
  return jnp.sum((s * t - c) * params), (model_state, Metrics(zero, zero, zero))


@pytest.mark.parametrize("protected", [True, False])
@pytest.mark.parametrize("native_form", ["1", "0"])
def test_the_norm_and_the_sum_are_of_one_gradient_to_the_last_bit(
  protected, native_form, monkeypatch
):
  """Else a product rounded in one place and fused into an addition in the other makes a gradient
  that cancels to 0 in the norm a thousand times the clip in the sum.
  """
  monkeypatch.setenv("PRIMIA_NATIVE", native_form)
  if not protected:
    monkeypatch.setattr(native, "settled", lambda x: x)
  width, a, b = 63, np.float32(1.2345678e10), np.float32(1.3456789)
  largest = 0.0
  for units, together in ((8, 2), (16, 4), (64, None)):
    images = np.zeros((units, 3, width), np.float32)
    images[0] = np.stack([np.full(width, v) for v in (a, b, a * b)])
    batch = Batch(jnp.asarray(images), jnp.zeros(units, jnp.int32), jnp.ones(units))
    run = jax.jit(
      clipping.clipped_sum(
        products_loss, microbatch=together, grid_of=lambda dim, units: grid.choose(dim, 1.0, units)
      )
    )
    total, *_ = run(jnp.ones(width), {}, batch, KEY)
    norm = np.linalg.norm(np.asarray(total.integers, np.float64))
    largest = max(largest, norm / total.grid.steps)
  if not protected and largest <= 1 and jax.__version_info__ >= (0, 11):
    pytest.skip("this XLA rounds the gradient alike in both places: there is nothing to show")
  assert largest <= 1 if protected else largest > 10


def test_bounds_of_norms_are_never_too_small_and_hardly_too_large():
  rng = np.random.default_rng(0)
  for shape in ((7,), (1000,), (300, 1), (3, 3, 16, 8), (2, 20_000), ()):
    for scale in (1e-15, 1.0, 1e15):
      x = np.asarray(rng.normal(size=shape) * scale, np.float32)
      exact = np.sum(x.astype(np.float64) ** 2)
      bound = float(jax.jit(grid.square)(jnp.asarray(x)))
      assert exact <= bound <= exact * (1 + 1e-2) + 1e-30
  squares = jnp.asarray(rng.uniform(size=50).astype(np.float32))
  exact = math.sqrt(np.sum(np.asarray(squares, np.float64)))
  assert exact <= float(grid.norm(squares)) <= exact * (1 + 1e-4)


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e6, 1e15])
def test_one_vector_is_clipped_rounded_and_noised(scale, monkeypatch):
  on = grid.choose(200, 0.5)
  tree = {"a": jnp.ones((10, 15)) * scale, "b": -jnp.ones(50) * scale}
  nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.int32), tree)
  drawn = noise.integers_like(SECRET, 4, tree, on.level)
  got = grid.release(tree, 3.0, on, SECRET, 4)
  size = np.float32(3.0 / on.steps)
  added = jax.tree.map(lambda g, n: np.asarray(g, np.float64) / size - np.asarray(n), got, drawn)
  flat = np.concatenate([a.ravel() for a in jax.tree.leaves(added)])
  np.testing.assert_allclose(flat, np.rint(flat), atol=0.02)
  assert np.linalg.norm(np.rint(flat)) <= on.steps
  want = min(3.0, scale * math.sqrt(200))
  np.testing.assert_allclose(np.linalg.norm(flat) * size, want, rtol=5e-3)
  spoilt = grid.release({**tree, "b": tree["b"].at[0].set(jnp.nan)}, 3.0, on, SECRET, 4)
  jax.tree.map(
    np.testing.assert_array_equal,
    spoilt,
    grid.real(jax.tree.map(jnp.add, nothing, drawn), jnp.float32(3) / np.float32(on.steps)),
  )


def test_what_has_no_grid_is_refused():
  with pytest.raises(ValueError, match="no grid of 32 bits"):
    grid.choose(10**9, 50.0, 10**6)
  with pytest.raises(ValueError, match="made without noise"):
    grid.noised({"a": jnp.zeros(3, jnp.int32)}, grid.choose(3), SECRET, 0)


@pytest.mark.parametrize(
  ("fan_in", "features"), [(33, 3), (3, 33), (40, 31), (70, 50), (7, 64), (1, 32), (95, 100)]
)
def test_rounded_products_of_any_width_are_exact(fan_in, features):
  """Whichever of the two is the wide one: rows and columns end within a block of the C form."""
  rng = np.random.default_rng(0)
  x, g = (rng.integers(-8, 9, (5, 4, n)).astype(np.float32) for n in (fan_in, features))
  factors = np.array([0.5, 0, 1, 3, -2.25], np.float32)
  products = np.einsum("mpk,mpo->mko", x, g, dtype=np.float64) * factors[:, None, None]
  total = np.rint(products).sum(0).astype(np.int32)
  add = jax.jit(bookkeeping.rounded_products)
  np.testing.assert_array_equal(add(x, g, factors), total)
  np.testing.assert_array_equal(add(g, x, factors).T, total)
