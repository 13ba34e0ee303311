"""Training over the protocol: every site a thread with its own exchange, joined to the others by
messages only.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from secagg_apart import Apart, Killed

from primia_jax import federated as fed
from primia_jax import secagg, sites, summation
from primia_jax.summation import Purpose
from primia_jax.types import Metrics, Site

N, D, L = 12, 5, 3
NUM = np.array([12, 7, 9, 10], np.int32)
SEED = 2


def site(i):
  rng = np.random.default_rng(int(i))
  images = rng.normal(size=(N, D, 1, 1)).astype(np.float32)
  return Site(np.int32(i), images, rng.integers(0, L, N).astype(np.int32), NUM[i])


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
  return fed.Message(update, n, metrics), {"rounds": kept["rounds"] + 1}


def mean(server, message):
  params = jax.tree.map(lambda p, u: p + u / message.weight, server.params, message.update)
  return params, {}, (), message.metrics


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


def train(placement, num_sites, summed, algorithm=ALGORITHM, lost=None):
  """Two rounds and then a count, with a site lost in the second: what every process knows at the
  end.
  """
  if lost is not None:
    summed = summation.losing(summed, lambda round, purpose, ids: lost if round else None)
  f = fed.federate(algorithm, summed, placement, num_sites)
  key, everybody = jax.random.key(SEED), fed.Sites(np.arange(num_sites), load)
  state, infos = f.init({"w": np.zeros((D, L), np.float32)}), []
  for _ in range(2):
    state, info = f.step(key, state, everybody)
    infos.append(info)
  count = fed.over_sites(extremes, summed, placement, Purpose.COUNTING)
  total, _, outcome = count((), 7, everybody)
  assert int(outcome.out_of_range) == 0
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

    summed = summation.over(own, secagg.secure_sum(3, threshold=2))
    return train(sites.own_process(i), 3, summed, ALGORITHM._replace(site=dying))

  apart = Apart(3).run(call)
  assert list(apart.errors) == [2]
  lost = secagg.Dropouts(np.zeros(3, bool), np.array([False, False, True]))
  summed = summation.masked(secagg.secure_sum(3, threshold=2))
  want, *_ = train(sites.scan(), 3, summed, lost=lost)
  for i in (0, 1):
    got, state, infos = apart.results[i]
    for name, value in want.items():
      np.testing.assert_array_equal(
        got[name], apart.results[0][0][name]
      )  # bit for bit with each other
      np.testing.assert_allclose(got[name], value, atol=1e-6)
    for name in ("max", "n"):
      np.testing.assert_array_equal(got[name], want[name])
    assert [info.survivors.tolist() for info in infos] == [[0, 1, 2], [0, 1]]
    assert [int(info.out_of_range) for info in infos] == [0, 0]
    assert state.site_state["rounds"].tolist() == [2]  # of this site only
  np.testing.assert_array_equal(want["n"], NUM[:2].sum() / 16)


class Asked(Exception):
  """What an exchange was asked for."""


def test_an_exchange_is_told_what_the_sum_is_for_and_how_it_is_protected():
  class Asking(Nobody):
    def begin(self, shapes, *terms):
      raise Asked(jax.tree.map(lambda a: (a.shape, a.dtype), shapes), *terms)

  config = secagg.secure_sum(3, threshold=2)
  coding = summation.fixed_point(config)._replace(min_survivors=3)
  summed = summation.over(Asking(), config, coding)
  count = fed.over_sites(extremes, summed, sites.own_process(1), Purpose.COUNTING)
  with pytest.raises(Asked) as asked:
    count((), 7, fed.Sites(np.arange(3), load))
  shapes, *terms = asked.value.args
  assert terms == [7, Purpose.COUNTING, config, 3, [0, 1, 2]]
  assert shapes.message == {"max": ((D, 1, 1), np.uint32), "n": ((), np.uint32)}


class Nobody:
  """An exchange that must not be asked."""

  sites = (0, 1, 2)


@pytest.mark.parametrize(
  "summed",
  [
    summation.clear(),
    summation.by_rule("median", lambda stacked: stacked),
    summation.masked(secagg.secure_sum(3)),
    summation.masked(secagg.secure_sum(3, masked=False)),
  ],
)
def test_nothing_but_masked_sums_leaves_a_process(summed):
  own = sites.own_process(1)._replace(name="hospital")  # how it is called decides nothing
  f = fed.federate(ALGORITHM._replace(uniform=True), summed, own, 3)
  state = f.init({"w": np.zeros((D, L), np.float32)})
  with pytest.raises(ValueError, match="go together"):
    f.step(jax.random.key(0), state, fed.Sites(np.arange(3), load))


def test_an_exchange_goes_with_sites_in_processes_of_their_own():
  summed = summation.over(Nobody(), secagg.secure_sum(3))
  for placement in (sites.scan()._replace(name="processes"), sites.on_mesh()):
    with pytest.raises(ValueError, match="go together"):
      fed.over_sites(extremes, summed, placement, Purpose.COUNTING)(
        (), 7, fed.Sites(np.arange(3), load)
      )
  with pytest.raises(ValueError, match="really lost"):
    summed.begin(
      0, Purpose.TRAINING, np.arange(3), None, secagg.Dropouts(np.ones(3, bool), np.zeros(3, bool))
    )
