import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import conv, local, models
from primia_jax.privacy import clipping, grid, sampling
from primia_jax.privacy.grid import Rounded
from primia_jax.tapped import dense
from primia_jax.types import Batch, Metrics

PARAMS = {"b": jnp.array([0.1, -0.2, 0.0]), "w": jnp.linspace(-1, 1, 4 * 3).reshape(4, 3)}
MODES = pytest.mark.parametrize("mode", clipping.CLIPPINGS)
KEY = jax.random.key(3)


def linear_loss(params, model_state, batch, key):
  """Least squares; the gradient of one row x, y is 2 w (x theta + b - y) x, so NumPy can be the
  oracle.
  """
  del key
  x = batch.images.reshape(batch.images.shape[0], 4)
  error = x @ params["w"] + params["b"][None] - jax.nn.one_hot(batch.labels, 3, dtype=jnp.float32)
  losses = batch.weights * jnp.sum(error**2, axis=1)
  count = jnp.sum((batch.weights > 0).astype(jnp.float32))
  return jnp.sum(losses) / jnp.maximum(count, 1.0), (
    model_state,
    Metrics(jnp.sum(losses), count, count),
  )


def batch_of(num_units, rows=None, seed=0, padding=0, scale=1.0):
  rng = np.random.default_rng(seed)
  lead = (num_units,) if rows is None else (num_units, rows)
  weights = rng.uniform(0.5, 2, lead).astype(np.float32)
  if rows is not None:
    weights[:, 1:] *= rng.integers(0, 2, (num_units, rows - 1))  # patients with fewer rows
  if padding:
    weights[-padding:] = 0
  images = np.float32(scale) * rng.normal(size=(*lead, 2, 2, 1)).astype(np.float32)
  images[::2] *= np.float32(0.1)
  return Batch(
    jnp.asarray(images),
    jnp.asarray(rng.integers(0, 3, lead).astype(np.int32)),
    jnp.asarray(weights),
  )


def oracle(batch, mode, norm):
  """The clipped sum in double precision, unit by unit, and how many were scaled down."""
  images, labels, weights = map(np.asarray, batch[:3])
  if weights.ndim == 1:
    images, labels, weights = images[:, None], labels[:, None], weights[:, None]
  w, b = np.asarray(PARAMS["w"], np.float64), np.asarray(PARAMS["b"], np.float64)
  total, scaled = {"b": np.zeros(3), "w": np.zeros((4, 3))}, 0
  for x, y, v in zip(
    images.reshape(*weights.shape, 4).astype(np.float64), labels, weights, strict=True
  ):
    if not np.any(v):
      continue
    error = 2 * v[:, None] * (x @ w + b - np.eye(3)[y]) / np.sum(v > 0)
    gradient = {"b": error.sum(0), "w": x.T @ error}
    size = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    own = {name: np.linalg.norm(g) for name, g in gradient.items()}
    factors = {
      name: {
        "flat": min(1, norm / size),
        "per_layer": min(1, norm / np.sqrt(2) / own[name]),
        "automatic": norm / (size + 0.01),
      }[mode]
      for name in gradient
    }
    scaled += min(factors.values()) < 1
    total = {name: total[name] + factors[name] * g for name, g in gradient.items()}
  return total, scaled


FINE = lambda dim, max_units: grid.choose(dim, 1e-6, max_units)  # hardly any rounding


@functools.cache
def summed(mode="flat", norm=1.5, microbatch=None, augmentations=1, loss=linear_loss):
  arguments = {
    "l2_clip_norm": norm,
    "clipping": mode,
    "microbatch": microbatch,
    "augmentations": augmentations,
    "grid_of": FINE,
  }
  return jax.jit(clipping.clipped_sum(loss, **arguments))


def real(tree):
  """The tree, with rounded sums as numbers."""
  is_sum = lambda a: isinstance(a, Rounded)
  number = lambda a: grid.real(a.integers, a.step) if is_sum(a) else a
  return jax.tree.map(number, tree, is_leaf=is_sum)


def flat(tree):
  tree = real(tree)
  return np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree)])


@MODES
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("microbatch", [None, pytest.param(1, marks=pytest.mark.slow), 4])
def test_sums_are_those_of_a_double_precision_oracle(mode, rows, microbatch):
  batch = batch_of(11, rows, padding=4)
  total, metrics, share = summed(mode, norm=4.0, microbatch=microbatch)(PARAMS, {}, batch, KEY)
  expected, scaled = oracle(batch, mode, 4.0)
  np.testing.assert_allclose(flat(total), flat(expected), rtol=1e-5, atol=1e-5)
  assert int(metrics.num_examples) == np.sum(np.asarray(batch.weights) > 0)
  assert scaled > 0
  assert mode != "flat" or scaled < 7  # both branches of the minimum
  np.testing.assert_allclose(share, scaled / 7, rtol=1e-6)


