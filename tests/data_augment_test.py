"""Augmentation: identity at zero, fresh draws, closed forms, MixUp, class weights; jit, scan and
vmap agree.
"""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from data_textures import jitted, some_images

from primia_jax.data import augment as aug
from primia_jax.data import warp
from primia_jax.data.clahe import equalize_adapthist

KEY = jax.random.key(7)


# name -> (key, images) -> images, at a strength at which every image changes
ALL = {
  "affine": jitted(
    warp.affine, rotation_degrees=20.0, translation=0.1, scale=0.2, shear_degrees=10.0
  ),
  "elastic": jitted(warp.elastic, elastic=0.05),
  "clahe": jitted(aug.clahe, clahe=1.0),
  "blur": jitted(aug.gaussian_blur, blur=2.0),
  "gamma": jitted(aug.gamma, gamma=1.0),
  "contrast": jitted(aug.contrast, contrast=0.5),
  "brightness": jitted(aug.brightness, brightness=0.3),
  "noise": jitted(aug.gaussian_noise, noise=0.1),
  "cutout": jitted(aug.cutout, cutout=0.5, fill=0.5),
}
OFF = {
  "affine": jitted(warp.affine),
  "elastic": jitted(warp.elastic, elastic=0.0),
  "flip": jitted(warp.flip, horizontal_flip=0.0),
  "clahe": jitted(aug.clahe, clahe=0.0),
  "blur": jitted(aug.gaussian_blur, blur=0.0),
  "gamma": jitted(aug.gamma, gamma=0.0),
  "contrast": jitted(aug.contrast, contrast=0.0),
  "brightness": jitted(aug.brightness, brightness=0.0),
  "noise": jitted(aug.gaussian_noise, noise=0.0),
  "cutout": jitted(aug.cutout, cutout=0.0),
  "augment": jitted(aug.augment, config=aug.Augmentation()),
}
EVERYTHING = aug.Augmentation(
  rotation_degrees=10.0,
  translation=0.1,
  scale=0.1,
  shear_degrees=5.0,
  horizontal_flip=0.5,
  vertical_flip=0.1,
  elastic=0.02,
  clahe=0.5,
  blur=1.0,
  gamma=0.3,
  contrast=0.2,
  brightness=0.1,
  noise=0.05,
  cutout=0.2,
)

EVERYTHING_STEP = jitted(aug.augment, config=EVERYTHING)
MIXUP = jax.jit(aug.mixup, static_argnums=3)


@pytest.mark.optimised
@pytest.mark.parametrize("name", OFF)
def test_zero_strength_is_the_identity(name):
  images = some_images(channels=3)
  out = OFF[name](KEY, images)
  np.testing.assert_allclose(out, images, rtol=0, atol=1e-6 if name == "gamma" else 0)


@pytest.mark.parametrize("name", ALL)
def test_draws_differ_between_keys_and_between_images(name):
  image = some_images(num=1)
  images = jnp.tile(image, (3, 1, 1, 1))
  out = np.asarray(ALL[name](KEY, images))
  assert out.shape == images.shape
  assert out.dtype == np.float32
  assert np.isfinite(out).all()
  assert out.min() >= 0
  assert out.max() <= 1 + 1e-6
  assert all(np.abs(one - image[0]).max() > 1e-3 for one in out)
  np.testing.assert_array_equal(out, ALL[name](KEY, images))
  if name != "clahe":  # which draws only whether to act
    assert np.abs(out[0] - out[1]).max() > 1e-3
    assert np.abs(out - ALL[name](jax.random.key(8), images)).max() > 1e-3


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_extreme_images_stay_finite(value):
  images = jnp.full((4, 24, 20, 1), value, jnp.float32)
  out = np.asarray(EVERYTHING_STEP(KEY, images))
  assert np.isfinite(out).all()
  assert out.min() >= 0
  assert out.max() <= 1


