"""Trains a network at several hospitals together.

Images stay at their hospital, and the server sees only sums of updates, by default:

  primia-train --run_dir=runs/first
  primia-train --preset=chest_xray --data=folder:PATH --run_dir=runs/chest

This process simulates the server and all hospitals. With --placement=flower each hospital has a
process and a folder of its own, and Flower carries their messages over TLS: a trial on this
machine, or with --site=N this hospital alone, as docs/flower.md says for hospitals apart. With
--site_data each process opens the images of its own hospital only; without it, each opens all of
--data and takes its share. --aggregation=clear and the robust rules show every update to the
server.

A hospital whose folder primia-site has made needs one other flag, the folder in which its SuperNode
reaches it: it trains what its operator has approved, on its own images and within its own limits,
and refuses anything else.

  primia-train --run_dir=/srv/primia/a --channel_dir=/srv/primia/a-channel

The defaults are made for the phantom; for images of your own start from a --preset.

The run folder holds report.md (federated beside pooled and local training, where these are
trained), metrics.json, pictures, the model, and one JSON line a round. An interrupted run resumes
when it is started again with the same --run_dir.
"""

import sys
from typing import Any

import jax
from absl import flags

from . import (
  admission,
  folders,
  inputs,
  presets,
  processes,
  report,
  running,
  settings,
  site_log,
  trial,
)
from .configs import Train, rehearse
from .seating import NAMES, Seating

settings.define_flags(Train)
presets.define_flag()
flags.DEFINE_string(
  "run_dir", None, "folder of the run: a new one, or that of an interrupted run", required=True
)
flags.DEFINE_list(
  "baselines",
  ["auto"],
  "what to train for comparison: pooled (all images in one place), local (each site alone); empty "
  "for neither; auto takes both, but none with dp, whose budget they would spend on the same "
  "images, or with placement=flower",
)
flags.DEFINE_boolean("tensorboard", False, "also write TensorBoard event files to the run folder")
settings.define_flags(Seating)
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def main() -> None:
  site_log.keep(FLAGS.run_dir)
  site = admission.of(FLAGS.run_dir)
  if site is None:
    config, number = settings.from_flags(Train), FLAGS.site
  else:
    config = admission.configured(site, _given())
    number = admission.number(site, FLAGS.site if FLAGS["site"].present else None)
  num_sites = config.hospitals.num_sites
  if num_sites < 2:
    raise ValueError(f"num_sites={num_sites}: one site is not a federation; use primia-pooled")
  baselines = running.baselines(FLAGS.baselines, config)
  in_processes = config.in_processes
  seating = settings.from_flags(Seating)
  given = [name for name in NAMES if FLAGS[name].present]
  is_site = site is not None or "site" in given
  seating.check(given, config.federation.placement, number, num_sites, is_site)
  seating.check_channel(None if site is None else site.folder)
  if in_processes and number < 0:
    jax.config.update("jax_platforms", "cpu")  # leaves the accelerator to the processes
    rehearse(config)
    inputs.check_sources(config)
    trial.check_installed(seating.flower_simulation)
    folder = running.open_run(config, FLAGS.run_dir)
    own = processes.sites_folder(folder, seating.sites_dir)
    of_run = f"{__package__}.train_federated", sys.argv[1:], num_sites, folder, own
    trial.launch(*of_run, seating.stage_timeout, is_simulated=seating.flower_simulation)
    print(f"each site's report: {own / 'site_N' / processes.RUN / 'report.md'}")
    return
  seat, run_dir = None, FLAGS.run_dir
  if not in_processes:
    running.prepare_devices(config.federation.placement)
  if site is None:
    rehearse(config)
  else:
    admission.admit(site, config)
  inputs.check_sources(config, number if in_processes else None)
  if in_processes:
    own = folders.role("run_dir", FLAGS.run_dir)
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    processes.check_own(own)
    run_dir = str(own / processes.RUN if site is None else site.run)
    seat = processes.Seat(number, seating.patience, own, site, seating.channel)
  folder = running.open_run(config, run_dir)
  log = running.tensorboard(folder) if FLAGS.tensorboard else lambda row: None
  result = running.run(config, folder, federated=True, baselines=baselines, log=log, seat=seat)
  report.print_summary(result, folder)


def _given() -> dict[str, Any]:
  """The settings on the command line, by name."""
  return {name: FLAGS[name].value for name in settings.flat(Train()) if FLAGS[name].present}


if __name__ == "__main__":
  running.start(main)
