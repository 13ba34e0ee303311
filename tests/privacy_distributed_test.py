import dataclasses
import math

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import rdp
from scipy import special, stats

from primia_jax import prng
from primia_jax.privacy import distributed, distributed_cost, rotation
from primia_jax.privacy.distributed import DistributedNoise

SECRET = prng.derive(jnp.arange(8, dtype=jnp.uint32), 7)
ROTATION = jax.random.key(3)
KINDS = ("discrete_gaussian", "skellam")
ENCODE = jax.jit(
  lambda x, secrets, words, c: jax.vmap(lambda u, s: distributed.encode(u, ROTATION, s, words, c))(
    x, secrets
  ),
  static_argnums=3,
)


def config(**changes):
  usual = dict(
    dim=3000, num_sites=5, min_survivors=4, l2_clip_norm=2.0, noise_multiplier=1.0, chunk_size=1024
  )
  return DistributedNoise(**(usual | changes))


def updates(c, num_sites, norm=None, seed=0):
  x = np.random.default_rng(seed).normal(size=(num_sites, c.dim))
  x *= (c.l2_clip_norm if norm is None else norm) / np.linalg.norm(x, axis=1, keepdims=True)
  return jnp.asarray(x, jnp.float32)


def opened(c, x, words=(0, 1)):
  """The sum in the ring of the sites' messages, as secure aggregation opens it."""
  secrets = jax.vmap(lambda i: prng.derive(SECRET, i))(jnp.arange(len(x), dtype=jnp.uint32))
  words = tuple(map(jnp.uint32, words))
  return jnp.sum(
    ENCODE(x, secrets, words, c), axis=0, dtype=jnp.uint32
  )  # unreduced: decode does it


def squared(c, x):
  """The mean squared error of a decoded sum."""
  total = distributed.decode(opened(c, x), ROTATION, c, num_survivors=len(x))
  return float(np.mean((np.asarray(total) - np.sum(x, axis=0)) ** 2))


def accepts(variance, stddev, num):
  return abs(variance / stddev**2 - 1) < 6 * math.sqrt(2 / num)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_survivors", [4])
def test_the_sum_is_decoded_with_the_noise_that_was_promised(kind, num_survivors):
  c = config(kind=kind, num_bits=20)
  x = updates(c, num_survivors, norm=1.9)
  promised = c.noise_multiplier * c.l2_clip_norm * math.sqrt(num_survivors / c.min_survivors)
  variance = squared(c, x)
  assert accepts(variance, promised, c.dim)
  assert accepts(variance, distributed.error_stddev(c, num_survivors), c.dim)
  assert not accepts(variance, promised * 2 / 3, c.dim)
  assert not accepts(variance, promised * 3 / 2, c.dim)
  error = np.asarray(distributed.decode(opened(c, x), ROTATION, c)) - np.sum(np.asarray(x), axis=0)
  assert np.max(np.abs(error)) < 6 * promised
  assert stats.kstest(error / promised, "norm").pvalue > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_noise_nothing_is_hidden(kind, monkeypatch):
  """Taking the noise out is seen: the sum is then exact up to rounding, far below what is
  promised.
  """
  c = config(
    kind=kind, num_bits=20, noise_multiplier=0.97
  )  # another number, so that no compiled function is reused
  x = updates(c, c.min_survivors, norm=1.9)
  monkeypatch.setattr(
    distributed.discrete, "sample", lambda key, shape, stddev, kind: jnp.zeros(shape, jnp.int32)
  )
  variance = squared(c, x)
  assert not accepts(variance, c.noise_multiplier * c.l2_clip_norm, c.dim)
  assert (
    variance < c.num_sites / c.scale**2
  )  # and the sum of roundings is what is left: decoding is right


def test_noise_counts_honest_sites_of_the_smallest_sum_only():
  few = config(num_sites=10, min_survivors=7, num_colluding=3)
  assert few.num_honest == 4
  assert few.local_stddev * math.sqrt(4) == pytest.approx(few.noise_multiplier * few.l2_clip_norm)
  c = dataclasses.replace(few, num_bits=20)
  all_honest = dataclasses.replace(c, num_colluding=0)
  sum_of_seven = squared(
    c, updates(c, 7, norm=1.9)
  )  # more than the threshold of honest ones gives more noise
  assert accepts(sum_of_seven, few.noise_multiplier * few.l2_clip_norm * math.sqrt(7 / 4), c.dim)
  assert not accepts(sum_of_seven, all_honest.local_stddev * math.sqrt(7), c.dim)
  epsilons = [distributed_cost.rdp(k)[1][9] for k in (c, all_honest)]
  assert epsilons[0] == pytest.approx(epsilons[1], rel=0.05)  # the same promise


