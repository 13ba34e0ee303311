import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import local
from primia_jax.types import Batch, Metrics, Site

D, L = 6, 3


def apply_fn(params, model_state, images, train=False, key=None):
  return images.reshape(images.shape[0], -1) @ params["w"] + params["b"][None], model_state


def as_stored(key, images, targets):
  return images, targets


def data(num_rows, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(num_rows, D, 1, 1)).astype(np.float32)
  return images, rng.integers(0, L, num_rows).astype(np.int32)


def start(seed=1):
  kernel = np.random.default_rng(seed).normal(size=(D, L))
  return {"w": jnp.asarray(kernel, jnp.float32), "b": jnp.zeros(L)}


def softmax(z):
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def joined(batches):
  return [example for batch in batches for example in batch]


def site(n, images=None, labels=None, **more):
  return Site(jnp.int32(0), images, labels, jnp.int32(n), **more)


def now(number, seeds=(0, 1), class_weights=None):
  return local.Round(jnp.int32(number), *map(jax.random.key, seeds), class_weights)


def index_of(steps, number, n, seed=3):
  """The examples of every step of a round, [T, B], and the number of steps."""
  num_steps, draw = steps.begin(site(n), now(number, (seed, 1)))
  index = jax.vmap(lambda t: draw(t, ()))(jnp.arange(steps.max_steps, dtype=jnp.int32))
  return index, num_steps


@functools.cache
def drawing(steps):
  """`index_of` of these steps, compiled once: (round, n, seed) -> index, number of steps."""
  return jax.jit(functools.partial(index_of, steps))


def order_of(rounds, n, steps, seed=3):
  """The examples of every step that a site takes, round after round."""
  taken = []
  for r in range(rounds):
    index, num_steps = drawing(steps)(jnp.int32(r), jnp.int32(n), jnp.int32(seed))
    assert index.shape == (steps.max_steps, steps.batch_size)
    assert index.dtype == jnp.int32
    assert np.all(np.asarray(index)[int(num_steps) :] == -1)  # nothing after the last step
    taken += [row[row >= 0].tolist() for row in np.asarray(index)[: int(num_steps)]]
  return taken


