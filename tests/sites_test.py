import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import sites

PLACEMENTS = ["loop", "scan", "vmap", "chunk=2", "chunk=3", "chunk=9", "mesh"]
COLLECTIVE = re.compile(
  r"= (.*?) (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter|ragged-all-to-all|"
  r"send|recv)(-start)?\("
)


def site_fn(shared, site):
  noise = jax.random.normal(jax.random.fold_in(shared["key"], site["id"]), (3,))
  value = jnp.tanh(site["x"] @ shared["w"]) + noise
  message = {"float": value, "ring": site["word"] * jnp.uint32(2654435761), "count": site["id"] - 3}
  return message, {"value": value, "id": site["id"]}


def inputs(num_sites):
  rng = np.random.default_rng(num_sites)
  shared = {"w": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), "key": jax.random.key(1)}
  return shared, {
    "x": rng.normal(size=(num_sites, 5)).astype(np.float32),
    "word": rng.integers(0, 2**32, (num_sites, 2), dtype=np.uint32),
    "id": np.arange(num_sites, dtype=np.int32),
  }


def run(text, shared, rows, inner=None):
  placement = sites.parse_placement(text)
  if inner is not None:
    placement = sites.on_mesh(inner=inner)
  lifted = placement.sum_over_sites(site_fn)
  return lifted(placement.replicate(shared), placement.put(rows))


@pytest.mark.parametrize("num_sites", [1, 7])
def test_every_placement_gives_the_same_sum(num_sites):
  shared, rows = inputs(num_sites)
  each = [
    site_fn(shared, jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), rows)) for i in range(num_sites)
  ]
  words = [
    [int(w) * 2654435761 for w in row] for row in rows["word"]
  ]  # Python integers, reduced at the end
  for text in PLACEMENTS:
    total, stacked = run(text, shared, rows)
    assert [int(t) for t in total["ring"]] == [
      sum(column) % 2**32 for column in zip(*words, strict=True)
    ]
    assert int(total["count"]) == sum(range(num_sites)) - 3 * num_sites
    assert np.array_equal(stacked["id"], rows["id"])
    np.testing.assert_allclose(
      total["float"], sum(np.asarray(m["float"], np.float64) for m, _ in each), atol=1e-6
    )
    np.testing.assert_allclose(
      stacked["value"], np.stack([kept["value"] for _, kept in each]), atol=1e-6
    )
    assert jax.tree.map(lambda a: a.dtype, total) == {
      "float": jnp.float32,
      "ring": jnp.uint32,
      "count": jnp.int32,
    }


@pytest.mark.parametrize("num_sites", [4, 6])
@pytest.mark.parametrize("inner", ["scan", "vmap"])
def test_mesh_runs_several_sites_a_device_either_way(num_sites, inner):
  shared, rows = inputs(num_sites)
  want, want_stacked = run("scan", shared, rows)
  got, got_stacked = run("mesh", shared, rows, inner)
  assert np.array_equal(got["ring"], want["ring"])
  np.testing.assert_allclose(got["float"], want["float"], atol=1e-6)
  np.testing.assert_allclose(got_stacked["value"], want_stacked["value"], atol=1e-6)


def test_wide_rings_agree_bit_for_bit():
  with jax.enable_x64(True):
    words = np.random.default_rng(0).integers(0, 2**64, (7, 3), dtype=np.uint64)
    for text in PLACEMENTS:
      placement = sites.parse_placement(text)
      total, _ = placement.sum_over_sites(lambda _, w: (w, ()))((), placement.put(words))
      assert [int(t) for t in total] == [sum(map(int, column)) % 2**64 for column in words.T]


@pytest.mark.parametrize("text", PLACEMENTS)
def test_randomness_goes_by_number_and_not_by_position(text):
  shared, rows = inputs(6)
  order = np.array([3, 0, 5, 1, 4, 2])
  _, stacked = run(text, shared, rows)
  total, permuted = run(text, shared, jax.tree.map(lambda a: a[order], rows))
  np.testing.assert_allclose(permuted["value"], np.asarray(stacked["value"])[order], atol=1e-6)
  assert int(total["count"]) == -3
  assert len(np.unique(np.asarray(stacked["value"])[:, 0])) == 6  # no two sites drew the same


