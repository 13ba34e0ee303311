"""Local training: the steps that one site takes in a round.

Nothing here depends on other sites. Each random choice derives from the keys of `Round`, or from
the site's secret.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from primia_jax.types import (
  ApplyFn,
  Array,
  Batch,
  Key,
  LossFn,
  Metrics,
  ModelState,
  Params,
  PyTree,
  Site,
)

# (params, model_state, batch, key) -> (gradient, (new model_state, Metrics)). The gradient is that
# of the mean loss, or the sum of clipped gradients, which a privatizer noises and divides.
GradFn = Callable[[Params, ModelState, Batch, Key], tuple[Params, tuple[ModelState, Metrics]]]
# learning rate -> optimiser, e.g. `functools.partial(optax.sgd, momentum=0.9)`
Optimizer = Callable[[Array], optax.GradientTransformation]
# of one site's model and batch; a loop over smaller ones costs more than it saves
_CACHE_BYTES = 2**20


class Round(NamedTuple):
  """What a site needs to know about a round, besides its own data.

  Attributes:
    number: int32, of the round, from 0.
    order_key: the site's key for the order of its examples, the same in every round.
    key: for augmentation and dropout; fresh for each (round, site).
    class_weights: [L], the weight of an example of each class; None for 1.
  """

  number: Array
  order_key: Key
  key: Key
  class_weights: Array | None = None


class Steps(NamedTuple):
  """Which examples a site takes in a round; made by `epochs`, `privacy.batches.poisson` or
  `cyclic`. The numbers are public; a site's own number of examples is not.

  Attributes:
    max_steps: T, the most steps of any site in a round.
    batch_size: the most examples (or units) that a step takes, on average for Poisson sampling.
    max_examples: public bound on the examples of one site.
    begin: (Site, Round) -> (number of steps: a Python int where all sites take equally many, else
      int32; draw). `draw` maps (step of the round t, state of the privatizer) to [B] int32 into the
      site's examples, or [B, R] where a unit has several rows; -1 marks padding.
  """

  max_steps: int
  batch_size: int
  max_examples: int
  begin: Callable[[Site, Round], tuple[Array | int, Callable[[Array, PyTree], Array]]]


class Privatizer(optax.GradientTransformationExtraArgs):
  """Adds noise to gradients; tied to the batches and clipped gradients of its plan.

  Attributes:
    goes_with: the `Steps` and the `GradFn` of its plan; () accepts any, without guarantee.
  """

  goes_with: tuple[Steps, GradFn] | tuple[()] = ()

  def bound_to(self, steps: Steps, grad_fn: GradFn) -> Privatizer:
    """A copy that `train` refuses to use with other batches or gradients."""
    made = Privatizer(*self)
    made.goes_with = (steps, grad_fn)
    return made

  def _replace(self, **changes) -> Privatizer:  # type: ignore[override]
    made = super()._replace(**changes)
    made.goes_with = self.goes_with
    return made


class Recipe(NamedTuple):
  """How a site trains.

  Attributes:
    steps: which examples each step takes.
    grad_fn: see `GradFn`.
    privatizer: adds noise to gradients, made by `privacy.plan`; None for no noise. Its
      `update` gets (gradient, state, params, secret=, step=, num_units=), with the site's secret, a
      uint32 step that no two steps of a site share, and the site's number of units. A site keeps
      its state from round to round and never sends it.
    optimizer: see `Optimizer`.
    schedule: the learning rate as a function of training time in rounds (float32; 2.5 is half-way
      through the third round). It advances whether or not the optimiser keeps its state.
  """

  steps: Steps
  grad_fn: GradFn
  privatizer: optax.GradientTransformationExtraArgs | None
  optimizer: Optimizer
  schedule: Callable[[Array], Array | float]


class Trained(NamedTuple):
  """A site's model after its steps."""

  params: Params
  model_state: ModelState
  opt_state: PyTree
  metrics: Metrics  # sums over all examples of all steps; 0 in private training
  num_steps: Array  # int32
  rate_sum: Array  # the sum of the steps' learning rates
  noise: PyTree  # the privatizer's next state, which the site keeps; () without


