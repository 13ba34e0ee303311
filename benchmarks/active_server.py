"""What a hostile server takes from real X-rays through secure aggregation, and which models a site
refuses to train.

  python -m benchmarks.active_server --data=folder:XRAYS

Attacks: three hospitals train one step on 16 X-rays each and send masked sums. Recovered: images
of which every pixel is right to 1e-3 of the range from black to white. The control is the same
reading of an honest model's sum.

Detection: `detection.measure` with the default limits on 16 images, of honest models (four
networks, fresh and after 5 and 40 steps of Adam on other X-rays, several seeds) and of planted
ones. The rates have exact intervals (Clopper and Pearson 1934) over seeds: networks of one seed at
several ages count once, as refused if any was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

from benchmarks import measuring
from experiments import inputs
from experiments.configs.data import Data
from experiments.configs.model import normalise
from primia_jax import algorithms, federated, local, models, secagg, sites, summation
from primia_jax.attacks import active, detection, linear
from primia_jax.metrics import clopper_pearson
from primia_jax.types import Batch, LossFn, Params, Site

_DATA = flags.DEFINE_string("data", None, "The X-rays, as train_federated takes them.")
_SEEDS = flags.DEFINE_integer("seeds", 8, "Honest models of each network.", lower_bound=1)

SIZE, NUM_SITES, AT_SITE, BINS, CLASSES = 32, 3, 16, 2048, 3
SCALE, GAIN = 1e-4, 10.0  # of an imprint's measurement; of a module's units
NETWORKS = ("mlp", "leaf_cnn", "cnn", "scatter_linear")
AGES = (5, 40)  # steps of training
_RIGHT = 1e-3 * 4  # a pixel's error; normalised images span 4 from black to white
KEY = jax.random.key(0)


class Work(NamedTuple):
  """The X-rays, as models take them.

  Attributes:
    hospitals: [S, N, H, W, C] and [S, N], what the sites hold.
    public: [M, H, W, C] and [M], what server and sites may use besides.
  """

  hospitals: tuple[np.ndarray, np.ndarray]
  public: tuple[np.ndarray, np.ndarray]


def work(data: str) -> Work:
  dataset, _ = inputs.images_to_test(Data(data=data, image_size=SIZE))
  order = np.random.default_rng(0).permutation(len(dataset))
  images = np.asarray(normalise(jnp.asarray(np.asarray(dataset.images)[order])))
  labels = dataset.labels[order].astype(np.int32)
  first = NUM_SITES * AT_SITE
  shaped = lambda a: a[:first].reshape(NUM_SITES, AT_SITE, *a.shape[1:])
  return Work((shaped(images), shaped(labels)), (images[first:], labels[first:]))


def loss_of(apply_fn: Callable) -> LossFn:
  return local.classification_loss(apply_fn, lambda key, x, targets: (x, targets), CLASSES)


def opened(work: Work, apply_fn: Callable, sent: Sequence[Params], num: int) -> Params:
  """The update that the masked sum shows, of one honest step on `num` images at each site."""
  steps = local.epochs(num, num)
  recipe = local.Recipe(steps, local.gradients(loss_of(apply_fn)), None, optax.sgd, lambda t: 1.0)
  algorithm = algorithms.fedavg(recipe)
  run = active.round(algorithm, summation.masked(secagg.secure_sum(NUM_SITES)), sites.loop())
  images, labels = (a[:, :num] for a in work.hospitals)
  ids, counts = np.arange(NUM_SITES, dtype=np.int32), np.full(NUM_SITES, num, np.int32)
  hospitals = federated.in_memory(Site(ids, images, labels, counts))
  one = algorithm.init_site(sent[0], {})
  state = jax.tree.map(lambda a: np.broadcast_to(a, (NUM_SITES, *np.shape(a))), one)
  together = jax.tree.map(lambda *a: jnp.stack(a), *sent)
  shared = federated.Global(together, {}, (), jnp.int32(0), KEY)
  return run(shared, hospitals, state).update[0]


def recovered(found: Any, images: np.ndarray) -> int:
  """How many of the images [..., H, W, C] are among those found [K, D], to the pixel."""
  flat = images.reshape(-1, np.prod(images.shape[-3:]))
  return sum(bool(np.abs(np.asarray(found) - one).max(1).min() < _RIGHT) for one in flat)


def planted(work: Work, params: Params, site: int = 1) -> dict[str, tuple[Callable, list[Params]]]:
  """Each attack on an MLP: its apply function and what it sends to each site."""
  apply_fn, pixels = models.build(config("mlp")).apply, SIZE * SIZE
  brightness = jnp.full(pixels, SCALE / pixels, jnp.float32)
  bright = SCALE * work.public[0].mean((1, 2, 3))
  bins = lambda number: jnp.asarray(active.thresholds(bright, number))
  module, add = active.imprint(brightness, bins(BINS)), functools.partial(active.prepend, apply_fn)
  width = params["hidden"]["bias"].size
  outputs = jnp.asarray([1.0, 0.0, -1.0], jnp.float32)
  head = {**params["head"], "kernel": active.alike(width, outputs)}
  imprinted = {"hidden": active.imprint(brightness, bins(width)), "head": head}
  own = [active.for_site(module, i, NUM_SITES) for i in range(NUM_SITES)]
  with_module = add(params, module, GAIN)[0]
  return {
    "honest model": (apply_fn, [params] * NUM_SITES),
    "imprint in the first layer": (apply_fn, [imprinted] * NUM_SITES),
    "module, the same at all sites": (with_module, [add(params, module, GAIN)[1]] * NUM_SITES),
    "module, units for each site": (with_module, [add(params, one, GAIN)[1] for one in own]),
    "dead units but at one site": (
      apply_fn,
      [params if i == site else active.dead(params, "hidden") for i in range(NUM_SITES)],
    ),
  }


def read(name: str, update: Params, site: int = 1) -> np.ndarray:
  """The images that the server reads from the sum, [K, D]."""
  if "module" in update:
    layer = update["module"]
    parts = range(NUM_SITES) if "each site" in name else [None]
    of = lambda a, i: a if i is None else active.block(a, i, NUM_SITES)
    found = [active.read(of(layer["kernel"], i), of(layer["bias"], i)) for i in parts]
    return np.concatenate([np.asarray(one.images)[np.asarray(one.has)] for one in found])
  layer = update["hidden"]
  quotient = linear.invert(layer["kernel"], layer["bias"])[None]
  return np.concatenate([active.read(layer["kernel"], layer["bias"]).images, quotient])


def config(name: str) -> models.ModelConfig:
  return models.ModelConfig(name, CLASSES, (SIZE, SIZE, 1))


def honest(work: Work, name: str, seed: int) -> Iterator[Params]:
  """A network, fresh and at each age, trained on public images."""
  model = models.build(config(name))
  params, _ = model.init(jax.random.key(seed))
  optimizer = optax.adam(2e-3)
  grad, state = _gradient(name), optimizer.init(params)
  rng, ages = np.random.default_rng(seed), list(AGES)
  yield params
  for step in range(1, max(AGES) + 1):
    rows = rng.choice(len(work.public[1]), AT_SITE, replace=False)
    batch = batch_of(work.public[0][rows], work.public[1][rows])
    updates, state = optimizer.update(grad(params, batch), state, params)
    params = optax.apply_updates(params, updates)
    if step in ages:
      yield params


@functools.cache
def _gradient(name: str) -> Callable:
  loss = loss_of(models.build(config(name)).apply)
  return jax.jit(lambda params, batch: jax.grad(loss, has_aux=True)(params, {}, batch, KEY)[0])


def batch_of(images: np.ndarray, labels: np.ndarray) -> Batch:
  return Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(len(labels), jnp.float32))


def inspected(apply_fn: Callable, batch: Batch) -> Callable[[Params], detection.Scores]:
  run = jax.jit(functools.partial(detection.measure, loss_of(apply_fn)))
  return lambda params: run(params, {}, batch, KEY)


def say(name: str, hits: int, trials: int, unit: str, **more: Any) -> None:
  ends = [float(f"{end:.4g}") for end in clopper_pearson(hits, trials)]
  measuring.say(name, [hits / trials], unit, None, hits=hits, trials=trials, interval=ends, **more)


def main(_):
  given = work(_DATA.value)
  own = batch_of(given.hospitals[0][0], given.hospitals[1][0])
  params, _ = models.build(config("mlp")).init(jax.random.key(0))
  for name, (apply_fn, sent) in planted(given, params).items():
    few = 1 if name.startswith("dead") else AT_SITE
    images = given.hospitals[0][:, :few]
    total = 1 if few == 1 else NUM_SITES * few  # the victim's only one
    found = read(name, opened(given, apply_fn, sent, few))
    scores = inspected(apply_fn, own)(sent[0])
    differ = len({detection.digest(p) for p in sent}) > 1
    try:
      detection.check_structure(sent[0], params)
      refusals = []
    except ValueError:
      refusals = ["another structure than the site's own"]
    refusals += ["differs between sites"] * differ + detection.suspicions(scores, detection.LIMITS)
    hits = recovered(found, images[1:2] if few == 1 else images)
    say(f"recovered through secure aggregation of 3 sites: {name}", hits, total, "images",
        refused_for=refusals)  # fmt: skip
  for name in NETWORKS:
    inspect, refused, worst = inspected(models.build(config(name)).apply, own), 0, []
    for seed in range(_SEEDS.value):
      scores = [inspect(params) for params in honest(given, name, seed)]
      refused += any(detection.suspicions(s, detection.LIMITS) for s in scores)
      worst += scores
    most = {field: float(max(getattr(s, field) for s in worst)) for field in worst[0]._fields}
    limits = {field: float(limit) for field, limit in detection.LIMITS._asdict().items()}
    say(f"honest models refused: {name}", refused, _SEEDS.value, "rate", most=most, limits=limits)


if __name__ == "__main__":
  flags.mark_flag_as_required("data")
  logging.set_verbosity(logging.ERROR)
  app.run(main)