@MODES
def test_without_jit_it_is_the_same(mode):
  batch = batch_of(3)
  run = clipping.clipped_sum(linear_loss, l2_clip_norm=1.5, clipping=mode, grid_of=FINE)
  eager = run(PARAMS, {}, batch, KEY)
  np.testing.assert_allclose(
    flat(eager), flat(summed(mode)(PARAMS, {}, batch, KEY)), rtol=1e-5, atol=1e-6
  )


def test_an_empty_batch_gives_zeros_and_padding_may_stand_anywhere():
  batch = batch_of(6)
  total, metrics, share = summed()(PARAMS, {}, batch._replace(weights=jnp.zeros(6)), KEY)
  assert not np.any(flat((total, metrics, share)))
  holes = batch._replace(weights=batch.weights.at[jnp.array([0, 3])].set(0))
  total, _, _ = summed()(PARAMS, {}, holes, KEY)
  np.testing.assert_allclose(flat(total), flat(oracle(holes, "flat", 1.5)[0]), rtol=1e-5, atol=1e-6)


@MODES
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("microbatch", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_unit_whose_gradient_is_not_finite_counts_as_exactly_nothing(mode, bad, microbatch):
  batch = batch_of(7)
  spoilt = batch._replace(images=batch.images.at[2].set(bad))
  without = batch._replace(weights=batch.weights.at[2].set(0))
  got, metrics, _ = summed(mode, microbatch=microbatch)(PARAMS, {}, spoilt, KEY)
  expected, ordinary, _ = summed(mode, microbatch=microbatch)(PARAMS, {}, without, KEY)
  assert np.array_equal(flat(got), flat(expected))
  assert np.array_equal(flat(metrics), flat(ordinary))


def largest_change(run):
  """The most that one unit changes a sum, over units of all sizes."""
  changes = []
  for seed, scale in enumerate([1e-3, 0.1, 1.0, 30.0, 1e4, 1e9]):
    batch = batch_of(5, rows=2, seed=seed, scale=scale)
    for i in range(5):
      gone = batch._replace(weights=batch.weights.at[i].set(0))
      changes.append(
        np.linalg.norm(flat(run(PARAMS, {}, batch, KEY)[0]) - flat(run(PARAMS, {}, gone, KEY)[0]))
      )
  return max(changes)


@MODES
def test_one_unit_changes_the_sum_by_the_clip_norm_at_most(mode):
  assert 0.9 * 1.5 < largest_change(summed(mode)) <= 1.5


def test_the_change_is_caught_with_clipping_off_or_rows_clipped_in_place_of_patients(monkeypatch):
  rows_as_units = lambda params, state, batch, key: summed()(
    params, state, jax.tree.map(_flatten, batch), key
  )
  assert largest_change(rows_as_units) > 1.5 * 1.2
  monkeypatch.setattr(
    clipping, "_factors", lambda squares, on, unclipped, _: jnp.full_like(squares, unclipped)
  )
  off = jax.jit(clipping.clipped_sum(linear_loss, l2_clip_norm=1.5))
  assert largest_change(off) > 15


def _flatten(a):
  return a.reshape(-1, *a.shape[2:])


@MODES
def test_microbatches_never_change_the_result(mode):
  """With random augmentation and dropout too: each unit's key is its own."""

  def noisy_loss(params, model_state, batch, key):
    images = batch.images + jax.random.normal(key, batch.images.shape)
    return linear_loss(params, model_state, batch._replace(images=images), key)

  batch = batch_of(10, rows=2, padding=3)
  results = [
    flat(summed(mode, microbatch=m, loss=noisy_loss)(PARAMS, {}, batch, KEY)) for m in (1, 4, 64)
  ]
  for other in results[1:]:
    np.testing.assert_allclose(other, results[0], rtol=1e-5, atol=1e-6)


def test_augmentations_are_averaged_and_clipped_as_one_unit():
  """All K draws of one unit's augmentation against K units: the mean is clipped, and the change
  stays C.
  """

  def augmented_loss(params, model_state, batch, key):
    images = batch.images + jax.random.normal(key, batch.images.shape)
    return linear_loss(params, model_state, batch._replace(images=images), key)

  one = batch_of(1, scale=5.0)
  total, metrics, _ = summed(augmentations=8, loss=augmented_loss)(PARAMS, {}, one, KEY)
  repeated = jax.tree.map(lambda a: jnp.repeat(a, 8, axis=0), one)
  key = jax.random.fold_in(KEY, 0)
  gradient = jax.grad(lambda p: augmented_loss(p, {}, repeated, key)[0])(PARAMS)
  size = np.linalg.norm(flat(gradient))
  np.testing.assert_allclose(flat(total), flat(gradient) * min(1, 1.5 / size), rtol=1e-4)
  assert float(metrics.num_examples) == 1
  apart, _, _ = summed(loss=augmented_loss)(PARAMS, {}, repeated, KEY)
  assert np.linalg.norm(flat(total)) <= 1.5 < np.linalg.norm(flat(apart))


def distance(a, b):
  return np.linalg.norm(flat(a) - flat(b))


FORMS = pytest.mark.parametrize(
  ("mode", "microbatch", "augmentations", "taps"),
  [("flat", None, 1, False), ("automatic", 4, 2, False), ("per_layer", 1, 1, True),
   ("flat", None, 2, True)],
)  # fmt: skip


def dropping_loss(params, model_state, batch, key):
  """Softmax regression that drops inputs, as dropout and augmentation do."""
  x = batch.images.reshape(batch.images.shape[0], -1)
  x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0.0)
  return local.classification_loss(
    lambda *_, **__: (dense(x, params["w"]), model_state), lambda _, i, t: (i, t), 3
  )(params, model_state, batch, key)