def test_only_the_summed_values_cross_devices():
  shared, rows = inputs(8)
  placement = sites.parse_placement("mesh")
  assert jax.device_count() == 4
  args = placement.replicate(shared), placement.put(rows)
  text = placement.sum_over_sites(site_fn).lower(*args).compile().as_text()
  found = COLLECTIVE.findall(text)
  assert {kind for _, kind, _ in found} == {"all-reduce"}
  shapes = sorted(shape for moved, _, _ in found for shape in re.findall(r"\w+\[[\d,]*\]", moved))
  assert shapes == ["f32[3]", "s32[]", "u32[2]"]


def test_the_check_for_collectives_sees_a_leak():
  shared, rows = inputs(8)
  placement = sites.parse_placement("mesh")
  leak = lambda shared, site: (jax.lax.all_gather(site["x"], sites.AXIS), ())
  lowered = placement.sum_over_sites(leak).lower(shared, placement.put(rows))
  assert "all-gather" in {kind for _, kind, _ in COLLECTIVE.findall(lowered.compile().as_text())}


def test_rows_lie_on_their_own_devices():
  placement = sites.parse_placement("mesh")
  _, rows = inputs(8)
  placed = placement.put(rows)
  for i, shard in enumerate(sorted(placed["x"].addressable_shards, key=lambda s: s.index[0].start)):
    assert np.array_equal(shard.data, rows["x"][2 * i : 2 * i + 2])
    assert shard.device == jax.devices()[i]
  assert placement.rows(np.arange(8)).tolist() == list(range(8))  # one process runs all sites
  assert placement.replicate({"w": np.ones(3)})["w"].sharding.is_fully_replicated


def test_a_process_of_its_own_runs_one_row_and_sums_nothing():
  shared, rows = inputs(1)
  placement = sites.own_process(2)
  assert placement.is_own_process
  assert not sites.scan().is_own_process
  assert placement.rows(np.arange(4)).tolist() == [2]
  assert placement.rows(np.array([0, 2, 3])).tolist() == [1]
  assert placement.rows(np.array([0, 1, 3])).tolist() == []  # it runs nothing
  lifted = placement.sum_over_sites(site_fn)
  got = lifted(placement.replicate(shared), placement.put(rows))
  want = run("scan", shared, rows)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


def test_padded_devices_run_nothing():
  """On an uneven mesh the empty places add nothing, even where a site function of nothing is
  NaN.
  """
  placement = sites.parse_placement("mesh")
  rows = np.arange(1, 6, dtype=np.float32)
  lifted = placement.sum_over_sites(lambda _, x: (1 / x, jnp.log(x)))
  total, stacked = lifted((), placement.put(rows))
  np.testing.assert_allclose(total, math.fsum(1 / rows), rtol=1e-6)
  np.testing.assert_allclose(stacked, np.log(rows), rtol=1e-6)


def test_parse_placement():
  for text in ("loop", "scan", "vmap", "chunk=8", "mesh"):
    assert sites.parse_placement(text).name == text
  assert sites.parse_placement("auto").name == "mesh"  # several devices in the tests


@pytest.mark.parametrize(
  "text", ["", "pmap", "chunk", "chunk=", "chunk=0", "chunk=-1", "chunk=2.5", "scan=2", "mesh=4"]
)
def test_bad_placements_are_refused(text):
  with pytest.raises(ValueError, match="chunk=C"):
    sites.parse_placement(text)


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match="size=0"):
    sites.chunked(0)
  with pytest.raises(ValueError, match="inner='loop'"):
    sites.on_mesh(inner="loop")
  with pytest.raises(ValueError, match="the one axis 'site'"):
    sites.on_mesh(jax.make_mesh((4,), ("party",)))
