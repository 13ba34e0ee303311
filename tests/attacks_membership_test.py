"""Membership attacks: scores against plain loops, and models that do and do not remember."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate, special, stats

from primia_jax import local, models, sites
from primia_jax.attacks import membership, rates, shadows
from primia_jax.attacks.membership import Signals
from primia_jax.types import Site

AIMED = (0.01, 0.1, 0.5)


def game(num_models=8, num_images=5, num_others=40, shift=0.0, seed=0):
  """Log-odds that are `shift` higher for images that a model was trained on."""
  rng = np.random.default_rng(seed)
  included = shadows.halves(seed, num_models, num_images)
  pool = rng.normal(1, 2, num_images) + rng.normal(size=(num_models, num_images)) + shift * included
  return Signals(pool, rng.normal(1, 2, (num_models, num_others))), included


def split(signals, included):
  """The first model as target; the others as shadows."""
  of = lambda rows: Signals(signals.pool[rows], signals.population[rows])
  return of(0), of(slice(2, None)), included[2:]


def test_log_odds_hold_where_probabilities_round_to_one():
  logits = np.array([[[0.0, 50.0, 1.0], [-800.0, 2.0, 900.0]]])
  got = membership.log_odds(logits, np.array([1, 0]))
  assert got == pytest.approx(np.array([[50 - np.logaddexp(0, 1), -1700]]), rel=1e-14)
  with pytest.raises(ValueError, match="diverged"):
    membership.log_odds(np.full((1, 2), np.nan), np.zeros(1, int))
  with pytest.raises(ValueError, match="give"):
    membership.log_odds(logits, np.zeros(3, int))


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_lira_is_the_ratio_of_two_normal_densities(pooled, online):
  target, others, included = split(*game(20))
  got = membership.lira(target, others, included, pooled_variance=pooled, online=online)
  fitted, sums = [], np.zeros((2, 2))
  for i in range(5):
    samples = [others.pool[included[:, i] == side, i] for side in (False, True)]
    fitted.append([(np.mean(s), np.var(s, ddof=1)) for s in samples])
    sums += [(np.sum((s - s.mean()) ** 2), len(s) - 1) for s in samples]
  for i in range(5):
    (out, out_var), (into, in_var) = fitted[i]
    if pooled:
      out_var, in_var = sums[:, 0] / sums[:, 1]
    phi = target.pool[i]
    want = stats.norm.logpdf(phi, into, in_var**0.5) - stats.norm.logpdf(phi, out, out_var**0.5)
    if not online:
      want = -math.log(stats.norm.sf(phi, out, out_var**0.5))
    assert got[i] == pytest.approx(want, rel=1e-9)


def test_bavaria_integrates_the_variance_out():
  """Against the integral over an inverse gamma posterior; a strong prior is the pooled variance."""
  target, others, included = split(*game(12))
  got = membership.bavaria(target, others, included, prior_degrees=3.0)
  side = lambda i, into: others.pool[included[:, i] == into, i]
  for i in range(5):
    logs = []
    for into in (True, False):
      own = side(i, into)
      spread = [side(k, into) for k in range(5)]
      pooled = sum(np.sum((s - s.mean()) ** 2) for s in spread) / sum(len(s) - 1 for s in spread)
      shape, scale = (3 + len(own) - 1) / 2, (3 * pooled + np.sum((own - own.mean()) ** 2)) / 2
      density = lambda v, own=own, shape=shape, scale=scale, i=i: (
        stats.invgamma.pdf(v, shape, scale=scale)
        * stats.norm.pdf(target.pool[i], own.mean(), math.sqrt(v * (1 + 1 / len(own))))
      )
      logs.append(math.log(integrate.quad(density, 0, np.inf, epsabs=0, limit=200)[0]))
    assert got[i] == pytest.approx(logs[0] - logs[1], rel=1e-5, abs=1e-6)
  with pytest.raises(ValueError, match="prior_degrees=0"):
    membership.bavaria(target, others, included, prior_degrees=0)


@pytest.mark.parametrize("a", [None, 0.3])
def test_rmia_counts_the_images_that_are_beaten(a):
  target, others, included = split(*game(10))
  got = membership.rmia(target, others, included, gamma=1.5, offline_a=a)
  p, q = special.expit(others.pool), special.expit(others.population)
  for i in range(5):
    out, into = p[~included[:, i], i].mean(), p[included[:, i], i].mean()
    mean = (out + into) / 2 if a is None else ((1 + a) * out + 1 - a) / 2
    wins = 0
    for z in range(40):
      mean_z = q[:, z].mean() if a is None else ((1 + a) * q[:, z].mean() + 1 - a) / 2
      ratio = special.expit(target.pool[i]) / mean
      wins += ratio >= 1.5 * special.expit(target.population[z]) / mean_z
    assert got[i] == wins / 40


def test_rmia_orders_images_as_base_does():
  target, others, included = split(*game(10, num_images=200))
  order = np.argsort(membership.base(target, others, included))
  ranked = membership.rmia(target, others, included, gamma=1.0)[order]
  assert np.all(np.diff(ranked) >= 0)
  assert len(np.unique(ranked)) > 10


def test_too_few_shadows_and_wrong_settings_are_refused():
  target, others, included = split(*game(10))
  everywhere = np.ones_like(included)
  for attack in (membership.lira, membership.bavaria, membership.base, membership.rmia):
    with pytest.raises(ValueError, match="out of 0 shadows"):
      attack(target, others, everywhere)
  with pytest.raises(ValueError, match="give both"):
    membership.lira(target, others, included.astype(int))
  with pytest.raises(ValueError, match="gamma"):
    membership.rmia(target, others, included, gamma=0.5)
  with pytest.raises(ValueError, match="offline_a=2"):
    membership.base(target, others, included, offline_a=2)
  with pytest.raises(ValueError, match="population"):
    membership.rmia(target._replace(population=np.zeros(0)), others, included)


def test_halves_are_complementary_fair_and_independent():
  included = shadows.halves(3, 40, 500)
  assert np.all(included[::2] != included[1::2])
  np.testing.assert_array_equal(included.sum(axis=0), 20)
  assert np.all(included.sum(axis=1) <= shadows.most_images(500))
  assert abs(np.corrcoef(included[::2])[np.triu_indices(20, 1)]).max() < 0.25
  with pytest.raises(ValueError, match="num_models=3"):
    shadows.halves(0, 3, 10)


def test_thresholds_from_shadows_keep_the_false_positive_rate():
  """Nothing leaks: 16 models x 400 images give each aimed rate up to sampling error."""
  signals, included = game(16, 400)
  found = rates.attack_each(membership.lira, signals, included, AIMED)
  points = rates.curve(found.scores, included, found.thresholds, AIMED)
  error = np.sqrt(np.array(AIMED) * (1 - np.array(AIMED)) / np.sum(~included))
  for got in (points.false_positive.value, points.true_positive.value):
    assert np.all(abs(got - AIMED) < 4 * error)
  own = rates.curve(found.scores, included, found.own_thresholds, AIMED).false_positive.value
  assert np.all((own <= AIMED) & (own > np.array(AIMED) - 1 / 150))


def test_a_known_shift_is_found_at_its_rate():
  """Log-odds one deviation higher: the best test has the power Phi(Phi^-1(FPR) + 1)."""
  signals, included = game(48, 300, shift=1.0)
  attack = lambda *args: membership.lira(*args, pooled_variance=True)
  found = rates.attack_each(attack, signals, included, AIMED, num_targets=8)
  points = rates.curve(found.scores, found.included, found.thresholds, AIMED)
  best = stats.norm.cdf(stats.norm.ppf(AIMED) + 1)
  assert np.all(points.true_positive.value > 0.7 * best)
  assert np.all(points.true_positive.low < best)


def test_rates_and_precision_by_hand():
  scores = np.array([[0.1, 0.9, 0.8, 0.2], [0.7, 0.3, 0.6, 0.4]])
  included = np.array([[False, True, True, False], [True, False, False, True]])
  points = rates.curve(scores, included, np.array([[0.5], [0.5]]), [0.1])
  assert points.true_positive.value == 3 / 4
  assert points.false_positive.value == 1 / 4
  low, high = stats.binomtest(3, 4).proportion_ci(method="exact")
  assert [points.true_positive.low[0], points.true_positive.high[0]] == pytest.approx([low, high])
  wide = stats.t.ppf(0.975, 1) * 0.25  # models found 1 and 1/2: their error is 1/4
  assert points.true_positive.least == pytest.approx(0.75 - wide)
  value, least, most = rates.precision(points, 0.1)
  assert value == pytest.approx(0.1 * 0.75 / (0.1 * 0.75 + 0.9 * 0.25))
  assert least < value < most
  with pytest.raises(ValueError, match="prior=1"):
    rates.precision(points, 1)
  assert rates.threshold(np.arange(10.0), [0.0, 0.1, 0.25]).tolist() == [9, 8, 7]


def test_models_must_come_in_pairs():
  signals, included = game(8)
  with pytest.raises(ValueError, match="complementary"):
    rates.attack_each(membership.lira, signals, included[::-1][[0, 2, 1, 3, 4, 5, 6, 7]], AIMED)


@pytest.mark.parametrize("placement", [sites.scan(), sites.on_mesh()], ids=["scan", "mesh"])
def test_each_model_sees_its_own_images_alone(placement):
  """A model that adds up the labels it is given, and tells its number from its key."""
  images, labels = np.zeros((20, 1, 1, 1), np.float32), 1 << np.arange(20, dtype=np.int32)
  included = shadows.halves(5, 6, 20)

  def train(key, site):
    real = jnp.arange(site.labels.shape[0]) < site.num_examples
    total = jnp.sum(jnp.where(real, site.labels, 0))
    drawn = jax.random.bits(key, (), jnp.uint32).astype(jnp.int32)
    return jnp.stack([total, drawn]), {}

  predict = lambda params, state, x: params[None]
  run = shadows.shadow_logits(train, predict, placement, batch_size=4)
  key, whole = jax.random.key(0), slice(None)
  for rows in (whole, slice(2, 6)):
    numbers = np.arange(6, dtype=np.int32)[rows]
    got = run(key, included[rows], images, labels, images[:3], numbers)
    assert got.shape == (len(numbers), 23, 2)
    np.testing.assert_array_equal(got[:, 7, 0], included[rows] @ labels)
    want = [jax.random.bits(jax.random.fold_in(key, n), (), jnp.uint32) for n in numbers]
    np.testing.assert_array_equal(got[:, 0, 1].astype(np.uint32), np.stack(want))


@pytest.fixture(scope="module")
def remembered():
  """MLPs on random images and labels, trained until they know theirs, and untrained ones."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(104, 6, 6, 1)).astype(np.float32)
  labels = rng.integers(0, 2, 104).astype(np.int32)
  model = models.build(models.ModelConfig("mlp", 2, (6, 6, 1)))
  loss = local.classification_loss(model.apply, lambda key, x, y: (x, y), 2)
  included = shadows.halves(1, 12, 64)
  steps = local.epochs(8, shadows.most_images(64), num_epochs=25)
  predict = lambda params, state, x: model.apply(params, state, x)[0]

  def signals(rate):
    sgd = functools.partial(optax.sgd, momentum=0.9)
    recipe = local.Recipe(steps, local.gradients(loss), None, sgd, lambda t: rate)
    run = shadows.shadow_logits(
      shadows.trainer(recipe, model.init), predict, sites.scan(), batch_size=104
    )
    logits = run(jax.random.key(0), included, images[:64], labels[:64], images[64:])
    odds = membership.log_odds(logits, labels)
    return Signals(odds[:, :64], odds[:, 64:])

  return signals(0.03), signals(0.0), included


