"""One operating-system process a site, under `jax.distributed`. This file is the test and, run by
itself, a process.
"""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import algorithms, local, secagg, sites, summation
from primia_jax import federated as fed
from primia_jax.types import Site

S, N, D, L = 3, 12, 5, 3
NUM = np.array([12, 7, 9], np.int32)
SEED = 2


def site(i):
  """The data of one site, which nobody else makes."""
  rng = np.random.default_rng(i)
  images = rng.normal(size=(N, D, 1, 1)).astype(np.float32)
  return Site(np.int32(i), images, rng.integers(0, L, N).astype(np.int32), NUM[i])


def load(ids, seen=None):
  if seen is not None:
    seen += ids.tolist()
  return jax.tree.map(lambda *rows: np.stack(rows), *map(site, ids))


def apply_fn(params, model_state, images, train=False, key=None):
  return images.reshape(images.shape[0], -1) @ params["w"] + params["b"][None], model_state


def start():
  return {"w": np.zeros((D, L), np.float32), "b": np.zeros(L, np.float32)}


def train(placement, seen=None):
  """Two rounds of FedAvg and a count, under secure aggregation."""
  loss = local.classification_loss(apply_fn, lambda key, images, targets: (images, targets), L)
  optimizer = functools.partial(optax.sgd, momentum=0.9)
  steps = local.epochs(4, N, num_epochs=2)
  recipe = local.Recipe(steps, local.gradients(loss), None, optimizer, lambda t: 0.1)
  summed = summation.masked(secagg.secure_sum(S))
  f = fed.federate(algorithms.fedavg(recipe, keep_optimizer=True), summed, placement, S)
  key, everybody = jax.random.key(SEED), fed.Sites(np.arange(S), functools.partial(load, seen=seen))
  state = f.init(start())
  for _ in range(2):
    state, info = f.step(key, state, everybody)

  def extremes(shared, kept, site):  # not rounded anywhere, so that the sums must agree bit for bit
    return {
      "max": jnp.max(site.images, axis=0),
      "n": site.num_examples.astype(jnp.float32) / 16,
    }, kept

  count = fed.over_sites(extremes, summed, placement, summation.Purpose.COUNTING)
  total, _, outcome = count((), 7, everybody)
  assert int(outcome.out_of_range) == 0
  result = {**state.params, "loss": info.loss, "update_norm": info.update_norm, **total}
  return state, result, f, everybody


def worker(process: int, address: str, folder: pathlib.Path) -> None:
  jax.distributed.initialize(address, num_processes=S, process_id=process)
  assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (S, S, 1)
  placement, seen = sites.parse_placement("mesh"), []
  state, result, f, everybody = train(placement, seen)
  assert set(seen) == {process}, f"process {process} loaded sites {seen}"
  for leaf in jax.tree.leaves(state.site_state):  # what a site keeps stays in its own process
    assert [shard.index[0] for shard in leaf.addressable_shards] == [slice(process, process + 1)]
  assert all(a.is_fully_replicated for a in jax.tree.leaves(state.params))
  with pytest.raises(ValueError, match="each runs its own"):
    f.step(jax.random.key(SEED), state, everybody._replace(ids=np.array([0, 2, 1])))
  with pytest.raises(ValueError, match="sites_per_load=0"):
    f.step(jax.random.key(SEED), state, everybody._replace(sites_per_load=0))
  with pytest.raises(ValueError, match="equally many"):
    placement.rows(np.arange(S + 1))
  np.savez(folder / f"{process}.npz", **jax.tree.map(np.asarray, result))


def test_one_process_a_site_agrees_with_one_process_for_all(tmp_path):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  root = pathlib.Path(__file__).parents[1]
  path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
  settings = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "XLA_FLAGS": "",
    "PYTHONPATH": path,
  }
  strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
  command = [sys.executable, __file__, address, str(tmp_path)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  workers = [
    subprocess.Popen([*command, str(i)], env=os.environ | settings | strict, **pipes)
    for i in range(S)
  ]
  try:
    _, want, *_ = train(sites.parse_placement("scan"))  # meanwhile
    for process in workers:
      told, _ = process.communicate(timeout=120)
      assert process.returncode == 0, told[-3000:]
  finally:
    for process in workers:
      process.kill()
  results = [dict(np.load(tmp_path / f"{i}.npz")) for i in range(S)]
  for name, value in want.items():
    assert all(
      np.array_equal(result[name], results[0][name]) for result in results
    )  # bit for bit with each other
    np.testing.assert_allclose(results[0][name], value, atol=1e-6)
  for name in ("max", "n"):
    assert np.array_equal(results[0][name], want[name])
  assert want["n"] == NUM.sum() / 16


if __name__ == "__main__":
  worker(int(sys.argv[3]), sys.argv[1], pathlib.Path(sys.argv[2]))
