"""The grid of reconstructions: its cells, the sites' updates, and that it continues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import local
from primia_jax.attacks import grid, updates

CELL = grid.Cell(4, 2, 3)
SINGLE = grid.Cell(1, 1, 1)
SEARCH = grid.Search(steps=120, least=4, weights=(1.0, 10.0), ladder=(0.0, 0.1), rate=0.5)


def apply(params, model_state, images, *, train=True, key=None):
  del train, key
  first, second = params
  return jax.nn.sigmoid(images.reshape(len(images), -1) @ first) @ second, model_state


@pytest.fixture(scope="module")
def world():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  loss_fn = local.classification_loss(apply, lambda key, images, targets: (images, targets), 4)
  images = rng.uniform(size=(60, 11, 11, 1)).astype(np.float32)
  labels = rng.integers(0, 4, 60).astype(np.int32)
  pools = (images[:15], labels[:15]), (images[15:30], labels[15:30])
  return loss_fn, [draw(121, 48) / 4, draw(48, 4)], grid.Images(*pools, images[30:])


def test_cells_have_full_batches_and_grow():
  found = grid.cells((1, 8), (1, 4, 8), (1, 3), most=8)
  assert found == [(1, 1, 1), (1, 1, 3), (8, 1, 1), (8, 4, 1), (8, 8, 1)]
  with pytest.raises(ValueError, match="no cell"):
    grid.cells((3,), (2,), (1,), most=8)


def test_larger_searches_have_fewer_steps():
  steps = grid.Search(steps=400).steps_for
  assert [steps(n) for n in (1, 32, 33, 128, 129, 1536)] == [400, 400, 133, 133, 60, 60]


def test_the_update_is_the_mean_of_each_site_s_epoch(world):
  loss_fn, params, images = world
  pixels, labels = (jnp.asarray(a[:12]) for a in images.attacked)

  def loss(params, rows):
    logits = apply(params, {}, pixels[rows])[0]
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(2), labels[rows]])

  changes = []
  for site in range(3):
    moved = params
    for start in (0, 2):
      rows = jnp.arange(start, start + 2) + 4 * site
      moved = jax.tree.map(lambda p, g: p - 0.5 * g, moved, jax.grad(loss)(moved, rows))
    changes.append(jax.tree.map(jnp.subtract, moved, params))
  expected = jax.tree.map(lambda *leaves: sum(leaves) / 3, *changes)
  update = jax.jit(grid.epoch(loss_fn, CELL, 0.5))(updates.Seen(params, {}, None, labels), pixels)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), update, expected)


def test_a_single_image_is_found_with_the_weight_that_suits_others(world):
  loss_fn, params, images = world
  found = grid.attack(jax.random.key(0), SINGLE, loss_fn, (params, {}), images, SEARCH)
  assert found.weight < 1  # smooths all away, and was the least of the first ones
  assert not found.is_at_end
  assert (found.steps, found.num_attacks) == (120, 4)
  assert found.named.all()
  assert found.ssim.mean() > 0.6
  assert found.guesses.shape == (4, 11, 11, 1)
  few = images._replace(tuning=(images.tuning[0][:0], images.tuning[1][:0]))
  with pytest.raises(ValueError, match="0 are left"):
    grid.attack(jax.random.key(0), SINGLE, loss_fn, (params, {}), few, SEARCH)


def test_a_weight_is_chosen_on_as_many_images_as_are_attacked(world, monkeypatch):
  loss_fn, params, images = world
  run, attacks = grid._all, []

  def seen(*args):
    found = run(*args)
    attacks.append((args[3] is images.tuning, found.num_attacks))
    return found

  monkeypatch.setattr(grid, "_all", seen)
  grid.attack(jax.random.key(0), SINGLE, loss_fn, (params, {}), images, SEARCH)
  assert attacks == [(True, 4)] * 4 + [(False, 4)]


def test_guesses_are_paired_with_the_images_they_resemble():
  rng = np.random.default_rng(1)
  truth = rng.uniform(size=(6, 5, 5, 2))
  order = rng.permutation(6)
  guesses = truth[order] + 0.01 * rng.normal(size=truth.shape)
  np.testing.assert_array_equal(grid.paired(guesses, truth), guesses[np.argsort(order)])


def test_a_grid_continues_and_refuses_another(world, monkeypatch, tmp_path):
  loss_fn, params, images = world
  made = []

  def fake(key, cell, loss_fn, model, images, search, weight, steps):
    made.append((tuple(cell), weight, steps))
    shape = (cell.total, 11, 11, 1)
    one = np.ones(cell.total)
    return grid.Outcome(
      0.5 if weight is None else weight, weight is None, steps, 1, one, one, one > 0, np.ones(shape)
    )

  monkeypatch.setattr(grid, "attack", fake)
  cells = grid.cells((1, 20, 60), (4, 1), (1,), most=60)
  folder = tmp_path / "cells"

  def run(about="X-rays", cells=cells):
    return grid.explore(
      jax.random.key(0), cells, loss_fn, (params, {}), images, SEARCH, folder, about
    )

  first = run(cells=cells[:3])
  assert made == [((1, 1, 1), None, 120), ((20, 1, 1), None, 120), ((20, 4, 1), None, 120)]
  found = run()
  # larger cells: with fewer steps, the weight of smaller ones, and a control of their own
  assert made[3:] == [((1, 1, 1), 0.5, 40), ((60, 1, 1), 0.5, 40), ((60, 4, 1), 0.5, 40)]
  assert run().outcomes.keys() == found.outcomes.keys()
  assert len(made) == 6
  cell = cells[1]
  for field, a, b in zip(
    grid.Outcome._fields, first.outcomes[cell], found.outcomes[cell], strict=True
  ):
    np.testing.assert_array_equal(a[:16] if field == "guesses" else a, b)
  assert found.controls[cells[-1]].steps == 40
  assert (folder / "single.npz").stat().st_mode & 0o777 == 0o600
  with pytest.raises(ValueError, match="is of another search"):
    run("phantoms")
  (folder / "single.npz").write_bytes(b"PK")
  with pytest.raises(ValueError, match="is damaged"):
    run()
