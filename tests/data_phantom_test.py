"""The synthetic phantom: the same images however they are made, and pictures that look like
radiographs.
"""

import jax
import numpy as np
import pytest

from primia_jax.data import radiograph
from primia_jax.data.phantom import LABEL_NAMES, SiteStyle, phantom, render, site_styles

SIZE = 32
draw = jax.jit(render, static_argnames="size")
STYLES = (
  SiteStyle(0.8, 0.002, (0.6, 0.2, 0.2)),
  SiteStyle(1.2, 0.01, (0.1, 0.1, 0.8)),
  SiteStyle(),
)


@pytest.fixture(scope="module")
def dataset():
  return phantom((40, 25, 10), size=SIZE, seed=5, styles=STYLES)


@pytest.fixture(scope="module")
def by_label():
  """The same 48 children, once healthy and once with each disease: float32 [L, N, H, W]."""
  keys = jax.random.split(jax.random.key(0), 48)
  return np.stack(
    [[draw(key, label, SIZE, 1.0, 0.004) for key in keys] for label in range(len(LABEL_NAMES))]
  )


def test_dataset_says_what_it_is(dataset):
  assert dataset.name == "synthetic phantom"
  assert dataset.label_names == ("normal", "bacterial", "viral")
  assert dataset.images.shape == (75, SIZE, SIZE, 1)
  assert dataset.images.dtype == np.uint8
  assert dataset.labels.dtype == np.int32
  assert len(set(dataset.groups)) == 75
  np.testing.assert_array_equal(
    dataset.columns["site"], np.repeat(np.arange(3, dtype=np.int32), (40, 25, 10))
  )


def test_one_process_makes_the_images_all_others_see(dataset):
  alone = phantom((40, 25, 10), size=SIZE, seed=5, styles=STYLES, only_site=1)
  np.testing.assert_array_equal(alone.images, dataset.images[40:65])
  np.testing.assert_array_equal(alone.labels, dataset.labels[40:65])
  np.testing.assert_array_equal(alone.groups, dataset.groups[40:65])
  np.testing.assert_array_equal(alone.columns["site"], np.ones(25))


def test_image_depends_neither_on_how_many_are_made_nor_on_the_batch(dataset):
  some = phantom((0, 3, 1), size=SIZE, seed=5, styles=STYLES, first=9)
  rows = [49, 50, 51, 74]
  np.testing.assert_array_equal(some.images, dataset.images[rows])
  np.testing.assert_array_equal(some.groups, dataset.groups[rows])
  more = phantom(300, size=SIZE, seed=5, styles=STYLES)  # more than one chunk
  np.testing.assert_array_equal(np.bincount(more.columns["site"]), [100, 100, 100])
  np.testing.assert_array_equal(more.images[100:125], dataset.images[40:65])


def test_images_are_those_of_render(dataset):
  for row, site, index in ((0, 0, 0), (41, 1, 1), (74, 2, 9)):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), site), index)
    style, label = STYLES[site], int(dataset.labels[row])
    image = draw(jax.random.split(key)[0], label, SIZE, style.gain, style.blur)
    assert image.dtype == np.float32
    np.testing.assert_allclose(255 * image, dataset.images[row, ..., 0], atol=0.51)


def test_images_do_not_change_under_x64(dataset):
  with jax.enable_x64(True):
    wide = phantom((4, 0, 0), size=SIZE, seed=5, styles=STYLES)
  np.testing.assert_array_equal(wide.images, dataset.images[:4])


def test_other_seeds_sites_and_indices_are_other_images(dataset):
  other = phantom((40, 25, 10), size=SIZE, seed=6, styles=STYLES)
  images = np.concatenate([dataset.images, other.images]).reshape(150, -1)
  assert len(np.unique(images, axis=0)) == 150
  assert not set(dataset.groups) & set(other.groups)


def test_total_is_spread_evenly():
  sites = phantom(5, size=16, styles=STYLES).columns["site"]
  np.testing.assert_array_equal(sites, [0, 0, 1, 1, 2])


