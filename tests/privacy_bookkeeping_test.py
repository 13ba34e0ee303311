"""Gradients that are never formed: the same clipped sums as those of formed ones, and no norm too
small.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from primia_jax import local, models
from primia_jax.conv import conv
from primia_jax.privacy import bookkeeping, clipping, grid
from primia_jax.tapped import dense
from primia_jax.types import Batch, Metrics

KEY = jax.random.key(3)
CONFIGS = {
  "cnn": models.ModelConfig("cnn", 3, (16, 16, 1), width=0.5, dropout=0.2),
  "leaf_cnn": models.ModelConfig("leaf_cnn", 3, (8, 8, 1)),
  "scatter_cnn": models.ModelConfig("scatter_cnn", 3, (16, 16, 1), width=0.25),
  "resnet18": models.ModelConfig("resnet18", 3, (32, 32, 1), width=0.125, stem="3x3/2"),
}


def batch_of(units, shape, rows=None, seed=0):
  rng = np.random.default_rng(seed)
  lead = (units,) if rows is None else (units, rows)
  weights = rng.uniform(0.5, 2, lead).astype(np.float32)
  weights[-1] = 0
  if rows is not None:
    weights[:, 1:] *= rng.integers(0, 2, (units, rows - 1))
  images = rng.normal(size=(*lead, *shape)).astype(np.float32)
  return Batch(
    jnp.asarray(images), jnp.asarray(rng.integers(0, 3, lead, dtype=np.int32)), jnp.asarray(weights)
  )


def both(loss_fn, has_taps, batch, params, **options):
  """What the two ways give."""
  fine = lambda dim, units: grid.choose(dim, 1e-6, units)
  runs = [
    clipping.clipped_sum(loss_fn, has_taps=taps, grid_of=fine, **options)
    for taps in (None, has_taps)
  ]
  results = jax.jit(lambda *args: [run(*args) for run in runs])(params, {}, batch, KEY)
  return [(grid.real(total.integers, total.step), *rest) for total, *rest in results]


def check(ours, formed):
  (total, metrics, share), (expected, *rest) = ours, formed
  scale = np.sqrt(sum(float(jnp.sum(a * a)) for a in jax.tree.leaves(expected)))
  assert scale > 0
  for a, e in zip(jax.tree.leaves(total), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3 * scale / np.sqrt(a.size) + 1e-7)
  for a, e in zip(jax.tree.leaves((metrics, share)), jax.tree.leaves(rest), strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5)


@pytest.mark.parametrize(
  ("name", "clipping_kind", "rows", "augmentations"),
  [
    ("cnn", "flat", None, 1),
    ("leaf_cnn", "per_layer", 3, 1),
    pytest.param("scatter_cnn", "automatic", None, 2, marks=pytest.mark.slow),
    pytest.param("resnet18", "flat", 2, 2, marks=pytest.mark.slow),
  ],
)
def test_sums_are_those_of_formed_gradients(name, clipping_kind, rows, augmentations, monkeypatch):
  if name != "leaf_cnn":
    monkeypatch.setattr(
      bookkeeping, "_CACHE_BYTES", 2**10
    )  # Gram matrices too, in networks this small
  config = CONFIGS[name]
  model = models.build(config)
  params, _ = model.init(jax.random.key(0))

  def jittered(key, images, targets):
    return images + 0.1 * jax.random.normal(key, images.shape), targets

  loss_fn = local.classification_loss(model.apply, jittered, 3)
  batch = batch_of(5, config.image_shape, rows)
  formed, ours = both(
    loss_fn, models.has_taps(config), batch, params,
    l2_clip_norm=0.5, clipping=clipping_kind, augmentations=augmentations, microbatch=3,
  )  # fmt: skip
  check(ours, formed)
  assert 0 < float(formed[2]) <= 1


def test_a_model_whose_kernels_are_standardised_has_no_taps():
  assert models.has_taps(models.ModelConfig("cnn", weight_standardisation=True)) is None


PARAMS = {
  "first": jnp.linspace(-1, 1, 12).reshape(4, 3),
  "gain": jnp.ones(3),
  "second": jnp.linspace(1, -1, 9).reshape(3, 3),
}
TAPS = lambda params: {"first": True, "gain": False, "second": True}


def loss_of(logits_fn):
  def loss_fn(params, model_state, batch, key):
    del key
    logits = logits_fn(params, batch.images.reshape(batch.images.shape[0], -1))
    loss = jnp.sum(batch.weights[:, None] * (logits - jax.nn.one_hot(batch.labels, 3)) ** 2)
    count = jnp.sum((batch.weights > 0).astype(jnp.float32))
    return loss / jnp.maximum(count, 1.0), (model_state, Metrics(loss, count, count))

  return loss_fn


def two_layers(params, x):
  return dense(jnp.tanh(dense(x, params["first"])) * params["gain"][None], params["second"])


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize(
  ("where", "bad"),
  [("weights", np.nan), ("weights", np.inf), ("weights", 1e30), ("images", np.nan)],
)
def test_a_unit_that_is_not_finite_counts_as_exactly_nothing(where, bad, rows):
  batch = batch_of(6, (2, 2, 1), rows)
  run = jax.jit(clipping.clipped_sum(loss_of(two_layers), l2_clip_norm=0.5, has_taps=TAPS))
  got = run(PARAMS, {}, batch._replace(**{where: getattr(batch, where).at[2].set(bad)}), KEY)
  expected = run(PARAMS, {}, batch._replace(weights=batch.weights.at[2].set(0)), KEY)
  for a, e in zip(jax.tree.leaves(got[:2]), jax.tree.leaves(expected[:2]), strict=True):
    np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("cache", [0, 2**22])  # norms from Gram matrices, and of formed gradients
def test_convolutions_of_several_units_keep_one_that_overflows_apart(cache, monkeypatch):
  monkeypatch.setattr(bookkeeping, "_CACHE_BYTES", cache)
  rng = np.random.default_rng(0)
  shapes = {"first": (3, 3, 1, 4), "gain": (4,), "second": (64, 3)}
  params = {
    name: jnp.asarray(rng.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()
  }

  def logits(params, x):
    x = jax.nn.relu(conv(x.reshape(-1, 8, 8, 1), params["first"], strides=(2, 2)))
    x = x * params["gain"][None, None, None]
    return dense(x.reshape(x.shape[0], -1), params["second"])

  run = jax.jit(clipping.clipped_sum(loss_of(logits), l2_clip_norm=0.5, has_taps=TAPS))
  batch = batch_of(6, (8, 8, 1), 2)
  expected = run(params, {}, batch._replace(weights=batch.weights.at[2].set(0)), KEY)[0]
  assert all(np.linalg.norm(leaf) > 0.01 for leaf in expected.integers.values())
  for bad in (np.nan, np.inf, 1e30):
    got = run(params, {}, batch._replace(images=batch.images.at[2, 0, 3].set(bad)), KEY)[0]
    for name in params:
      np.testing.assert_array_equal(got.integers[name], expected.integers[name])


def test_a_kernel_is_used_once_or_refused():
  run = lambda logits_fn: clipping.clipped_sum(loss_of(logits_fn), has_taps=TAPS)(
    PARAMS, {}, batch_of(2, (2, 2, 1)), KEY
  )
  with pytest.raises(ValueError, match=r"kernel \[3, 3\] with taps is used 2 times"):
    run(lambda p, x: dense(two_layers(p, x), p["second"]))
  with pytest.raises(ValueError, match=r"kernel \[3, 3\] with taps is used 0 times"):
    run(lambda p, x: dense(x, p["first"]) * p["gain"][None])
  with pytest.raises(TypeError):
    run(lambda p, x: dense(x, p["first"]) @ p["second"])


@pytest.mark.parametrize("around", [jax.jit, pytest.param(jax.checkpoint, marks=pytest.mark.slow)])
def test_a_penalty_on_all_parameters_is_refused(around):
  """It finds the array within, whose gradient nobody would look at."""

  def penalised(params, model_state, batch, key):
    loss, aux = loss_of(two_layers)(params, model_state, batch, key)
    return loss + sum(around(lambda p: jnp.sum(p**2))(p) for p in jax.tree.leaves(params)), aux

  with pytest.raises(ValueError, match="would be lost"):
    clipping.clipped_sum(penalised, has_taps=TAPS)(PARAMS, {}, batch_of(2, (2, 2, 1)), KEY)
  nothing = lambda params: jax.tree.map(lambda _: False, params)
  clipping.clipped_sum(penalised, has_taps=nothing)(PARAMS, {}, batch_of(2, (2, 2, 1)), KEY)


@pytest.mark.parametrize("rows", [None, 2])  # norms from Gram matrices, and of formed gradients
def test_a_use_in_a_loop_spoils_everything_instead_of_passing(rows):
  def looped(p, x):
    x = dense(x, p["first"]) * p["gain"][None]
    return lax.fori_loop(0, 2, lambda _, x: dense(x, p["second"]), x)

  total, *_ = clipping.clipped_sum(loss_of(looped), has_taps=TAPS)(
    PARAMS, {}, batch_of(2, (2, 2, 1), rows), KEY
  )
  assert np.isnan(total.step)


def cancelling(positions=4, fan_in=40, features=40, seed=0):
  """One unit whose positions nearly cancel: a gradient of norm 1 out of terms of norm 1000."""
  rng = np.random.default_rng(seed)
  x, g = rng.normal(size=fan_in), rng.normal(size=features)
  signs = np.where(np.arange(positions) % 2, -1, 1)[:, None]
  rows = np.float32(signs * x + 1e-4 * rng.normal(size=(positions, fan_in)))
  out = np.float32(g + 1e-4 * rng.normal(size=(positions, features)))
  return rows, out


def squares_of(rows, out):
  """The squared norm that bookkeeping finds, and that of the gradient, in double precision."""
  loss_fn = lambda params, model_state, batch, key: (
    jnp.sum(dense(batch.images[0], params) * batch.labels[0]),
    (model_state, Metrics(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))),
  )
  batch = Batch(jnp.asarray(rows)[None, None], jnp.asarray(out)[None, None], jnp.ones((1, 1)))
  per_unit = bookkeeping.bookkept(loss_fn, lambda params: True)
  w = jnp.zeros((rows.shape[1], out.shape[1]))
  found = float(per_unit.gradients(w, {}, batch, KEY[None]).squares[0, 0])
  return found, np.sum((rows.astype(np.float64).T @ out.astype(np.float64)) ** 2)


@pytest.mark.parametrize("margin", [True, False])
def test_rounding_makes_no_norm_too_small(margin, monkeypatch):
  """Where positions cancel, Gram matrices in float32 give half of all norms too small, or would."""
  monkeypatch.setattr(bookkeeping, "_CACHE_BYTES", 0)
  if not margin:
    monkeypatch.setattr(grid, "EPS", 0.0)
  pairs = [squares_of(*cancelling(seed=seed)) for seed in range(20)]
  too_small = sum(found < exact for found, exact in pairs)
  assert too_small == 0 if margin else too_small > 2


@pytest.mark.parametrize("positions", [1, 4, 40])
@pytest.mark.parametrize("cache", [0, 2**22])
def test_norms_are_right_by_either_form(positions, cache, monkeypatch):
  monkeypatch.setattr(bookkeeping, "_CACHE_BYTES", cache)
  rng = np.random.default_rng(0)
  found, exact = squares_of(*(rng.normal(size=(positions, n)).astype(np.float32) for n in (40, 30)))
  np.testing.assert_allclose(found, exact, rtol=1e-3)
  assert found >= exact


@pytest.mark.parametrize("positions", [1, 4])
def test_products_below_the_range_of_float32_make_no_norm_too_small(positions, monkeypatch):
  """Pixels so large that gradients whose squares vanish still make a norm beyond a clip."""
  monkeypatch.setattr(bookkeeping, "_CACHE_BYTES", 0)
  for x, g in ((1e18, 5e-20), (1e-19, 1e17)):
    found, exact = squares_of(
      np.full((positions, 40), x, np.float32), np.full((positions, 1000), g, np.float32)
    )
    assert found >= exact > 1


def test_norms_of_coarse_activations_are_of_float32(monkeypatch):
  monkeypatch.setattr(bookkeeping, "_CACHE_BYTES", 0)
  rng = np.random.default_rng(0)
  with jax.numpy_dtype_promotion("standard"):
    for positions in (1, 4):
      rows, out = (rng.normal(size=(positions, n)).astype(np.float32) for n in (40, 30))
      found, exact = squares_of(rows.astype(jnp.bfloat16), out)
      np.testing.assert_allclose(found, exact, rtol=1e-3)


def test_the_norm_of_millions_of_equal_numbers_is_hardly_too_large_and_never_too_small():
  """A running float32 sum would lose 4 %: the clip would let that much more through."""
  for shape in ((3, 3, 512, 512), (25088, 100), (2**21,)):
    x = jnp.full(shape, 0.1, jnp.float32)
    exact = x.size * float(np.float32(0.1)) ** 2
    assert 0 <= float(jax.jit(grid.square)(x)) / exact - 1 < 1e-3
