"""One site's work between two synchronisations: which examples, in which order, and the steps of
its optimiser.

Nothing here knows of other sites. Every random choice comes from a key folded from (round, site
number).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from primia_jax.types import ApplyFn, Array, Batch, Key, LossFn, Metrics, ModelState, Params, PyTree

# (params, model_state, batch, key) -> (gradient of the mean loss, (new model_state, Metrics))
GradFn = Callable[[Params, ModelState, Batch, Key], tuple[Params, tuple[ModelState, Metrics]]]
# learning rate -> optimiser, e.g. `functools.partial(optax.sgd, momentum=0.9)`
Optimizer = Callable[[Array], optax.GradientTransformation]
_CACHE_BYTES = (
  2**20
)  # of one site's model and batch; looping over smaller ones costs more than it saves


@dataclasses.dataclass(frozen=True)
class Work:
  """How much a site does in a round. All sites know these numbers; a site's own number of examples
  stays with it.

  Attributes:
    batch_size: examples in a step. The last batch of an epoch may be smaller.
    epochs: synchronise every `epochs` epochs; or
    steps: synchronise every `steps` batches, going on in the epoch where the last round stopped.
    min_examples, max_examples: public bounds on the examples of one site.
  """

  batch_size: int
  max_examples: int
  min_examples: int = 1
  epochs: int | None = 1
  steps: int | None = None

  def __post_init__(self):
    if (self.epochs is None) == (self.steps is None):
      raise ValueError(
        f"epochs={self.epochs} and steps={self.steps}: give one, and None for the other"
      )
    for name in ("batch_size", "max_examples", "min_examples", "epochs", "steps"):
      if (value := getattr(self, name)) is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    if self.min_examples > self.max_examples:
      raise ValueError(
        f"min_examples={self.min_examples} is more than max_examples={self.max_examples}"
      )

  @property
  def max_steps(self) -> int:
    """T, the most steps of any site in a round."""
    return self.steps or (self.epochs or 0) * -(-self.max_examples // self.batch_size)

  @property
  def same_steps(self) -> bool:
    """Whether all sites are bound to take equally many steps."""
    batches = [-(-n // self.batch_size) for n in (self.min_examples, self.max_examples)]
    return self.steps is not None or batches[0] == batches[1]


class Private(NamedTuple):
  """What stands in for `draw_batches` and a recipe's `grad_fn` at a site that trains under
  differential privacy.

  Attributes:
    draw: (the site's secret [8] uint32, step uint32, num_units, N, units, state) -> [B] int32 into
      its examples, -1 where none, or [B, R] where a unit has several; units, [N] int32, number each
      example's unit, None where each is one. No two steps of a site have the same number, those of
      rounds that were lost included.
    grad_fn: (params, model_state, batch, key, secret, step, num_units, state) -> what `GradFn`
      gives, and the next state. Metrics never leave the step: they are not private.
    num_steps: of a round, the same at all sites.
    init: params -> the state before the first step, which the site keeps from round to round and
      never shows; () where noise is fresh at every step.
  """

  draw: Callable[[Array, Array, Array, int, Array | None, PyTree], Array]
  grad_fn: Callable[..., tuple[Params, tuple[ModelState, Metrics], PyTree]]
  num_steps: int
  init: Callable[[Params], PyTree] = lambda params: ()


class Recipe(NamedTuple):
  """How a site trains.

  Attributes:
    grad_fn: see `GradFn`.
    optimizer: see `Optimizer`.
    schedule: learning rate as a function of training time in rounds (float32: 2.5 is half-way
      through the third round), so that it goes on whether or not the optimiser's state is kept from
      round to round.
    work: how much a site does in a round.
    private: takes the place of `grad_fn` and of `work`'s batches, see `Private`; then a site needs
      a secret.
  """

  grad_fn: GradFn
  optimizer: Optimizer
  schedule: Callable[[Array], Array | float]
  work: Work
  private: Private | None = None


class Trained(NamedTuple):
  """A site's model after its steps."""

  params: Params
  model_state: ModelState
  opt_state: PyTree
  metrics: Metrics  # sums over all examples of all steps
  num_steps: Array  # int32, or a Python int where all sites take equally many
  rate_sum: Array  # the sum of the steps' learning rates
  noise: PyTree  # the state of `Private`, which the site keeps; () without


def draw_batches(
  key: Key, round_index: Array, num_examples: Array, work: Work
) -> tuple[Array, Array | int]:
  """Chooses the examples of each step: each epoch a fresh permutation, cut into batches.

  Args:
    key: this site's key for the order of examples, the same in every round.
    round_index: int32 scalar; epochs are numbered on from round to round.
    num_examples: int32 scalar n, with min_examples <= n <= max_examples.
    work: the amount of work.

  Returns:
    index: [T, B] int32 into the site's examples, -1 where a batch is not full and after the last
      step.
    num_steps: how many of the T steps this site takes.
  """
  batches = -(-num_examples // work.batch_size)  # in one epoch
  if work.steps is None:
    assert work.epochs is not None
    num_steps = work.max_steps if work.same_steps else work.epochs * batches
    first_epoch, offset, num_orders = round_index * work.epochs, jnp.int32(0), work.epochs
  else:
    num_steps = work.steps
    fewest = -(-work.min_examples // work.batch_size)
    first_epoch, offset = jnp.divmod(round_index * work.steps, batches)
    num_orders = (work.steps - 1) // fewest + 2
  step = offset + jnp.arange(
    work.max_steps, dtype=jnp.int32
  )  # counted from the start of the first epoch

  def order(i: Array) -> Array:
    bits = jax.random.bits(
      jax.random.fold_in(key, first_epoch + i), (work.max_examples,), jnp.uint32
    )
    real = jnp.arange(work.max_examples, dtype=jnp.int32) < num_examples
    return jnp.lexsort((bits, ~real)).astype(
      jnp.int32
    )  # the site's examples in random order, padding last

  orders = jax.vmap(order)(jnp.arange(num_orders, dtype=jnp.int32))
  position = (step % batches)[:, None] * work.batch_size + jnp.arange(
    work.batch_size, dtype=jnp.int32
  )[None, :]
  epoch = jnp.minimum(step // batches, num_orders - 1)  # at the limit only after the last step
  index = orders[epoch[:, None], jnp.minimum(position, work.max_examples - 1)]
  used = (position < num_examples) & (jnp.arange(work.max_steps, dtype=jnp.int32) < num_steps)[
    :, None
  ]
  return jnp.where(used, index, -1), num_steps


def gather(images: Array, labels: Array, index: Array, class_weights: Array | None = None) -> Batch:
  """Takes a batch out of a site's examples, each with its class's weight or 1; -1 becomes an
  example of weight 0.
  """
  safe = jnp.maximum(index, 0)
  weights = (index >= 0).astype(jnp.float32)
  if class_weights is not None:
    weights = weights * class_weights[labels[safe]]
  return Batch(images[safe], labels[safe], weights)


def gradients(loss_fn: LossFn) -> GradFn:
  """The plain gradient; private gradients take its place.

  For training, not to be differentiated again: on CPU its `vmap` is custom, which JAX cannot
  differentiate in reverse. Attacks and meta-learning differentiate `jax.grad(loss_fn,
  has_aux=True)`.
  """
  return _in_cache(jax.grad(loss_fn, has_aux=True))


def _in_cache(grad_fn: GradFn) -> GradFn:
  """grad_fn, whose `vmap` over large models runs site after site on CPU, where side by side they
  overflow the cache.
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
      out = jax.vmap(grad_fn, jax.tree.map(lambda is_batched: 0 if is_batched else None, batched))(
        *args
      )
    return out, jax.tree.map(lambda _: True, out)

  return run


def train(
  recipe: Recipe, correct: Callable[[PyTree, Params], PyTree] | None = None
) -> Callable[..., Trained]:
  """Makes the function that trains one site's model for one round.

  Args:
    recipe: how to train.
    correct: changes a gradient before the optimiser sees it: (gradient, params) -> gradient.

  Returns:
    (params, model_state, opt_state, images [N, H, W, C], labels [N], num_examples, round_index,
    order_key, key, class_weights=None, secret=None, units=None, noise=()) -> Trained. `order_key`
    stays the same for a site, `key` is fresh for each (round, site); `class_weights`, [L], weigh an
    example by its class; `secret`, [8] uint32, is what a private recipe draws its batches and its
    noise from, and must be fresh whenever rounds are counted from 0 again; `units` and `noise` (the
    state) see `Private`. The metrics of private training are 0. It raises a ValueError where a
    recipe is private and there is no secret.
  """
  grad_fn, optimizer, schedule, work, private = recipe
  add = lambda a, b: jax.tree.map(jnp.add, a, b)

  def source(images, round_index, num_examples, order_key, secret, units):
    """The number of steps, the examples of step t, and the gradient of step t."""
    if private is None:
      index, num_steps = draw_batches(order_key, round_index, num_examples, work)
      return num_steps, lambda t, state: index[t], lambda t, state, *args: (*grad_fn(*args), state)
    if secret is None:
      raise ValueError(
        "private training needs a secret at each site: give Site.secret, from prng.random_key()"
      )
    number = lambda t: (round_index * private.num_steps + t).astype(jnp.uint32)
    num_units = num_examples if units is None else jnp.max(units) + 1
    index_fn = lambda t, state: private.draw(
      secret, number(t), num_units, images.shape[0], units, state
    )

    def gradient(t, state, *args):
      grads, (model_state, new), state = private.grad_fn(*args, secret, number(t), num_units, state)
      return grads, (model_state, jax.tree.map(jnp.zeros_like, new)), state

    return private.num_steps, index_fn, gradient

  def run(
    params,
    model_state,
    opt_state,
    images,
    labels,
    num_examples,
    round_index,
    order_key,
    key,
    class_weights=None,
    secret=None,
    units=None,
    noise=(),
  ):
    num_steps, index_fn, gradient = source(
      images, round_index, num_examples, order_key, secret, units
    )

    def step(t: Array, carry):
      params, model_state, opt_state, metrics, rate_sum, noise = carry
      batch = gather(images, labels, index_fn(t, noise), class_weights)
      step_key = jax.random.fold_in(key, t)
      grads, (model_state, new), noise = gradient(t, noise, params, model_state, batch, step_key)
      grads = grads if correct is None else correct(grads, params)
      progress = jnp.asarray(t, jnp.float32) / jnp.asarray(num_steps, jnp.float32)
      rate = jnp.asarray(schedule(jnp.asarray(round_index, jnp.float32) + progress), jnp.float32)
      updates, opt_state = optimizer(rate).update(grads, opt_state, params)
      return (
        optax.apply_updates(params, updates),
        model_state,
        opt_state,
        add(metrics, new),
        rate_sum + rate,
        noise,
      )

    zero = jnp.zeros((), jnp.float32)
    carry = (params, model_state, opt_state, Metrics(zero, zero, zero), zero, noise)
    params, model_state, opt_state, metrics, rate_sum, noise = jax.lax.fori_loop(
      0, num_steps, step, carry
    )
    return Trained(
      params, model_state, opt_state, metrics, jnp.asarray(num_steps, jnp.int32), rate_sum, noise
    )

  return run


def classification_loss(
  apply_fn: ApplyFn,
  prepare: Callable[[Key, Array, Array], tuple[Array, Array]],
  num_classes: int,
  label_smoothing: float = 0.0,
) -> LossFn:
  """Softmax cross-entropy: the weighted sum over the batch, divided by the number of examples of
  non-zero weight.

  With class weights of mean 1 over the data this is, on average, the weighted mean, and a batch
  that happens to lack a class is not blown up.

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
    correct = jnp.sum(
      jnp.where(jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch.labels, counts, 0.0)
    )
    num_examples = jnp.sum(counts)
    return loss / jnp.maximum(num_examples, 1.0), (
      model_state,
      Metrics(loss, correct, num_examples),
    )

  return loss_fn


def count_errors(
  apply_fn: ApplyFn,
  prepare: Callable[[Array], Array],
  num_classes: int,
  batch_size: int,
) -> Callable[..., dict[str, Array]]:
  """Makes the function that evaluates a model on one site's examples.

  Returns:
    (params, model_state, images [N, H, W, C], labels [N], num_examples) -> {"confusion": [L, L]
    float32 counts, rows true and columns predicted; "loss": the sum of the cross-entropies}: sums,
    which add up over sites.
  """
  one_hot = lambda labels: jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)

  def run(params, model_state, images, labels, num_examples):
    size = images.shape[0]

    def body(i: Array, total):
      index = i * batch_size + jnp.arange(batch_size, dtype=jnp.int32)
      batch = gather(images, labels, jnp.where(index < jnp.minimum(num_examples, size), index, -1))
      logits, _ = apply_fn(params, model_state, prepare(batch.images), train=False)
      true = one_hot(batch.labels) * batch.weights[:, None]
      confusion = true.T @ one_hot(jnp.argmax(logits, axis=-1))
      loss = jnp.sum(true * -jax.nn.log_softmax(logits))
      return {"confusion": total["confusion"] + confusion, "loss": total["loss"] + loss}

    zero = {
      "confusion": jnp.zeros((num_classes, num_classes), jnp.float32),
      "loss": jnp.zeros((), jnp.float32),
    }
    return jax.lax.fori_loop(0, -(-num_examples // batch_size), body, zero)

  return run