def test_blur_equals_scipy_inside_and_keeps_the_level_at_the_edges():
  images = some_images(num=3, height=40, width=30)
  out = np.asarray(jitted(aug.gaussian_blur, blur=1.5)(KEY, images))
  for i, sigma in enumerate(
    np.asarray(jax.random.uniform(KEY, (3, 1, 1, 1), jnp.float32, 0, 1.5)).ravel()
  ):
    expected = scipy.ndimage.gaussian_filter(
      np.asarray(images[i, ..., 0], np.float64), sigma, radius=9
    )
    np.testing.assert_allclose(out[i, 9:-9, 9:-9, 0], expected[9:-9, 9:-9], atol=2e-5)
  flat = jnp.full((3, 40, 30, 1), 0.7, jnp.float32)
  np.testing.assert_allclose(jitted(aug.gaussian_blur, blur=4.0)(KEY, flat), flat, atol=1e-6)


def test_photometric_changes_follow_their_formulas():
  images = some_images(num=50)
  x = np.asarray(images, np.float64)
  ratio = (
    np.log(np.asarray(aug.gamma(KEY, images, 0.5), np.float64))[:, 5:9, 5:9]
    / np.log(x)[:, 5:9, 5:9]
  )
  np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-3)
  assert 1 / 1.5 - 1e-3 <= ratio.min() < 0.75
  assert 1.35 < ratio.max() <= 1.5 + 1e-3

  def spread(strength, low, high):
    draw = np.asarray(jax.random.uniform(KEY, (50, 1, 1, 1), jnp.float32, low, high), np.float64)
    assert np.ptp(draw) > 0.8 * 2 * strength
    return draw

  shifted = np.clip(x + spread(0.2, -0.2, 0.2), 0, 1)
  np.testing.assert_allclose(aug.brightness(KEY, images, 0.2), shifted, atol=1e-6)
  mean = x.mean((1, 2, 3), keepdims=True)
  scaled = np.clip(mean + (1 + spread(0.4, -0.4, 0.4)) * (x - mean), 0, 1)
  np.testing.assert_allclose(aug.contrast(KEY, images, 0.4), scaled, atol=1e-5)


def test_noise_has_the_distribution_asked_for():
  images = jnp.full((64, 40, 40, 1), 0.5, jnp.float32)
  noise = np.asarray(jitted(aug.gaussian_noise, noise=0.08)(KEY, images), np.float64) - 0.5
  std_key, _ = jax.random.split(KEY)
  std = np.asarray(jax.random.uniform(std_key, (64,), jnp.float32, 0, 0.08))
  np.testing.assert_allclose(noise.std((1, 2, 3)), std, rtol=0.1)
  white = (noise / std[:, None, None, None]).ravel()
  assert abs(white.mean()) < 0.02
  assert abs((white**4).mean() - 3) < 0.15
  assert abs((white[1:] * white[:-1]).mean()) < 0.02


def test_cutout_fills_one_box():
  out = np.asarray(jitted(aug.cutout, cutout=0.4)(KEY, jnp.ones((200, 20, 30, 2), jnp.float32)))
  rows, columns = (out == 0).any((2, 3)), (out == 0).any((1, 3))
  np.testing.assert_array_equal(out[..., 0] == 0, rows[:, :, None] & columns[:, None, :])
  np.testing.assert_array_equal(out[..., 0], out[..., 1])
  for hit, length in ((rows, 8), (columns, 12)):
    sizes = hit.sum(1)
    assert sizes.max() == length
    assert sizes.min() >= length // 2
    assert hit.any(0).all()  # every pixel is sometimes hit
    assert (np.abs(np.diff(hit.astype(int), axis=1)).sum(1) <= 2).all()


def test_clahe_acts_with_the_probability_asked_for():
  images = jnp.tile(some_images(num=1, height=16, width=16), (200, 1, 1, 1))
  changed = (np.asarray(jitted(aug.clahe, clahe=0.25)(KEY, images)) != np.asarray(images)).any(
    (1, 2, 3)
  )
  assert 0.15 < changed.mean() < 0.35