def test_other_sites_and_other_words_give_other_noise():
  c = config(num_bits=20)
  x = jnp.broadcast_to(updates(c, 1), (4, c.dim))
  secrets = jnp.stack([SECRET, prng.derive(SECRET, 1), SECRET, SECRET])
  words = lambda a, b: (jnp.uint32(a), jnp.uint32(b))
  messages = [ENCODE(x, secrets, words(*w), c) for w in ((0, 1), (0, 2), (1, 1))]
  assert messages[0].dtype == jnp.uint32
  assert int(jnp.max(messages[0])) < 2**c.num_bits
  assert np.array_equal(messages[0][0], messages[0][2])  # the same secret, words and update
  noise = [
    np.asarray(distributed.decode(m[i], ROTATION, c) - x[0])
    for m, i in zip(messages, (0, 0, 0), strict=True)
  ]
  noise.append(np.asarray(distributed.decode(messages[0][1], ROTATION, c) - x[0]))
  assert np.max(np.abs(np.corrcoef(noise) - np.eye(4))) < 0.1


@pytest.mark.parametrize("num_bits", [10, 20])
def test_no_rounded_update_is_beyond_the_sensitivity(num_bits):
  """Against zeros in its place, which are rounded to zeros, a site changes the sum by at most
  this.
  """
  c = config(dim=512, chunk_size=512, num_bits=num_bits)
  rng = np.random.default_rng(num_bits)
  aligned = np.asarray(
    rotation.unrotate(jnp.full(512, 0.5) / c.scale, ROTATION, 512, 512)
  )  # every fraction is 1/2
  shapes = [rng.normal(size=512), np.eye(512)[3], rng.standard_cauchy(512), np.ones(512), aligned]
  round_all = jax.jit(
    jax.vmap(lambda u, i: distributed.round_clipped(u, ROTATION, prng.derive(SECRET, i), c))
  )
  for norm in (0.0, 1.0, 2.0, 50.0, 1e15):
    x = np.stack([s * norm / np.linalg.norm(s) for s in shapes])
    z = np.asarray(round_all(jnp.asarray(x, jnp.float32), jnp.arange(5, dtype=jnp.uint32))).astype(
      object
    )
    for row in z:
      assert sum(int(v) ** 2 for v in row) <= c.l2_sensitivity**2
      assert sum(abs(int(v)) for v in row) <= c.l1_sensitivity
    if norm == 0:
      assert not z.any()
    if norm > 2:
      assert (
        sum(int(v) ** 2 for v in z[0]) > 0.9 * (c.scale * c.l2_clip_norm) ** 2
      )  # clipped, not lost


def test_the_condition_on_the_norm_is_needed():
  """2.5 in every coordinate, and beta near 1: half of all plain random roundings pass the bound,
  ours never does.
  """
  c = config(dim=256, chunk_size=256, num_bits=10, num_sites=4, beta=0.999, num_tries=2)
  room = (4.0**c.num_bits - 4 * c.num_stddevs**2) / (2 * c.num_stddevs) ** 2
  c = dataclasses.replace(
    c, noise_multiplier=math.sqrt(room / 40.02**2 - 16 / 256)
  )  # a clip of 40.02 on the grid
  assert c.scale * c.l2_clip_norm == pytest.approx(40.02)
  x = rotation.unrotate(jnp.full(256, 2.5) / c.scale, ROTATION, 256, 256)
  keys = jax.vmap(lambda i: prng.derive(SECRET, i))(jnp.arange(200, dtype=jnp.uint32))
  norms = np.linalg.norm(
    jax.vmap(lambda k: distributed.round_clipped(x, ROTATION, k, c))(keys), axis=1
  )
  assert np.all(norms <= c.l2_sensitivity)
  assert np.sum(norms == 32) > 20  # rounded towards zero at last: 2 everywhere
  assert np.sum(norms > 38) > 100
  plain = np.random.default_rng(0).integers(2, 4, (200, 256))
  assert np.mean(np.linalg.norm(plain, axis=1) > c.l2_sensitivity) > 0.3


@pytest.mark.slow
def test_rounding_is_unbiased():
  c = config(dim=64, chunk_size=64, num_bits=12)
  x = updates(c, 1, norm=1.0)[0]
  keys = jax.vmap(lambda i: prng.derive(SECRET, i))(jnp.arange(4000, dtype=jnp.uint32))
  z = np.asarray(jax.jit(jax.vmap(lambda k: distributed.round_clipped(x, ROTATION, k, c)))(keys))
  exact = np.asarray(rotation.rotate(x, ROTATION, 64)) * c.scale
  assert np.max(np.abs(z.mean(axis=0) - exact)) < 6 * 0.5 / math.sqrt(4000)
  assert np.all(np.abs(z - exact[None, :]) < 1.001)


