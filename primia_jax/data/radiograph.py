"""One image of the synthetic phantom: a chest X-ray of a child, simulated from a key.

Ellipsoids of tissue, air and bone are projected by Beer and Lambert's law, I = I_0 exp(-integral of
mu). The projection is blurred, veiled by scatter, counted with Poisson noise, and shown as -log I.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.types import Array, Key

# What varies between images, each uniformly between two bounds. The frame is [-1, 1] x [-1, 1]. y
# points down. +x is the viewer's right, hence the patient's left, where the heart is.
_VARIATION = {
  "turn": (-0.09, 0.09),  # of the pose, in radians
  "shift_x": (-0.07, 0.07),
  "shift_y": (-0.08, 0.06),
  "zoom_x": (0.98, 1.24),
  "zoom_y": (0.96, 1.16),
  "oblique": (-0.04, 0.04),  # how far the mediastinum moves sideways when the child is turned
  "thickness": (2.3, 2.85),  # optical depth of the body
  "waist": (0.66, 0.8),
  "arm_x": (0.82, 1.0),
  "arm_y": (-0.78, -0.5),
  "chin": (-1.45, -1.15),
  "thorax_x": (0.56, 0.64),
  "thorax_y": (0.88, 1.0),
  "air": (1.25, 1.65),  # how much optical depth the lungs' air removes: inspiration
  "mediastinum": (0.1, 0.155),
  "thymus": (0.0, 0.1),
  "heart_x": (0.08, 0.16),
  "heart_y": (0.18, 0.28),
  "heart_width": (0.25, 0.35),
  "heart_height": (0.36, 0.48),
  "dome_right": (0.36, 0.48),
  "dome_drop": (0.0, 0.08),  # how much lower the left dome lies, pushed down by the heart
  "stomach": (-0.3, 0.6),  # how much optical depth its air bubble removes; none if negative
  "rib_phase": (0.0, 1.0),
  "rib_period": (0.135, 0.165),
  "rib_slope": (0.2, 0.38),
  "bone": (0.25, 0.5),
  "clavicle": (-0.66, -0.54),
  "vessels": (0.2, 0.4),
  "beta": (2.3, 3.0),  # exponent of the texture's power law
  "texture": (0.03, 0.07),
  "scatter": (0.15, 0.5),  # scattered over primary radiation
  "exposure": (0.8, 1.2),
  "dose": (1e8, 1e9),  # photons on the whole detector, however many pixels share them
  "severity": (0.0, 1.0),  # of the disease, if any; the entries below place a consolidation
  "lesion_side": (-1.0, 1.0),
  "lesion_x": (0.24, 0.46),
  "lesion_y": (-0.38, 0.3),
  "lesion_width": (0.15, 0.28),
  "lesion_height": (0.16, 0.32),
  "lesion_turn": (-0.8, 0.8),
}


def _radius2(x, y, center_x, center_y, width, height, turn=0.0) -> Array:
  """Squared distance from an ellipse's centre, scaled to be 1 on its edge."""
  cos, sin = jnp.cos(turn), jnp.sin(turn)
  dx, dy = x - center_x, y - center_y
  return ((cos * dx + sin * dy) / width) ** 2 + ((cos * dy - sin * dx) / height) ** 2


def _chord(radius2: Array) -> Array:
  """Relative length of a ray's path through an ellipsoid; 1 through its centre."""
  return jnp.sqrt(jnp.maximum(1.0 - radius2, 0.0))


def _inside(distance: Array, softness: float) -> Array:
  """A soft step: 1 where `distance` is well above 0, and 0 where it is well below."""
  return jax.nn.sigmoid(distance / softness)


def _texture(white: Array, beta: Array) -> tuple[Array, Array]:
  """Turns white noise [2, H, W] into two independent random fields [H, W] of unit variance with
  power spectrum 1 / f^beta.
  """
  size = white.shape[-1]
  frequency = np.fft.fftfreq(size, 1 / size).astype(np.float32)
  power = np.square(frequency)[:, None] + np.square(frequency)[None, :]
  log_power = np.log(np.where(power == 0, 1, power))  # the mean (power 0) is dropped below
  amplitude = jnp.where(power == 0, 0.0, jnp.exp(-0.25 * beta * log_power))
  amplitude *= size * size * jax.lax.rsqrt(jnp.sum(jnp.square(amplitude)))
  field = jnp.fft.ifft2(jax.lax.complex(amplitude * white[0], amplitude * white[1]))
  return field.real, field.imag