@FORMS
def test_a_unit_that_is_left_out_changes_no_other_units_keys(mode, microbatch, augmentations, taps):
  """Units move up by one place when one before them is not drawn; leaving it out is zeroing it."""
  num = 16
  rng = np.random.default_rng(0)
  images = jnp.asarray(10 * rng.normal(size=(2 * num, 4, 2, 1)).astype(np.float32))
  labels = jnp.asarray(rng.integers(0, 3, 2 * num).astype(np.int32))
  index, units = jnp.arange(num, dtype=jnp.int32), None
  if augmentations > 1:  # patients of two images
    units = jnp.repeat(index, 2)
    index = index[:, None] * 2 + jnp.arange(2, dtype=jnp.int32)[None]
  gone = jnp.full_like(index[:1], -1)
  every, zeroed, moved = (
    local.gather(images, labels, i, units=units)
    for i in (index, index.at[0].set(-1), jnp.concatenate([index[1:], gone]))
  )
  np.testing.assert_array_equal(every.numbers, np.arange(num))
  np.testing.assert_array_equal(moved.numbers, [*range(1, num), -1])
  run = jax.jit(
    clipping.clipped_sum(
      dropping_loss, clipping=mode, microbatch=microbatch, augmentations=augmentations,
      has_taps=(lambda params: {"w": True}) if taps else None, grid_of=FINE,
    )
  )  # fmt: skip
  of = lambda batch: run({"w": jnp.zeros((8, 3))}, {}, batch, KEY)[0]
  np.testing.assert_allclose(flat(of(moved)), flat(of(zeroed)), rtol=1e-5, atol=1e-5)
  assert 0.5 < distance(of(every), of(moved)) <= 1 + 1e-3
  place = jnp.arange(num, dtype=jnp.int32)
  by_place = [of(batch._replace(numbers=place)) for batch in (every, moved)]
  assert distance(*by_place) > 2


MLP = models.ModelConfig("mlp", 3, (4, 4, 1))
GATHER = jax.jit(local.gather)


@functools.cache
def of_mlp(mode, microbatch, augmentations, taps):
  as_float = lambda key, images, targets: ((images / 255 - 0.5) / 0.25, targets)
  return jax.jit(
    clipping.clipped_sum(
      local.classification_loss(models.build(MLP).apply, as_float, 3), clipping=mode,
      microbatch=microbatch, augmentations=augmentations,
      has_taps=models.has_taps(MLP) if taps else None,
    )
  )  # fmt: skip


@functools.cache
def of_key():
  return models.build(MLP).init(KEY)[0]


def unequal_patients():
  """Patient 0 has three images, 15 others one: images, labels, rows [16, 3], patients."""
  units = jnp.asarray([0, 0, 0, *range(1, 16)], jnp.int32)
  rows = sampling.rows_of(units, jnp.arange(16, dtype=jnp.int32), 3)[0]
  labels = np.random.default_rng(0).integers(0, 3, 18).astype(np.int32)
  return np.full((18, 4, 4, 1), 128, np.float32), jnp.asarray(labels), rows, units


def hostile(params, spares_blank):
  """Parameters under which one pixel makes an image overflow, and a blank one may, too."""
  hidden, head = params["hidden"], params["head"]
  if not spares_blank:
    grown = jax.tree.map(lambda a: a * np.float32(2e20), hidden)
    return {"hidden": grown, "head": jax.tree.map(lambda a: a * np.float32(4e18), head)}
  kernel = hidden["kernel"].at[:, 0].set(0.0).at[0, 0].set(1e25)
  hidden = {"kernel": kernel, "bias": hidden["bias"].at[0].set(-1e25)}
  return {"hidden": hidden, "head": {**head, "kernel": head["kernel"].at[0].set(1e20)}}