_NOISELESS = optax.GradientTransformationExtraArgs(
  lambda params: (), lambda grads, state, params=None, **_: (grads, state)
)


def init_noise(recipe: Recipe, params: Params) -> PyTree:
  """The privatizer's state before a site's first step; () without a privatizer."""
  return (recipe.privatizer or _NOISELESS).init(params)


def num_units(site: Site) -> Array:
  """How many units (examples, or patients) a site has: int32."""
  return site.num_examples if site.units is None else jnp.max(site.units) + 1


def epochs(
  batch_size: int,
  max_examples: int,
  *,
  min_examples: int = 1,
  num_epochs: int | None = 1,
  num_steps: int | None = None,
) -> Steps:
  """Each epoch takes the examples in a fresh random order, cut into batches.

  Args:
    batch_size: examples in a step. The last batch of an epoch may be smaller.
    max_examples: public bound on the examples of one site.
    min_examples: public lower bound on them.
    num_epochs: of a round; or None, and
    num_steps: of a round. The next round continues in the epoch where the last one stopped.

  Raises:
    ValueError: for both or neither of num_epochs and num_steps, or numbers out of range.
  """
  if (num_epochs is None) == (num_steps is None):
    raise ValueError(
      f"num_epochs={num_epochs} and num_steps={num_steps}: give one, and None for the other"
    )
  names = "batch_size", "max_examples", "min_examples", "num_epochs", "num_steps"
  given = batch_size, max_examples, min_examples, num_epochs, num_steps
  for name, value in zip(names, given, strict=True):
    if value is not None and value < 1:
      raise ValueError(f"{name}={value} must be at least 1")
  if min_examples > max_examples:
    raise ValueError(f"min_examples={min_examples} is more than max_examples={max_examples}")
  fewest, most = (-(-n // batch_size) for n in (min_examples, max_examples))  # batches of an epoch
  max_steps = num_steps or (num_epochs or 0) * most

  def begin(site: Site, now: Round) -> tuple[Array | int, Callable[[Array, PyTree], Array]]:
    batches = -(-site.num_examples // batch_size)
    taken: Array | int = max_steps
    if num_steps is None:
      assert num_epochs is not None
      taken = max_steps if fewest == most else num_epochs * batches
      first_epoch, offset, num_orders = now.number * num_epochs, jnp.int32(0), num_epochs
    else:
      first_epoch, offset = jnp.divmod(now.number * num_steps, batches)
      num_orders = (num_steps - 1) // fewest + 2
    within = jnp.arange(max_steps, dtype=jnp.int32)
    step = offset + within  # counted from the start of the first epoch

    def order(i: Array) -> Array:
      """The site's examples in random order, padding last."""
      key = jax.random.fold_in(now.order_key, first_epoch + i)
      bits = jax.random.bits(key, (max_examples,), jnp.uint32)
      real = jnp.arange(max_examples, dtype=jnp.int32) < site.num_examples
      return jnp.lexsort((bits, ~real)).astype(jnp.int32)

    orders = jax.vmap(order)(jnp.arange(num_orders, dtype=jnp.int32))
    place = jnp.arange(batch_size, dtype=jnp.int32)[None, :]
    position = (step % batches)[:, None] * batch_size + place
    epoch = jnp.minimum(step // batches, num_orders - 1)  # at the limit only after the last step
    index = orders[epoch[:, None], jnp.minimum(position, max_examples - 1)]
    used = (position < site.num_examples) & (within < taken)[:, None]
    index = jnp.where(used, index, -1)
    return taken, lambda t, state: index[t]

  return Steps(max_steps, batch_size, max_examples, begin)


def gather(
  images: Array,
  labels: Array,
  index: Array,
  class_weights: Array | None = None,
  units: Array | None = None,
  is_blank: bool = True,
) -> Batch:
  """Takes a batch out of a site's examples. Each has the weight of its class, or 1.

  Args:
    images, labels: [N, ...] of the site.
    index: [B] int32 into them, or [U, R] for the rows of units. -1 becomes padding: a blank image
      (zeros) of label and weight 0, which tells nothing of the site's images.
    class_weights: [L]; None for 1.
    units: [N], the number of each example's unit; None where examples are the units.
    is_blank: False repeats the site's first image instead, for BatchNorm, whose statistics count
      padding.
  """
  safe, real = jnp.maximum(index, 0), index >= 0
  weights = real.astype(jnp.float32)
  if class_weights is not None:
    weights = weights * class_weights[labels[safe]]
  images, labels = images[safe], labels[safe]
  if is_blank:
    images, labels = blank(real, images), blank(real, labels)
  numbers = index if units is None else jnp.where(real, units[safe], -1)
  numbers = numbers if index.ndim == 1 else numbers[:, 0]
  return Batch(images, labels, weights, numbers)


def blank(real: Array, a: Array) -> Array:
  """a [..., H, W, C] with zeros where `real` [...] is False."""
  return jnp.where(real.reshape(*real.shape, *(1,) * (a.ndim - real.ndim)), a, 0)


def gradients(loss_fn: LossFn) -> GradFn:
  """The plain gradient of the mean loss.

  Do not differentiate it again: on CPU its `vmap` is custom, and JAX cannot differentiate that in
  reverse. Attacks and meta-learning differentiate `jax.grad(loss_fn, has_aux=True)`.
  """
  return _in_cache(jax.grad(loss_fn, has_aux=True))


def _in_cache(grad_fn: GradFn) -> GradFn:
  """grad_fn, whose `vmap` over large models runs one site after another on CPU; side by side they
  would overflow the cache.
  """
  if jax.default_backend() != "cpu":
    return grad_fn

  @jax.custom_batching.custom_vmap
  def run(*args):
    return grad_fn(*args)

  @run.def_vmap
  def rule(axis_size: int, batched: PyTree, *args):
    batched = tuple(batched)
    size = sum(
      a.nbytes // axis_size
      for a, is_batched in zip(*map(jax.tree.leaves, (args, batched)), strict=True)
      if is_batched
    )
    if size > _CACHE_BYTES:
      take = lambda i: jax.tree.map(lambda a, is_batched: a[i] if is_batched else a, args, batched)
      out = jax.lax.map(lambda i: run(*take(i)), jnp.arange(axis_size, dtype=jnp.int32))
    else:
      axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched)
      out = jax.vmap(grad_fn, axes)(*args)
    return out, jax.tree.map(lambda _: True, out)

  return run


def train(
  recipe: Recipe, correct: Callable[[PyTree, Params], PyTree] | None = None
) -> Callable[[Params, ModelState, PyTree, PyTree, Site, Round], Trained]:
  """Makes the function that trains one site's model for one round.

  Args:
    recipe: how to train.
    correct: changes a gradient, after any noise, before the optimiser sees it: (gradient, params)
      -> gradient.

  Returns:
    (params, model_state, opt_state, noise, Site, Round) -> Trained. `noise` is the privatizer's
    state: `init_noise` at first, then `Trained.noise`. A site's secret must be fresh whenever
    rounds are counted from 0 again. It raises a ValueError for a private recipe and a site without
    a secret.

  Raises:
    ValueError: for a privatizer that does not go with the recipe's batches and gradients.
  """
  steps, grad_fn, privatizer, optimizer, schedule = recipe
  privatizer = privatizer or _NOISELESS
  if recipe.privatizer is None and getattr(grad_fn, "needs_noise", False):
    raise ValueError(
      "the recipe takes a private plan's clipped gradients without its privatizer, so nothing "
      "would be private; take the whole from the plan's recipe(optimizer, schedule)"
    )
  own = getattr(privatizer, "goes_with", ())
  if own and (steps is not own[0] or grad_fn is not own[1]):
    raise ValueError(
      "the recipe joins a privatizer with batches or gradients that its releases are not charged "
      "for; take the whole from the plan's recipe(optimizer, schedule)"
    )
  add = lambda a, b: jax.tree.map(jnp.add, a, b)

  def run(params, model_state, opt_state, noise, site: Site, now: Round):
    num_steps, draw = steps.begin(site, now)

    def step(t: Array, carry):
      params, model_state, opt_state, metrics, rate_sum, noise = carry
      index, is_blank = draw(t, noise), not jax.tree.leaves(model_state)
      batch = gather(site.images, site.labels, index, now.class_weights, site.units, is_blank)
      step_key = jax.random.fold_in(now.key, t)
      grads, (model_state, new) = grad_fn(params, model_state, batch, step_key)
      grads, noise = privatizer.update(
        grads,
        noise,
        params,
        secret=site.secret,
        step=number_of(steps, now, t),
        num_units=num_units(site),
      )
      grads = grads if correct is None else correct(grads, params)
      progress = jnp.asarray(t, jnp.float32) / jnp.asarray(num_steps, jnp.float32)
      rate = jnp.asarray(schedule(jnp.asarray(now.number, jnp.float32) + progress), jnp.float32)
      updates, opt_state = optimizer(rate).update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      return params, model_state, opt_state, add(metrics, new), rate_sum + rate, noise

    zero = jnp.zeros((), jnp.float32)
    carry = (params, model_state, opt_state, Metrics(zero, zero, zero), zero, noise)
    params, model_state, opt_state, metrics, rate_sum, noise = jax.lax.fori_loop(
      0, num_steps, step, carry
    )
    return Trained(
      params, model_state, opt_state, metrics, jnp.asarray(num_steps, jnp.int32), rate_sum, noise
    )

  return run


def number_of(steps: Steps, now: Round, t: Array) -> Array:
  """The uint32 number of a round's step t, counted over all rounds, lost ones included."""
  return (now.number * steps.max_steps + t).astype(jnp.uint32)


def classification_loss(
  apply_fn: ApplyFn,
  prepare: Callable[[Key, Array, Array], tuple[Array, Array]],
  num_classes: int,
  label_smoothing: float = 0.0,
) -> LossFn:
  """Softmax cross-entropy: the weighted sum over the batch, divided by the number of examples of
  non-zero weight.

  With class weights of mean 1 over the data this is the weighted mean on average. A batch that
  lacks a class is not scaled up.

  Args:
    apply_fn: (params, model_state, images, train=, key=) -> (logits [B, L], new model_state).
    prepare: (key, images as stored, targets [B, L]) -> (float32 images as the model takes them,
      targets), e.g. augmentation, normalisation and MixUp. Targets are one-hot times the example's
      weight.
    num_classes: L.
    label_smoothing: in [0, 1).

  Raises:
    ValueError: for a label smoothing outside [0, 1).
  """
  if not 0 <= label_smoothing < 1:
    raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")

  def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: Key):
    prepare_key, model_key = jax.random.split(key)
    targets = optax.smooth_labels(
      jax.nn.one_hot(batch.labels, num_classes, dtype=jnp.float32), label_smoothing
    )
    images, targets = prepare(prepare_key, batch.images, targets * batch.weights[:, None])
    logits, model_state = apply_fn(params, model_state, images, train=True, key=model_key)
    loss = jnp.sum(optax.softmax_cross_entropy(logits, targets))
    counts = (batch.weights > 0).astype(jnp.float32)
    is_right = jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch.labels
    metrics = Metrics(loss, jnp.sum(jnp.where(is_right, counts, 0.0)), jnp.sum(counts))
    return loss / jnp.maximum(metrics.num_examples, 1.0), (model_state, metrics)

  return loss_fn