@pytest.mark.parametrize(
  ("n", "batch_size", "epochs"), [(20, 4, 1), (13, 4, 2), (7, 4, 3), (5, 8, 2), (1, 4, 2)]
)
def test_each_epoch_visits_every_example_once(n, batch_size, epochs):
  work = local.epochs(batch_size, 20, num_epochs=epochs)
  taken, batches = order_of(3, n, work), -(-n // batch_size)
  assert len(taken) == 3 * epochs * batches
  epochs_seen = [joined(taken[i : i + batches]) for i in range(0, len(taken), batches)]
  assert all(sorted(epoch) == list(range(n)) for epoch in epochs_seen)
  assert all(
    len(batch) == batch_size for i, batch in enumerate(taken) if (i + 1) % batches
  )  # only the last is short
  assert n < 5 or len({tuple(epoch) for epoch in epochs_seen}) == len(
    epochs_seen
  )  # each in an order of its own


@pytest.mark.parametrize(
  ("n", "batch_size", "steps"),
  [(20, 4, 3), (13, 4, 7), (7, 4, 1), (5, 4, 9), (4, 4, 5), (20, 4, 5)],
)
def test_steps_go_on_across_epochs_and_rounds(n, batch_size, steps):
  work = local.epochs(batch_size, 20, min_examples=n, num_epochs=None, num_steps=steps)
  rounds, batches = 8, -(-n // batch_size)
  taken = order_of(rounds, n, work)
  assert len(taken) == rounds * steps
  whole = len(taken) // batches * batches
  for i in range(0, whole, batches):
    assert sorted(joined(taken[i : i + batches])) == list(range(n))
  rest = joined(taken[whole:])
  assert len(set(rest)) == len(rest)


def test_rounds_may_be_cut_anywhere():
  """The same steps in one round or in many: the order depends on the site's key and the step
  only.
  """
  cut = lambda steps: local.epochs(4, 20, min_examples=4, num_epochs=None, num_steps=steps)
  assert order_of(2, 13, cut(6)) == order_of(6, 13, cut(2))
  eight = cut(8)
  assert order_of(1, 13, eight, seed=4) != order_of(1, 13, eight, seed=5)


def test_late_rounds_do_not_overflow():
  """15,000 steps a round pass 2^31 in round 143,166."""
  steps = local.epochs(1, 3000, num_epochs=5)
  index, _ = jax.jit(lambda r, n: index_of(steps, r, n))(jnp.int32(200_000), jnp.int32(3000))
  assert np.array_equal(np.sort(np.asarray(index)[:, 0]), np.repeat(np.arange(3000), 5))


@pytest.mark.parametrize(
  "wrong",
  [
    {"num_epochs": 1, "num_steps": 1},
    {"num_epochs": None},
    {"batch_size": 0},
    {"num_epochs": 0},
    {"num_epochs": None, "num_steps": -1},
    {"min_examples": 21},
    {"max_examples": 0},
  ],
)
def test_impossible_steps_are_refused(wrong):
  with pytest.raises(ValueError, match="|".join(wrong)):
    local.epochs(**({"batch_size": 4, "max_examples": 20} | wrong))


def test_same_steps_and_max_steps():
  """Where all sites are bound to take equally many, the number is known before data are."""

  def taken(steps):
    found = []
    jax.eval_shape(lambda: found.append(steps.begin(site(18), now(0))[0]))
    return found[0]

  by_steps = local.epochs(4, 20, num_epochs=None, num_steps=7)
  assert local.epochs(4, 20, num_epochs=2).max_steps == 10
  assert by_steps.max_steps == 7
  assert isinstance(taken(local.epochs(4, 20, min_examples=17)), int)
  assert not isinstance(taken(local.epochs(4, 20, min_examples=16)), int)
  assert isinstance(taken(by_steps), int)


def test_padding_is_blank_and_units_keep_their_numbers():
  """The site's first image once stood for padding, and could spoil the sums of others."""
  images, labels = (jnp.asarray(a) + 1 for a in data(5))
  padding = lambda batch, real: any(np.any(np.asarray(a)[~np.asarray(real)]) for a in batch[:2])
  index = jnp.asarray([3, -1, 0], jnp.int32)
  gather = jax.jit(local.gather, static_argnames="is_blank")
  batch = gather(images, labels, index)
  assert batch.images.dtype == images.dtype
  assert not padding(batch, index >= 0)
  np.testing.assert_array_equal(batch.numbers, index)
  repeated = gather(images, labels, index, is_blank=False)
  np.testing.assert_array_equal(repeated.images[1], images[0])
  rows = jnp.asarray([[2, 4], [0, -1], [-1, -1]], jnp.int32)
  of_patients = gather(images, labels, rows, units=jnp.asarray([7, 8, 9, 7, 9], jnp.int32))
  assert not padding(of_patients, rows >= 0)
  np.testing.assert_array_equal(of_patients.numbers, [9, 7, -1])


def test_gather_gives_padding_no_weight():
  images, labels = data(5)
  index, classes = jnp.asarray([3, 0, -1], jnp.int32), np.array([0.5, 2.0, 1.0], np.float32)
  for class_weights, want in (
    (None, [1, 1, 0]),
    (jnp.asarray(classes), [*classes[labels[[3, 0]]], 0]),
  ):
    batch = jax.jit(local.gather)(images, labels, index, class_weights)
    assert np.array_equal(batch.weights, want)
    assert np.array_equal(batch.images[:2], images[[3, 0]])
    assert np.array_equal(batch.labels[:2], labels[[3, 0]])


def recipe(work, schedule=lambda t: 0.1, optimizer=optax.sgd, **kwargs):
  loss = local.classification_loss(apply_fn, as_stored, L, **kwargs)
  return local.Recipe(work, local.gradients(loss), None, optimizer, schedule)


def by_hand(params, images, labels, batches, rates, momentum=0.0, classes=(1.0, 1.0, 1.0)):
  """Softmax regression by (heavy-ball) gradient descent, in float64."""
  w, b = (np.asarray(params[k], np.float64) for k in ("w", "b"))
  vw, vb = np.zeros_like(w), np.zeros_like(b)
  loss = correct = count = 0
  for batch, rate in zip(batches, rates, strict=True):
    x, y = images[batch].reshape(len(batch), D).astype(np.float64), np.eye(L)[labels[batch]]
    p = softmax(x @ w + b)
    each = np.asarray(classes)[labels[batch]][:, None]
    loss += -np.sum(each * y * np.log(p))
    correct += np.sum(p.argmax(1) == labels[batch])
    count += len(batch)
    slope = each * (p - y) / len(batch)
    vw, vb = momentum * vw + x.T @ slope, momentum * vb + slope.sum(0)
    w, b = w - rate * vw, b - rate * vb
  return {"w": w, "b": b}, (loss, correct, count)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("n", "classes"), [(20, None), (13, (0.5, 2.0, 1.25))])
def test_training_equals_the_loop_written_by_hand(n, classes, momentum):
  images, labels = data(20)
  work = local.epochs(4, 20, num_epochs=2)
  schedule = lambda t: 0.3 * 0.8**t
  optimizer = functools.partial(optax.sgd, momentum=momentum or None)
  made = recipe(work, schedule, optimizer)
  opt_state = made.optimizer(jnp.float32(0)).init(start())
  weights = None if classes is None else jnp.asarray(classes)
  data_of = site(n, jnp.asarray(images), jnp.asarray(labels))
  trained = jax.jit(local.train(made))(start(), {}, opt_state, (), data_of, now(2, (3, 4), weights))
  index, num_steps = drawing(work)(jnp.int32(2), jnp.int32(n), jnp.int32(3))
  batches = [row[row >= 0] for row in np.asarray(index)[: int(num_steps)]]
  rates = [schedule(2 + t / int(num_steps)) for t in range(int(num_steps))]
  want, sums = by_hand(
    start(), images, labels, batches, rates, momentum, classes or (1.0, 1.0, 1.0)
  )
  assert int(trained.num_steps) == len(batches) == 2 * -(-n // 4)
  np.testing.assert_allclose(trained.rate_sum, sum(rates), rtol=1e-6)
  np.testing.assert_allclose(trained.metrics, sums, rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), trained.params, want)


def test_rows_beyond_the_sites_examples_change_nothing():
  images, labels = data(20)
  poisoned = images.copy()
  poisoned[13:] = np.nan
  run = jax.jit(local.train(recipe(local.epochs(4, 20, num_epochs=2))))
  train = lambda x: run(
    start(), {}, optax.sgd(0.1).init(start()), (), site(13, jnp.asarray(x), jnp.asarray(labels)),
    now(0),
  )  # fmt: skip
  clean, dirty = train(images), train(poisoned)
  assert np.array_equal(clean.params["w"], dirty.params["w"])
  assert clean.metrics.num_examples == 26


@jax.numpy_dtype_promotion("standard")  # optax's Adam raises a float to an int32 power
@pytest.mark.parametrize("keep", [True, False])
def test_the_schedule_advances_whether_the_optimiser_keeps_its_state_or_not(keep):
  images, labels = data(20)
  rates = []
  for optimizer in (optax.sgd, optax.adam, functools.partial(optax.sgd, momentum=0.9)):
    made = recipe(local.epochs(4, 20), lambda t: 1.0 / (1.0 + t), optimizer)
    run, opt_state = jax.jit(local.train(made)), made.optimizer(jnp.float32(0)).init(start())
    sums = []
    for r in range(3):
      state = opt_state if keep else made.optimizer(jnp.float32(0)).init(start())
      data_of = site(20, jnp.asarray(images), jnp.asarray(labels))
      trained = run(start(), {}, state, (), data_of, now(r, (0, r)))
      opt_state = trained.opt_state
      sums.append(float(trained.rate_sum))
    rates.append(sums)
    count = [int(c) for c in jax.tree.leaves(opt_state) if c.dtype == jnp.int32]
    assert count in ([], [15 if keep else 5])  # Adam's own count tells whether the state was kept
  want = [sum(1 / (1 + r + t / 5) for t in range(5)) for r in range(3)]
  np.testing.assert_allclose(rates, [want] * 3, rtol=1e-6)


def test_correct_changes_the_gradient_before_the_optimiser():
  images, labels = data(20)
  made = recipe(local.epochs(4, 20))
  halt = local.train(made, lambda grads, params: jax.tree.map(jnp.zeros_like, grads))
  data_of = site(20, jnp.asarray(images), jnp.asarray(labels))
  trained = jax.jit(halt)(start(), {}, optax.sgd(0.1).init(start()), (), data_of, now(0))
  jax.tree.map(np.testing.assert_array_equal, trained.params, start())


def graded(loss_fn, state, batch):
  """The loss with what comes beside it, and its gradient, at `start`."""
  run = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  return run(start(), state, batch, jax.random.key(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_loss_and_its_gradient(smoothing):
  images, labels = data(6)
  weights = np.array([1, 0.5, 0, 1, 0, 2], np.float32)
  loss_fn = local.classification_loss(apply_fn, as_stored, L, label_smoothing=smoothing)
  batch = Batch(*map(jnp.asarray, (images, labels, weights)))
  (loss, (state, sums)), grads = graded(loss_fn, {"untouched": jnp.ones(2)}, batch)
  x = images.reshape(6, D).astype(np.float64)
  p0 = jax.tree.map(lambda a: np.asarray(a, np.float64), start())
  targets = (1 - smoothing) * np.eye(L)[labels] + smoothing / L
  p = softmax(x @ p0["w"] + p0["b"])
  total = np.sum(-weights * np.sum(targets * np.log(p), axis=1))
  np.testing.assert_allclose(loss, total / 4, rtol=1e-6)  # four examples count
  np.testing.assert_allclose(
    sums, (total, np.sum((p.argmax(1) == labels)[weights > 0]), 4), rtol=1e-6
  )
  slope = weights[:, None] * (p - targets) / 4
  np.testing.assert_allclose(grads["w"], x.T @ slope, atol=1e-6)
  np.testing.assert_allclose(grads["b"], slope.sum(0), atol=1e-6)
  assert np.array_equal(state["untouched"], [1, 1])


def test_an_empty_batch_has_no_loss_and_no_gradient():
  images, labels = data(4)
  loss_fn = local.classification_loss(apply_fn, as_stored, L)
  batch = Batch(jnp.asarray(images), jnp.asarray(labels), jnp.zeros(4))
  (loss, _), grads = graded(loss_fn, {}, batch)
  assert loss == 0
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_prepare_and_model_get_different_keys_and_prepare_may_mix_targets():
  seen = []

  def model(params, state, images, train, key):
    seen.append(key)
    assert train
    return apply_fn(params, state, images)

  def mix(key, images, targets):
    seen.append(key)
    return images[::-1], targets[::-1]

  images, labels = data(4)
  given = Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(4)), jax.random.key(0)
  loss, _ = local.classification_loss(model, mix, L)(start(), {}, *given)
  plain, _ = local.classification_loss(apply_fn, as_stored, L)(start(), {}, *given)
  np.testing.assert_allclose(loss, plain, rtol=1e-6)
  assert not np.array_equal(*map(jax.random.key_data, seen))


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_impossible_smoothing_is_refused(smoothing):
  with pytest.raises(ValueError, match="label_smoothing"):
    local.classification_loss(apply_fn, as_stored, L, label_smoothing=smoothing)


# Side by side, and too large for the cache: site after site.
@pytest.mark.parametrize("size", [8, 2**19])
def test_vmapped_gradients_are_those_of_each_site(size):
  total = lambda params, batch: jnp.sum(params**2 * batch.images.mean())
  grad_fn = local.gradients(lambda p, state, batch, key: (total(p, batch), (state, batch.labels)))
  params = jnp.arange(3 * size, dtype=jnp.float32).reshape(3, size) / size
  images = jnp.arange(3, dtype=jnp.float32)[:, None]
  batch = Batch(images, jnp.zeros((3, 1), jnp.int32), jnp.ones((3, 1)))
  keys = jax.random.split(jax.random.key(0), 3)
  together, _ = jax.jit(jax.vmap(grad_fn, in_axes=(0, None, 0, 0)))(params, {}, batch, keys)
  of = lambda i: jax.tree.map(lambda a: a[i], batch)
  alone = [grad_fn(params[i], {}, of(i), keys[i])[0] for i in range(3)]
  np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-6)


def test_a_privatizer_gets_the_sites_secret_its_units_and_numbers_that_go_on():
  """Steps are counted over rounds, so that no two of a site share a number."""
  steps = 3

  def begin(site, now):
    return steps, lambda t, state: jnp.stack([t + site.num_examples - 5, -1]).astype(jnp.int32)

  def grad_fn(params, model_state, batch, key):
    nothing = jnp.float32(0)
    grads = {"w": jnp.zeros((D, L)), "b": jnp.sum(batch.weights) * jnp.ones(L)}
    return grads, (model_state, Metrics(nothing, nothing, nothing))

  def update(grads, state, params, *, secret, step, num_units):
    seen = jnp.stack([step + secret[0], num_units.astype(jnp.uint32), state.astype(jnp.uint32)])
    return {**grads, "w": jnp.tile(seen.astype(jnp.float32), (D, 1))}, state + 1

  made = local.Recipe(
    local.Steps(steps, 2, 7, begin),
    grad_fn,
    optax.GradientTransformationExtraArgs(lambda params: jnp.int32(7), update),
    optax.sgd,
    lambda t: 1.0,
  )
  images, labels = data(7)
  params = jax.tree.map(jnp.zeros_like, start())
  for units, num_units in ((None, 5), (jnp.array([0, 0, 1, 1, 1, -1, -1], jnp.int32), 2)):
    here = site(5, images, labels, secret=jnp.full(8, 9, jnp.uint32), units=units)
    trained = jax.jit(local.train(made))(
      params, {}, optax.sgd(1.0).init(params), local.init_noise(made, params), here, now(2)
    )
    numbers = 2 * steps + np.arange(steps)
    want = [-(numbers + 9).sum(), -num_units * steps, -(7 + 8 + 9)]
    np.testing.assert_array_equal(trained.params["w"][0], want)
    np.testing.assert_array_equal(trained.params["b"], -steps * np.ones(L))  # one example a step
    assert trained.num_steps == steps
    assert trained.noise == 10


def test_without_a_privatizer_nothing_is_kept():
  assert local.init_noise(recipe(local.epochs(4, 20)), start()) == ()