def _smooth(image: Array, sigma: Array | float) -> Array:
  """Gaussian blur of [H, W]; `sigma` is in pixels. At the edges the weights are renormalised."""
  steps = np.arange(image.shape[0], dtype=np.float32)
  distance2 = np.square(steps[:, None] - steps[None, :])
  kernel = jnp.exp(-distance2 / (2.0 * jnp.square(sigma) + 1e-6))
  kernel /= jnp.sum(kernel, axis=1, keepdims=True)
  return jnp.einsum("ih,hw,jw->ij", kernel, image, kernel, precision="highest")


def _lesions(
  label: Array | int,
  a: dict[str, Array],
  x: Array,
  y: Array,
  hilum: Array,
  field: Array,
  ridges: Array,
):
  """The fraction of air that disease replaces at each point, [H, W]. Even the mildest case replaces
  some.
  """
  center_x = jnp.sign(a["lesion_side"]) * a["lesion_x"]
  radius2 = _radius2(
    x, y, center_x, a["lesion_y"], a["lesion_width"], a["lesion_height"], a["lesion_turn"]
  )
  focal = (0.35 + 0.65 * a["severity"]) * _inside(1.0 - radius2 + 0.4 * field, 0.2)
  diffuse = (0.28 + 0.6 * a["severity"]) * (
    0.35 + 0.45 * _inside(field, 0.5) + 0.6 * ridges * (0.4 + hilum)
  )
  return jnp.where(label == 1, focal, jnp.where(label == 2, jnp.minimum(diffuse, 0.9), 0.0))


def _optical_depth(label: Array | int, a: dict[str, Array], white: Array) -> Array:
  """The integral of the attenuation coefficient along the ray to each pixel, [H, W].

  Args:
    label: scalar int32.
    a: a value for each name in `_VARIATION`.
    white: [2, H, W] white noise, from which the texture is made.
  """
  size = white.shape[-1]
  axis = (2.0 * np.arange(size, dtype=np.float32) + 1.0) / size - 1.0
  column, row = axis[None, :] - a["shift_x"], axis[:, None] - a["shift_y"]
  cos, sin = jnp.cos(a["turn"]), jnp.sin(a["turn"])
  x, y = (cos * column + sin * row) / a["zoom_x"], (cos * row - sin * column) / a["zoom_y"]
  mid = x - a["oblique"] * (1.0 - y)  # sideways from the spine
  side = jnp.abs(x)
  field, grain = _texture(white, a["beta"])
  ridges = jnp.exp(-jnp.square(grain / 0.3))  # thin branching lines, where the field crosses zero

  # Soft tissue: trunk, arms, neck and head, joined where they overlap.
  trunk = _chord(
    jnp.square(x / (a["waist"] + 0.1 * y * y)) + jnp.square(jnp.square((y - 0.3) / 1.15))
  )
  arms = _radius2(side, y, a["arm_x"], a["arm_y"], 0.22, 0.62, -0.7)
  shoulders = _chord(_radius2(side, y, 0.3, -0.6, 0.66, 0.36, 0.25))
  neck = _chord(_radius2(x, y, 0.0, a["chin"], 0.42, 0.42)) + 0.5 * _chord(
    _radius2(x, y, 0.0, -0.85, 0.3, 0.5)
  )
  body = jnp.sqrt(
    jnp.square(trunk)
    + jnp.square(0.6 * _chord(arms))
    + jnp.square(0.5 * shoulders)
    + jnp.square(0.7 * neck)
    + 1e-6
  )

  # Air: the thorax without mediastinum, heart and everything below the diaphragm's two domes.
  thorax2 = _radius2(x, y, 0.0, 0.28, a["thorax_x"], a["thorax_y"])
  hollow = jnp.maximum(1.0 - thorax2, 0.0) ** 0.4
  left = _inside(x, 0.04)
  dome = a["dome_right"] + a["dome_drop"] * left + 1.7 * jnp.square(side - 0.26)
  lung = hollow * _inside(dome - y, 0.012)
  narrow = a["mediastinum"] + a["thymus"] * jnp.exp(-jnp.square((y + 0.28) / 0.2))
  lung *= _inside(jnp.abs(mid) - narrow, 0.022)
  heart2 = _radius2(mid, y, a["heart_x"], a["heart_y"], a["heart_width"], a["heart_height"], -0.45)
  lung *= 1.0 - 0.85 * _inside(1.0 - heart2, 0.08)
  hilum = jnp.exp(-jnp.square((jnp.abs(mid) - 0.2) / 0.13) - jnp.square((y + 0.02) / 0.26))
  lung *= 1.0 - a["vessels"] * hilum * (0.25 + 0.75 * ridges) - 0.1 * ridges
  lung *= 1.0 - _lesions(label, a, x, y, hilum, field, ridges)
  trachea = _inside(0.035 - jnp.abs(mid), 0.01) * _inside(-0.22 - y, 0.04)
  stomach = jnp.maximum(a["stomach"], 0.0) * _chord(
    _radius2(x, y, 0.3, a["dome_right"] + 0.3, 0.2, 0.14, -0.4)
  )

  # Bone: ribs are bands of constant phase. They slope down sideways at the back, and down towards
  # the middle in front.
  reach = side / a["thorax_x"]
  back = (y - a["rib_slope"] * reach * reach + 0.12 * reach) / a["rib_period"] + a["rib_phase"]
  front = (y + a["rib_slope"] * 1.3 * reach) / (1.15 * a["rib_period"]) + a["rib_phase"]
  cage = _inside(1.06 - thorax2, 0.03) * _inside(0.62 - y, 0.06)
  edge = 1.0 + 1.2 * thorax2**4  # rays along the chest wall cross more of a rib
  ribs = cage * edge * _band(back) + 0.55 * cage * _inside(reach - 0.5, 0.06) * _band(front)
  spine = _inside(0.085 - jnp.abs(mid), 0.012) * (
    0.75 + 0.25 * jnp.cos(2 * np.pi * y / (0.9 * a["rib_period"]))
  )
  arch = a["clavicle"] - 0.22 * (side - 0.1) + 0.05 * jnp.sin(7.0 * side)
  clavicles = (
    jnp.exp(-jnp.square((y - arch) / 0.024))
    * _inside(side - 0.07, 0.015)
    * _inside(0.56 - side, 0.03)
  )
  humerus = _chord(_radius2(side, y, a["arm_x"], a["arm_y"], 0.05, 0.42, -0.7))
  bone = a["bone"] * (ribs + 1.3 * spine + 1.3 * clavicles + 1.5 * humerus)

  tissue = a["thickness"] * body * (1.0 + a["texture"] * field)
  air = a["air"] * lung + 0.35 * trachea + stomach
  return jnp.maximum(tissue - air + bone * jnp.minimum(2.0 * body, 1.0), 0.0)


