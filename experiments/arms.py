"""Trains one arm of an experiment (federated, pooled, or one site alone), with checkpoints."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import federated, models
from primia_jax.data import sites as data_sites
from primia_jax.data.augment import inverse_frequency
from primia_jax.data.sites import Part
from primia_jax.privacy import agreeing, ledger
from primia_jax.privacy.accounting import Ledger
from primia_jax.types import Array, ModelState, Params, PyTree, Site

from . import (
  admission,
  inputs,
  ledgers,
  lines,
  loop,
  markdown,
  progress,
  rejoining,
  starts,
  suppression,
  transcripts,
)
from .configs import Train, feature_statistics
from .trainers import Cohort, Trainer


class Arm(NamedTuple):
  """A trained arm: its best models (one for each site where some parameters stay there) and its
  JSON lines.

  Attributes:
    sent: what each site sends a change of: one of the models, without frozen parts, and its
      parameters again where control variates or averages are sent, too.
    facts: by name, for the report.
    privacy: what a report says of it; None without.
    ledgers: one for each site; None without privacy.
  """

  models: list[tuple[Params, ModelState]]
  sent: PyTree
  rows: list[dict[str, Any]]
  facts: dict[str, Any]
  privacy: dict[str, Any] | None
  ledgers: Sequence[Ledger] | None


def train(
  config: Train,
  cohort: Cohort,
  trainer: Trainer,
  model_config: models.ModelConfig,
  folder: pathlib.Path,
  ledger_dir: pathlib.Path | None,
  log: Callable[[dict[str, Any]], None] = lambda row: None,
  save_every: float = 0.0,
) -> Arm:
  """Trains an arm, or continues where it was stopped.

  Args:
    config: of the run.
    cohort: the sites.
    trainer: what trains them.
    model_config: of the model they train.
    folder: where the arm's checkpoints and `rounds.jsonl` go.
    ledger_dir: folder of the data's ledger, where a private arm is charged; None without privacy.
    log: called with each round's line.
    save_every: seconds from one checkpoint to the next. Later rounds are trained again, bit for
      bit. Private runs and processes save each round.

  Raises:
    RuntimeError: as `loop.rounds`, no round changed the model, or sites do not agree on where to
      start (`starts.agree`).
    ValueError: the ledger is damaged, or has lost what earlier starts were charged.
  """
  from .checkpoints import Best, Checkpoints  # here, because orbax takes half a second

  num_sites, key = len(cohort.train.sites), jax.random.key(config.seed)
  place, privacy, algorithm = trainer.place, trainer.privacy, trainer.algorithm
  joined = place.joined
  path = (folder if joined is None else joined.own) / ledger.LEDGER
  is_private = privacy is None or config.privacy.dp_seed < 0
  frozen = trainer.frozen
  start = config.model.initial(model_config, key) if frozen is None else frozen[1:3]
  state = trainer.rounds.init(*start)
  keep = lambda a: place.placement.replicate(a)
  best = Best(*state[:-1], *keep((jnp.float32(-2), jnp.int32(0))))
  has_own = bool(jax.tree.leaves(state.site_state))
  # Two between processes, in case that some were stopped before they saved the last.
  checkpoints = Checkpoints(folder, 1 if joined is None else 2)
  initial, back = state, None
  if joined is None:
    state, best, last_entry = checkpoints.restore(state, best)
  else:
    untrained = starts.Kept(state, best, "")
    if joined.is_back:
      back = rejoining.come_back(joined, place.number, untrained, checkpoints, path)
      state, best, last_entry = back.kept
    else:
      state, best, last_entry = starts.catch_up(joined, place.number, untrained, checkpoints)
  # Orbax ties what it restores to one device, which a mesh refuses where it cannot deal the rows
  # evenly: they are placed anew, as at the first start.
  rows_of = lambda tree: place.placement.put(jax.tree.map(np.asarray, tree))
  state = state._replace(site_state=rows_of(state.site_state))
  best = best._replace(site_state=rows_of(best.site_state))
  site = None if joined is None else joined.site
  if site is not None:
    model = state.params, state.model_state
    admission.check_start(site, model if frozen is None else frozen.whole(*model))
  step = trainer.rounds.step
  if joined is not None:
    if back is None:
      told = starts.agree(joined, place.number, initial, state, ledger.public(path))
      joined.exchange.bind(starts.digest(best, joined.settings))  # another site may have given it
    else:
      told = back.ledgers
    if privacy is not None:
      agreeing.reconcile(told, path, privacy, max(2, joined.num_colluding + 1))
    step = starts.recorded(joined, step, is_fresh=privacy is not None)
  if trainer.seen is not None:
    step = transcripts.recorded(folder, trainer.seen, step)
  charges: ledger.Ledgers | None = None
  if privacy is not None:
    assert ledger_dir is not None
    mine = cohort.mine.tolist()
    charges = ledgers.begin(privacy, cohort.train, mine, path, ledger_dir, is_private, last_entry)
  if site is not None:
    if privacy is not None and charges is not None:
      of_run = config.training.rounds, int(state.round), charges.counts is not None
      admission.check_budget(site, privacy, charges.chain, *of_run)
    last = "" if charges is None else charges.chain.last
    admission.note_start(site, config, int(state.round), last)

  everybody = _sites(config, cohort, cohort.train, trainer, trainer.max_examples)
  if back is not None:
    everybody = everybody._replace(class_weights=back.class_weights)
  elif config.training.class_weights:
    everybody = everybody._replace(class_weights=_class_weights(trainer, everybody, charges, site))
  if joined is not None and back is None and everybody.class_weights is not None:
    joined.exchange.bind(np.asarray(everybody.class_weights).tobytes())
  lines_path, begun = folder / "rounds.jsonl", int(state.round)
  policy = config.disclosure.policy()
  of_one = _of_one(cohort) if policy.fewest_patients else 1
  rows = lines.read(lines_path, begun)

  bar = progress.bar(
    desc=cohort.order + cohort.name + " (NOT PRIVATE)" * bool(_not_private(config, trainer)),
    unit="round",
    initial=int(state.round),
    total=config.training.rounds,
    bar_format="{desc}: {bar:20} round {n_fmt} of {total_fmt}{postfix}  [{elapsed} gone, "
    "{remaining} left]",
  )

  def before(ids: list[int]) -> bool:
    """Looks for lost sites, and charges a round before anything of it is released; False ends the
    run.
    """
    patience = config.training.patience
    if patience and int(state.round) - int(best.round) >= patience:  # alike in all processes
      return False
    if joined is not None and (back is None or int(state.round) > begun):  # else it has just been
      weights = everybody.class_weights
      rejoining.roll_call(joined, place.number, state, best, weights, path)
    if charges is None or privacy is None:
      return True
    if not charges.within_budget(ids):
      again = ", since a whole run is charged at each start" if privacy.whole_run else ""
      target = f"epsilon {privacy.target_epsilon:g}{again}"
      bar.set_postfix_str(f"stopped: another round would exceed {target}")
      return False
    charges.spend_round(ids)
    if site is not None:
      admission.note_charged(site, charges.chain.last)
    return True

  validate = None
  if trainer.validate is not None:
    held_out = _sites(config, cohort, cohort.validation, trainer, trainer.max_validated)
    validate = lambda key, state: trainer.validate(key, state, held_out)
  with_images = everybody._replace(ids=everybody.ids[np.asarray(cohort.train.sizes) > 0])
  inputs = step, validate, key, state, with_images
  most, bound = config.training.rounds, config.aggregation.secagg_max_abs
  last_abort, saved = "", time.monotonic()
  try:
    for done in loop.rounds(*inputs, most, trainer.num_sampled, before, bound):
      state = done.state
      if done.info is None:
        last_abort = done.aborted.removeprefix("round aborted: ")
        bar.write(f"round {done.number} aborted: {last_abort}")
        bar.update()
        continue
      row = _row(config, cohort, trainer, done, charges)
      mcc = np.float32(row.get("val_mcc", best.mcc))  # float32, as `Best` has it
      if validate is None or mcc > float(best.mcc):
        now = keep((jnp.float32(mcc), jnp.int32(done.number)))
        best = Best(*state[:-1], *now)
      row = suppression.of_round(
        row, policy, _confusion(done), _trained(config, cohort, done.info.survivors), of_one
      )
      rows.append(row)
      with lines_path.open("a") as file:
        file.write(json.dumps(row) + "\n")
      log(row)
      last_entry = "" if charges is None else charges.chain.last
      is_due = time.monotonic() - saved >= save_every or done.number == most
      if is_due or charges is not None or joined is not None:
        checkpoints.save(done.number, state, best, last_entry)
        saved = time.monotonic()
      if site is not None:
        admission.note_round(site, row, last_entry)
      epsilon = None if charges is None else f"epsilon {charges.epsilon:.2f}"
      shown = epsilon or f"loss {lines.text(row['train_loss'])}"
      shown += f"  MCC {lines.text(row['val_mcc'])}" if "val_mcc" in row else ""
      bar.set_postfix_str(shown, refresh=False)
      bar.update()
  finally:
    bar.close()
    checkpoints.close()

  if not int(best.round):
    why = "the budget allows no round"
    if last_abort:
      why = f"all {int(state.round)} rounds were aborted, the last because: {last_abort}"
    raise RuntimeError(
      f"{cohort.name}: {why}. Nothing was trained, so there is no model and no report; lower "
      "--dropout_rate or --secagg_threshold, or raise --target_epsilon, with another --run_dir"
    )

  facts = lines.facts(rows, best, state, place, num_sites, charges is not None)
  serve = lambda kept: algorithm.personal(
    federated.Global(best.params, best.model_state, best.server_state, state.round, key), kept
  )
  kept = []
  if has_own and algorithm.name == "fedbn":
    here = range(
      len(jax.tree.leaves(best.site_state)[0])
    )  # its own alone, where each has a process
    kept = [jax.tree.map(lambda a, i=i: a[i], best.site_state) for i in here]
  if kept:
    whose = "this site's own" if len(kept) < num_sites else "the mean of all sites' models"
    facts["normalisation"] = f"each site's own (FedBN); test scores are of {whose}"
  # The average needs no site's state.
  t = config.training
  is_average = config.privacy.dp_average or t.average_last or t.average_decay
  shared = serve(None) if is_average else (best.params, best.model_state)
  trained = [serve(k) for k in kept] or [shared]
  spent, said = None, None
  if charges is not None and privacy is not None:
    spent, said = charges.ledgers, ledgers.facts(config.privacy, privacy, charges.ledgers)
    if name := config.model.feature_statistics:
      said["features"] = (
        "standardised by mean and deviation of public images, for which nothing is charged: "
        + feature_statistics.source(name)
      )
  whole = trained if frozen is None else [frozen.whole(*m) for m in trained]
  twice = t.average_decay or config.federation.algorithm == "scaffold"
  tree = (trained[0], trained[0][0]) if twice else trained[0]
  saved_models, sent = jax.tree.map(np.asarray, (whole, tree))
  return Arm(saved_models, sent, rows, facts, said, spent)


def _row(
  config: Train, cohort: Cohort, trainer: Trainer, done: loop.Round, charges: ledger.Ledgers | None
) -> dict[str, Any]:
  """The JSON line of a round."""
  info, between_processes = done.info, trainer.place.placement.is_own_process
  assert info is not None
  ids, survivors = done.ids.tolist(), info.survivors.tolist()
  loses = len(cohort.train.sites) > 1 and config.aggregation.dropout_rate
  return {
    "arm": cohort.name,
    "round": done.number,
    "sites": ids if len(cohort.train.sites) > 1 else None,
    "train_loss": float(info.loss) if charges is None else None,  # not private, so never sent
    "train_accuracy": float(info.accuracy) if charges is None else None,
    "update_norm": float(info.update_norm),
    "learning_rate": float(trainer.schedule(jnp.float32(done.number - 1))),
    **({"survivors": len(survivors)} if loses or between_processes else {}),
    **({"lost": sorted(set(ids) - set(survivors))} if between_processes else {}),
    **({} if charges is None else {"epsilon": charges.epsilon}),
    **{name: float(value) for name, value in info.tells.items()},
    **({markdown.NOT_PRIVATE: open_by} if (open_by := _not_private(config, trainer)) else {}),
    **lines.scores(done),
    "seconds": done.seconds,
  }


def _of_one(cohort: Cohort) -> int:
  """The most images of one patient, of those that this process or the sites have counted."""
  known = [most for _, most in cohort.patients]
  for part in (cohort.train, cohort.validation):
    here = [rows[(rows >= 0) & (rows < len(part.dataset))] for rows in part.sites]  # not others'
    known += [most for _, most in inputs.count_patients(Part(part.dataset, tuple(here)))]
  return max(known)


def _confusion(done: loop.Round) -> Any:
  """[L, L] of a round's validation; None where there is none, or a task has other counts."""
  found = None if done.scores is None else np.asarray(done.scores.confusion)
  return found if found is not None and found.ndim == 2 else None