def test_an_update_that_is_not_finite_counts_as_zeros():
  c = config(num_bits=20)
  bad = jnp.ones((4, c.dim)) * jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 0.0])[:, None]
  bad = bad.at[:, 1:].set(1.0).at[3].set(0.0)
  secrets = jnp.broadcast_to(SECRET, (4, 8))
  messages = ENCODE(bad, secrets, (jnp.uint32(0), jnp.uint32(1)), c)
  assert all(np.array_equal(m, messages[3]) for m in messages)  # zeros and noise, as ever
  assert np.std(distributed.decode(messages[0], ROTATION, c)) > 0.9 * c.local_stddev


@pytest.mark.slow
def test_pytrees_go_in_and_come_out():
  tree = {"w": jnp.ones((20, 30)) * 0.01, "b": jnp.arange(10.0) * 0.01}
  c = config(
    dim=610, num_bits=24, noise_multiplier=1e-3, chunk_size=256, min_survivors=1, num_sites=2
  )
  message = jax.jit(lambda t: distributed.encode(t, ROTATION, SECRET, (1, 2, 3), c))(tree)
  assert message.shape == (c.size,) == (768,)
  back = distributed.decode(message, ROTATION, c, like=tree)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=7 * distributed.error_stddev(c, 1)),
    tree,
    back,
  )
  with pytest.raises(ValueError, match="dim=610"):
    distributed.encode(tree["w"], ROTATION, SECRET, (1,), c)


# --- Accounting ---


def probability(x, stddev, kind):
  if kind == "skellam":
    return special.ive(np.abs(x), stddev**2)
  support = np.arange(-400, 401)
  return np.exp(-(x**2) / (2 * stddev**2)) / np.sum(np.exp(-(support**2) / (2 * stddev**2)))


def divergence(stddev, num_sites, shift, order, kind):
  """Renyi divergence of a sum of noise from itself shifted, with no bound involved; tails below
  1e-280 left out.
  """
  x = np.arange(-400, 401)
  one = probability(x, stddev, kind)
  total = one
  for _ in range(num_sites - 1):
    total = np.convolve(total, one)
  total = np.maximum(total, 0)
  p, q = total[shift:], total[:-shift] if shift else total
  seen = (p > 1e-280) & (q > 1e-280)
  return float(special.logsumexp(order * np.log(p[seen]) + (1 - order) * np.log(q[seen]))) / (
    order - 1
  )


@dataclasses.dataclass(frozen=True)
class OnGrid:
  """A configuration of which accounting's inputs are given rather than derived."""

  size: int
  num_honest: int
  grid_stddev: float
  l2_sensitivity: float
  l1_sensitivity: float
  kind: str


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stddev", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("num_sites", [1, 2, 5])
def test_rdp_bounds_the_divergence_of_the_sum(kind, stddev, num_sites):
  for shift in (1, 2, 5):
    orders = (2.0, 3.0, 8.0, 16.0)
    _, bounds = distributed_cost.rdp(OnGrid(1, num_sites, stddev, shift, shift, kind), orders)
    for order, bound in zip(orders, bounds, strict=True):
      if shift * order > 20 * stddev * math.sqrt(num_sites):
        continue  # where the tails that float64 holds do not reach
      exact = divergence(stddev, num_sites, shift, order, kind)
      assert exact <= bound * (1 + 1e-9)
      if stddev == 2.5 and kind == "discrete_gaussian":
        assert bound <= 1.001 * exact  # and is tight
      if stddev == 2.5 and num_sites == 5 and shift * order <= 8:
        assert bound <= 1.1 * exact


def test_fractional_orders_are_bounded_by_the_next_integer():
  c = config(kind="skellam")
  orders, epsilons = distributed_cost.rdp(c, (1.5, 2.0, 2.5, 3.0))
  assert orders == (1.5, 2.0, 2.5, 3.0)
  assert epsilons[0] == epsilons[1] < epsilons[2] == epsilons[3]
  with pytest.raises(ValueError, match="greater than 1"):
    distributed_cost.rdp(c, (1.0,))


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_fine_grid_epsilon_is_that_of_the_gaussian_mechanism(kind):
  c = config(kind=kind, num_bits=22, noise_multiplier=2.0)
  accountant = rdp.RdpAccountant(list(distributed_cost.ORDERS))
  accountant.compose(dp_accounting.GaussianDpEvent(c.noise_multiplier), 20)
  expected = accountant.get_epsilon(1e-5)
  assert c.sensitivity_inflation < 1.001
  assert distributed_cost.epsilon(c, 20, 1e-5) == pytest.approx(expected, rel=0.01)
  assert distributed_cost.epsilon(c, 20, 1e-5) > expected  # never less


