"""A site without images in a training of hospitals apart: it follows the sums of the others."""

import json
import threading

import jax
import numpy as np
import pytest
from experiments_apart import APART, in_threads, seat_of
from experiments_runs import train

from experiments import imageless, inputs, model_files, processes, report, running, settings
from primia_jax.data import sites as data_sites

SITES, EMPTY = range(4), 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  root, part = tmp_path_factory.mktemp("images"), data_sites.phantom_part((12, 12, 16), size=16)
  for i, rows in enumerate(part.sites):
    images = part.dataset.images[rows, ..., 0]
    np.savez(root / f"{i}.npz", train_images=images, train_labels=part.dataset.labels[rows])
  return settings.replace(
    APART,
    num_sites=4,
    site_data=",".join([*(f"npz:{root}/{i}.npz" for i in range(3)), "none"]),
    label_names=",".join(part.dataset.label_names),
  )


def test_the_others_train_as_without_it_and_it_has_their_model(config, tmp_path, monkeypatch):
  held, alone, save = {}, threading.Lock(), model_files.save_model

  def one(i, carriers):
    held["carriers"] = carriers
    seat = seat_of(tmp_path, i)
    folder = running.open_run(config, str(seat.own / "run"))
    return running.run(config, folder, federated=True, seat=seat)

  def save_in_turn(*args):  # orbax's saves share state within a process
    with alone:
      save(*args)

  monkeypatch.setattr(
    processes,
    "connect",
    lambda *args: processes.meet(args[0], held["carriers"][args[1].number], *args[1:]),
  )
  monkeypatch.setattr(model_files, "save_model", save_in_turn)
  monkeypatch.setattr(report, "write_report", lambda *args, **facts: facts)
  results, errors = in_threads(one, SITES, tmp_path)
  for error in errors.values():
    raise error

  sums = [one.opened.survivors for one in results["coordinator"] if one.purpose == 0]
  assert sums == [(0, 1, 2)] * 2
  others = settings.replace(
    config, num_sites=3, site_data=config.data.site_data.removesuffix(",none"), placement="scan",
    secagg_threshold=3,
  )  # fmt: skip
  expected = train(others, tmp_path / "simulated").models[0]
  folders = [tmp_path / "own" / f"site_{i}" / "run" for i in SITES]
  trained = [model_files.load_model(str(folder))[1][0] for folder in folders]
  for leaves in zip(*map(jax.tree.leaves, (expected, *trained)), strict=True):
    np.testing.assert_allclose(leaves[1], leaves[0], atol=1e-5)
    for other in leaves[2:]:
      np.testing.assert_array_equal(other, leaves[1])
  mine = results[EMPTY]
  assert mine["arms"] == {}
  assert mine["images"]["sites without images"] == "[3], in no sum of updates"
  text = (folders[EMPTY] / "report.md").read_text()
  assert "This place has no images to test on, so that nothing is scored here." in text
  assert "sites in a sum | 3" in text
  assert (folders[EMPTY] / "disclosure.md").is_file()
  lines = (folders[EMPTY] / "federated" / "rounds.jsonl").read_text().splitlines()
  assert [json.loads(line)["sites"] for line in lines] == [[0, 1, 2]] * 2


def test_it_has_no_images_of_the_agreed_classes(config, tmp_path):
  found = inputs.site_images(config, EMPTY)
  assert found.train.sizes == found.validation.sizes == (0, 0, 0, 0)
  assert len(found.test) == 0
  assert found.train.dataset.label_names == tuple(config.data.label_names.split(","))
  (tmp_path / "file.png").touch()
  assert not imageless.is_empty(f"folder:{tmp_path}")
  assert not imageless.is_empty("npz:none")
  with pytest.raises(ValueError, match="give all of them in label_names"):
    imageless.nothing(settings.replace(APART, site_data="none,none,none"))
  with pytest.raises(ValueError, match=r"sites \[3\] have no images to train on; give them some"):
    inputs.site_images(settings.replace(config, placement="scan"))


def test_sums_are_of_as_many_sites_as_have_images_or_of_none(config):
  """Else a site that has none would count among those that hide an update."""
  of = lambda sizes, **change: imageless.sums_of_others(settings.replace(config, **change), sizes)
  assert of((5, 5, 5, 5)) == config
  assert of((5, 0, 5, 5)).sites_in_round == 3
  assert of((5, 0, 5, 5), sites_per_round=3, seed=1).sites_in_round == 3
  with pytest.raises(
    ValueError, match=r"sites \[1, 2\] have no .* of 2 sites at most: secagg_coll"
  ):
    of((5, 0, 0, 5))
  assert of((5, 0, 0, 5), secagg_colluding=0).sites_in_round == 2
  with pytest.raises(ValueError, match="of 3 sites at most: secagg_threshold=4"):
    of((5, 0, 5, 5), secagg_threshold=4)
  with pytest.raises(ValueError, match="needs two sites with images"):
    of((5, 0, 0, 0), secagg_colluding=0)
