"""Five unequal sites, a linear model and its recipe, which several test modules share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax import algorithms, local, secagg, sites, summation
from primia_jax import federated as fed
from primia_jax.types import Site

S, N, D, L = 5, 20, 6, 3
RNG = np.random.default_rng(0)
IMAGES, LABELS = (
  RNG.normal(size=(S, N, D, 1, 1)).astype(np.float32),
  RNG.integers(0, L, (S, N)).astype(np.int32),
)
NUM = np.array([20, 13, 7, 20, 5], np.int32)
IDS = np.arange(S)
KEY = jax.random.key(0)
STEPS = local.epochs(4, N, min_examples=5, num_epochs=2)


def load(ids, images=IMAGES):
  return Site(ids.astype(np.int32), images[ids], LABELS[ids], NUM[ids])


def apply_fn(params, model_state, images, train=False, key=None):
  logits = images.reshape(images.shape[0], -1) @ params["w"] + params["b"][None]
  return logits, jax.tree.map(lambda m: 0.9 * m + 0.1 * jnp.mean(images), model_state)


def augment(key, images, targets):
  return images + 0.1 * jax.random.normal(key, images.shape, images.dtype), targets


def recipe(rate=0.1, momentum=0.9):
  loss = local.classification_loss(apply_fn, augment, L)
  optimizer = functools.partial(optax.sgd, momentum=momentum or None)
  return local.Recipe(STEPS, local.gradients(loss), None, optimizer, lambda t: rate)


def start():
  return {"w": jnp.zeros((D, L), jnp.float32), "b": jnp.zeros(L, jnp.float32)}


@functools.cache
def secure(**kwargs):
  return summation.masked(secagg.secure_sum(S, **({"num_peers": 2} | kwargs)))


def build(algorithm, summed, placement="scan", num_sites=S):
  return fed.federate(algorithm, summed, sites.parse_placement(placement), num_sites)


@functools.cache
def fedavg(how="secure", placement="scan"):
  """One compiled federated algorithm for many tests."""
  chosen = {"secure": secure, "clear": summation.clear}[how]()
  return build(algorithms.fedavg(recipe(), keep_optimizer=True), chosen, placement)


def play(f, rounds=2, ids=IDS, load=load, state=None, model_state=None, per_load=None):
  state, infos = state or f.init(start(), model_state), []
  for _ in range(rounds):
    state, info = f.step(KEY, state, fed.Sites(ids, load, sites_per_load=per_load))
    infos.append(info)
  return state, infos


def distance(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(
    float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)), initial=0))
    for x, y in pairs
  )


def same(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


TRAIN = jax.jit(local.train(recipe()))


def by_hand(i, params, round_index, opt_state=None):
  """Site i's training as `local` has it, with the keys of the protocol."""
  order = jax.random.fold_in(jax.random.fold_in(KEY, fed.ORDER), i)
  steps = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, fed.STEPS), round_index), i)
  opt_state = recipe().optimizer(jnp.float32(0)).init(params) if opt_state is None else opt_state
  site = jax.tree.map(lambda a: jnp.asarray(a[0]), load(np.array([i])))
  now = local.Round(jnp.int32(round_index), order, steps)
  return TRAIN(params, {}, opt_state, (), site, now)