def _trained(config: Train, cohort: Cohort, survivors: Any) -> int:
  t = config.training
  most = None if t.sync_epochs else t.batches * t.batch_size
  return suppression.trained([cohort.train.sizes[i] for i in np.asarray(survivors).tolist()], most)


def _not_private(config: Train, trainer: Trainer) -> str:
  """The settings by which an arm shows more than its server learns; empty where there is none."""
  repeats = trainer.privacy is not None and config.privacy.dp_seed >= 0
  return ", ".join(["dp_seed"] * repeats + ["record_transcript"] * (trainer.seen is not None))


def _class_weights(
  trainer: Trainer,
  everybody: federated.Sites,
  charges: ledger.Ledgers | None,
  site: admission.Site | None,
) -> Array:
  """Inverse frequencies of the classes; a private run releases the noised counts once."""
  counts: Any = None if charges is None else charges.counts
  if counts is None:
    if charges is not None and trainer.privacy is not None:
      for release in trainer.privacy.before:
        charges.spend(release, everybody.ids.tolist())
        if site is not None:
          admission.note_charged(site, charges.chain.last)
    counts = trainer.count_classes(everybody).tolist()
    if charges is not None:
      charges.keep_counts(counts)
  return inverse_frequency(np.maximum(np.asarray(counts, np.float32), np.float32(1)))


