"""Training over the protocol: every site a thread with its own exchange, joined to the others by sockets only."""

import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import algorithms, local, secagg, sites
from primia_jax import federated as fed
from primia_jax.secagg import exchange, keys, protocol, rounds, transport
from primia_jax.secagg import messages as msg
from primia_jax.secagg import server as serving

N, D, L = 12, 5, 3
NUM = np.array([12, 7, 9, 10], np.int32)
SEED, DEALER = 2, np.arange(8, dtype=np.uint32)


def site(i):
  rng = np.random.default_rng(int(i))
  images = rng.normal(size=(N, D, 1, 1)).astype(np.float32)
  return fed.Site(np.int32(i), images, rng.integers(0, L, N).astype(np.int32), NUM[i])


def load(ids):
  return jax.tree.map(lambda *rows: np.stack(rows), *map(site, ids))


def apply_fn(params, model_state, images, train=False, key=None):
  return images.reshape(images.shape[0], -1) @ params["w"] + params["b"][None], model_state


def start():
  return {"w": np.zeros((D, L), np.float32), "b": np.zeros(L, np.float32)}


def fedavg(placement, aggregator):
  loss = local.classification_loss(apply_fn, lambda key, images, targets: (images, targets), L)
  optimizer = functools.partial(optax.sgd, momentum=0.9)
  recipe = local.Recipe(local.gradients(loss), optimizer, lambda t: 0.1, local.Work(4, max_examples=N, epochs=2))
  return fed.federated(algorithms.fedavg(recipe, keep_optimizer=True), aggregator, placement)


def extremes(shared, kept, site):
  """What is not rounded anywhere, so that the sums must agree bit for bit."""
  return {"max": jnp.max(site.images, axis=0), "n": site.num_examples.astype(jnp.float32) / 16}, kept


def train(placement, num_sites, num_rounds=2, loader=None, ids=None, threshold=None, dropouts=None):
  """Some rounds of FedAvg and then a count; what every process knows after it."""
  aggregator = fed.securely(secagg.secure_sum(num_sites, threshold=threshold))
  f, loader = fedavg(placement, aggregator), loader or fed.Loader(load)
  key, ids = jax.random.key(SEED), np.arange(num_sites, dtype=np.int32) if ids is None else ids
  state, infos = f.init(start(), {}, num_sites), []
  for _ in range(num_rounds):
    state, info = f.step(key, state, ids, loader, DEALER, None, dropouts if len(infos) == 1 else None)
    infos.append(info)
  count = fed.total_over_sites(extremes, aggregator, placement, fed.COUNTING)
  linked = fed.link(aggregator, placement, fed.COUNTING)(key, np.int32(7), ids, DEALER, dropouts)
  total, _, out_of_range = count((), jnp.int32(7), ids, linked, (), loader)
  assert int(out_of_range) == 0
  return {**state.params, "update_norm": infos[-1].update_norm, **total}, state, infos


class Apart:
  """Exchanges of some sites, and what each of them did in a thread."""

  def __init__(self, num_sites, timeout=30.0):
    server, own = keys.identity(), [keys.identity() for _ in range(num_sites)]
    listener = transport.listen()
    self.host = transport.Host(listener, num_sites, timeout, server)
    pinned = {i: one.public for i, one in enumerate(own)}
    self.exchanges = [
      exchange.Exchange(
        listener.getsockname(), i, exchange.Pinned(own[i], pinned, server.public), b"test", timeout,
        self.host if i == 0 else None,
      )
      for i in range(num_sites)
    ]  # fmt: skip
    self.results, self.errors = {}, {}

  def run(self, call):
    """call(site, its placement) for each site in a thread, to the end of all."""

    def one(i):
      try:
        self.results[i] = call(i, sites.Placement("apart", index=i, exchange=self.exchanges[i]))
      except Exception as e:
        self.errors[i] = e

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(self.exchanges))]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(60)
      assert not thread.is_alive()
    for e in self.exchanges:
      e.close()
    return self


def assert_like(results, want, atol=1e-6):
  for result in results:
    for name, value in want.items():
      np.testing.assert_array_equal(result[name], results[0][name])  # bit for bit with each other
      np.testing.assert_allclose(result[name], value, atol=atol)
    for name in ("max", "n"):
      np.testing.assert_array_equal(result[name], want[name])


def test_three_sites_apart_train_as_all_in_one_process():
  apart = Apart(3).run(lambda i, placement: train(placement, 3))
  assert apart.errors == {}
  want, *_ = train(sites.Placement("scan"), 3)
  assert_like([apart.results[i][0] for i in range(3)], want)
  _, state, infos = apart.results[1]
  assert [int(info.survivors) for info in infos] == [3, 3]
  assert all(leaf.shape[0] == 1 for leaf in jax.tree.leaves(state.sites))  # what a site keeps stays there


def test_a_site_that_is_lost_while_it_trains_is_left_out_at_once_and_the_others_go_on():
  apart = Apart(4)
  rounds_of_two = iter(range(9))

  def call(i, placement):
    def dying(ids):
      if i == 2 and next(rounds_of_two) == 2:  # two rounds, and dies while it counts
        placement.exchange.close()
        raise KeyError("killed")
      return load(ids)

    return train(placement, 4, loader=fed.Loader(dying))

  begun = time.monotonic()
  apart.run(call)
  assert time.monotonic() - begun < 25  # and no stage's timeout, of 30 s, is spent
