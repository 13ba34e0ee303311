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

SITES, DRAWN, ROUNDS = 3, 2, 3
STATISTICS = {"mean": np.zeros(2, np.float32)}
FEDBN = algorithms.fedbn(recipe(), lambda path: path == "b", keep_optimizer=True)


def play(f, load):
  state, infos = f.init(start(), STATISTICS), []
  for r in range(ROUNDS):
    ids = fed.sample_sites(KEY, r, SITES, DRAWN)
    state, info = f.step(KEY, state, fed.Sites(ids, load))
    infos.append(info)
  return state, infos


@pytest.mark.optimised
def test_sites_apart_train_what_one_process_trains_bit_for_bit():
  """Two of three in a round; momentum and normalisation stay at the sites."""
  config = secagg.secure_sum(DRAWN)

  def call(i, own):
    def own_site(ids):
      assert set(ids.tolist()) <= {i}
      return load(ids)

    f = fed.federate(FEDBN, summation.over(own, config), sites.own_process(i), SITES)
    return play(f, own_site)

  apart = Apart(SITES).run(call)
  assert (apart.errors, apart.failure) == ({}, None)
  f = build(FEDBN, summation.masked(config), "scan", SITES)
  want, want_infos = play(f, load)
  drawn = [fed.sample_sites(KEY, r, SITES, DRAWN).tolist() for r in range(ROUNDS)]
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
  offsets = [apart.results[i][0].site_state["personal"][0]["b"][0] for i in range(SITES)]
  assert len({tuple(np.asarray(b)) for b in offsets}) == SITES  # each has its own
  assert not np.any(want.params["b"])
