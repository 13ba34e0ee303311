"""Trains one arm of an experiment (federated, pooled, or one site alone) with checkpoints, and predicts with it."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tqdm
from jax.experimental import multihost_utils

from experiments import inputs, learning
from experiments.settings import Train
from primia_jax import federated, local, metrics, models, prng, sites
from primia_jax.data.augment import inverse_frequency
from primia_jax.data.dataset import Dataset
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
    count_classes: (key, dealer_key, site numbers, Loader) -> images of each class, [L].
    schedule: learning rate by time in rounds.
    placement: where the site axis runs.
    num_sampled: sites in a round.
    max_examples, max_validated: rows to which the sites' images are padded.
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


class Best(NamedTuple):
  """The model of the round with the best MCC on validation."""

  params: Params
  model_state: ModelState
  sites: PyTree
  mcc: Array
  round: Array


class Arm(NamedTuple):
  """A trained arm: its best models (one for each site where some parameters stay there) and its JSON lines."""

  models: list[tuple[Params, ModelState]]
  rows: list[dict[str, Any]]
  facts: dict[str, Any]


def make_trainer(
  settings: Train, model: models.Model, num_classes: int, cohorts: Sequence[Cohort], placement: sites.Placement
) -> Trainer:
  """Makes what trains any of the cohorts: all of several sites, or all of one."""
  num_sites = len(cohorts[0].train.sites)
  together = num_sites > 1
  num_sampled = (settings.sites_per_round or settings.num_sites) if together else 1
  work = learning.work(settings, tuple(n for cohort in cohorts for n in cohort.train.sizes))
  max_validated = max(n for cohort in cohorts for n in cohort.validation.sizes)
  recipe = learning.recipe(settings, model, work, num_classes)
  algorithm = learning.algorithm(settings, recipe) if together else learning.alone(recipe)
  aggregator = learning.aggregator(settings, num_sampled) if together else federated.alone()

  def counting(largest: float) -> federated.Aggregator:  # counts are summed securely, however updates are combined
    return federated.securely(learning.secure_sum(settings, num_sites, largest)) if together else federated.alone()

  return Trainer(
    algorithm,
    federated.federated(algorithm, aggregator, placement),
    _validation(algorithm, model, num_classes, counting(_MAX_LOSS * max_validated), placement),
    _class_counting(num_classes, counting(work.max_examples), placement),
    recipe.schedule,
    placement,
    num_sampled,
    work.max_examples,
    max_validated,
  )


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
    RuntimeError: a site's update did not fit the encoding of secure aggregation, or training diverged.
  """
  everyone = np.arange(len(cohort.train.sites), dtype=np.int32)
  algorithm, placement = trainer.algorithm, trainer.placement
  key = jax.random.key(settings.seed)
  dealer_key = np.asarray(prng.random_key())  # fresh at every start, so that no mask is ever used twice
  if jax.process_count() > 1:
    dealer_key = multihost_utils.broadcast_one_to_all(dealer_key)
  in_memory = settings.sites_in_memory
  train_data = _loader(cohort.train, trainer.max_examples, cohort.mine, placement, in_memory)
  validation_data = _loader(cohort.validation, trainer.max_validated, cohort.mine, placement, in_memory)
  class_weights = None
  if settings.class_weights:
    class_weights = np.asarray(inverse_frequency(trainer.count_classes(key, dealer_key, everyone, train_data)))

  params, model_state = learning.initial(settings, model_config, key)
  state = trainer.rounds.init(params, model_state, len(everyone))
  minus_one, zero = sites.replicate((jnp.float32(-2), jnp.int32(0)), placement)
  best = Best(state.params, state.model_state, state.sites, minus_one, zero)
  checkpoints = _checkpoints(folder)
  if (last := checkpoints.latest_step()) is not None:
    saved = checkpoints.restore(last, args=ocp.args.StandardRestore(_saved(state, best)))
    state, best = federated.State(**saved["state"]), Best(**saved["best"])
  rows = _read_rows(folder / "rounds.jsonl", int(state.round))

  is_first = jax.process_index() == 0
  bar = tqdm.tqdm(
    range(int(state.round), settings.rounds),
    desc=cohort.name, unit="round", initial=int(state.round), total=settings.rounds, disable=not is_first,
    bar_format="{desc}: {bar:20} round {n_fmt}/{total_fmt}{postfix}  [{elapsed} gone, {remaining} left]",
  )  # fmt: skip
  for round_index in bar:
    if settings.patience and round_index - int(best.round) >= settings.patience:
      break
    start = time.perf_counter()
    ids = federated.sample_sites(key, round_index, len(everyone), trainer.num_sampled)
    state, info = trainer.rounds.step(key, state, ids, train_data, dealer_key, class_weights)
    if int(info.out_of_range):
      checkpoints.close()
      raise RuntimeError(
        f"round {round_index + 1}: {int(info.out_of_range)} site's update held a number beyond secagg_max_abs="
        f"{settings.secagg_max_abs} or not finite. The round was not applied. If training diverges, lower "
        "--learning_rate; else raise --secagg_max_abs. Start again with the same --run_dir to go on from round "
        f"{round_index}"
      )
    row = {
      "arm": cohort.name,
      "round": round_index + 1,
      "sites": ids.tolist() if len(everyone) > 1 else None,
      "train_loss": float(info.loss),
      "train_accuracy": float(info.accuracy),
      "update_norm": float(info.update_norm),
      "learning_rate": float(trainer.schedule(jnp.float32(round_index))),
      **trainer.validate(key, state, everyone, dealer_key, validation_data),
    }
    row["seconds"] = time.perf_counter() - start
    if np.float32(row["val_mcc"]) > float(best.mcc):  # float32, as it is kept
      here = sites.replicate((jnp.float32(row["val_mcc"]), jnp.int32(round_index + 1)), placement)
      best = Best(state.params, state.model_state, state.sites, *here)
    rows.append(row)
    if is_first:
      with (folder / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
      log(row)
    checkpoints.save(round_index + 1, args=ocp.args.StandardSave(_saved(state, best)))
    bar.set_postfix_str(f"  loss {row['train_loss']:.3f}  MCC {row['val_mcc']:.3f}")
  checkpoints.close()

  serve = lambda kept: algorithm.personal(
    federated.Global(best.params, best.model_state, state.server, state.round, key), kept
  )
  personal = jax.tree.leaves(best.sites) and algorithm.name == "fedbn"
  kept = [jax.tree.map(lambda a, i=i: a[i], best.sites) for i in everyone] if personal else []
  trained = [serve(k) for k in kept] if kept else [(best.params, best.model_state)]
  facts = {"best round": int(best.round), "validation MCC": float(best.mcc), "rounds trained": int(state.round)}
  return Arm([jax.tree.map(np.asarray, m) for m in trained], rows, facts)


def predictor(model: models.Model) -> Callable[[list[tuple[Params, ModelState]], Dataset], np.ndarray]:
  """Makes (trained models, images) -> the probabilities [N, L] of each image; of several models, their mean."""

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


def _class_counting(num_classes: int, aggregator: federated.Aggregator, placement: sites.Placement):
  def site_fn(shared: Any, kept: PyTree, site: federated.Site) -> tuple[PyTree, PyTree]:
    real = (jnp.arange(site.labels.shape[0]) < site.num_examples).astype(jnp.float32)
    return jnp.sum(jax.nn.one_hot(site.labels, num_classes) * real[:, None], axis=0), kept

  total = federated.total_over_sites(site_fn, aggregator, placement, federated.COUNTING)
  make_links = federated.link(aggregator, placement)

  def count(key: Key, dealer_key: np.ndarray, ids: np.ndarray, loader: federated.Loader) -> np.ndarray:
    links = make_links(key, np.int32(0), ids, dealer_key)
    counts, *_ = total((), np.int32(0), ids, links, (), loader)
    return np.round(np.asarray(counts))

  return count


def _loader(
  part: inputs.Part, max_examples: int, mine: np.ndarray, placement: sites.Placement, in_memory: int
) -> federated.Loader:
  if in_memory:
    return federated.Loader(lambda ids: inputs.stack(part, ids, max_examples), in_memory)
  stacked = inputs.stack(part, mine, max_examples)
  placed = sites.put(stacked, placement)
  everything = lambda ids: np.array_equal(ids, mine)
  return federated.Loader(
    lambda ids: placed if everything(ids) else jax.tree.map(lambda a: a[np.searchsorted(mine, ids)], stacked)
  )


def _validation(
  algorithm: federated.Algorithm, model: models.Model, num_classes: int, aggregator: federated.Aggregator,
  placement: sites.Placement,
) -> Callable[..., dict[str, float]]:  # fmt: skip
  count_errors = local.count_errors(model.apply, learning.normalise, num_classes, _PREDICTION_BATCH)

  def site_fn(shared: federated.Global, kept: PyTree, site: federated.Site) -> tuple[PyTree, PyTree]:
    return count_errors(*algorithm.personal(shared, kept), site.images, site.labels, site.num_examples), ()

  total = federated.total_over_sites(site_fn, aggregator, placement, federated.EVALUATION)
  make_links = federated.link(aggregator, placement)

  def validate(key: Key, state: federated.State, ids: np.ndarray, dealer_key: np.ndarray, loader: federated.Loader):
    shared = federated.Global(
      state.params, state.model_state, state.server, state.round, sites.replicate(key, placement)
    )
    links = make_links(key, np.asarray(state.round), ids, dealer_key)
    sums, _, out_of_range = total(shared, state.round, ids, links, state.sites, loader)
    if int(out_of_range):
      raise RuntimeError(
        f"validation after round {int(state.round)}: the loss of {int(out_of_range)} site is not finite or above "
        f"{_MAX_LOSS} per image; training has diverged: lower --learning_rate"
      )
    confusion = np.round(np.asarray(sums["confusion"]))
    loss = float(sums["loss"]) / float(confusion.sum())
    return {
      "val_loss": loss,
      "val_accuracy": float(metrics.accuracy(confusion)),
      "val_mcc": float(metrics.mcc(confusion)),
    }

  return validate


def _saved(state: federated.State, best: Best) -> dict[str, Any]:
  return {"state": state._asdict(), "best": best._asdict()}


def _checkpoints(folder: pathlib.Path) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(max_to_keep=1, create=True, enable_async_checkpointing=False)
  return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def _read_rows(path: pathlib.Path, finished: int) -> list[dict[str, Any]]:
  """The lines of the finished rounds; later ones, of a round that was not saved, are dropped from the file."""
  if not path.is_file():
    return []
  rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["round"] <= finished]
  if jax.process_index() == 0:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return rows
