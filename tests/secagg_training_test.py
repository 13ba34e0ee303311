"""Training over the protocol: every site a thread with its own exchange, joined to the others by
sockets only.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from secagg_apart import Apart, Killed

from primia_jax import federated as fed
from primia_jax import secagg, sites
from primia_jax.secagg import exchange
from primia_jax.types import Metrics

N, D, L = 12, 5, 3
NUM = np.array([12, 7, 9, 10], np.int32)
SEED, DEALER = 2, np.arange(8, dtype=np.uint32)


def site(i):
  rng = np.random.default_rng(int(i))
  images = rng.normal(size=(N, D, 1, 1)).astype(np.float32)
  return fed.Site(np.int32(i), images, rng.integers(0, L, N).astype(np.int32), NUM[i])


def load(ids):
  return jax.tree.map(lambda *rows: np.stack(rows), *map(site, ids))


def one_step(server, kept, site):
  """One step of linear regression over all of a site's examples: FedAvg in its shortest form, soon
  compiled.
  """
  real = (jnp.arange(N) < site.num_examples).astype(jnp.float32)
  x, y = site.images.reshape(N, D), jax.nn.one_hot(site.labels, L)
  wrong = (x @ server.params["w"] - y) * real[:, None]
  update, n = {"w": -0.1 * x.T @ wrong}, jnp.sum(real)
  metrics = Metrics(jnp.sum(wrong**2), jnp.zeros(()), n)
  return {"update": update, "weight": n, "metrics": metrics}, {"rounds": kept["rounds"] + 1}


def mean(server, message):
  params = jax.tree.map(lambda p, u: p + u / message["weight"], server.params, message["update"])
  return params, {}, (), message["metrics"]


ALGORITHM = fed.Algorithm(
  "one step",
  lambda params: (),
  lambda *_: {"rounds": np.int32(0)},
  one_step,
  mean,
  lambda s, _: (s.params, {}),
  False,
  False,
)


def extremes(shared, kept, site):
  """What is not rounded anywhere, so that the sums must agree bit for bit."""
  return {
    "max": jnp.max(site.images, axis=0),
    "n": site.num_examples.astype(jnp.float32) / 16,
  }, kept


def train(placement, num_sites, threshold, algorithm=None, lost=None):
  """Two rounds and then a count, with a site lost in the second: what every process knows at the
  end.
  """
  aggregator = fed.securely(secagg.secure_sum(num_sites, threshold=threshold))
  f, loader = fed.federated(algorithm or ALGORITHM, aggregator, placement), fed.Loader(load)
  key, ids = jax.random.key(SEED), np.arange(num_sites, dtype=np.int32)
  state, infos = f.init({"w": np.zeros((D, L), np.float32)}, {}, num_sites), []
  for dropouts in (None, lost):
    state, info = f.step(key, state, ids, loader, DEALER, None, dropouts)
    infos.append(info)
  count = fed.total_over_sites(extremes, aggregator, placement, fed.COUNTING)
  linked = fed.link(aggregator, placement, fed.COUNTING)(key, np.int32(7), ids, DEALER, lost)
  total, _, out_of_range = count((), jnp.int32(7), ids, linked, (), loader)
  assert int(out_of_range) == 0
  return {"w": state.params["w"], "update_norm": infos[-1].update_norm, **total}, state, infos


def test_sites_apart_train_as_all_in_one_process_and_without_one_that_dies():
  """Site 2 ends while it trains in the second round; the others do not wait for it, then or
  later.
  """
  rounds_of_two = iter((1, 2))

  def call(i, own):
    def dying(shared, kept, site):
      def check(_):
        if next(rounds_of_two) == 2:
          raise Killed

      if i == 2:
        jax.debug.callback(check, site.id)
      return one_step(shared, kept, site)

    return train(
      sites.Placement("apart", index=i, exchange=own), 3, 2, ALGORITHM._replace(site=dying)
    )

  apart = Apart(3).run(call)
  assert list(apart.errors) == [2]
  lost = secagg.Dropouts(np.zeros(3, bool), np.array([False, False, True]))
  want, *_ = train(sites.Placement("scan"), 3, 2, lost=lost)
  for i in (0, 1):
    got, state, infos = apart.results[i]
    for name, value in want.items():
      np.testing.assert_array_equal(
        got[name], apart.results[0][0][name]
      )  # bit for bit with each other
      np.testing.assert_allclose(got[name], value, atol=1e-6)
    for name in ("max", "n"):
      np.testing.assert_array_equal(got[name], want[name])
    assert [int(info.survivors) for info in infos] == [3, 2]
    assert [int(info.out_of_range) for info in infos] == [0, 0]
    assert state.sites["rounds"].tolist() == [2]  # of this site only
  np.testing.assert_array_equal(want["n"], NUM[:2].sum() / 16)


class Asked(Exception):
  """What an exchange was asked for."""


def test_an_exchange_is_told_what_the_sum_is_for_and_how_it_is_protected():
  class Asking(Nobody):
    def begin(self, shapes, terms):
      raise Asked(terms)

  aggregator = fed.securely(secagg.secure_sum(3, threshold=2))._replace(min_survivors=3)
  placement = sites.Placement("apart", exchange=Asking())
  count = fed.total_over_sites(extremes, aggregator, placement, fed.COUNTING)
  ids, key = np.arange(3, dtype=np.int32), jax.random.key(0)
  linked = fed.link(aggregator, placement, fed.COUNTING)(key, np.int32(7), ids, DEALER)
  with pytest.raises(Asked) as asked:
    count((), jnp.int32(7), ids, linked, (), fed.Loader(load))
  assert asked.value.args == (exchange.Terms(7, fed.COUNTING, 32, 2, 2, 3),)


class Nobody:
  """An exchange that must not be asked."""

  sites = (0, 1, 2)


def test_nothing_but_masked_sums_leaves_sites_apart():
  apart = sites.Placement("apart", exchange=Nobody())
  secure = secagg.secure_sum(3)
  for aggregator in (
    fed.in_the_clear(),
    fed.by_rule("median", lambda stacked: stacked),
    fed.securely(secagg.secure_sum(3, masked=False)),
  ):
    with pytest.raises(ValueError, match="sites apart send nothing but masked ring elements"):
      fed.federated(ALGORITHM._replace(uniform=True), aggregator, apart)
  link = fed.link(fed.securely(secure), apart)
  key, ids = jax.random.key(0), np.arange(3)
  with pytest.raises(ValueError, match="lost in earnest"):
    link(key, 0, ids, DEALER, secagg.Dropouts(np.ones(3, bool), np.zeros(3, bool)))
  first, second = (link(key, 0, ids, DEALER).links for _ in range(2))
  assert not np.any(first.own == second.own)  # fresh for each sum
  assert first.keys.shape == (1, 0, 8)  # and no key that anybody has dealt
  with pytest.raises(ValueError, match="sites apart need one"):
    sites.Placement("apart")
  with pytest.raises(ValueError, match="no others do"):
    sites.Placement("scan", exchange=Nobody())