def test_labels_follow_the_class_mix():
  num = 4000
  mix = (0.7, 0.3, 0.0)
  labels = phantom(num, size=16, styles=(SiteStyle(class_mix=mix),)).labels
  counts = np.bincount(labels, minlength=3)
  assert counts[2] == 0  # a class of probability 0 never comes
  assert abs(counts[0] - 0.7 * num) < 4 * np.sqrt(num * 0.7 * 0.3)
  for label in range(3):
    only = tuple(float(label == other) for other in range(3))
    assert (phantom(9, size=16, styles=(SiteStyle(class_mix=only),)).labels == label).all()


@pytest.mark.parametrize("size", [16, 32, 65])
def test_any_size_shows_a_thorax(size):
  """Dark air beside the body, dark lungs, bright mediastinum, heart on the viewer's right, bright
  abdomen.
  """
  mean = (
    phantom(24, size=size, styles=(SiteStyle(class_mix=(1.0, 0.0, 0.0)),)).images[..., 0].mean(0)
  )

  def at(x, y, half=0.06):
    low_x, high_x, low_y, high_y = (
      round((c + 1) / 2 * size)
      for c in (x - half, x + half + 2 / size, y - half, y + half + 2 / size)
    )
    return mean[low_y:high_y, low_x:high_x].mean()

  lungs = (at(-0.38, 0.0) + at(0.42, -0.2)) / 2
  assert at(-0.9, 0.6) < 0.45 * lungs
  assert at(0.0, 0.0) > 1.25 * lungs
  assert at(0.0, 0.75) > 1.25 * lungs
  assert at(0.28, 0.2) > at(-0.28, 0.2) + 10


def test_resolution_changes_the_grain_and_not_the_child():
  key, label = jax.random.key(3), 0
  small, large = (np.asarray(draw(key, label, size, 1.0, 0.02)) for size in (32, 64))
  pooled = large.reshape(32, 2, 32, 2).mean((1, 3))
  assert np.corrcoef(small.ravel(), pooled.ravel())[0, 1] > 0.97


def test_texture_has_unit_variance_and_the_asked_power_law():
  size, beta = 64, 2.5
  white = jax.random.normal(jax.random.key(1), (200, 2, size, size))
  fields = np.stack(jax.vmap(lambda noise: radiograph._texture(noise, np.float32(beta)))(white))
  np.testing.assert_allclose(np.mean(fields**2, axis=(1, 2, 3)), 1.0, atol=0.15)
  assert abs(np.mean(fields[0] * fields[1])) < 0.05  # the two are independent
  spectrum = np.mean(np.abs(np.fft.fft2(fields)) ** 2, axis=(0, 1))
  frequency = np.hypot(*np.meshgrid(*[np.fft.fftfreq(size, 1 / size)] * 2))
  ring = (frequency > 1) & (frequency < 30)
  slope = np.polyfit(np.log(frequency[ring]), np.log(spectrum[ring]), 1)[0]
  assert slope == pytest.approx(-beta, abs=0.05)


def test_smoothing_keeps_constants_and_spreads_a_point():
  flat = np.full((32, 32), 0.7, np.float32)
  np.testing.assert_allclose(radiograph._smooth(flat, 3.0), flat, rtol=1e-5)
  point = np.zeros((33, 33), np.float32)
  point[16, 16] = 1
  spread = np.asarray(radiograph._smooth(point, 2.0))
  steps = np.arange(33) - 16
  assert spread.sum() == pytest.approx(1, rel=1e-4)
  assert (spread.sum(0) * steps**2).sum() == pytest.approx(4.0, rel=1e-3)
  np.testing.assert_allclose(radiograph._smooth(point, 0.0), point, atol=1e-6)  # no blur at all