def test_augment_is_the_same_in_a_scan_of_a_vmap():
  steps = jnp.stack(
    [jnp.stack([some_images(seed=2 * t + s) for s in range(2)]) for t in range(2)]
  )  # [T, S, B, H, W, C]
  keys = jax.random.split(KEY, (2, 2))
  expected = np.stack(
    [[EVERYTHING_STEP(keys[t, s], steps[t, s]) for s in range(2)] for t in range(2)]
  )
  body = lambda carry, step: (carry, jax.vmap(EVERYTHING_STEP)(*step))
  out = np.asarray(jax.jit(lambda k, x: jax.lax.scan(body, 0, (k, x))[1])(keys, steps))
  # CLAHE puts pixels into bins: where compilers round differently, one may fall on the other side
  # of an edge.
  assert np.mean(np.abs(out - expected) > 1e-4) < 0.01


def test_augment_needs_no_jit():
  images, config = some_images(), aug.Augmentation(horizontal_flip=0.5, brightness=0.2)
  np.testing.assert_allclose(
    aug.augment(KEY, images, config), jitted(aug.augment, config=config)(KEY, images), atol=1e-6
  )


def test_augment_draws_do_not_depend_on_what_else_is_on():
  images = some_images()
  config = aug.Augmentation(horizontal_flip=0.5, vertical_flip=0.5, cutout=0.3)
  plain = jitted(aug.augment, config=config)(KEY, images)
  for more, atol in (({"rotation_degrees": 1e-6, "gamma": 1e-9, "noise": 1e-9}, 1e-5),):
    out = jitted(aug.augment, config=dataclasses.replace(config, **more))(KEY, images)
    np.testing.assert_allclose(out, plain, atol=atol)


def test_mixup_follows_equation_and_permutes():
  images = some_images(num=64, height=6, width=5)
  labels = jnp.arange(64, dtype=jnp.int32)
  mixed = MIXUP(KEY, images, labels, 0.4)
  partner, lam = np.asarray(mixed.labels_b), np.asarray(mixed.lam, np.float64)
  assert sorted(partner) == list(range(64))
  assert (partner != np.arange(64)).mean() > 0.8
  np.testing.assert_array_equal(mixed.labels_a, labels)
  x, share = np.asarray(images, np.float64), lam[:, None, None, None]
  np.testing.assert_allclose(mixed.images, share * x + (1 - share) * x[partner], atol=1e-6)
  soft = np.asarray(aug.mixed_labels(mixed, 64))
  np.testing.assert_allclose(
    soft, lam[:, None] * np.eye(64) + (1 - lam)[:, None] * np.eye(64)[partner], atol=1e-6
  )
  one_hot = mixed._replace(
    labels_a=jnp.eye(64)[mixed.labels_a], labels_b=jnp.eye(64)[mixed.labels_b]
  )
  np.testing.assert_allclose(aug.mixed_labels(one_hot, 64), soft, atol=1e-6)
  off = MIXUP(KEY, images, jnp.eye(64), 0.0)
  np.testing.assert_array_equal(off.images, images)
  np.testing.assert_array_equal(aug.mixed_labels(off, 64), np.eye(64))
  np.testing.assert_array_equal(off.labels_b, np.eye(64)[partner])


