"""The default data set, a synthetic phantom: chest X-rays of children, computed from a seed.

`radiograph` simulates each image. `bacterial` fills the air of one lung with a focal consolidation;
`viral` fills the air of both with a diffuse, textured haze. These signs distinguish the two in
children (Kermany et al., Cell 172, 2018, Figure 6). Mild cases are nearly invisible. No image shows
a patient, and no score on these images says anything about patients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.data.dataset import Dataset
from primia_jax.data.radiograph import render
from primia_jax.types import Array, Key

LABEL_NAMES = ("normal", "bacterial", "viral")
NAME = "synthetic phantom"
MIN_SIZE = 16  # pixels; below it the ribs and the milder lesions vanish


@dataclasses.dataclass(frozen=True)
class SiteStyle:
  """How the images of one hospital differ from those of another.

  Attributes:
    gain: exposure relative to the usual one. Less makes an image brighter (as on film) and noisier.
    blur: standard deviation of the detector's Gaussian blur, as a fraction of the image's width.
    class_mix: probability of each class, in the order of `LABEL_NAMES`.
  """

  gain: float = 1.0
  blur: float = 0.004
  class_mix: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)

  def __post_init__(self):
    if not 0 < self.gain < np.inf:
      raise ValueError(f"gain is {self.gain}; expected a positive number, 1 for the usual exposure")
    if not 0 <= self.blur <= 0.25:
      raise ValueError(
        f"blur is {self.blur}; expected a fraction of the image's width from 0 to 0.25"
      )
    mix = self.class_mix
    if len(mix) != len(LABEL_NAMES) or not min(mix) >= 0 or not abs(sum(mix) - 1) < 1e-6:
      raise ValueError(
        f"class_mix is {mix}; expected {len(LABEL_NAMES)} probabilities, {LABEL_NAMES}, that add "
        f"up to 1"
      )


def site_styles(
  num_sites: int, seed: int = 0, *, concentration: float = 4.0
) -> tuple[SiteStyle, ...]:
  """Draws plausible, different styles for sites. The style of site s depends on (seed, s) alone.

  Args:
    num_sites: S, the number of sites.
    seed: any non-negative integer.
    concentration: of the symmetric Dirichlet distribution of the class mix. Smaller values skew the
      classes more.

  Returns:
    S styles: gain in [0.7, 1.4], log-uniform; blur in [0.002, 0.012], uniform.
  """
  if num_sites < 1:
    raise ValueError(f"num_sites is {num_sites}; at least 1 is needed")
  if not concentration > 0:
    raise ValueError(f"concentration is {concentration}; expected a positive number")
  styles = []
  for site in range(num_sites):
    rng = np.random.default_rng((seed, site))
    gain = float(np.exp(rng.uniform(np.log(0.7), np.log(1.4))))
    blur = float(rng.uniform(0.002, 0.012))
    mix = rng.dirichlet([concentration] * len(LABEL_NAMES))
    styles.append(SiteStyle(gain, blur, tuple(mix.tolist())))
  return tuple(styles)


@functools.partial(jax.jit, static_argnames="size")
def _render_chunk(
  key: Key, sites: Array, indices: Array, gains: Array, blurs: Array, bounds: Array, size: int
):
  """Draws images uint8 [M, H, W] and labels int32 [M] for these sites and indices."""

  def one(site, index, gain, blur, bound):
    image_key, label_key = jax.random.split(
      jax.random.fold_in(jax.random.fold_in(key, site), index)
    )
    label = jnp.sum(jax.random.uniform(label_key, (), jnp.float32) >= bound, dtype=jnp.int32)
    image = render(image_key, label, size, gain, blur)
    return jnp.round(255.0 * image).astype(jnp.uint8), label

  return jax.vmap(one)(sites, indices, gains, blurs, bounds)


def phantom(
  num_images: int | Sequence[int],
  *,
  size: int = 64,
  seed: int = 0,
  styles: Sequence[SiteStyle] = (SiteStyle(),),
  first: int = 0,
  only_site: int | None = None,
) -> Dataset:
  """Makes the synthetic phantom: the images of all sites, in the order of the sites.

  Image i of site s depends only on (seed, s, i), the site's style and the size. It does not depend
  on how many images are made, or for which other sites. A process of a deployment passes
  `only_site` and gets the same images that a process with all sites gets for it.

  Args:
    num_images: [S], for each site; or a total, spread over the sites as evenly as possible.
    size: H = W in pixels.
    seed: any integer from 0 to 2^32 - 1; another seed gives other children.
    styles: one for each of the S sites; see `site_styles`.
    first: index of each site's first image. Disjoint ranges [first, first + number) share no image.
    only_site: make only this site's images.

  Returns:
    A `Dataset` named "synthetic phantom": uint8 images [N, size, size, 1], each in a group of its
    own, and a column "site" (int32) with each image's site.

  Raises:
    ValueError: an argument is out of its range.
  """
  num_sites = len(styles)
  if not num_sites:
    raise ValueError("styles is empty; give one for each site")
  if isinstance(num_images, int):
    counts = [
      num_images // num_sites + (site < num_images % num_sites) for site in range(num_sites)
    ]
  else:
    counts = list(num_images)
  if len(counts) != num_sites or min(counts) < 0:
    raise ValueError(
      f"num_images is {num_images}; expected a total or, for each of {num_sites} styles, a count "
      f">= 0"
    )
  if size < MIN_SIZE:
    raise ValueError(f"size is {size} pixels; expected at least {MIN_SIZE}")
  if not 0 <= seed < 2**32 or first < 0 or first + max(counts) > 2**31:
    raise ValueError(
      f"seed {seed} or first {first} is out of range; expected 0 <= seed < 2^32, 0 <= first < 2^31"
    )
  if only_site is not None and not 0 <= only_site < num_sites:
    raise ValueError(
      f"only_site is {only_site}; expected one of the {num_sites} sites, 0 to {num_sites - 1}"
    )

  made = range(num_sites) if only_site is None else (only_site,)
  sites = np.repeat(np.asarray(made, np.int32), [counts[site] for site in made])
  indices = np.concatenate(
    [np.arange(first, first + counts[site], dtype=np.int32) for site in made]
  )
  gains = np.asarray([style.gain for style in styles], np.float32)
  blurs = np.asarray([style.blur for style in styles], np.float32)
  mixes = np.cumsum([style.class_mix for style in styles], axis=1)
  bounds = (mixes / mixes[:, -1:])[:, :-1].astype(np.float32)

  # All chunks have one shape (the last is filled up), so one compiled program gives the same bits
  # in every batch.
  chunk = int(np.clip(2**18 // size**2, 1, 128))
  images = np.empty((len(sites), size, size, 1), np.uint8)
  labels = np.empty(len(sites), np.int32)
  for start in range(0, len(sites), chunk):
    rows = np.arange(start, min(start + chunk, len(sites)))
    site, index = sites[np.resize(rows, chunk)], indices[np.resize(rows, chunk)]
    image, label = _render_chunk(
      jax.random.key(seed), site, index, gains[site], blurs[site], bounds[site], size=size
    )
    images[rows, ..., 0], labels[rows] = (
      np.asarray(image)[: len(rows)],
      np.asarray(label)[: len(rows)],
    )
  groups = np.asarray(
    [f"{seed}-{site}-{index}" for site, index in zip(sites, indices, strict=True)], np.str_
  )
  one_each = np.ones(len(groups), bool)  # each image is another child's
  return Dataset(images, labels, LABEL_NAMES, groups, {"site": sites}, NAME, one_each)
