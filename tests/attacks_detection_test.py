"""The checks of a site refuse every planted model, and let honest ones pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import settings
from experiments.configs import Train
from primia_jax import algorithms, federated, local, models, sites, summation
from primia_jax.attacks import active, detection
from primia_jax.types import Batch, Site

SHAPE, CLASSES, KEY, BATCH = (6, 6, 1), 3, jax.random.key(0), 16
MODEL = models.build(models.ModelConfig("mlp", CLASSES, SHAPE))
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(BATCH, *SHAPE)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, BATCH).astype(np.int32)
SITE = Batch(jnp.asarray(IMAGES), jnp.asarray(LABELS), jnp.ones(BATCH, jnp.float32))


def loss_of(apply_fn):
  return local.classification_loss(apply_fn, lambda key, x, y: (x, y), CLASSES)


@functools.cache
def measure(apply_fn):
  run = jax.jit(functools.partial(detection.measure, loss_fn=loss_of(apply_fn)))
  return lambda params: run(params=params, model_state={}, batch=SITE, key=KEY)


@functools.cache
def fresh(seed):
  return MODEL.init(jax.random.key(seed))[0]


@functools.cache
def trained(seed, steps=40):
  """After steps on images that are not the site's."""
  rng, params = np.random.default_rng(100 + seed), fresh(seed)
  grad = jax.jit(jax.grad(loss_of(MODEL.apply), has_aux=True))
  images = jnp.asarray(rng.normal(size=(BATCH, *SHAPE)), jnp.float32)
  for _ in range(steps):
    gradient, _ = grad(params, {}, SITE._replace(images=images), KEY)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
  return params


@functools.cache
def limits():
  honest = [measure(MODEL.apply)(p) for seed in range(4) for p in (fresh(seed), trained(seed))]
  return detection.calibrate(honest, margin=0.3)


def test_honest_models_pass_fresh_and_trained():
  for seed in range(10, 14):
    for params in (fresh(seed), trained(seed)):
      detection.check_structure(params, fresh(0))
      assert detection.suspicions(measure(MODEL.apply)(params), limits()) == []


def imprinted():
  bins = jnp.asarray(active.thresholds(np.linspace(-0.5, 0.5, 99), 32))
  layer = active.imprint(jnp.full(36, 1 / 36, jnp.float32), bins)
  outputs = jnp.asarray([0.1, 0.0, -0.1], jnp.float32)
  return {"hidden": layer, "head": {**fresh(0)["head"], "kernel": active.alike(32, outputs)}}


def one_image_only():
  """Every unit opens for the site's first image alone, as in a trap set for it."""
  first = jnp.asarray(IMAGES[0].reshape(-1))
  draws = jnp.asarray(RNG.normal(size=(36, 32)), jnp.float32) * 0.01
  kernel = draws + first[:, None] / (first @ first)
  bias = jnp.full(32, -0.8, jnp.float32) - first @ draws
  return {"hidden": {"kernel": kernel, "bias": bias}, "head": fresh(0)["head"]}


@pytest.mark.parametrize(
  ("planted", "word"),
  [
    (imprinted, "alike"),
    (lambda: active.dead(fresh(0), "hidden"), "closed"),
    (one_image_only, "single"),
  ],
)
def test_each_planted_model_is_refused(planted, word):
  scores = measure(MODEL.apply)(planted())
  assert word in " ".join(detection.suspicions(scores, limits()))
  with pytest.raises(ValueError, match=rf"site 2 does not train the model .*{word}"):
    detection.refuse(scores, limits(), 2)


def test_a_module_before_the_model_is_refused_by_structure_and_by_its_units():
  bins = jnp.asarray(active.thresholds(np.linspace(-0.5, 0.5, 99), 32))
  layer = active.for_site(active.imprint(jnp.full(36, 1 / 36, jnp.float32), bins), 1, 3)
  apply_fn, params = active.prepend(MODEL.apply, fresh(0), layer, 0.01)
  with pytest.raises(ValueError, match=r"beyond the site's own, .*\(of 7\), and lacks .*\(of 4\)"):
    detection.check_structure(params, fresh(0))
  # even a site that takes it sees what it is for
  scores = measure(apply_fn)(params)
  assert "alike" in " ".join(detection.suspicions(scores, limits()))


