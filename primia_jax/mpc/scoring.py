"""A secret model's score on secret labelled images: only a sum over many images is opened.

The vendor (the model owner) has the weights; the hospital (the data owner) has images and labels.
Each batch of images is one run of the protocol, with labels as rows of 0 and 1 that nobody but the
hospital sees. What a run leaves is a share of the batch's counts at each party, uniform by itself.
Each party adds up its shares (`Total`), and only the sum of all batches is opened, once.

| who | learns |
| --- | --- |
| hospital | the opened result if it is opened to it, and the plan |
| vendor | the opened result if it is opened to it, the number of images, and how it is opened |
| dealer | the plan |

All are semi-honest, and the dealer colludes with neither. No one sees an image, a label, a
predicted class, a logit or the counts of one batch. What an opened result itself tells is not
protected: counts of one image are its class. So `rows` refuses a class of few images, a `Total`
serves once, and an image may be in one opened result only, for which the caller keeps a register.
Labels are the hospital's word: counts of wrong labels are wrong counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng
from primia_jax.mpc import inference, planning
from primia_jax.mpc.circuit import Config
from primia_jax.mpc.messages import NAMES
from primia_jax.mpc.planning import SHARED, Plan
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.types import Array, PyTree

FEWEST = 10  # different images in a row of an opened result
OWNERS = ("model_owner", "data_owner", "data_owner")

Logits = Callable[[PyTree, Array], Array]  # (weights, images [B, ...]) -> [B, L]
Score = Callable[[PyTree, Array, Array], Array]  # (weights, images, labels [B, R]) -> counts


# ---- what is counted, as functions to be encrypted


def winner(scores: Array) -> Array:
  """[..., L] -> the same with 1 at the largest and 0 elsewhere; the first of equals, as argmax.

  Each pair is compared once, and a comparison of a few bits finds the one that wins all. That is
  two rounds and a third of the comparisons less than jax.nn.one_hot of an argmax. Every value
  inside has the same largest magnitude on all inputs, so its range holds whatever calibration saw.
  """
  num = scores.shape[-1]
  if num == 1:
    return jnp.ones_like(scores)
  first, second = np.triu_indices(num, 1)
  of_class = lambda i: [*np.flatnonzero(first == i), *len(first) + np.flatnonzero(second == i)]
  with jax.named_scope("winner"):
    signs = jnp.where(scores[..., first] >= scores[..., second], 1.0, -1.0).astype(scores.dtype)
    both = jnp.concatenate([signs, -signs], -1)
    points = both[..., np.array([of_class(i) for i in range(num)])].sum(-1)
    # num - 1 for the one that wins all its pairs, and less by 2 at least for the others
    return (points >= num - 2).astype(scores.dtype)


def confusion(logits: Logits) -> Score:
  """Counts [R, L]: rows by label, columns by predicted class."""

  def score(weights: PyTree, images: Array, labels: Array) -> Array:
    won = winner(logits(weights, images))
    with jax.named_scope("counts"):
      return labels.T @ won

  return score


def right(logits: Logits) -> Score:
  """[1]: how many images get the class of their label; labels are [B, L]."""

  def score(weights: PyTree, images: Array, labels: Array) -> Array:
    won = winner(logits(weights, images))
    with jax.named_scope("counts"):
      return jnp.sum(labels * won, axis=(0, 1))[None]

  return score


def roc(logits: Logits, positive: int, thresholds: Sequence[float]) -> Score:
  """Counts [2, T + 1] of other images and of those of the positive class (labels are [B, 2]).

  Column t counts those whose probability of the positive class reaches thresholds[t]; the last
  column counts all of them.
  """
  levels = np.array([*thresholds, -1.0], np.float32)  # all reach the last, also under encryption

  def score(weights: PyTree, images: Array, labels: Array) -> Array:
    likely = jax.nn.softmax(logits(weights, images))[:, positive]
    with jax.named_scope("thresholds"):
      reached = (likely[:, None] >= levels[None, :]).astype(labels.dtype)
    with jax.named_scope("counts"):
      return labels.T @ reached

  return score


def plan(
  score: Score, weights: PyTree, images: Array, num_rows: int, batch: int, config: Config
) -> Plan:
  """Plans a score for batches of images; what is left of the last batch has labels of 0.

  Args:
    score: what is counted.
    weights: the vendor's.
    images: [N, ...] float32, for calibration, from the vendor's own data.
    num_rows: R of the labels.
    batch: B, images in one run of the protocol.
    config: the ring.

  Raises:
    ValueError: a range does not fit the ring, or counts of so many images do not.
  """
  num = batch * -(-images.shape[0] // batch)
  filled = jnp.asarray(images)[np.resize(np.arange(images.shape[0]), num)]
  # The largest column of counts has a share of 1 / (the number of columns) of the batch at least.
  # Labels of that number make the calibrated range hold every count that a batch can have.
  columns = jax.eval_shape(score, weights, filled[:batch], _blank(batch, num_rows)).shape[-1]
  labels = jnp.full((batch, num_rows), columns, jnp.float32)
  examples = [(weights, filled[start : start + batch], labels) for start in range(0, num, batch)]
  ranges = planning.calibrate(score, OWNERS, examples)
  return planning.plan(score, OWNERS, examples[0], config, ranges)


def most_images(plan: Plan) -> int:
  """How many images one result can count in the plan's ring, with room for `at_least`."""
  return int(2.0 ** (plan.config.num_bits - 5) * plan.config.unit / plan.config.margin)


