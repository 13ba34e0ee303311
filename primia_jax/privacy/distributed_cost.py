"""What distributed noise costs: the Renyi divergences of a round, the epsilon of several, and the
noise or the ring that a target needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from primia_jax.privacy.distributed import DistributedNoise

ORDERS = (
  *(1 + i / 10 for i in range(1, 100)),
  *map(float, range(11, 64)),
  *(2.0**i for i in range(6, 13)),
)


def rdp(
  config: DistributedNoise, orders: Sequence[float] = ORDERS
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Renyi differential privacy of one round: orders, and the divergence at each, at most.

  Discrete Gaussian: 1/2 e^2-concentrated DP with e = min(sqrt(D2^2 / (h s^2) + tau d / 2), D2 /
  (sqrt(h) s) + tau sqrt(d)), tau = 10 sum_(k < h) exp(-2 pi^2 s^2 k / (k + 1)), a sum of h discrete
  Gaussians being nearly one (Kairouz et al. 2021, proposition 14). Skellam: a D2^2 / (2 v) +
  min(((2 a - 1) D2^2 + 6 D1) / (4 v^2), 3 D1 / (2 v)) at integer orders a, v = h s^2 (Agarwal et
  al. 2021, theorem 3.5); other orders are rounded up. `sampler_error` comes on top.

  Raises:
    ValueError: for an order that is not above 1.
  """
  if not all(a > 1 for a in orders):
    raise ValueError(f"orders={orders}; Renyi orders are greater than 1")
  d, h, s, d2, d1 = (
    config.size,
    config.num_honest,
    config.grid_stddev,
    config.l2_sensitivity,
    config.l1_sensitivity,
  )
  v = h * s**2
  if config.kind == "skellam":
    more = lambda a: min(((2 * a - 1) * d2**2 + 6 * d1) / (4 * v**2), 3 * d1 / (2 * v))
    return tuple(orders), tuple(a * d2**2 / (2 * v) + more(a) for a in map(math.ceil, orders))
  tau = 10 * math.fsum(math.exp(-2 * (math.pi * s) ** 2 * k / (k + 1)) for k in range(1, h))
  e = min(math.sqrt(d2**2 / v + tau * d / 2), d2 / math.sqrt(v) + tau * math.sqrt(d))
  return tuple(orders), tuple(a * e**2 / 2 for a in orders)


def epsilon(config: DistributedNoise, num_rounds: int, delta: float) -> float:
  """The epsilon of that many rounds at delta: RDP composed and converted (Canonne et al. 2020,
  proposition 12).

  A thousandth of delta is kept for the sampler's error.

  Raises:
    ValueError: for a delta out of range, or an epsilon beyond about 17, where the sampler's error
      exceeds that.
  """
  if not 0 < delta < 1 or num_rounds < 1:
    raise ValueError(
      f"delta={delta} must lie between 0 and 1, and num_rounds={num_rounds} be at least 1"
    )
  kept = delta / 1000
  value = max(0.0, min(
    num_rounds * e + math.log1p(-1 / a) - (math.log(delta - kept) + math.log(a)) / (a - 1)
    for a, e in zip(*rdp(config), strict=True)
  ))  # fmt: skip
  if math.log(max(num_rounds * config.sampler_error, 1e-300)) + value + math.log1p(
    math.exp(-value)
  ) > math.log(kept):
    raise ValueError(
      f"epsilon={value:.3g} at delta={delta} is too much: the sampler's error, "
      f"{num_rounds * config.sampler_error:.1e}, counts exp(epsilon) times; use more noise, more "
      f"bits or fewer rounds, or a larger delta"
    )
  return value


def calibrate(
  config: DistributedNoise, target_epsilon: float, delta: float, num_rounds: int
) -> DistributedNoise:
  """The configuration with the least noise_multiplier (to 1e-4 of it) that keeps `epsilon` within
  the target.

  Raises:
    ValueError: where no noise does: on a coarse grid more noise means coarser rounding. Take more
      bits.
  """

  def attained(z: float) -> float:
    try:
      return epsilon(dataclasses.replace(config, noise_multiplier=z), num_rounds, delta)
    except ValueError:  # beyond the ring
      return math.inf

  fits = [z for z in np.geomspace(1e-2, 1e4, 61) if attained(float(z)) <= target_epsilon]
  if not fits:
    raise ValueError(
      f"target_epsilon={target_epsilon} at delta={delta} over {num_rounds} rounds is out of reach "
      f"with num_bits={config.num_bits}, dim={config.dim}: use more bits, more survivors or fewer "
      f"rounds"
    )
  high = float(fits[0])
  low = high / 10**0.1
  while high / low > 1 + 1e-4:
    middle = math.sqrt(low * high)
    low, high = (low, middle) if attained(middle) <= target_epsilon else (middle, high)
  return dataclasses.replace(config, noise_multiplier=high)


def choose_bits(config: DistributedNoise, max_inflation: float = 1.05) -> DistributedNoise:
  """The configuration with the fewest bits whose `sensitivity_inflation` is at most that.

  Raises:
    ValueError: where even 32 bits do not do.
  """
  for num_bits in range(2, 33):
    try:
      chosen = dataclasses.replace(config, num_bits=num_bits)
    except ValueError:  # too small a ring
      continue
    if chosen.sensitivity_inflation <= max_inflation:
      return chosen
  raise ValueError(
    f"no ring of 32 bits or fewer keeps the inflation of sensitivity within {max_inflation} at "
    f"dim={config.dim}, num_sites={config.num_sites}, noise_multiplier={config.noise_multiplier}; "
    f"allow more inflation or use more noise"
  )