def test_more_noise_more_bits_and_fewer_rounds_cost_less():
  of = lambda rounds=10, **changes: distributed_cost.epsilon(config(**changes), rounds, 1e-5)
  assert of(noise_multiplier=2.0) < of(noise_multiplier=1.0)
  assert of(num_bits=16) < of(num_bits=12) < of(num_bits=10)
  assert of(rounds=5) < of(rounds=10)
  assert of(num_colluding=3) >= of() * 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_reaches_the_target_with_the_least_noise(kind):
  c = distributed_cost.calibrate(config(kind=kind), 3.0, 1e-5, 50)
  assert 2.9 < distributed_cost.epsilon(c, 50, 1e-5) <= 3.0
  less = dataclasses.replace(c, noise_multiplier=c.noise_multiplier * 0.99)
  assert distributed_cost.epsilon(less, 50, 1e-5) > 3.0
  with pytest.raises(ValueError, match="out of reach"):
    distributed_cost.calibrate(config(num_bits=8, dim=10**6), 0.1, 1e-5, 1000)


def test_inflation_at_eleven_million_parameters_is_that_of_the_paper():
  """12 bits multiply the sensitivity by 4, 16 bits by 1.03 (10 sites, padded to 2^24, central noise
  multiplier 1).
  """
  of = lambda bits: (
    DistributedNoise(11_178_051, 10, 10, 1.0, 1.0, bits, chunk_size=2**24).sensitivity_inflation
  )
  assert of(12) == pytest.approx(4.1, abs=0.15)
  assert of(16) == pytest.approx(1.03, abs=0.005)
  chunked = DistributedNoise(11_178_051, 10, 10, 1.0, 1.0, 12)
  assert chunked.size < 1.01 * chunked.dim
  assert chunked.sensitivity_inflation < of(12)
  chosen = distributed_cost.choose_bits(chunked, 1.05)
  assert chosen.num_bits == 16
  assert chosen.sensitivity_inflation <= 1.05
  with pytest.raises(ValueError, match="32 bits"):
    distributed_cost.choose_bits(chunked, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_coordinates_wrap_as_seldom_as_stated(kind):
  """Updates that all point the same way, and noise of all sites, in the smallest ring."""
  c = config(
    dim=2**14,
    chunk_size=2**14,
    num_bits=12,
    num_sites=40,
    min_survivors=40,
    kind=kind,
    num_stddevs=2.0,
  )
  x = jnp.broadcast_to(updates(c, 1)[0], (40, c.dim))
  error = np.asarray(
    rotation.rotate(distributed.decode(opened(c, x), ROTATION, c), ROTATION, c.chunk)
  ) - 40 * np.asarray(rotation.rotate(x[0], ROTATION, c.chunk))
  wrapped = np.mean(np.abs(error) > 2 ** (c.num_bits - 1) / c.scale)
  assert 0 < wrapped < c.wrap_probability
  assert config().wrap_probability < 1e-3


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(noise_multiplier=0.0), "noise_multiplier"),
    (dict(l2_clip_norm=math.nan), "l2_clip_norm"),
    (dict(min_survivors=6), "min_survivors=6"),
    (dict(num_colluding=4), "num_colluding=4"),
    (dict(num_bits=33), "num_bits=33"),
    (dict(num_bits=3), "too small a ring"),
    (dict(kind="gaussian"), "kind"),
    (dict(beta=1.0), "beta"),
    (dict(dim=0), "dim=0"),
    (dict(chunk_size=1000), "power of two"),
  ],
)
def test_what_cannot_be_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    config(**changes)


def test_bad_sums_are_refused():
  c = config()
  with pytest.raises(ValueError, match="num_survivors=3"):
    distributed.decode(jnp.zeros(c.size, jnp.uint32), ROTATION, c, num_survivors=3)
  with pytest.raises(ValueError, match="uint32"):
    distributed.decode(jnp.zeros(c.dim, jnp.uint32), ROTATION, c)
  with pytest.raises(ValueError, match="delta"):
    distributed_cost.epsilon(c, 1, 0.0)
  with pytest.raises(ValueError, match="too much: the sampler"):
    distributed_cost.epsilon(c, 10, 1e-18)
