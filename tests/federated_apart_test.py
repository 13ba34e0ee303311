"""Rounds over sites that each have a process: some of the sites, and parameters that stay at them.

The sites are threads with exchanges of their own. Each loads its own site only.
"""

import jax
import numpy as np
import pytest
from federated_sites import KEY, build, load, recipe, start
from secagg_apart import Apart

from primia_jax import algorithms, secagg, sites, summation
from primia_jax import federated as fed

SITES, ROUNDS = 4, 3
STATISTICS = {"mean": np.zeros(2, np.float32)}
KINDS = {
  "momentum that stays": lambda: algorithms.fedavg(recipe(), keep_optimizer=True),
  "FedBN": lambda: algorithms.fedbn(recipe(), lambda path: path == "b"),
}


def play(f, load, num_sampled, model_state):
  state, infos = f.init(start(), model_state), []
  for r in range(ROUNDS):
    ids = fed.sample_sites(KEY, r, SITES, num_sampled)
    state, info = f.step(KEY, state, fed.Sites(ids, load))
    infos.append(info)
  return state, infos


@pytest.mark.parametrize(("kind", "num_sampled"), [("momentum that stays", 3), ("FedBN", 3)])
def test_sites_apart_train_what_one_process_trains_bit_for_bit(kind, num_sampled):
  config, algorithm = secagg.secure_sum(num_sampled), KINDS[kind]()
  model_state = STATISTICS if kind == "FedBN" else None

  def call(i, own):
    def own_site(ids):
      assert set(ids.tolist()) <= {i}
      return load(ids)

    f = fed.federate(algorithm, summation.over(own, config), sites.own_process(i), SITES)
    return play(f, own_site, num_sampled, model_state)

  apart = Apart(SITES).run(call)
  assert (apart.errors, apart.failure) == ({}, None)
  f = build(algorithm, summation.masked(config), "scan", SITES)
  want, want_infos = play(f, load, num_sampled, model_state)
  drawn = [fed.sample_sites(KEY, r, SITES, num_sampled).tolist() for r in range(ROUNDS)]
  assert len(set(map(tuple, drawn))) > 1
  for i in range(SITES):
    state, infos = apart.results[i]
    assert [info.survivors.tolist() for info in infos] == drawn
    assert [float(info.update_norm) for info in infos] == [
      float(info.update_norm) for info in want_infos
    ]
    jax.tree.map(np.testing.assert_array_equal, state[:3], want[:3])  # what all sites share
    for a, b in zip(*map(jax.tree.leaves, (state.site_state, want.site_state)), strict=True):
      np.testing.assert_allclose(a[0], b[i], atol=1e-6)
  if kind == "FedBN":
    offsets = [apart.results[i][0].site_state["personal"][0]["b"][0] for i in range(SITES)]
    assert len({tuple(np.asarray(b)) for b in offsets}) == SITES  # each has its own
    assert not np.any(want.params["b"])
