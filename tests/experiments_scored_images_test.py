"""Which images a hospital scores: of its own source, or its part of a trial's."""

import dataclasses

import numpy as np
import pytest
from experiments_runs import NAMES, TINY
from scoring_world import SITES, images_of, write_images

from experiments import approving, evaluating, inputs, scored_images, settings
from experiments.configs.scoring import Evaluate
from experiments.site_folders import Own
from primia_jax.data import phantom


def test_the_images_that_training_held_out_are_scored(tmp_path):
  """Of a source without a test split: those on which the training's own report tests."""
  source = write_images(tmp_path / "a.npz", 0, "train", 40)
  run = approving.multiprocess(
    {"label_names": ",".join(NAMES), "image_size": 16, "seed": 5, "test_fraction": 0.25},
    Own(source),
  )
  config = settings.replace(Evaluate(), data=source, image_size=16, held_out=0.25, seed=5)
  found = scored_images.of_source(config, NAMES)
  want = inputs.site_images(run, 0).test
  np.testing.assert_array_equal(found.images, want.images)
  assert 0 < len(found) < 40
  (tmp_path / "run").mkdir()
  settings.save(run, tmp_path / "run" / "config.json")
  bare = settings.replace(config, held_out=0.0)
  at = NAMES, str(tmp_path / "run"), 0
  assert "was trained on images of it" in scored_images.warnings(bare, *at)["TRAINED ON"]
  assert scored_images.warnings(config, *at) == {}
  assert len(scored_images.of_source(bare, NAMES)) == 40


def test_a_trial_deals_images_of_one_source_and_none_is_lost_or_counted_twice(tmp_path):
  images, *_ = images_of(0, 40)
  source = write_images(tmp_path / "a.npz", 0, num=40)
  config = settings.replace(Evaluate(), data=source, image_size=16)
  parts = [scored_images.of_trial(config, NAMES, "", i) for i in SITES]
  found = sorted(image.tobytes() for part in parts for image in np.asarray(part.images))
  assert found == sorted(image.tobytes() for image in images)
  of = [set(part.groups) for part in parts]
  assert len(set.union(*of)) == sum(map(len, of))
  synthetic = settings.replace(Evaluate(), data="phantom", image_size=16, held_out=0.2)
  sites = [
    set(scored_images.of_trial(synthetic, phantom.LABEL_NAMES, "", i).columns["site"])
    for i in SITES
  ]
  assert sites == [{0}, {1}, {2}]
  with pytest.raises(ValueError, match=r"num_sites=4, and .* is of 3 sites; set --num_sites=3"):
    scored_images.of_trial(settings.replace(synthetic, num_sites=4), phantom.LABEL_NAMES, "", 0)
  crowded = dataclasses.replace(parts[0], groups=np.zeros(len(parts[0]), int))
  few = settings.replace(config, most_images=2)
  with pytest.raises(ValueError, match="most_images=2: this site has more images to score"):
    evaluating.check(few, None, crowded)
  with pytest.raises(ValueError, match="this site has no test images to score"):
    evaluating.check(config, None, scored_images.take(parts[0], np.zeros(0, int)))


def test_a_trial_without_images_named_takes_those_of_the_run_s_own_report(tmp_path):
  settings.save(TINY, tmp_path / "config.json")
  at = phantom.LABEL_NAMES, str(tmp_path)
  parts = [np.asarray(scored_images.of_trial(Evaluate(), *at, i).images) for i in SITES]
  want = inputs.tested_images(TINY).images
  np.testing.assert_array_equal(np.concatenate(parts), want)
  assert scored_images.sites_of(str(tmp_path)) == 3
  scored_images.check_sources(Evaluate(), str(tmp_path))
  own = settings.replace(TINY, site_data="npz:a,npz:b,npz:c")
  settings.save(own, tmp_path / "config.json")
  two = settings.replace(Evaluate(), num_sites=2, secagg_colluding=0)
  with pytest.raises(ValueError, match=r"num_sites=2, and the run in .* was of 3 sites"):
    scored_images.check_sources(two, str(tmp_path))
  with pytest.raises(ValueError, match=r"run_dir=.*\.pt has no test images of its own"):
    scored_images.sites_of(str(tmp_path / "a.pt"))
