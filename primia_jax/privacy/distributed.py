"""Differential privacy of sites by distributed noise: each site adds a share of it before masking,
and nobody adds all of it.

The distributed discrete Gaussian (Kairouz, Liu, Steinke 2021, "The distributed discrete Gaussian
mechanism for federated learning with secure aggregation", algorithms 1 and 2) and the Skellam
mechanism (Agarwal, Kairouz, Liu 2021, "The Skellam mechanism for differentially private federated
learning"). A site clips its update, rotates it (`rotation`), scales it to a grid, rounds it at
random under a bound on its norm, and adds integer noise (`discrete`) modulo 2^k. Secure aggregation
opens the sum, which `decode` takes back.

Who learns what: whoever sees the opened sums learns of one site's update, against an update of zero
in its place, no more than `distributed_cost.epsilon` says. This assumes that secure aggregation
opens only sums of at least `min_survivors` sites, of which at most `num_colluding` reveal or leave
out their noise, and that it keeps single messages hidden; that sites' secrets are fresh; and that
ChaCha20 is a pseudorandom function. Noise is calibrated to the honest sites of the smallest sum.
With more survivors its variance exceeds the promised one by the factor num_survivors / num_honest.
What a site sent is hidden; that it took part is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import native, prng, ring
from primia_jax.privacy import discrete, rotation
from primia_jax.types import Array, Key, PyTree

# of the norm, left for float32: clipping, rotation and sums of squares are off by less
_SLACK = 2.0**-12
_LARGEST = 2.0**30  # numbers on the grid stay below; float32 holds them to 2^-24 of them


@dataclasses.dataclass(frozen=True)
class DistributedNoise:
  """How sites encode their updates, and what is promised of the sum.

  Attributes:
    dim: D, numbers in an update.
    num_sites: the most sites in a sum.
    min_survivors: the fewest; fewer must abort the round.
    l2_clip_norm: the largest norm of an update. A norm that changes from round to round is better
      divided out before `encode` and multiplied in after `decode`: each configuration is compiled
      anew.
    noise_multiplier: standard deviation of the honest sites' noise in a sum of `min_survivors`,
      over l2_clip_norm.
    num_bits: k, of the ring.
    num_colluding: sites, out of any sum, whose noise does not count.
    kind: "discrete_gaussian" or "skellam".
    beta: a rounding whose norm is beyond the bound is repeated; the probability of that is at most
      beta.
    chunk_size: of the rotation, a power of two.
    num_stddevs: a coordinate of the sum wraps around only where it is this many standard deviations
      out.
    num_tries: roundings. If all fail, numbers are rounded towards zero, which is biased and never
      beyond the bound.
  """

  dim: int
  num_sites: int
  min_survivors: int
  l2_clip_norm: float
  noise_multiplier: float
  num_bits: int = 16
  num_colluding: int = 0
  kind: discrete.Kind = "discrete_gaussian"
  beta: float = math.exp(-0.5)
  chunk_size: int = 2**16
  num_stddevs: float = 4.0
  num_tries: int = 8

  def __post_init__(self):
    for name in ("l2_clip_norm", "noise_multiplier", "num_stddevs"):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
    for name in ("dim", "min_survivors", "num_tries"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
    if self.kind not in ("discrete_gaussian", "skellam"):
      raise ValueError(f"kind={self.kind!r}; use 'discrete_gaussian' or 'skellam'")
    if not 0 < self.beta < 1:
      raise ValueError(f"beta={self.beta} must lie between 0 and 1")
    if self.min_survivors > self.num_sites:
      raise ValueError(
        f"min_survivors={self.min_survivors} of num_sites={self.num_sites}: no sum could be opened"
      )
    if not 0 <= self.num_colluding < self.min_survivors:
      raise ValueError(
        f"num_colluding={self.num_colluding} of min_survivors={self.min_survivors}: a sum might "
        f"hold no honest noise; use 0 to {self.min_survivors - 1}, or more survivors"
      )
    if not 2 <= self.num_bits <= 32:
      raise ValueError(f"num_bits={self.num_bits}; a ring of 2 to 32 bits is supported")
    rotation.padded_size(self.dim, self.chunk_size)
    if 4.0**self.num_bits <= self.num_sites * self.num_stddevs**2 or self.grid_stddev < 0.5:
      raise ValueError(
        f"num_bits={self.num_bits} is too small a ring for num_sites={self.num_sites}, "
        f"noise_multiplier={self.noise_multiplier}: a site's noise must have a standard deviation "
        f"of at least 1/2 on the grid; use more bits (see distributed_cost.choose_bits)"
      )

  @property
  def num_honest(self) -> int:
    """The fewest sites in a sum whose noise counts."""
    return self.min_survivors - self.num_colluding

  @property
  def chunk(self) -> int:
    """The chunk that is rotated: no larger than the update."""
    return min(self.chunk_size, 2 ** (self.dim - 1).bit_length())

  @property
  def size(self) -> int:
    """Ring elements of an encoded update: D, padded."""
    return rotation.padded_size(self.dim, self.chunk)

  @property
  def local_stddev(self) -> float:
    """Of one site's noise, in units of the update: num_honest of them make noise_multiplier *
    l2_clip_norm.
    """
    return self.noise_multiplier * self.l2_clip_norm / math.sqrt(self.num_honest)

  @property
  def scale(self) -> float:
    """Grid points in a unit: the finest with num_stddevs standard deviations of the fullest sum
    inside the ring.

    A coordinate's variance is at most scale^2 (c^2 n^2 / m + n local_stddev^2) + n / 4: of rotated
    updates, noise and rounding (as in Kairouz et al. 2021, with a chunk's m for d). Limited too by
    what the sampler and float32 can hold.
    """
    n, c = self.num_sites, self.l2_clip_norm
    room = (4.0**self.num_bits - n * self.num_stddevs**2) / (2 * self.num_stddevs) ** 2
    fits = math.sqrt(room / (c**2 * n**2 / self.chunk + n * self.local_stddev**2))
    return min(fits, discrete.MAX_STDDEV * (1 - 1e-12) / self.local_stddev, _LARGEST / c)

  @property
  def grid_stddev(self) -> float:
    """Of one site's noise on the grid: the sampler's parameter."""
    return self.scale * self.local_stddev

  @property
  def l2_sensitivity(self) -> float:
    """The largest norm of a rounded update, on the grid; holds always, as `encode` sends nothing
    beyond it.

    Kairouz et al. 2021, theorem 1 and proposition 22; d is the padded size.
    """
    c, d = self.scale * self.l2_clip_norm, self.size
    likely = c**2 + d / 4 + math.sqrt(2 * math.log(1 / self.beta)) * (c + math.sqrt(d) / 2)
    return min(math.sqrt(likely), c + math.sqrt(d))

  @property
  def l1_sensitivity(self) -> float:
    """The largest sum of magnitudes, on the grid: at most sqrt(d) times the norm, and its square
    for integers.
    """
    return min(math.sqrt(self.size), self.l2_sensitivity) * self.l2_sensitivity

  @property
  def sensitivity_inflation(self) -> float:
    """By what rounding multiplies the sensitivity; a report states it."""
    return self.l2_sensitivity / (self.scale * self.l2_clip_norm)

  @property
  def wrap_probability(self) -> float:
    """A bound on the probability that one coordinate of the rotated sum wraps around, by 2^k /
    scale.

    2 exp(-num_stddevs^2 / 2) for sub-Gaussian sums; the Skellam's tail is that of a Gaussian there
    as well, nearly.
    """
    return min(1.0, 2 * math.exp(-(self.num_stddevs**2) / 2))

  @property
  def sampler_error(self) -> float:
    """Total variation between a round's noise and what `distributed_cost.rdp` assumes; T rounds
    have T times that.

    An accountant adds (1 + exp(epsilon)) times it to delta.
    """
    return self.size * self.num_honest * discrete.sampler_error(self.grid_stddev, self.kind)


def error_stddev(config: DistributedNoise, num_survivors: int) -> float:
  """The standard deviation of each number of a decoded sum of that many sites, at most: noise and
  rounding.
  """
  return math.sqrt(num_survivors * (config.local_stddev**2 + 0.25 / config.scale**2))


def encode(
  update: PyTree,
  rotation_key: Key,
  secret: Array,
  words: Sequence[int | Array],
  config: DistributedNoise,
):
  """What one site gives to secure aggregation: its update, clipped and noised, in Z_2^k.

  Who learns what: only the site's own noise protects the message, so it must be masked.

  Args:
    update: a pytree of float arrays, D numbers. Where one is not finite, an update of zeros is sent
      in its place.
    rotation_key: public, the same at all sites, fresh for each sum and chosen independently of the
      updates.
    secret: [8] uint32, the site's own.
    words: up to three, e.g. (round, purpose), never used twice with this secret.
    config: see `DistributedNoise`.

  Returns:
    [config.size] uint32 below 2^k.

  Raises:
    ValueError: for an update of another size.
  """
  flat = rotation.flatten(update)
  if flat.shape != (config.dim,):
    raise ValueError(f"the update has {flat.shape[0]} numbers, but dim={config.dim}")
  key = prng.derive(secret, *words)
  rounded = round_clipped(flat, rotation_key, prng.derive(key, 0), config)
  noise = discrete.sample(prng.derive(key, 1), (config.size,), config.grid_stddev, config.kind)
  return ring.reduce(lax.bitcast_convert_type(rounded + noise, jnp.uint32), config.num_bits)


def round_clipped(flat: Array, rotation_key: Key, key: Array, config: DistributedNoise) -> Array:
  """The update on the grid, before noise (Kairouz et al. 2021, algorithm 1): clip, rotate, scale,
  round at random.

  Args:
    flat: [D] float32.
    rotation_key: as in `encode`.
    key: [8] uint32, secret.
    config: see `DistributedNoise`.

  Returns:
    [config.size] int32, of norm at most config.l2_sensitivity whatever the update is; on average
    the clipped and rotated update, but for what the condition on the norm takes away (at most by
    beta).
  """
  clip = config.l2_clip_norm * (1 - _SLACK)
  norm = jnp.sqrt(_sum_squares(flat))
  flat = jnp.where(jnp.isfinite(norm), flat, 0.0) * jnp.minimum(
    1.0, clip / jnp.where(norm > 0, norm, 1.0)
  )
  # what is bounded and what is sent are of the same bits, however the compiler divides the work
  x = native.settled(rotation.rotate(flat, rotation_key, config.chunk) * np.float32(config.scale))
  limit = np.float32(config.l2_sensitivity**2 * (1 - _SLACK / 2))
  low = jnp.floor(x)
  share = jnp.floor(
    (x - low) * np.float32(2.0**32)
  )  # exact, but for 2^32 itself where x is just below an integer
  always, share = (
    share >= np.float32(2.0**32),
    jnp.minimum(share, np.float32(2.0**32 - 2**8)).astype(jnp.uint32),
  )
  inside = lambda z: _sum_squares(z.astype(jnp.float32)) <= limit

  def attempt(state):
    number, _, _ = state
    words = prng.bits(key, jnp.stack([number, *np.zeros(2, np.uint32)]), (config.size,))
    z = low.astype(jnp.int32) + (always | (words < share)).astype(jnp.int32)
    return number + np.uint32(1), z, inside(z)

  again = lambda state: (state[0] < np.uint32(config.num_tries)) & jnp.logical_not(state[2])
  _, z, done = lax.while_loop(again, attempt, attempt((jnp.uint32(0), None, None)))
  z = jnp.where(done, z, jnp.trunc(x).astype(jnp.int32))
  # Never the case; but the promise must hold whatever float32 does.
  return jnp.where(inside(z), z, 0)


def decode(
  total: Array,
  rotation_key: Key,
  config: DistributedNoise,
  like: PyTree = None,
  num_survivors: int | None = None,
) -> PyTree:
  """The sum of the updates, from the opened sum (Kairouz et al. 2021, algorithm 2).

  Args:
    total: [config.size] uint32, the sum of the sites' messages modulo 2^k, masks removed.
    rotation_key: as in `encode`.
    config: see `DistributedNoise`.
    like: a pytree of arrays of the update's shapes; None for a flat [D] float32.
    num_survivors: sites in the sum, where known; it is checked. (This is too late for privacy:
      secure aggregation itself must not open a smaller sum.)

  Returns:
    The sum of the clipped updates, each number with an error of standard deviation `error_stddev`
    and mean about 0, but where a coordinate has wrapped around (`wrap_probability`).

  Raises:
    ValueError: for a total of the wrong shape or dtype, or too few or many survivors.
  """
  if total.shape != (config.size,) or total.dtype != jnp.uint32:
    raise ValueError(f"total is {total.dtype}{list(total.shape)}; it must be uint32[{config.size}]")
  if num_survivors is not None and not config.min_survivors <= num_survivors <= config.num_sites:
    raise ValueError(
      f"num_survivors={num_survivors} is not between min_survivors={config.min_survivors} and "
      f"num_sites={config.num_sites}: the noise is not what was promised"
    )
  centred = ring.decode(ring.reduce(total, config.num_bits), ring.FixedPoint(config.num_bits, 0))
  flat = rotation.unrotate(
    centred / np.float32(config.scale), rotation_key, config.chunk, config.dim
  )
  return flat if like is None else rotation.unflatten(flat, like)


def _sum_squares(x: Array) -> Array:
  """The sum of squares of a float32 vector, in blocks, so that it is off by less than 2^-13 of
  it.
  """
  x = x * x
  while x.shape[0] > 1:
    x = jnp.pad(x, (0, -x.shape[0] % 256)).reshape(-1, 256).sum(axis=1)
  return x[0]