def _band(phase: Array) -> Array:
  """One smooth bump per period."""
  return jnp.exp(2.5 * (jnp.cos(2 * np.pi * phase) - 1.0))


def render(
  key: Key, label: Array | int, size: int, gain: Array | float, blur: Array | float
) -> Array:
  """Draws one radiograph of the synthetic phantom.

  Args:
    key: decides the child, the pose, the lesion and the noise.
    label: scalar int32, an index into `phantom.LABEL_NAMES`.
    size: H = W in pixels; static.
    gain: exposure relative to the usual one; see `phantom.SiteStyle`.
    blur: standard deviation of the detector's blur, as a fraction of the width.

  Returns:
    float32 [H, W] in [0, 1]; bone and heart are bright, air is dark.
  """
  variation_key, noise_key = jax.random.split(key)
  low, high = np.asarray(list(_VARIATION.values()), np.float32).T
  a = dict(
    zip(
      _VARIATION, jax.random.uniform(variation_key, low.shape, jnp.float32, low, high), strict=True
    )
  )
  white = jax.random.normal(noise_key, (3, size, size), jnp.float32)
  primary = _smooth(jnp.exp(-_optical_depth(label, a, white[:2])), blur * float(size))
  intensity = (primary + a["scatter"] * _smooth(primary, 0.12 * size)) * a["exposure"] * gain
  # A pixel gets tens (at 512 pixels) to thousands (at 64) of photons, so the Poisson distribution
  # is nearly normal.
  mean_count = intensity * a["dose"] / float(size * size)
  count = mean_count + jnp.sqrt(mean_count) * white[2]
  shown = -jnp.log(jnp.maximum(count * float(size * size) / a["dose"], 1e-3))
  return jnp.clip(shown / 2.9, 0.0, 1.0)
