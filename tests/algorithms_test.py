"""Each algorithm against NumPy, on sites whose loss is a quadratic and whose examples are all
alike.

Site i's loss is curvature_i / 2 |w - a_i|^2 + |norm - m_i|^2 / 2, so that no result depends on the
order of examples.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import algorithms, local, secagg, sites, summation
from primia_jax import federated as fed
from primia_jax.types import Metrics, Site

NUM, ROUNDS = np.array([5, 12, 1, 8]), 3
RNG = np.random.default_rng(0)
A, M, CURVATURE = RNG.normal(size=(4, 3)), RNG.normal(size=(4, 2)), np.array([0, 2, 1, 0])
WORK = local.epochs(4, 12, num_epochs=2)
STEPS = 2 * -(-NUM // 4)  # 4, 6, 2, 4
SCHEDULE = lambda t: 0.3 / (1.0 + t)
IDS = np.arange(4)
KEY = jax.random.key(0)


def load(ids):
  images = np.concatenate([A, M], axis=1).astype(np.float32)[:, None, :, None, None]
  images = np.broadcast_to(images, (4, 12, 5, 1, 1))
  labels = np.broadcast_to(CURVATURE.astype(np.int32)[:, None], (4, 12))
  return Site(ids.astype(np.int32), images[ids], labels[ids], NUM[ids].astype(np.int32))


def grad_fn(params, model_state, batch, key):
  def loss(params):
    target, curvature = batch.images[..., 0, 0], 1.0 + batch.labels.astype(jnp.float32)
    far = 0.5 * curvature * jnp.sum((params["w"][None] - target[:, :3]) ** 2, axis=1)
    far += 0.5 * jnp.sum((params["norm"][None] - target[:, 3:]) ** 2, axis=1)
    total, count = jnp.sum(far * batch.weights), jnp.sum(batch.weights)
    return total / count, Metrics(total, 0.0 * total, count)

  grads, metrics = jax.grad(loss, has_aux=True)(params)
  state = jax.tree.map(lambda s: 0.9 * s + 0.1 * batch.images[0, :1, 0, 0], model_state)
  return grads, (state, metrics)


def recipe(momentum=0.0, optimizer=None):
  optimizer = optimizer or functools.partial(optax.sgd, momentum=momentum or None)
  return local.Recipe(WORK, grad_fn, None, optimizer, SCHEDULE)


def start():
  return {"w": jnp.asarray([0.5, -1.0, 2.0]), "norm": jnp.asarray([1.0, -1.0])}


CLEAR = summation.clear()


@functools.cache
def federated(algorithm, summed):
  return fed.federate(algorithm, summed, sites.scan(), 4)


def run(algorithm, rounds=(IDS,) * ROUNDS, summed=CLEAR, model_state=None):
  f = federated(algorithm, summed)
  state = f.init(start(), model_state)
  for ids in rounds:
    state, info = f.step(KEY, state, fed.Sites(ids, load))
    assert info.out_of_range == 0
  return state


def vector(params):
  return np.concatenate(
    [np.asarray(params["w"], np.float64), np.asarray(params["norm"], np.float64)], axis=-1
  )


X0 = np.array([0.5, -1.0, 2.0, 1.0, -1.0])


def descend(i, x, r, momentum=0.0, velocity=None, proximal=0.0, correction=0.0):
  """Site i's steps in round r: heavy-ball gradient descent. Returns its parameters, velocity and
  sum of rates.
  """
  scale = np.array([1.0 + CURVATURE[i]] * 3 + [1.0] * 2)
  y, velocity, rates = x.copy(), np.zeros(5) if velocity is None else velocity, 0.0
  for t in range(STEPS[i]):
    gradient = scale * (y - np.concatenate([A[i], M[i]])) + proximal * (y - x) + correction
    velocity = momentum * velocity + gradient
    rate = SCHEDULE(r + t / STEPS[i])
    y, rates = y - rate * velocity, rates + rate
  return y, velocity, rates


def mean_updates(x, r, weights, **kwargs):
  updates = np.array([descend(i, x, r, **kwargs)[0] - x for i in IDS])
  return np.average(updates, axis=0, weights=weights)


def check(state, want):
  np.testing.assert_allclose(vector(state.params), want, rtol=2e-5, atol=2e-6)
  assert int(state.round) == ROUNDS


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("proximal", [0.0, 0.7])
def test_fedavg_and_fedprox(weighting, proximal):
  """McMahan et al. 2017, algorithm 1; Li et al. 2020, eq. 2."""
  weights, x = NUM if weighting == "examples" else np.ones(4), X0
  for r in range(ROUNDS):
    x = x + mean_updates(x, r, weights, proximal=proximal)
  made = recipe()
  algorithm = algorithms.fedprox(made, proximal, weighting=weighting) if proximal else None
  check(run(algorithm or algorithms.fedavg(made, weighting=weighting)), x)


@pytest.mark.parametrize("keep", [True, False])
def test_site_optimisers_keep_or_reset_their_state(keep):
  x, velocities = X0, [None] * 4
  for r in range(ROUNDS):
    done = [descend(i, x, r, 0.9, velocities[i]) for i in IDS]
    velocities = [velocity for _, velocity, _ in done] if keep else [None] * 4
    x = np.average([y for y, _, _ in done], axis=0, weights=NUM)
  state = run(algorithms.fedavg(recipe(0.9), keep_optimizer=keep))
  check(state, x)
  assert bool(jax.tree.leaves(state.site_state)) == keep


def adam(x, d, s, t, yogi):
  """Reddi et al. 2021, algorithm 2, with optax's bias correction and (Yogi) accumulators that start
  at 1e-6.
  """
  m, v = s if s is not None else (np.full(5, 1e-6 * yogi), np.full(5, 1e-6 * yogi))
  m = 0.9 * m + 0.1 * d
  v = v - 0.01 * np.sign(v - d**2) * d**2 if yogi else 0.99 * v + 0.01 * d**2
  return x + 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3), (m, v)


def adagrad(x, d, s, t):
  v = (np.full(5, 0.05) if s is None else s) + d**2
  return x + 0.1 * d / (np.sqrt(v) + 1e-6), v


def heavy_ball(x, d, s, t):
  m = 0.9 * (np.zeros(5) if s is None else s) + d
  return x + 0.5 * m, m


SERVERS = {
  "adam": (optax.adam(0.1, 0.9, 0.99, eps=1e-3), functools.partial(adam, yogi=False)),
  "yogi": (optax.yogi(0.1, 0.9, 0.99, eps=1e-3), functools.partial(adam, yogi=True)),
  "adagrad": (optax.adagrad(0.1, initial_accumulator_value=0.05, eps=1e-12), adagrad),
  "momentum": (optax.sgd(0.5, momentum=0.9), heavy_ball),
}


@jax.numpy_dtype_promotion("standard")  # optax's Adam raises a float to an int32 power
@pytest.mark.parametrize("name", SERVERS)
def test_fedopt(name):
  optimizer, by_hand = SERVERS[name]
  x, s = X0, None
  for r in range(ROUNDS):
    x, s = by_hand(x, mean_updates(x, r, NUM), s, r + 1)
  check(run(algorithms.fedopt(recipe(), optimizer)), x)


@pytest.mark.parametrize("rounds", [(IDS,) * 3, ([0, 2], [3, 1], [1, 2, 3])])
def test_scaffold(rounds):
  """Karimireddy et al. 2020, algorithm 1, option II, with all sites and with some."""
  x, c, own = X0, np.zeros(5), np.zeros((4, 5))
  for r, taking_part in enumerate(rounds):
    updates, changes = [], []
    for i in taking_part:
      y, _, rates = descend(i, x, r, correction=c - own[i])
      new = own[i] - c + (x - y) / rates
      updates.append(y - x)
      changes.append(new - own[i])
      own[i] = new
    x = x + 0.8 * np.mean(updates, axis=0)
    c = c + len(taking_part) / 4 * np.mean(changes, axis=0)
  state = run(algorithms.scaffold(recipe(), 4, server_rate=0.8), [np.array(ids) for ids in rounds])
  check(state, x)
  np.testing.assert_allclose(vector(state.server_state), c, rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(vector(state.site_state["control"]), own, rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(np.mean(own, axis=0), c)  # the paper's invariant


@pytest.mark.parametrize(
  ("momentum", "weighting"), [(0.0, "examples"), (0.8, "examples"), (0.8, "uniform")]
)
def test_fednova(momentum, weighting):
  """Wang et al. 2020, eq. 6. The steps of the sites are unequal."""
  p = NUM / NUM.sum() if weighting == "examples" else np.full(4, 0.25)
  lengths = []
  for steps in STEPS:  # |a_i|_1 by its definition: how often each gradient enters the update
    velocity = total = np.zeros(steps)
    for t in range(steps):
      velocity = momentum * velocity + np.eye(steps)[t]
      total = total + velocity
    lengths.append(total.sum())
  lengths, x = np.array(lengths), X0
  for r in range(ROUNDS):
    directions = [(descend(i, x, r, momentum)[0] - x) / lengths[i] for i in IDS]
    x = x + np.sum(p * lengths) * np.sum(p[:, None] * directions, axis=0)
  check(run(algorithms.fednova(recipe(momentum), momentum=momentum, weighting=weighting)), x)


def test_fednova_is_fedavg_where_all_sites_take_equally_many_steps():
  made = recipe()._replace(steps=local.epochs(4, 12, num_epochs=None, num_steps=5))
  one, other = (
    run(algorithm(made)).params for algorithm in (algorithms.fednova, algorithms.fedavg)
  )
  np.testing.assert_allclose(vector(one), vector(other), rtol=1e-5)


def test_fedbn():
  """Li et al. 2021: the sites share w; norm and the statistics are each site's own."""
  w, norm = X0[:3], np.tile(X0[3:], (4, 1))
  statistics = np.zeros((4, 1))
  for r in range(ROUNDS):
    done = np.array([descend(i, np.concatenate([w, norm[i]]), r)[0] for i in IDS])
    w, norm = np.average(done[:, :3], axis=0, weights=NUM), done[:, 3:]
    for i in IDS:
      for _ in range(STEPS[i]):
        statistics[i] = 0.9 * statistics[i] + 0.1 * A[i, 0]
  algorithm = algorithms.fedbn(recipe(), lambda path: path == "norm")
  state = run(algorithm, model_state={"bn": {"mean": jnp.zeros(1)}})
  np.testing.assert_allclose(state.params["w"], w, rtol=2e-5)
  assert np.array_equal(state.params["norm"], start()["norm"])  # the server never hears of it
  assert np.array_equal(state.model_state["bn"]["mean"], [0.0])
  server = fed.Global(state.params, state.model_state, state.server_state, state.round, KEY)
  for i in IDS:
    params, model_state = algorithm.personal(
      server, jax.tree.map(lambda a, i=i: a[i], state.site_state)
    )
    np.testing.assert_allclose(params["w"], w, rtol=2e-5)
    np.testing.assert_allclose(params["norm"], norm[i], rtol=2e-5)
    np.testing.assert_allclose(model_state["bn"]["mean"], statistics[i], rtol=2e-5)


