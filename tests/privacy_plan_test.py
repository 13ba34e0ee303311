"""Plans: what they refuse, that noise meets its target, and that step and ledger agree."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import local
from primia_jax.privacy import accounting, grid, ledger, plan, sampling, subkeys
from primia_jax.privacy.chain import Chain
from primia_jax.privacy.distributed import DistributedNoise
from primia_jax.privacy.grid import Rounded
from primia_jax.types import Metrics, Site

SECRET = jnp.arange(8, dtype=jnp.uint32)
COUNTS = accounting.gaussian("class counts", 20.0)
TOGETHER = DistributedNoise(1000, 10, 7, 1.0, 1.0, num_bits=24, num_colluding=1)


def loss_fn(params, model_state, batch, key):
  loss = jnp.sum(batch.weights * (batch.images @ params))
  count = jnp.sum(batch.weights)
  return loss / jnp.maximum(count, 1.0), (model_state, Metrics(loss, count, count))


RUN = {"num_units": 40, "steps": 4, "rounds": 3, "delta": 1e-3}
SGD = {**RUN, "sampling_rate": 0.25, "noise_multiplier": 1.0}
FTRL = {**RUN, "batch_size": 5, "noise_multiplier": 1.0}
SITES = {"num_sites": 10, "rounds": 3, "delta": 0.01, "noise_multiplier": 2.0}
sgd = lambda **changes: plan.dp_sgd(loss_fn, **(SGD | changes))
ftrl = lambda **changes: plan.dp_ftrl(loss_fn, **(FTRL | changes))
sites = lambda **changes: plan.site_level(**(SITES | changes))


@pytest.mark.parametrize("make", [sgd, ftrl])
@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("noise_multiplier", -1.0),
    ("noise_multiplier", 0.0),
    ("noise_multiplier", math.inf),
    ("noise_multiplier", math.nan),
    ("noise_multiplier", None),
    ("l2_clip_norm", 0.0),
    ("l2_clip_norm", math.nan),
    ("clipping", "ghost"),
    ("unit", "site"),
    ("unit", "image"),
    ("augmentations", 0),
    ("microbatch", 0),
    ("delta", 0.1),
    ("steps", 0),
    ("rounds", 0),
    ("rows_per_unit", 0),
    ("num_units", 0),
  ],
)
def test_what_makes_no_plan_of_steps_is_refused_by_name(make, field, value):
  with pytest.raises(ValueError, match="num_steps|steps" if field == "rounds" else field):
    make(**{field: value})


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: sgd(sampling_rate=0.0), "sampling_rate"),
    (lambda: sgd(sampling_rate=1.5), "sampling_rate"),
    (lambda: ftrl(kind="fresh"), "kind='fresh'"),
    (lambda: ftrl(bands=9), "use bands=8"),
    (lambda: ftrl(min_units=4), "4 units, less than batch_size=5"),
    (lambda: ftrl(target_epsilon=1.0, noise_multiplier=0.3), "costs epsilon .* target_epsilon=1"),
    (lambda: sites(noise_multiplier=None), "without noise nothing is private"),
    (lambda: sites(noise_multiplier=-1.0), "noise_multiplier=-1.0"),
    (lambda: sites(delta=0.2), "publish one unit completely"),
    (lambda: sites(target_quantile=1.5), "target_quantile=1.5"),
  ],
)
def test_what_could_not_be_claimed_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_the_rate_that_runs_is_the_rate_that_is_charged():
  made = sgd(sampling_rate=0.01)
  (release,) = made.releases
  assert made.sampling_rate == release.sampling_rate == sampling.effective_rate(0.01) >= 0.01
  assert (release.times, release.noise_multiplier) == (4, 1.0)
  assert made.batch_size == sampling.capacity(40, 0.01, 12)
  overflow = sampling.overflow_probability(made.batch_size, 40, 0.01, 12)
  assert release.extra_delta * 12 == pytest.approx(overflow, rel=1e-12)
  assert release.extra_delta > 0
  with pytest.raises(dataclasses.FrozenInstanceError):
    made.noise_multiplier = 2.0


def test_noise_is_calibrated_for_all_that_is_released():
  made = sgd(noise_multiplier=None, target_epsilon=6, before=[COUNTS])
  assert 5.9 < made.epsilon(3) <= 6
  assert made.spent(0) == accounting.spend(accounting.Ledger("example", 1e-3), COUNTS)
  assert made.rounds_within(10) == 3
  whole = ftrl(noise_multiplier=None, target_epsilon=6, before=[COUNTS])
  assert whole.epsilon(0) < 5.9 < whole.epsilon(1) == whole.epsilon(3) <= 6


@pytest.mark.parametrize("together", [None, TOGETHER], ids=["alone", "together"])
@pytest.mark.parametrize("quantile", [None, 0.5], ids=["fixed", "moving"])
def test_sites_keep_within_their_target(together, quantile):
  made = sites(
    noise_multiplier=None, target_epsilon=5, together=together, target_quantile=quantile, delta=0.1
  )
  assert 4.9 < made.epsilon(3) <= 5
  assert made.clip.target_quantile == quantile
  assert (made.noise is None) == (together is None)
  if made.noise is not None:
    assert made.noise.noise_multiplier == made.noise_multiplier
    assert made.noise.l2_clip_norm == 1  # of updates that are divided by a clip that moves, or by 1


PLANS = {
  "dp_sgd": lambda: sgd(before=[COUNTS]),
  "dp_ftrl": lambda: ftrl(before=[COUNTS]),
  "sites alone": lambda: sites(target_quantile=0.5),
  "sites together": lambda: sites(together=TOGETHER, target_quantile=0.5),
}


@pytest.mark.parametrize("name", PLANS)
def test_what_is_foretold_is_what_is_charged(name, tmp_path):
  """Ledgers are charged, release for release, what the plan forecasts; equal flags make equal
  plans.
  """
  made = PLANS[name]()
  assert made == PLANS[name]()
  charges = begin(made, tmp_path)
  for release in made.before:
    charges.spend(release, [0, 1])
  assert charges.ledgers[0] == made.spent(0)
  for rounds in (1, 2, 3):
    charges.spend_round([0])
    assert charges.ledgers[0] == made.spent(rounds)
    assert begin(made, tmp_path).ledgers == [made.spent(rounds), made.spent(0)]
  assert charges.epsilon == made.epsilon(3)


def begin(made, folder):
  """Opens the ledgers of a run of two sites."""
  return ledger.Ledgers(made, folder / ledger.LEDGER, Chain(folder), [None, None])


def test_the_steps_that_run_are_the_steps_that_are_charged():
  """Counted at the privatizer, which alone draws noise."""
  for made, times in ((sgd(), 4), (ftrl(), 1)):
    drawn = []

    def update(grads, state, params=None, made=made, drawn=drawn, **numbers):
      jax.debug.callback(lambda step: drawn.append(int(step)), numbers["step"])
      return made.privatizer.update(grads, state, params, **numbers)

    counted = optax.GradientTransformationExtraArgs(made.privatizer.init, update)
    recipe = made.recipe(optax.sgd, lambda t: 0.1)._replace(privatizer=counted)
    images, labels = jnp.ones((40, 2)), jnp.zeros(40, jnp.int32)
    here = Site(jnp.int32(0), images, labels, jnp.int32(40), SECRET)
    params = jnp.zeros(2)
    for number in range(2):
      now = local.Round(jnp.int32(number), jax.random.key(0), jax.random.key(1))
      noise = local.init_noise(recipe, params)
      local.train(recipe)(params, {}, optax.sgd(0.1).init(params), noise, here, now)
    jax.effects_barrier()
    assert sorted(drawn) == list(range(8))  # no number comes twice
    assert (made.num_steps, made.releases[0].times) == (4, times)


def test_no_two_uses_of_a_site_s_secret_derive_the_same_key():
  numbers = [np.uint32(n) for n in (0, 1, 2, 7, 0x53495445, 0x434E5453, 2**32 - 1)]
  first = [
    subkeys.of_sampling(SECRET),
    subkeys.of_counts(SECRET),
    *(subkeys.of_step(SECRET, n) for n in numbers),
    *(subkeys.of_update(SECRET, n) for n in numbers),
  ]
  keys = {tuple(np.asarray(key).tolist()) for key in first}
  assert len(keys) == len(first)
  words = [subkeys.POISSON, subkeys.GAUSSIAN, subkeys.CORRELATED]
  words += [value for name, value in vars(subkeys).items() if name in ("_SAMPLING", "_STEP")]
  words += [value for name, value in vars(subkeys).items() if name in ("_UPDATE", "_COUNTS")]
  assert all(a != b for a, b in itertools.combinations(words, 2))
  assert len(words) == sum(isinstance(value, int) for value in vars(subkeys).values())


def test_two_lines_make_a_plain_recipe_private():
  how = functools.partial(optax.sgd, momentum=0.9), lambda t: 0.1
  plain = local.Recipe(local.epochs(10, 40), local.gradients(loss_fn), None, *how)
  privacy = plan.dp_sgd(loss_fn, **(SGD | {"noise_multiplier": None, "target_epsilon": 6}))
  private = privacy.recipe(*how)
  assert plain.optimizer is private.optimizer
  assert privacy.epsilon(rounds=3) <= 6


@pytest.mark.parametrize("make", [sgd, ftrl])
def test_a_plan_is_not_taken_apart(make):
  """Noise charged for Poisson batches and clipped gradients, on shuffled or unclipped ones."""
  made, other = make(), make()
  whole = made.recipe(optax.sgd, lambda t: 1.0)
  local.train(whole)
  loosened = made.privatizer._replace(init=lambda params: made.privatizer.init(params))
  for part in (
    {"steps": local.epochs(5, 40)},
    {"steps": other.steps},
    {"grad_fn": local.gradients(loss_fn)},
    {"grad_fn": other.grad_fn},
    {"privatizer": None},
    {"privatizer": None, "steps": local.epochs(5, 40)},
    {"privatizer": loosened, "grad_fn": other.grad_fn},
  ):
    with pytest.raises(ValueError, match="take the whole from the plan"):
      local.train(whole._replace(**part))
  for change in (
    {"grad_fn": other.grad_fn},
    {"steps": other.steps},
    {"noise_multiplier": 100.0},
    {"releases": (made.releases[0]._replace(noise_multiplier=100.0),)},
  ):
    with pytest.raises(ValueError, match="make a plan whole"):
      dataclasses.replace(made, **change)


def test_a_site_with_more_units_than_planned_releases_nothing():
  """Its batches would overflow, and the ledger is charged for a chance of 1e-12 that they do."""
  update = sgd(num_units=40).privatizer.update
  grads = Rounded({"w": jnp.zeros(3, jnp.int32)}, jnp.float32(1), grid.choose(3, 1.0))
  noised = lambda n: update(grads, (), secret=SECRET, step=jnp.uint32(0), num_units=jnp.int32(n))[0]
  assert np.isfinite(noised(40)["w"]).all()
  assert np.isnan(noised(41)["w"]).all()


@pytest.mark.parametrize("make", [sgd, ftrl])
def test_examples_are_not_counted_as_patients(make):
  images = jnp.zeros((8, 1, 1, 1))
  units = jnp.asarray([0, 0, 0, 0, 1, 1, 1, 1], jnp.int32)
  site = Site(jnp.int32(0), images, jnp.zeros(8, jnp.int32), jnp.int32(8), SECRET, units)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="unit='example' and a site with units"):
    make().steps.begin(site, local.Round(jnp.int32(0), key, key))


def test_a_refused_round_of_correlated_noise_is_charged_again(tmp_path):
  made = ftrl()
  charges = begin(made, tmp_path)
  charges.spend_round([0, 1])
  once = charges.epsilon
  charges.spend_round([0, 1])
  assert charges.epsilon == once  # the whole run was charged at its start
  charges.repeats([0, 1])
  charges.spend_round([0, 1])
  assert charges.epsilon > once
