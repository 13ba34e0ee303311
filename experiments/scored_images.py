"""Which images a hospital scores in an evaluation by several of them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from primia_jax.data import overlaps, partition, scan
from primia_jax.data.dataset import Dataset, take

from . import folders, inputs, markdown
from .configs.data import Data
from .configs.scoring import Evaluate


def of_source(config: Evaluate, classes: tuple[str, ...]) -> Dataset:
  """The images of one source that are scored: its test split; where it has none, those that
  training held out, or with `held_out=0` all.

  Args:
    config: whose data name the source.
    classes: of the model, whose labels the images get, by name.

  Raises:
    ValueError, FileNotFoundError: the source is wrong, or has a class that the model lacks.
  """
  data, fraction = config.data, config.scoring.held_out
  fraction = 0.0 if data.data == "phantom" else fraction  # it has test images
  splits = inputs.listed(data, classes) if fraction else {}
  if "test" in splits or not fraction:
    return inputs.images_to_test(data, config.seed, classes)[0]
  whole = "train" if "train" in splits else "all"  # as training takes them
  if whole not in splits:
    raise ValueError(
      f"held_out={fraction}: {data.data} has only the splits {sorted(splits)}; use held_out=0"
    )
  read = scan.read({whole: splits[whole]}, skip_bad_files=data.skip_bad_files)[whole]
  _, held = partition.hold_out(overlaps.tied(read), fraction, config.seed)
  return take(read, held)


def of_trial(config: Evaluate, classes: tuple[str, ...], run_dir: str, number: int) -> Dataset:
  """A site's images in a trial: of a source of its own; else its part of the source that all share,
  or of the images on which the run's own report tests, where none are named.

  Args:
    config: of the trial.
    classes: of the model.
    run_dir: the run of the model.
    number: of the site.

  Raises:
    ValueError, FileNotFoundError: a source is wrong, or cannot be dealt.
  """
  if config.data.sources:
    data = config.data.of(config.data.sources[number])
    return of_source(dataclasses.replace(config, data=data), classes)
  seed, num_sites = config.seed, config.scoring.num_sites
  if config.data.data:
    whole = of_source(config, classes)
  else:
    run = folders.settings_of(run_dir)
    if run.data.site_data:
      return inputs.site_images(run, number).test
    whole = inputs.tested_images(run)
  return take(whole, dealt(whole, num_sites, seed)[number])


def dealt(dataset: Dataset, num_sites: int, seed: int) -> Sequence[np.ndarray]:
  """The rows of each site, of images from one source: those of the source's own sites, or equal
  shares in which patients stay together.

  Raises:
    ValueError: the source names another number of sites, or has fewer patients than sites.
  """
  if "site" not in dataset.columns:
    return partition.iid(overlaps.tied(dataset), num_sites, seed)
  # A patient may have been at several sites.
  alone = dataclasses.replace(dataset, groups=np.arange(len(dataset)))
  rows = partition.by_column(alone, "site")
  if len(rows) != num_sites:
    raise ValueError(
      f"num_sites={num_sites}, and {dataset.name} is of {len(rows)} sites; set "
      f"--num_sites={len(rows)}"
    )
  return rows


def sites_of(run_dir: str) -> int:
  """How many sites a run had.

  Raises:
    ValueError: it is no run whose images can be found.
  """
  if not pathlib.Path(run_dir).expanduser().is_dir():
    raise ValueError(
      f"run_dir={run_dir} has no test images of its own; name the images with --data or --site_data"
    )
  return folders.settings_of(run_dir).hospitals.num_sites


def check_sources(config: Evaluate, run_dir: str) -> None:
  """Refuses sources that are not there, and reads none.

  Raises:
    ValueError, FileNotFoundError: naming the source; or the run had another number of sites.
  """
  if config.data.data or config.data.sources:
    for one in config.data.sources or (config.data.data,):
      inputs.source(config.data.of(one))
    return
  run = folders.settings_of(run_dir)
  if run.data.site_data and config.scoring.num_sites != run.hospitals.num_sites:
    raise ValueError(
      f"num_sites={config.scoring.num_sites}, and the run in {run_dir} was of "
      f"{run.hospitals.num_sites} sites; leave num_sites out"
    )
  inputs.check_sources(run)


def trained_on(run_dir: str, data: Data) -> dict[str, str]:
  """A warning for a report, if the images of a source include those that the run was trained on."""
  try:
    run = folders.settings_of(run_dir)
    sources = [run.data.of(one) for one in run.data.sources]
    same = inputs.source(data) in map(inputs.source, sources or [run.data])
  except (FileNotFoundError, ValueError):  # the run's own images may be elsewhere by now
    return {}
  why = "the source has no test split, and the run was trained on images of it; leave --data out"
  return {markdown.TRAINED_ON: f"{why} to test on those that it held out"} if same else {}


def warnings(
  config: Evaluate, classes: tuple[str, ...], run_dir: str, number: int
) -> dict[str, str]:
  """The same of the images of `of_trial`, whose arguments it takes."""
  sources = config.data.sources
  data = config.data.of(sources[number]) if sources else config.data
  if data.data in ("", "phantom") or config.scoring.held_out:
    return {}
  return {} if "test" in inputs.listed(data, classes) else trained_on(run_dir, data)
