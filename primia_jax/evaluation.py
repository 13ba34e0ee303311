"""Class counts and validation scores of a federation, as sums over sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import local
from primia_jax.federated import Algorithm, Global, Site, Sites, State, over_sites
from primia_jax.metrics import ScoreCounts
from primia_jax.privacy import grid, subkeys
from primia_jax.sites import Placement
from primia_jax.summation import Purpose, Summation
from primia_jax.types import ApplyFn, Array, Batch, Key, ModelState, Params, PyTree

MAX_LOSS = 100.0  # nats per image, on average; a run above it has diverged
SQUARES = 64.0  # divides sums of squares over patients, to fit an encoding made for image counts


class Scores(NamedTuple):
  """Errors, summed over all sites.

  Attributes:
    confusion: [L, L] float64 counts, rows true and columns predicted. In segmentation, each pixel
      counts as its share of an image. With several labels an image, [L, 2, 2], one for each.
    loss: mean cross-entropy of an example, nats.
  """

  confusion: np.ndarray
  loss: float


def class_counting(
  num_classes: int, summation: Summation, placement: Placement, noise_stddev: float = 0.0
) -> Callable[[Sites], np.ndarray]:
  """Makes the function that counts the examples of each class over all sites.

  Where patients are the unit (`Site.units`), the images of one patient count as 1 together, so one
  patient changes the counts by at most 1 in L1 and L2 norm.

  Who learns what: the summation's server learns the opened counts. With noise, each site's counts
  are a Gaussian mechanism of that deviation and sensitivity 1, against every observer.

  Args:
    num_classes: L.
    summation, placement: how and where the sum is formed.
    noise_stddev: of Gaussian noise that each site adds to each of its counts.

  Returns:
    Sites -> [L] float64, rounded to whole numbers. It raises a RuntimeError for counts that do not
    fit the summation.
  """

  def site_fn(shared: tuple, site_state: PyTree, site: Site) -> tuple[Array, PyTree]:
    size = site.labels.shape[0]
    real = (jnp.arange(size) < site.num_examples).astype(jnp.int32)
    on = grid.choose(num_classes, noise_stddev, size)
    # what one unit adds at most, in integers, so that sums are exact
    whole = int(on.steps) if noise_stddev or site.units is not None else 1
    share = real * whole
    if site.units is not None:
      of_unit = jnp.zeros_like(real).at[site.units].add(real)  # padding, of unit -1, adds 0
      share = real * (whole // jnp.maximum(of_unit[site.units], 1))
    one_hot = jax.nn.one_hot(site.labels, num_classes, dtype=jnp.int32)
    counts = jnp.sum(one_hot * share[:, None], axis=0, dtype=jnp.int32)
    if noise_stddev:
      counts = grid.noised(counts, on, subkeys.of_counts(site.secret), 0)
    return grid.real(counts, jnp.float32(1 / whole)), site_state

  _check_sums(summation)
  total = over_sites(site_fn, summation, placement, Purpose.COUNTING)

  def count(sites: Sites) -> np.ndarray:
    counts, _, outcome = total((), 0, sites)
    if int(outcome.out_of_range):
      raise RuntimeError(
        f"the class counts of {int(outcome.out_of_range)} sites do not fit {summation.name}; give "
        "its secure_sum a larger max_abs"
      )
    return np.round(np.asarray(counts, np.float64))

  return count


def over_batches(
  of_batch: Callable[[Batch], PyTree],
  zeros: PyTree,
  images: Array,
  labels: Array,
  num_examples: Any,
  batch_size: int,
) -> PyTree:
  """The sum of of_batch over a site's examples in batches of one size, from zeros on.

  Args:
    of_batch: a batch, whose padding weighs 0 -> what is summed, a pytree.
    zeros: the sum over nothing.
    images, labels: [N, ...], of which the first num_examples are real.
    batch_size: images at once.
  """
  size = images.shape[0]

  def body(i: Array, total: PyTree) -> PyTree:
    index = i * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
    real = jnp.where(index < jnp.minimum(num_examples, size), index, -1)
    return jax.tree.map(jnp.add, total, of_batch(local.gather(images, labels, real)))

  return jax.lax.fori_loop(0, -(-num_examples // batch_size), body, zeros)


def count_errors(
  apply_fn: ApplyFn, prepare: Callable[[Array], Array], num_classes: int, batch_size: int
) -> Callable[..., dict[str, Array]]:
  """Makes the function that evaluates a model on one site's examples.

  Returns:
    (params, model_state, images [N, H, W, C], labels [N] or [N, H, W], num_examples) ->
    {"confusion": [L, L] float32, rows true and columns predicted; "loss": the sum of the
    cross-entropies}: sums, which add up over sites. An example counts 1, and a pixel of it its
    share of that.
  """
  one_hot = lambda labels: jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)

  def run(params, model_state, images, labels, num_examples):
    pixels = math.prod(labels.shape[1:])

    def of_batch(batch: Batch) -> dict[str, Array]:
      logits, _ = apply_fn(params, model_state, prepare(batch.images), train=False)
      weights = jnp.broadcast_to(
        batch.weights.reshape(-1, *(1,) * (batch.labels.ndim - 1)), batch.labels.shape
      ).reshape(-1, 1)
      logits = logits.reshape(-1, num_classes)
      true = one_hot(batch.labels.reshape(-1)) * weights
      confusion = true.T @ one_hot(jnp.argmax(logits, axis=-1)) / pixels
      loss = jnp.sum(jnp.where(weights > 0, true * -jax.nn.log_softmax(logits), 0.0))
      return {"confusion": confusion, "loss": loss / pixels}

    confusion = jnp.zeros((num_classes, num_classes), jnp.float32)
    zeros = {"confusion": confusion, "loss": jnp.zeros((), jnp.float32)}
    return over_batches(of_batch, zeros, images, labels, num_examples, batch_size)

  return run


def validation(
  algorithm: Algorithm,
  apply_fn: ApplyFn,
  prepare: Callable[[Array], Array],
  num_classes: int,
  summation: Summation,
  placement: Placement,
  batch_size: int = 64,
  of_pixels: bool = False,
  errors: Callable[..., Callable[..., dict[str, Array]]] | None = None,
) -> Callable[[Key, State, Sites], Scores]:
  """Makes the function that scores the model of a run on the sites' own images.

  Who learns what: the summation's server learns the confusion matrix and the loss, summed over
  sites. They are exact, and no ledger is charged for them.

  Args:
    algorithm: whose `personal` model each site scores.
    apply_fn, prepare: of the model; images as stored -> as it takes them.
    num_classes: L.
    summation, placement: how and where the sum is formed.
    batch_size: images scored at once.
    of_pixels: labels are masks, so that counts are sums of shares of images, and no whole numbers.
    errors: `count_errors`, or `multilabel.count_errors` for several labels an image.

  Returns:
    (key, State, Sites) -> Scores. It raises a RuntimeError where a site's loss is not finite or
    does not fit the summation.
  """
  errors_of = (errors or count_errors)(apply_fn, prepare, num_classes, batch_size)

  def site_fn(shared: Global, site_state: PyTree, site: Site) -> tuple[dict[str, Array], tuple]:
    model = algorithm.personal(shared, site_state)
    return errors_of(*model, site.images, site.labels, site.num_examples), ()

  _check_sums(summation)
  total = over_sites(site_fn, summation, placement, Purpose.EVALUATION)

  def validate(key: Key, state: State, sites: Sites) -> Scores:
    key = placement.replicate(key)
    shared = Global(state.params, state.model_state, state.server_state, state.round, key)
    sums, _, outcome = total(shared, int(state.round), sites, state.site_state)
    if int(outcome.out_of_range):
      raise RuntimeError(
        f"validation after round {int(state.round)}: at {int(outcome.out_of_range)} of "
        f"{len(sites.ids)} sites the loss is not finite or above {MAX_LOSS} per image; training "
        "has diverged: lower the learning rate"
      )
    confusion = np.asarray(sums["confusion"], np.float64)
    confusion = confusion if of_pixels else np.round(confusion)
    examples = confusion[0].sum() if confusion.ndim == 3 else confusion.sum()
    return Scores(confusion, float(sums["loss"]) / max(float(examples), 1.0))

  return validate


def count_summing(
  summation: Summation, placement: Placement
) -> Callable[[Sequence[int], PyTree], tuple[PyTree, np.ndarray]]:
  """Makes the function that sums what sites have counted.

  Who learns what: the summation's server, and between processes every site, learn the sums, as near
  as `summation` has them.

  Args:
    summation, placement: how and where the sum is formed.

  Returns:
    (numbers of all K sites, float32 counts [k, ...] of those that run here) -> (their sum, float64;
    the numbers of the sites in it). It raises a RuntimeError for counts that do not fit the
    summation.
  """

  def site_fn(shared: tuple, counts: PyTree, site: Site) -> tuple[PyTree, tuple]:
    return counts, ()

  def no_images(ids: np.ndarray) -> Site:
    empty: Any = np.zeros((len(ids), 0), np.int32)
    numbers: Any = np.asarray(ids, np.int32)
    return Site(numbers, empty, empty, 0 * numbers)

  _check_sums(summation)
  total = over_sites(site_fn, summation, placement, Purpose.EVALUATION)

  def add(ids: Sequence[int], counts: PyTree) -> tuple[PyTree, np.ndarray]:
    sums, _, outcome = total((), 0, Sites(np.asarray(ids, np.int32), no_images), counts)
    if int(outcome.out_of_range):
      raise RuntimeError(
        f"the score counts of {int(outcome.out_of_range)} sites do not fit {summation.name}; give "
        "its secure_sum a larger max_abs"
      )
    return jax.tree.map(lambda a: np.asarray(a, np.float64), sums), outcome.survivors

  return add


def score_summing(
  summation: Summation, placement: Placement
) -> Callable[[Sequence[int], ScoreCounts], tuple[ScoreCounts, np.ndarray]]:
  """Makes the function that sums what sites have counted of a finished model's scores.

  Who learns what: as `count_summing`. The sums are exact, and no ledger is charged for them. With
  many bins a count may be of one image: take as few as the error bound of `metrics.binned_roc_auc`
  allows, and show them with floors (`disclosure.Policy`); or add noise to them (`score_noise`).

  Args:
    summation, placement: how and where the sum is formed.

  Returns:
    (numbers of all K sites, `metrics.score_counts` [k, ...] of those that run here) -> (their sum,
    float64; the numbers of the sites in it). Counts are exact up to 2^24 in a sum; sums of
    confidences and of squares are as near as `summation` has them, the latter divided by `SQUARES`.
    It raises a RuntimeError for counts that do not fit the summation.
  """
  total = count_summing(summation, placement)

  def add(ids: Sequence[int], counts: ScoreCounts) -> tuple[ScoreCounts, np.ndarray]:
    sent = counts._replace(squares=np.asarray(counts.squares) / SQUARES)
    found, survivors = total(ids, ScoreCounts(*(np.asarray(a, np.float32) for a in sent)))
    whole = ScoreCounts(*map(np.round, found))
    sums_of_confidences = found.calibration[2:]
    calibration = np.concatenate([whole.calibration[:2], sums_of_confidences])
    squares = found.squares * SQUARES
    return whole._replace(calibration=calibration, squares=squares), survivors

  return add


def _check_sums(summation: Summation) -> None:
  if summation.is_rule:
    raise ValueError(
      f"{summation.name!r} makes no sum of counts; use summation.masked or summation.clear"
    )


def batches(images: Any, size: int) -> Iterator[np.ndarray]:
  """Images [N, ...] in batches of one size, so that what takes them is compiled once.

  Repetitions fill the last batch, and the caller drops what becomes of them. (Blank images would
  widen the ranges that encrypted inference calibrates.) In training, padding is blank.
  """
  num = images.shape[0]
  for start in range(0, num, size):
    yield images[np.resize(np.arange(start, min(start + size, num)), size)]


def predictor(
  apply_fn: ApplyFn,
  prepare: Callable[[Array], Array],
  batch_size: int = 64,
  likely: Callable[[Array], Array] = jax.nn.softmax,
  told: Callable[[np.ndarray], np.ndarray] = lambda probabilities: probabilities,
) -> Callable[[Sequence[tuple[Params, ModelState]], Any], np.ndarray]:
  """Makes (models, images [N, ...]) -> probabilities [N, L]; of several models, their mean.

  likely makes probabilities of logits; told makes what is returned of those of each batch.
  """

  @jax.jit
  def probabilities(params: Params, model_state: ModelState, images: Array) -> Array:
    logits, _ = apply_fn(params, model_state, prepare(images), train=False)
    return likely(logits)

  def predict(trained: Sequence[tuple[Params, ModelState]], images: Any) -> np.ndarray:
    mean = lambda batch: told(np.mean([probabilities(*m, batch) for m in trained], axis=0))
    return np.concatenate(list(map(mean, batches(images, batch_size))))[: images.shape[0]]

  return predict