def _sites(
  config: Train, cohort: Cohort, part: Part, trainer: Trainer, max_examples: int
) -> federated.Sites:
  """The sites of an arm with their images, kept in memory or loaded a few at a time."""
  by_patient = config.privacy.by_patient and part is cohort.train

  def load(ids: np.ndarray) -> Site:
    site = data_sites.stack(part, ids, max_examples, by_patient=by_patient)
    if trainer.features is not None:
      site = site._replace(images=_features(trainer.features, site))  # type: ignore[arg-type]
    return site

  ids, at_once = np.arange(len(part.sites), dtype=np.int32), config.hospitals.sites_in_memory
  secrets = config.privacy.secrets()
  if at_once:
    return federated.Sites(ids, load, None, at_once, secrets)
  mine = cohort.mine
  stacked = load(mine)
  placed = trainer.place.placement.put(stacked)

  def in_memory(wanted: np.ndarray) -> Site:
    if np.array_equal(wanted, mine):
      return placed
    return jax.tree.map(lambda a: a[np.searchsorted(mine, wanted)], stacked)

  return federated.Sites(ids, in_memory, secrets=secrets)


def _features(compute: Callable[[np.ndarray], np.ndarray], site: Site) -> np.ndarray:
  """[K, N, h, w, c] of stacked images; padding is not computed and stays blank."""
  images, counts = np.asarray(site.images), np.asarray(site.num_examples).tolist()
  real = compute(np.concatenate([of[:n] for of, n in zip(images, counts, strict=True)]))
  made = np.zeros((*images.shape[:2], *real.shape[1:]), real.dtype)
  for of_site, own in zip(made, np.split(real, np.cumsum(counts)[:-1]), strict=True):
    of_site[: len(own)] = own
  return made
