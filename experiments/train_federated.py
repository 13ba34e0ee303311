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

A hospital whose folder primia-site has made needs no other flag: it trains what its operator has
approved, on its own images and within its own limits, and refuses anything else.

  primia-train --run_dir=/srv/primia/a

The defaults are made for the phantom; for images of your own start from a --preset.

The run folder holds report.md (federated beside pooled and local training, where these are
trained), metrics.json, pictures, the model, and one JSON line a round. An interrupted run resumes
when it is started again with the same --run_dir.
"""

import pathlib
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
  refusals,
  report,
  running,
  settings,
  trial,
)
from .configs import Train, rehearse

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
flags.DEFINE_integer(
  "site",
  -1,
  "placement=flower: number of this hospital's site, from 0: runs it alone, and --run_dir is its "
  "own folder, which its SuperNode names, too; -1 starts a trial of all on this machine, or takes "
  "the number in a folder that primia-site has made",
)
flags.DEFINE_float(
  "stage_timeout",
  600.0,
  "placement=flower: seconds that the coordinator waits for a site before it counts as lost; its "
  "training must fit in",
)
flags.DEFINE_string(
  "sites_dir",
  "",
  "placement=flower: where in a trial each site has a folder of its own, site_N, which no other "
  "user can read; empty is RUN_DIR.sites",
)
flags.DEFINE_string(
  "channel_dir",
  "",
  "placement=flower with site: an existing folder for the socket by which the SuperNode reaches "
  "this program, where the SuperNode is another user's: of mode 0750, for a group that only that "
  "user is in. Name it as the SuperNode's site-folder; empty is the run_dir",
)
FLAGS = flags.FLAGS
_PATIENCE = 2.0  # a site waits for longer than the coordinator waits for the others
flags.adopt_module_key_flags(settings)


def main() -> None:
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
  for name in ("site", "stage_timeout", "sites_dir", "channel_dir"):
    if FLAGS[name].present and not in_processes:
      raise ValueError(
        f"{name}={FLAGS[name].value} belongs to placement=flower, not {config.federation.placement}"
      )
  if (site or FLAGS["site"].present) and not 0 <= number < num_sites:
    raise ValueError(f"site={number}; use 0 to {num_sites - 1}, the number of this hospital's site")
  if not 0 < FLAGS.stage_timeout < float("inf"):
    raise ValueError(f"stage_timeout={FLAGS.stage_timeout} must be a positive number of seconds")
  if FLAGS.sites_dir:
    refusals.folder("sites_dir", FLAGS.sites_dir)
  if FLAGS.channel_dir and not pathlib.Path(FLAGS.channel_dir).expanduser().is_dir():
    raise ValueError(f"channel_dir={FLAGS.channel_dir}: there is no such folder; make it first")
  if FLAGS.channel_dir and number < 0:
    raise ValueError(
      f"channel_dir={FLAGS.channel_dir}: a trial has a channel in each site's folder; leave it "
      "out, or give --site"
    )
  if in_processes and number < 0:
    jax.config.update("jax_platforms", "cpu")  # leaves the accelerator to the processes
    rehearse(config)
    inputs.check_sources(config)
    trial.check_installed()
    folder = running.open_run(config, FLAGS.run_dir)
    own = processes.sites_folder(folder, FLAGS.sites_dir)
    module, arguments = f"{__package__}.train_federated", sys.argv[1:]
    trial.launch(module, arguments, num_sites, folder, own, FLAGS.stage_timeout)
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
    through = pathlib.Path(FLAGS.channel_dir).expanduser() if FLAGS.channel_dir else None
    seat = processes.Seat(number, _PATIENCE * FLAGS.stage_timeout, own, site, through)
  folder = running.open_run(config, run_dir)
  log = running.tensorboard(folder) if FLAGS.tensorboard else lambda row: None
  result = running.run(config, folder, federated=True, baselines=baselines, log=log, seat=seat)
  report.print_summary(result, folder)


def _given() -> dict[str, Any]:
  """The settings on the command line, by name."""
  return {name: FLAGS[name].value for name in settings.flat(Train()) if FLAGS[name].present}


if __name__ == "__main__":
  running.start(main)