@pytest.mark.parametrize(
  "attack", [membership.loss_threshold, membership.lira, membership.bavaria, membership.rmia]
)
def test_a_model_that_remembers_is_attacked_and_an_untrained_one_is_not(remembered, attack):
  trained, untrained, included = remembered
  found = rates.attack_each(attack, trained, included, AIMED)
  points = rates.curve(found.scores, included, found.thresholds, AIMED)
  assert np.all(points.true_positive.low[1:] > points.false_positive.high[1:])
  assert points.true_positive.value[1] > 0.3
  found = rates.attack_each(attack, untrained, included, AIMED)
  points = rates.curve(found.scores, included, found.thresholds, AIMED)
  assert np.all(points.true_positive.low <= points.false_positive.high)


def test_a_divisor_replaces_the_sites_own_number_of_units():
  """So that private models of n and of n - 1 images divide by the same number."""
  seen = lambda grads, state, params=None, *, num_units, **_: (
    jax.tree.map(lambda g: jnp.full_like(g, num_units), grads),
    state,
  )
  privatizer = local.Privatizer(lambda params: (), seen)
  grad_fn = lambda params, state, batch, key: (params, (state, local.Metrics(*jnp.zeros(3))))
  recipe = local.Recipe(local.epochs(4, 4), grad_fn, privatizer, optax.sgd, lambda t: 1.0)
  site = Site(np.int32(0), jnp.zeros((4, 1, 1, 1)), jnp.zeros(4, jnp.int32), jnp.int32(3))
  init = lambda key: (jnp.zeros(2), {})
  for divisor, want in ((None, -3), (7, -7)):
    params, _ = jax.jit(shadows.trainer(recipe, init, divisor))(jax.random.key(0), site)
    np.testing.assert_array_equal(params, want)
  tied = privatizer.bound_to(recipe.steps, lambda *_: None)
  with pytest.raises(ValueError, match="joins a privatizer"):
    shadows.trainer(recipe._replace(privatizer=tied), init, 7)