def test_fedbns_message_holds_nothing_of_the_normalisation():
  algorithm = algorithms.fedbn(recipe(), lambda path: path.endswith("norm"))
  model_state = {"bn": {"mean": jnp.zeros(7)}}
  kept = algorithm.init_site(start(), model_state)
  server = fed.Global(start(), model_state, (), jnp.int32(0), KEY)
  site = jax.tree.map(lambda a: jnp.asarray(a[0]), load(IDS))
  message, _ = jax.eval_shape(algorithm.site, server, kept, site)
  update = jax.tree_util.tree_leaves_with_path(message.update)
  assert [jax.tree_util.keystr(path) for path, _ in update] == ["[0]['w']"]
  assert sorted(a.shape for a in jax.tree.leaves(message)) == [(), (), (), (), (3,)]
  assert algorithm.shares_statistics is False


def test_statistics_are_averaged_under_secure_aggregation():
  means = np.array([A[i, 0] * (1 - 0.9 ** STEPS[i]) for i in IDS])  # after one round, from zero
  for algorithm, weights in (
    (algorithms.fedavg(recipe()), NUM),
    (algorithms.fednova(recipe()), NUM),
    (algorithms.scaffold(recipe(), 4), np.ones(4)),
  ):
    secure = summation.masked(secagg.secure_sum(4))
    state = run(algorithm, [IDS], secure, {"mean": jnp.zeros(1)})
    np.testing.assert_allclose(
      state.model_state["mean"], [np.average(means, weights=weights)], atol=1e-5
    )


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_fednovas_and_scaffolds_optimiser_must_go_with_them(momentum):
  made, other = recipe(momentum), recipe(0.8 - momentum)
  assert run(algorithms.fednova(made, momentum=momentum), []).round == 0
  with pytest.raises(ValueError, match="momentum"):
    run(algorithms.fednova(other, momentum=momentum), [])
  for wrong in (recipe(0.8), recipe(optimizer=optax.adam)):
    with pytest.raises(ValueError, match="plain gradient steps"):
      run(algorithms.scaffold(wrong, 4), [])


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match="weighting='size'"):
    algorithms.fedavg(recipe(), weighting="size")
  with pytest.raises(ValueError, match=r"proximal=-0.1"):
    algorithms.fedprox(recipe(), -0.1)
  for momentum in (-0.1, 1.0):
    with pytest.raises(ValueError, match="momentum"):
      algorithms.fednova(recipe(), momentum=momentum)