def _blank(batch: int, num_rows: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((batch, num_rows), jnp.float32)


# ---- labels


class Rows(NamedTuple):
  """The rows of a result.

  Attributes:
    of_class: [L] the row of each class.
    names: of the rows.
  """

  of_class: np.ndarray
  names: tuple[str, ...]

  def one_hot(self, labels: np.ndarray, num: int) -> np.ndarray:
    """[num, R] float32: a 1 in the row of each label, and zeros after the last."""
    out = np.zeros((num, len(self.names)), np.float32)
    out[np.arange(len(labels)), self.of_class[labels]] = 1
    return out


def rows(
  labels: np.ndarray, images: Sequence[bytes], names: Sequence[str], merge: bool = False
) -> Rows:
  """A row for each class, unless a class has images, but fewer than `FEWEST` different ones.

  A row of few images tells their classes one by one. Copies of an image count once, since ten
  copies would tell its class, too.

  Args:
    labels: [N] integers.
    images: of each, what equal images have in common (a digest).
    names: of the classes.
    merge: put small classes together, and with the next larger one, instead of refusing them.

  Raises:
    ValueError: a class, or all together, has too few images.
  """
  different = lambda members: len(
    {images[int(i)] for i in np.flatnonzero(np.isin(labels, members))}
  )
  if different(range(len(names))) < FEWEST:
    raise ValueError(
      f"{different(range(len(names)))} different images are too few: a result over fewer than "
      f"{FEWEST} tells the classes of single images; give more"
    )
  groups = [[i] for i in range(len(names))]
  while small := [g for g in groups if 0 < different(g) < FEWEST]:
    if not merge:
      said = ", ".join(f"{names[i]} ({different([i])})" for (i,) in small)
      raise ValueError(
        f"classes of fewer than {FEWEST} different images: {said}; their rows would tell the "
        "classes of single images. Give more images, or merge small classes"
      )
    least = min(small, key=different)
    others = [g for g in groups if g is not least and different(g)]
    groups.remove(least)
    min(others, key=different).extend(least)
  groups = sorted(sorted(group) for group in groups)
  of_class = np.empty(len(names), int)
  for row, group in enumerate(groups):
    of_class[group] = row
  return Rows(of_class, tuple(" or ".join(names[i] for i in group) for group in groups))


# ---- sums of shares


class Total:
  """One party's shares of a result, summed over runs of one plan. It is opened once.

  Two openings, one batch apart, would tell the counts of that batch.

  Args:
    plan: of the runs.
    party: MODEL_OWNER (the vendor) or DATA_OWNER (the hospital).
  """

  def __init__(self, plan: Plan, party: int):
    self.plan, self.party, self.num_runs = plan, party, 0
    self._sums: list[Array] | None = None
    self._is_open = False

  def add(self, shares: Sequence[Array]) -> None:
    """Adds this party's shares of one run's outputs.

    Raises:
      ValueError: the total was opened.
    """
    self._check()
    with self.plan.config.scope():
      old = self._sums or [jnp.zeros_like(v) for v in shares]
      self._sums = [a + b for a, b in zip(old, shares, strict=True)]
    self.num_runs += 1

  def take(self) -> list[Array]:
    """The sums, for the one opening.

    Raises:
      ValueError: the total was opened, or nothing was added.
    """
    self._check()
    if self._sums is None:
      raise ValueError("nothing was added to this total; run the protocol first")
    out, self._sums, self._is_open = self._sums, None, True
    return out

  def _check(self) -> None:
    if self._is_open:
      raise ValueError(
        f"this total of the {NAMES[self.party]} was opened; a second opening would tell what came "
        "between"
      )

  def __reduce_ex__(self, protocol: object) -> str:
    raise TypeError("a Total serves once and cannot be copied or pickled")


def opened(vendor: Total, hospital: Total) -> np.ndarray:
  """The counts, from both parties' totals; whoever calls this learns them.

  Raises:
    ValueError: the totals do not belong together, or one was opened.
  """
  return _counts(vendor.plan, _both(vendor, hospital))


def opened_apart(plan: Plan, vendor: Sequence[Array], hospital: Sequence[Array]) -> np.ndarray:
  """The counts, from what each party's `Total.take` gave, for the party that got the other's."""
  with plan.config.scope():
    pairs = zip(vendor, hospital, strict=True)
    shares = [jnp.stack([jnp.asarray(a), jnp.asarray(b)]) for a, b in pairs]
  return _counts(plan, shares)


def _counts(plan: Plan, shares: Sequence[Array]) -> np.ndarray:
  return np.rint(np.asarray(inference.reveal(plan, shares), np.float64)).astype(np.int64)


def at_least(vendor: Total, hospital: Total, least: int) -> bool:
  """Whether a total count reaches `least`: one bit, found under encryption. Nothing else is opened.

  All roles play in this process, as in `inference.transform`.

  Args:
    vendor, hospital: totals of `right`.
    least: public.

  Raises:
    ValueError: the totals do not belong together, or one was opened.
  """
  plan = vendor.plan
  (value,) = plan.circuit.outputs
  shape = jax.ShapeDtypeStruct(value.shape, jnp.float32)
  if value.scale != plan.config.unit:
    raise ValueError("the counts have another scale than shared arguments; plan `right` itself")
  test = lambda count: count >= least - 0.5
  largest = jnp.full(value.shape, most_images(plan), jnp.float32)
  ranges = planning.calibrate(test, (SHARED,), [(largest,)])
  bit = planning.plan(test, (SHARED,), (shape,), plan.config, ranges)
  shares = _both(vendor, hospital)
  with plan.config.scope():
    decide = bit.compiled(
      "decide", lambda key, own: inference.simulate(bit, inference.offline(bit, key, {}), {0: own})
    )
    return bool(np.all(inference.reveal(bit, decide(prng.random_key(), shares[0]))))


def _both(vendor: Total, hospital: Total) -> list[Array]:
  """Both parties' sums, [2, ...] each."""
  if (vendor.party, hospital.party) != (MODEL_OWNER, DATA_OWNER):
    raise ValueError("the vendor's total comes first, then the hospital's")
  if vendor.plan.digest != hospital.plan.digest or vendor.num_runs != hospital.num_runs:
    raise ValueError("the totals are of different runs; add both parties' shares of each run")
  with vendor.plan.config.scope():
    pairs = zip(vendor.take(), hospital.take(), strict=True)
    return [jnp.stack([jnp.asarray(a), jnp.asarray(b)]) for a, b in pairs]