def test_other_shapes_types_and_numbers_are_refused():
  own = jax.eval_shape(MODEL.init, KEY)[0]
  detection.check_structure(fresh(0), own)
  for change, word in (
    (lambda a: a.astype(jnp.float16), "float16"),
    (lambda a: a[..., :1], "hidden"),
    (lambda a: a * jnp.nan, "not finite"),
  ):
    wrong = {**fresh(0), "hidden": jax.tree.map(change, fresh(0)["hidden"])}
    with pytest.raises(ValueError, match=word):
      detection.check_structure(wrong, own)


def test_models_that_differ_between_sites_have_other_digests():
  same, other = fresh(0), active.dead(fresh(0), "hidden")
  digests = [detection.digest(p) for p in (same, same, other)]
  assert digests[0] == digests[1] != digests[2]
  changed = {**same, "head": {**same["head"], "bias": same["head"]["bias"] + np.float32(1e-30)}}
  assert detection.digest(changed) != digests[0]


def test_a_guarded_step_trains_honest_models_only():
  calls = []
  step = lambda key, state, sites: calls.append(state) or (state, None)
  images, labels = np.stack([IMAGES] * 3), np.stack([LABELS] * 3)
  counts = np.array([BATCH, 1, BATCH], np.int32)  # site 1 has nothing to compare
  hospitals = federated.in_memory(Site(np.arange(3, dtype=np.int32), images, labels, counts))
  here = lambda ids: np.arange(1, len(ids))  # as in a process that plays the last two
  guarded = detection.guarded(step, loss_of(MODEL.apply), here, limits(), BATCH)
  state = federated.State(fresh(11), {}, (), (), jnp.int32(0))
  assert guarded(KEY, state, hospitals)[0] is state
  with pytest.raises(ValueError, match="site 2 does not train"):
    guarded(KEY, state._replace(params=imprinted()), hospitals)
  assert len(calls) == 1


def test_the_default_limits_part_honest_models_from_planted_ones():
  told = lambda params: detection.suspicions(measure(MODEL.apply)(params), detection.LIMITS)
  assert told(fresh(5)) == told(trained(5)) == []
  for planted in (imprinted(), active.dead(fresh(0), "hidden"), one_image_only()):
    assert told(planted)


def test_a_run_that_is_told_to_look_trains_as_before_and_refuses_what_is_planted():
  loss = loss_of(MODEL.apply)
  steps = local.epochs(BATCH, BATCH)
  recipe = local.Recipe(steps, local.gradients(loss), None, optax.sgd, lambda t: 0.1)
  parts = algorithms.fedavg(recipe), summation.clear(), sites.scan(), 2, loss
  plain = settings.replace(Train(), num_sites=2).federation.join(*parts)
  told = settings.replace(Train(), num_sites=2, refuse_suspicious_models=True)
  looking = told.federation.join(*parts)
  images, labels = np.stack([IMAGES] * 2), np.stack([LABELS] * 2)
  site = Site(np.arange(2, dtype=np.int32), images, labels, np.full(2, BATCH, np.int32))
  hospitals = federated.in_memory(site)
  after, expected = (run.step(KEY, run.init(fresh(1)), hospitals)[0] for run in (looking, plain))
  jax.tree.map(np.testing.assert_array_equal, after, expected)
  with pytest.raises(ValueError, match=r"site 0 does not train the model it was sent: .*closed"):
    looking.step(KEY, looking.init(active.dead(fresh(1), "hidden")), hospitals)


def test_scores_are_those_of_the_definition():
  params = fresh(3)
  scores = measure(MODEL.apply)(params)
  grad = jax.jit(jax.grad(loss_of(MODEL.apply), has_aux=True))
  each = [
    grad(params, {}, jax.tree.map(lambda a, i=i: a[i : i + 1], SITE), KEY)[0] for i in range(BATCH)
  ]
  values = np.linalg.svd(np.asarray(params["hidden"]["kernel"]), compute_uv=False) ** 2
  np.testing.assert_allclose(scores.alike, values[0] / values.sum(), rtol=1e-4)
  biases = np.stack([g["hidden"]["bias"] for g in each])
  np.testing.assert_allclose(scores.closed, np.mean((biases == 0).all(0)))
  leaves = zip(*(jax.tree.leaves(g) for g in each), strict=True)
  squares = [np.array([np.sum(np.square(g)) for g in leaf]) for leaf in leaves]
  expected = max(np.sqrt(s.max() / (s.sum() - s.max())) for s in squares)
  np.testing.assert_allclose(scores.single, expected, rtol=1e-4)
  alone = jax.tree.map(lambda a: a[:1], SITE)
  with pytest.raises(ValueError, match="a batch of 1"):
    detection.measure(loss_of(MODEL.apply), params, {}, alone, KEY)