@pytest.mark.optimised
def test_the_average_over_rounds_is_what_is_evaluated_and_changes_no_training():
  plain, algorithm = (
    algorithms.fedavg(recipe()),
    algorithms.averaged(algorithms.fedavg(recipe()), 0.25),
  )
  averages, average = [], X0
  for r in range(1, ROUNDS + 1):
    want, state = (run(a, (IDS,) * r) for a in (plain, algorithm))
    np.testing.assert_array_equal(vector(state.params), vector(want.params))
    keep = min(0.25, r / (9 + r))
    average = keep * average + (1 - keep) * vector(want.params)
    server = fed.Global(state.params, {}, state.server_state, state.round, KEY)
    averages.append(vector(algorithm.personal(server, ())[0]))
    np.testing.assert_allclose(averages[-1], average, rtol=1e-6, atol=1e-7)
  with pytest.raises(ValueError, match="decay=1"):
    algorithms.averaged(plain, 1.0)


@pytest.mark.optimised
def test_the_mean_of_the_last_rounds_is_what_is_evaluated():
  plain = algorithms.fedavg(recipe())
  algorithm = algorithms.averaged_from(plain, 1)
  ends = [vector(run(plain, (IDS,) * r).params) for r in range(1, ROUNDS + 1)]
  for r in range(1, ROUNDS + 1):
    state = run(algorithm, (IDS,) * r)
    server = fed.Global(state.params, {}, state.server_state, state.round, KEY)
    want = np.mean(ends[min(1, r - 1) : r], axis=0)
    np.testing.assert_allclose(
      vector(algorithm.personal(server, ())[0]), want, rtol=1e-6, atol=1e-7
    )
    np.testing.assert_array_equal(vector(state.params), ends[r - 1])
  with pytest.raises(ValueError, match="first_round=-1"):
    algorithms.averaged_from(plain, -1)


def test_sites_count_by_patients_where_these_are_the_unit():
  """How many images one patient has is not public, and the opened weight would tell it."""
  site = jax.tree.map(lambda a: jnp.asarray(a[1]), load(IDS))
  algorithm, server = algorithms.fedavg(recipe()), fed.Global(start(), {}, (), jnp.int32(0), KEY)
  weight = lambda site: algorithm.site(server, algorithm.init_site(start(), {}), site)[0].weight
  for units in ([0, 0, 0, 1, 2], [0, 1, 1, 1, 2]):
    padded = jnp.asarray(units + [-1] * 7, jnp.int32)
    few = site._replace(num_examples=jnp.int32(5), units=padded)
    assert float(weight(few)) == pytest.approx(3 / 12)