def test_bacterial_is_focal_and_viral_is_on_both_sides(by_label):
  """Both diseases replace air, so both brighten: bacterial one lung, viral both."""
  normal, bacterial, viral = by_label
  for ill in (bacterial, viral):
    assert (ill - normal).min() > -0.02
    assert ((ill - normal).max((1, 2)) > 0.01).all()
  left, right = (
    (slice(None), slice(None), slice(SIZE // 2)),
    (slice(None), slice(None), slice(SIZE // 2, None)),
  )

  def one_sidedness(ill):
    a, b = ((ill - normal)[half].sum((1, 2)) for half in (left, right))
    return np.abs(a - b) / (a + b)

  assert np.median(one_sidedness(bacterial)) > 0.7
  assert np.median(one_sidedness(viral)) < 0.4


def test_gain_brightens_less_when_it_is_higher_and_blur_removes_detail():
  key = jax.random.key(0)
  made = lambda gain, blur: np.asarray(draw(key, 0, 64, gain, blur))
  assert made(0.7, 0.004).mean() > made(1.0, 0.004).mean() + 0.03
  assert made(1.0, 0.004).mean() > made(1.4, 0.004).mean() + 0.03
  detail = lambda image: np.abs(np.diff(image, axis=0)).mean()
  assert detail(made(1.0, 0.0)) > detail(made(1.0, 0.01)) > detail(made(1.0, 0.03))


def test_images_use_the_grey_scale_without_saturating(by_label):
  assert by_label.min() >= 0
  assert by_label.max() <= 1
  assert (by_label == 1).mean() < 0.05
  inside = by_label[:, :, SIZE // 4 : -SIZE // 4, SIZE // 4 : -SIZE // 4]
  assert 0.35 < inside.mean() < 0.75
  assert (inside == 0).mean() < 0.01


def test_classes_differ_but_mild_cases_are_hard(by_label):
  """Severity varies: the mildest tenth brightens far less than the worst."""
  normal, bacterial, viral = by_label
  for ill in (bacterial, viral):
    change = np.sort((ill - normal).mean((1, 2)))
    assert change[4] < 0.5 * change[-5]


def test_site_styles_differ_and_depend_on_their_site_alone():
  styles = site_styles(6, seed=2)
  assert styles[:3] == site_styles(3, seed=2)
  assert styles[:3] != site_styles(3, seed=3)
  assert len(set(styles)) == 6
  assert all(0.7 <= style.gain <= 1.4 and 0.002 <= style.blur <= 0.012 for style in styles)
  spread = lambda alpha: np.std([style.class_mix for style in site_styles(50, concentration=alpha)])
  assert spread(0.5) > spread(4.0) > spread(100.0)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"gain": 0.0}, "gain is 0.0"),
    ({"gain": float("nan")}, "gain is nan"),
    ({"blur": -0.1}, "blur is -0.1"),
    ({"class_mix": (0.5, 0.5)}, "3 probabilities"),
    ({"class_mix": (0.5, 0.6, -0.1)}, "add up to 1"),
    ({"class_mix": (0.5, 0.5, 0.5)}, "add up to 1"),
  ],
)
def test_bad_style_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    SiteStyle(**arguments)


@pytest.mark.parametrize(
  ("num_images", "arguments", "message"),
  [
    (4, {"styles": ()}, "styles is empty"),
    ((4, 5), {}, "each of 1 styles"),
    (-1, {}, "num_images is -1"),
    (4, {"size": 8}, "size is 8 pixels"),
    (4, {"seed": -1}, "seed -1"),
    (4, {"first": 2**31 - 2}, "out of range"),
    (4, {"only_site": 1}, "only_site is 1"),
  ],
)
def test_bad_request_is_refused(num_images, arguments, message):
  with pytest.raises(ValueError, match=message):
    phantom(num_images, **arguments)


def test_bad_number_of_styles_is_refused():
  with pytest.raises(ValueError, match="num_sites is 0"):
    site_styles(0)
  with pytest.raises(ValueError, match="concentration is 0"):
    site_styles(2, concentration=0)


def test_no_images_is_an_empty_dataset():
  empty = phantom((0, 0, 0), styles=STYLES)
  assert len(empty) == 0
  assert empty.images.shape == (0, 64, 64, 1)
