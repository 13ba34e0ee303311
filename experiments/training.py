"""Trains one arm of an experiment (federated, pooled, or one site alone) with checkpoints, and
predicts with it.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import books, inputs, learning, private, processes
from experiments.checkpoints import Best, Checkpoints
from experiments.settings import Train
from primia_jax import federated, local, metrics, models, prng, secagg, site_privacy, sites
from primia_jax.data.augment import inverse_frequency
from primia_jax.data.dataset import Dataset
from primia_jax.privacy import ledger, noise, subkeys
from primia_jax.privacy.plan import SiteLevel, StepPlan
from primia_jax.types import Array, Key, ModelState, Params, PyTree

_PREDICTION_BATCH = 64
_MAX_LOSS = 100.0  # nats an image may cost on average before a run is taken for diverged


class Cohort(NamedTuple):
  """Sites that train together; a single one for pooled and local training.

  Attributes:
    name: of the arm, as reports print it.
    train, validation: what each site holds.
    mine: numbers of the sites whose images this process may read.
  """

  name: str
  train: inputs.Part
  validation: inputs.Part
  mine: np.ndarray


class Trainer(NamedTuple):
  """The compiled side of training, which cohorts of one shape share.

  Attributes:
    algorithm, rounds: what is trained, and how.
    validate: see `_validation`.
    count_classes: (key, dealer_key, site numbers, Loader) -> images, or patients, of each class,
      [L].
    schedule: learning rate by time in rounds.
    placement: where the site axis runs.
    num_sampled: sites in a round.
    max_examples, max_validated: rows to which the sites' images are padded.
    privacy: of the sites' units, if any.
    features: what images become before they are loaded, once and for all; None where they stay as
      they are.
  """

  algorithm: federated.Algorithm
  rounds: federated.FederatedAlgorithm
  validate: Callable[..., dict[str, float]]
  count_classes: Callable[..., np.ndarray]
  schedule: Callable[[Array], Array | float]
  placement: sites.Placement
  num_sampled: int
  max_examples: int
  max_validated: int
  privacy: StepPlan | SiteLevel | None
  features: Callable[[np.ndarray], np.ndarray] | None


class Arm(NamedTuple):
  """A trained arm: its best models (one for each site where some parameters stay there) and its
  JSON lines.

  Attributes:
    privacy: what a report says of it; None without.
  """

  models: list[tuple[Params, ModelState]]
  rows: list[dict[str, Any]]
  facts: dict[str, Any]
  privacy: dict[str, Any] | None


def make_trainer(
  settings: Train,
  model: models.Model,
  model_config: models.ModelConfig,
  cohorts: Sequence[Cohort],
  placement: sites.Placement,
) -> Trainer:
  """Makes what trains any of the cohorts: all of several sites, or all of one; with privacy, a
  single cohort.
  """
  num_classes = model_config.num_classes
  num_sites = len(cohorts[0].train.sites)
  together = num_sites > 1
  num_sampled = (settings.sites_per_round or settings.num_sites) if together else 1
  steps = learning.steps(settings, tuple(n for cohort in cohorts for n in cohort.train.sizes))
  max_validated = max(n for cohort in cohorts for n in cohort.validation.sizes)
  units = (
    [inputs.patients(c.train, i) for c in cohorts for i in range(len(c.train.sites))]
    if by_patient(settings)
    else []
  )
  sizes = [int(u.max()) + 1 for u in units] or [n for cohort in cohorts for n in cohort.train.sizes]
  rows_per_unit = max((int(np.bincount(u).max()) for u in units), default=1)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  num_parameters = sum(a.size for a in jax.tree.leaves(params))
  least = learning.min_survivors(learning.secure_sum(settings, num_sampled)) if together else None
  features = _features(model_config) if settings.augment == "none" and not settings.mixup else None
  loss_fn = learning.loss(settings, model, num_classes, features is not None)
  privacy = None  # of a whole site that trains by itself: it sends no update that needs noise
  if together or settings.dp != "site":
    privacy = private.plan(
      settings,
      loss_fn,
      sizes,
      num_sampled,
      num_parameters,
      least,
      rows_per_unit=rows_per_unit,
      max_examples=steps.max_examples,
      has_taps=models.has_taps(model_config),
    )
  recipe = learning.recipe(settings, loss_fn, steps, privacy)
  algorithm = (
    learning.algorithm(settings, recipe, privacy) if together else learning.alone(settings, recipe)
  )
  aggregator = federated.alone()
  if together:
    aggregator = learning.private_aggregator(settings, num_sampled, privacy, params, model_state)

  def counting(
    largest: float,
  ) -> federated.Aggregator:  # counts are summed securely, however updates are combined
    return (
      federated.securely(learning.secure_sum(settings, num_sites, largest))
      if together
      else federated.alone()
    )

  return Trainer(
    algorithm,
    federated.federated(algorithm, aggregator, placement),
    _validation(
      algorithm,
      model,
      num_classes,
      counting(_MAX_LOSS * max_validated),
      placement,
      features is not None,
    ),
    _class_counting(
      num_classes,
      counting(
        steps.max_examples + 10 * settings.dp_count_noise
      ),  # the noise ends at 6.8 deviations
      placement,
      settings.dp_count_noise if settings.dp != "none" else 0.0,
    ),
    recipe.schedule,
    placement,
    num_sampled,
    steps.max_examples,
    max_validated,
    privacy,
    features,
  )


def by_patient(settings: Train) -> bool:
  return settings.dp == "patient"


def _features(config: models.ModelConfig) -> Callable[[np.ndarray], np.ndarray] | None:
  """What the model computes before its first parameter, of any number of stored images, batch by
  batch.
  """
  transform = models.features(config)
  if transform is None:
    return None
  run = jax.jit(lambda images: transform(learning.normalise(images)))

  def apply(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(-1, *images.shape[-3:])
    batches = (
      flat[np.resize(np.arange(i, min(i + 64, len(flat))), 64)] for i in range(0, len(flat), 64)
    )
    out = np.concatenate([np.asarray(run(batch)) for batch in batches])[: len(flat)]
    return out.reshape(*images.shape[:-3], *out.shape[1:])

  return apply


def train(
  settings: Train,
  cohort: Cohort,
  trainer: Trainer,
  model_config: models.ModelConfig,
  folder: pathlib.Path,
  log: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Arm:
  """Trains an arm, or goes on where it was stopped.

  Args:
    settings: of the run.
    cohort: the sites.
    trainer: what trains them.
    model_config: of the model they train.
    folder: where the arm's checkpoints and `rounds.jsonl` go.
    log: called with each round's line.

  Raises:
    RuntimeError: a site's update did not fit the encoding of secure aggregation, or training
      diverged.
    ValueError: the ledger of an earlier start is damaged, or of another number of sites.
  """
  everyone = np.arange(len(cohort.train.sites), dtype=np.int32)
  algorithm, placement = trainer.algorithm, trainer.placement
  key = jax.random.key(settings.seed)
  dealer_key = np.asarray(
    prng.random_key()
  )  # fresh at every start, so that no mask is ever used twice
  exchange, is_first = placement.exchange, placement.index == 0
  own_folder = processes.home(folder, placement.index)
  own_folder.mkdir(exist_ok=True)
  privacy, book = trainer.privacy, None
  repeatable = privacy is not None and settings.dp_seed >= 0
  if privacy is not None:
    book = ledger.Book(privacy, len(everyone), own_folder / ledger.LEDGER)
  train_data = _loader(
    cohort.train, trainer.max_examples, cohort.mine, placement, settings, trainer, True
  )
  validation_data = _loader(
    cohort.validation, trainer.max_validated, cohort.mine, placement, settings, trainer
  )
  class_weights = None
  if settings.class_weights:
    counts = None if book is None else book.counts
    if counts is None:
      for release in privacy.before if privacy is not None else ():
        assert book is not None  # as there is a plan
        book.spend(release, everyone.tolist())
      counts = trainer.count_classes(key, dealer_key, everyone, train_data).tolist()
      if book is not None:
        book.counts = counts
        book.save()
    class_weights = np.asarray(inverse_frequency(np.maximum(counts, 1.0)))

  params, model_state = learning.initial(settings, model_config, key)
  state = trainer.rounds.init(params, model_state, len(everyone))
  minus_one, zero = sites.replicate((jnp.float32(-2), jnp.int32(0)), placement)
  best = Best(state.params, state.model_state, state.server, state.sites, minus_one, zero)
  checkpoints = Checkpoints(folder, placement, keeps=bool(jax.tree.leaves(state.sites)))
  state, best = checkpoints.restore(state, best)
  rows = _read_rows(folder / "rounds.jsonl", int(state.round)) if is_first else []

  bar = tqdm.tqdm(
    range(int(state.round), settings.rounds),
    desc=cohort.name + (" (NOT PRIVATE)" if repeatable else ""), unit="round",
    initial=int(state.round), total=settings.rounds, disable=not is_first,
    bar_format="{desc}: {bar:20} round {n_fmt}/{total_fmt}{postfix}  [{elapsed} gone, {remaining} "
               "left]",
  )  # fmt: skip
  for round_index in bar:
    if settings.patience and round_index - int(best.round) >= settings.patience:
      break
    start = time.perf_counter()
    ids = federated.sample_sites(key, round_index, len(everyone), trainer.num_sampled)
    lost = learning.dropouts(settings, round_index, len(ids)) if len(everyone) > 1 else None
    if book is not None and privacy is not None:
      if not book.within_budget(ids.tolist()):
        again = (
          ", since correlated noise is charged whole at each start" if privacy.whole_run else ""
        )
        bar.set_postfix_str(
          f"  stopped: another round would exceed epsilon {privacy.target_epsilon:g}{again}"
        )
        break
      book.spend_round(ids.tolist())  # before anything is released
    clip = site_privacy.l2_clip_norm(state.server)
    try:
      state, info = trainer.rounds.step(
        key, state, ids, train_data, dealer_key, class_weights, lost
      )
    except secagg.RoundAborted as error:
      bar.write(f"round {round_index + 1}: {error}")
      state = state._replace(round=state.round + 1)
      continue
    if int(info.out_of_range):
      checkpoints.close()
      raise RuntimeError(
        f"round {round_index + 1}: at {int(info.out_of_range)} of {len(ids)} sites the update held "
        f"a number beyond "
        f"secagg_max_abs={settings.secagg_max_abs} or not finite. The round was not applied. If "
        f"training diverges, "
        "lower --learning_rate; else raise --secagg_max_abs. Start again with another --run_dir, "
        "since a run keeps its "
        "settings"
      )
    row = {
      "arm": cohort.name,
      "round": round_index + 1,
      "sites": ids.tolist() if len(everyone) > 1 else None,
      "train_loss": float(info.loss) if privacy is None else None,  # not private, so never sent
      "train_accuracy": float(info.accuracy) if privacy is None else None,
      "update_norm": float(info.update_norm),
      "learning_rate": float(trainer.schedule(jnp.float32(round_index))),
      **({} if lost is None and exchange is None else {"survivors": int(info.survivors)}),
      **(
        {} if exchange is None else {"lost": [i for i in ids.tolist() if i not in exchange.sites]}
      ),
      **({} if book is None else {"epsilon": book.epsilon}),
      **({} if clip is None else {"l2_clip_norm": clip}),
      **({"NOT PRIVATE": "dp_seed"} if repeatable else {}),
      **trainer.validate(key, state, everyone, dealer_key, validation_data),
    }
    row["seconds"] = time.perf_counter() - start
    if np.float32(row["val_mcc"]) > float(best.mcc):  # float32, as it is kept
      here = sites.replicate((jnp.float32(row["val_mcc"]), jnp.int32(round_index + 1)), placement)
      best = Best(state.params, state.model_state, state.server, state.sites, *here)
    rows.append(row)
    if is_first:
      with (folder / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
      log(row)
    checkpoints.save(round_index + 1, state, best)
    shown = f"  loss {row['train_loss']:.3f}" if book is None else f"  epsilon {book.epsilon:.2f}"
    bar.set_postfix_str(f"{shown}  MCC {row['val_mcc']:.3f}")
  checkpoints.close()

  serve = lambda kept: algorithm.personal(
    federated.Global(best.params, best.model_state, best.server, state.round, key), kept
  )
  personal = jax.tree.leaves(best.sites) and algorithm.name == "fedbn"
  kept = [jax.tree.map(lambda a, i=i: a[i], best.sites) for i in everyone] if personal else []
  shared = (
    serve(None) if settings.dp_average else (best.params, best.model_state)
  )  # the average needs nothing kept
  trained = [serve(k) for k in kept] or [shared]
  facts: dict[str, Any] = {"best round": int(best.round), "validation MCC": float(best.mcc)}
  facts["rounds trained"] = len(rows)
  if aborted := int(state.round) - len(rows):
    facts["rounds aborted, too few sites being left"] = (
      f"{aborted}{', charged all the same' if book else ''}"
    )
  if exchange is not None:
    lost_once = {i for row in rows for i in row.get("lost", ())} | set(everyone.tolist()) - set(
      exchange.sites
    )
    facts["sites lost in some round"] = sorted(lost_once) or "none"
  said = (
    books.facts(settings, privacy, book.ledgers)
    if privacy is not None and book is not None
    else None
  )
  return Arm([jax.tree.map(np.asarray, m) for m in trained], rows, facts, said)


def predictor(
  model: models.Model,
) -> Callable[[list[tuple[Params, ModelState]], Dataset], np.ndarray]:
  """Makes (trained models, images) -> the probabilities [N, L] of each image; of several models,
  their mean.
  """

  @jax.jit
  def probabilities(params, model_state, images):
    logits, _ = model.apply(params, model_state, learning.normalise(images), train=False)
    return jax.nn.softmax(logits)

  def batches(trained: list[tuple[Params, ModelState]], dataset: Dataset) -> Iterator[np.ndarray]:
    for start in range(0, len(dataset), _PREDICTION_BATCH):
      index = np.arange(start, min(start + _PREDICTION_BATCH, len(dataset)))
      images = dataset.images[np.resize(index, _PREDICTION_BATCH)]  # one shape, so compiled once
      yield np.mean([probabilities(*m, images)[: len(index)] for m in trained], axis=0)

  return lambda trained, dataset: np.concatenate(list(batches(trained, dataset)))


def _class_counting(
  num_classes: int, aggregator: federated.Aggregator, placement: sites.Placement, count_noise: float
) -> Callable[..., np.ndarray]:
  """Sums class counts over sites; with count_noise, each site adds Gaussian noise of that deviation
  to its own.

  Where patients are the unit, the images of each count as 1 together: the release is charged for a
  change by 1.
  """

  def site_fn(shared: Any, kept: PyTree, site: federated.Site) -> tuple[PyTree, PyTree]:
    share = (jnp.arange(site.labels.shape[0]) < site.num_examples).astype(jnp.float32)
    if site.units is not None:
      of_unit = jnp.zeros_like(share).at[site.units].add(share)  # padding, of unit -1, adds 0
      share = share / jnp.maximum(of_unit[site.units], 1.0)
    counts = jnp.sum(jax.nn.one_hot(site.labels, num_classes) * share[:, None], axis=0)
    if count_noise and site.secret is not None:
      counts = counts + noise.gaussian_like(subkeys.of_counts(site.secret), 0, counts, count_noise)
    return counts, kept

  total = federated.total_over_sites(site_fn, aggregator, placement, federated.COUNTING)
  make_links = federated.link(aggregator, placement, federated.COUNTING)

  def count(
    key: Key, dealer_key: np.ndarray, ids: np.ndarray, loader: federated.Loader
  ) -> np.ndarray:
    links = make_links(key, np.int32(0), ids, dealer_key)
    counts, *_ = total((), np.int32(0), ids, links, (), loader)
    return np.round(np.asarray(counts))

  return count


def _loader(
  part: inputs.Part,
  max_examples: int,
  mine: np.ndarray,
  placement: sites.Placement,
  settings: Train,
  trainer: Trainer,
  is_training: bool = False,
) -> federated.Loader:
  secrets = {}
  if is_training and trainer.privacy is not None:
    secrets = dict(zip(mine.tolist(), private.secrets(settings, mine), strict=True))

  def load(ids: np.ndarray) -> federated.Site:
    site: Any = inputs.stack(part, ids, max_examples)
    if trainer.features is not None:
      site = site._replace(images=trainer.features(site.images))
    if secrets:
      site = site._replace(secret=np.stack([secrets[i] for i in ids.tolist()]))
      if by_patient(settings):
        padded = [
          np.pad(u, (0, max_examples - len(u)), constant_values=-1)
          for u in (inputs.patients(part, i) for i in ids)
        ]
        site = site._replace(units=np.stack(padded))
    return site

  if settings.sites_in_memory:
    return federated.Loader(load, settings.sites_in_memory)
  stacked = load(mine)
  placed = sites.put(stacked, placement)
  everything = lambda ids: np.array_equal(ids, mine)
  return federated.Loader(
    lambda ids: (
      placed if everything(ids) else jax.tree.map(lambda a: a[np.searchsorted(mine, ids)], stacked)
    )
  )


def _validation(
  algorithm: federated.Algorithm,
  model: models.Model,
  num_classes: int,
  aggregator: federated.Aggregator,
  placement: sites.Placement,
  prepared: bool,
) -> Callable[..., dict[str, float]]:
  prepare = (lambda images: images) if prepared else learning.normalise
  count_errors = local.count_errors(model.apply, prepare, num_classes, _PREDICTION_BATCH)

  def site_fn(
    shared: federated.Global, kept: PyTree, site: federated.Site
  ) -> tuple[PyTree, PyTree]:
    return count_errors(
      *algorithm.personal(shared, kept), site.images, site.labels, site.num_examples
    ), ()

  total = federated.total_over_sites(site_fn, aggregator, placement, federated.EVALUATION)
  make_links = federated.link(aggregator, placement, federated.EVALUATION)

  def validate(
    key: Key,
    state: federated.State,
    ids: np.ndarray,
    dealer_key: np.ndarray,
    loader: federated.Loader,
  ):
    shared = federated.Global(
      state.params, state.model_state, state.server, state.round, sites.replicate(key, placement)
    )
    links = make_links(key, np.asarray(state.round), ids, dealer_key)
    sums, _, out_of_range = total(shared, state.round, ids, links, state.sites, loader)
    if int(out_of_range):
      raise RuntimeError(
        f"validation after round {int(state.round)}: at {int(out_of_range)} of {len(ids)} sites "
        f"the loss is not finite "
        f"or above {_MAX_LOSS} per image; training has diverged: lower --learning_rate"
      )
    confusion = np.round(np.asarray(sums["confusion"]))
    loss = float(sums["loss"]) / float(confusion.sum())
    return {
      "val_loss": loss,
      "val_accuracy": float(metrics.accuracy(confusion)),
      "val_mcc": float(metrics.mcc(confusion)),
    }

  return validate


def _read_rows(path: pathlib.Path, finished: int) -> list[dict[str, Any]]:
  """The lines of the finished rounds; later ones, of a round that was not saved, are dropped from
  the file.
  """
  if not path.is_file():
    return []
  rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["round"] <= finished]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return rows