@pytest.mark.parametrize("alpha", [0.1, 5.0])
def test_mixup_shares_are_beta_distributed(alpha):
  lam = np.asarray(
    jitted(aug.mixup, alpha=alpha)(KEY, jnp.zeros((4000, 1, 1, 1)), jnp.zeros(4000, jnp.int32)).lam
  )
  assert np.isfinite(lam).all()
  assert lam.mean() == pytest.approx(0.5, abs=0.03)
  assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_mixup_leaves_some_images_as_they_are():
  images, labels = jnp.arange(4000.0).reshape(4000, 1, 1, 1), jnp.zeros(4000, jnp.int32)
  mixed = jitted(aug.mixup, alpha=5.0, share=0.9)(KEY, images, labels)
  stays = np.asarray(mixed.lam) == 1
  assert 0.88 < 1 - stays.mean() < 0.92
  np.testing.assert_array_equal(mixed.images[stays], images[stays])
  assert (mixed.images[~stays] != images[~stays]).mean() > 0.99
  assert mixed.lam[~stays].mean() == pytest.approx(0.5, abs=0.03)


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(st.lists(st.booleans(), min_size=8, max_size=8), st.integers(0, 2**31))
def test_mixup_never_mixes_padding_with_real_images(real, seed):
  weights = jnp.asarray(real, jnp.float32)
  labels = jnp.arange(8, dtype=jnp.int32)
  mixed = MIXUP(jax.random.key(seed), jnp.zeros((8, 1, 1, 1)), labels, 0.0, weights)
  partner = np.asarray(mixed.labels_b)
  assert sorted(partner) == list(range(8))
  np.testing.assert_array_equal(np.asarray(real)[partner], real)


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(st.lists(st.integers(1, 10**6), min_size=4, max_size=4))
def test_inverse_frequency_has_mean_one_under_the_data(counts):
  n = np.array(counts)
  weights = np.asarray(aug.inverse_frequency(n))
  assert weights.dtype == np.float32
  np.testing.assert_allclose(weights, n.sum() / (len(n) * n), rtol=1e-6)
  assert (n * weights).sum() / n.sum() == pytest.approx(1, rel=1e-5)


def test_inverse_frequency_of_an_empty_class():
  with pytest.raises(ValueError, match=r"classes \[1\].*at least one example"):
    aug.inverse_frequency(np.array([3, 0, 4]))
  with pytest.raises(ValueError, match="classes"):
    aug.inverse_frequency(jnp.array([3.0, jnp.nan]))
  with pytest.raises(ValueError, match="one number for each class"):
    aug.inverse_frequency(np.ones((2, 2)))
  traced = jax.jit(aug.inverse_frequency)(jnp.array([3, 0, 1]))
  np.testing.assert_allclose(traced, [4 / 6, 0, 2], rtol=1e-6)


@pytest.mark.parametrize(
  "field", [f for f in aug.Augmentation.__dataclass_fields__ if f != "elastic_grid"]
)
@pytest.mark.parametrize("value", [-0.1, 1000.0, float("nan")])
def test_strengths_out_of_bounds_are_refused(field, value):
  with pytest.raises(ValueError, match=f"{field} is {value}"):
    aug.Augmentation(**{field: value})


def test_bad_arguments_are_refused():
  images = some_images()
  for bad in ((images * 255).astype(jnp.uint8), images[0], images.astype(jnp.bfloat16)):
    for function in (*ALL.values(), *OFF.values(), lambda _, x: equalize_adapthist(x)):
      with pytest.raises(ValueError, match=r"expected float32 \[B, H, W, C\]"):
        function(KEY, bad)
  labels = jnp.zeros(4, jnp.int32)
  for call, match in (
    (lambda: warp.affine(KEY, images, scale=1.0), "scale is 1.0"),
    (lambda: aug.gamma(KEY, images, -1.0), "gamma is -1.0"),
    (lambda: warp.elastic(KEY, images, 0.1, grid=1), "grid of 1"),
    (lambda: aug.Augmentation(elastic_grid=1), "elastic_grid is 1"),
    (lambda: equalize_adapthist(images, tiles=21), "21 tiles"),
    (lambda: equalize_adapthist(images, num_bins=1), "num_bins is 1"),
    (lambda: aug.mixup(KEY, images, labels, -1.0), "alpha is -1.0"),
    (lambda: aug.mixup(KEY, images, labels[:3], 1.0), "give one for each image"),
    (lambda: aug.mixup(KEY, images, labels, 1.0, share=1.5), "share is 1.5"),
    (
      lambda: aug.mixed_labels(aug.mixup(KEY, images, jnp.eye(4, dtype=jnp.float32), 0.0), 3),
      "expected 3",
    ),
  ):
    with pytest.raises(ValueError, match=match):
      call()