@FORMS
@pytest.mark.parametrize(
  ("spares_blank", "pixel"), [(True, 255), (False, 0), (None, np.nan), (None, np.inf)]
)
def test_a_patient_with_fewer_rows_is_padded_by_nobodys_image(
  mode, microbatch, augmentations, taps, spares_blank, pixel
):
  """One pixel of patient 0, whose image once stood in for others' missing rows."""
  images, labels, rows, units = unequal_patients()
  params = of_key()
  params = params if spares_blank is None else hostile(params, spares_blank)
  run = of_mlp(mode, microbatch, augmentations, taps)
  of = lambda images, rows: run(params, {}, GATHER(images, labels, rows, units=units), KEY)[0]
  changed = images.copy()
  changed[0, 0, 0, 0] = pixel
  assert distance(of(images, rows), of(changed, rows)) <= 1 + 1e-3
  without = of(images, rows.at[0].set(-1))
  np.testing.assert_array_equal(flat(of(changed, rows)), flat(without))
  assert (np.linalg.norm(flat(without)) > 1.5) == (spares_blank is not False)


def conv_loss(params, model_state, batch, key):
  x = jax.nn.relu(conv.conv(batch.images, params["kernel"], strides=(2, 2)))
  logits = dense(conv.mean_pool(x, 2, 2).reshape(x.shape[0], -1), params["w"])
  return local.classification_loss(
    lambda *_, **__: (logits, model_state), lambda _, i, t: (i, t), 3
  )(params, model_state, batch, key)


@pytest.mark.parametrize(("microbatch", "taps"), [(1, False), (5, False), (4, True)])
@pytest.mark.slow
def test_convolutions_against_plain_vmap_and_under_vmap_over_sites(microbatch, taps):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
  params = {"kernel": draw(2, 3, 3, 2, 4), "w": draw(2, 16, 3)}
  labels = jnp.asarray(rng.integers(0, 3, (2, 7)).astype(np.int32))
  batch = Batch(draw(2, 7, 8, 8, 2), labels, jnp.ones((2, 7)).at[1, 4:].set(0))
  has_taps = (lambda params: {"kernel": True, "w": True}) if taps else None
  run = clipping.clipped_sum(
    conv_loss, l2_clip_norm=0.7, microbatch=microbatch, has_taps=has_taps, grid_of=FINE
  )
  got = jax.jit(jax.vmap(lambda p, b: run(p, {}, b, KEY)[0]))(params, batch)
  take = lambda tree, *index: jax.tree.map(lambda a: a[index], tree)
  gradient = jax.jit(jax.grad(lambda p, b: conv_loss(p, {}, b, KEY)[0]))
  for site in range(2):
    own = [flat(gradient(take(params, site), take(batch, site, slice(i, i + 1)))) for i in range(7)]
    total = sum(g * min(1, 0.7 / max(np.linalg.norm(g), 1e-9)) for g in own)
    np.testing.assert_allclose(flat(take(got, site)), total, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_shipped_model_and_one_with_batch_norm():
  batch = Batch(jnp.ones((3, 16, 16, 1)), jnp.arange(3, dtype=jnp.int32), jnp.ones(3))
  prepare = lambda key, images, targets: (images, targets)
  for norm in ("group", "batch"):
    model = models.build(models.ModelConfig("cnn", 3, (16, 16, 1), norm=norm, width=0.5))
    params, state = model.init(KEY)
    run = jax.jit(
      clipping.clipped_sum(local.classification_loss(model.apply, prepare, 3), l2_clip_norm=0.1)
    )
    if norm == "batch":
      with pytest.raises(ValueError, match="use norm=group"):
        run(params, state, batch, KEY)
    else:
      total, metrics, share = run(params, state, batch, KEY)
      assert 0 < np.linalg.norm(flat(total)) <= 0.3
      assert float(share) == 1
      assert float(metrics.num_examples) == 3


@pytest.mark.parametrize(
  "options",
  [{"clipping": "perlayer"}, {"l2_clip_norm": 0.0}, {"augmentations": 0}, {"microbatch": 0}],
)
def test_what_would_not_clip_as_told_is_refused(options):
  """A clipping that is unknown would be taken for flat."""
  with pytest.raises(ValueError, match=next(iter(options))):
    clipping.clipped_sum(linear_loss, **options)


def test_coarse_parameters_are_refused():
  params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), PARAMS)
  with pytest.raises(ValueError, match=r"parameters are bfloat16; .* use that"):
    clipping.clipped_sum(linear_loss)(params, {}, batch_of(2), KEY)
