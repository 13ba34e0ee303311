"""Trains a network at several hospitals together.

Images stay at their hospital, and the server sees only sums of updates, by default:

  primia-train --run_dir=runs/first
  primia-train --preset=chest_xray --data=folder:PATH --run_dir=runs/chest

This process simulates the server and all hospitals. With --placement=processes each hospital has a
process of its own: a trial on one machine, since models and sums are not encrypted on their way.
With --site_data each process opens the images of its own hospital only; without it, each opens all
of --data and takes its share. --aggregation=clear and the robust rules show every update to the
server.

The defaults are made for the phantom; for images of your own start from a --preset.

The run folder holds report.md (federated beside pooled and local training, where these are
trained), metrics.json, pictures, the model, and one JSON line a round. An interrupted run resumes
when it is started again with the same --run_dir.
"""

import sys

import jax
from absl import flags

from . import inputs, presets, processes, refusals, report, running, settings
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
  "images, or with placement=processes",
)
flags.DEFINE_boolean("tensorboard", False, "also write TensorBoard event files to the run folder")
flags.DEFINE_string(
  "coordinator",
  "",
  "placement=processes: HOST:PORT where process 0, which hosts the server, listens. Give it with "
  "process_id to start one process; empty starts all of them on this machine",
)
flags.DEFINE_integer(
  "process_id", -1, "placement=processes: number of this process's site, with coordinator"
)
flags.DEFINE_float(
  "stage_timeout",
  600.0,
  "placement=processes: seconds that the others wait for a site before it counts as lost; its "
  "training must fit in",
)
flags.DEFINE_string(
  "sites_dir",
  "",
  "placement=processes: where each site has a folder of its own, site_N, which no other user can "
  "read, with its identity, state, ledger and log; empty is RUN_DIR.sites",
)
flags.DEFINE_boolean(
  "network_is_protected",
  False,
  "placement=processes: allow a coordinator that is no loopback address. Models and sums travel in "
  "the clear, so say this only of a network that is encrypted by other means, such as a VPN",
)
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def main() -> None:
  config = settings.from_flags(Train)
  num_sites = config.hospitals.num_sites
  if num_sites < 2:
    raise ValueError(f"num_sites={num_sites}: one site is not a federation; use primia-pooled")
  baselines = running.baselines(FLAGS.baselines, config)
  in_processes = config.in_processes
  for name in (
    "coordinator", "process_id", "stage_timeout", "sites_dir", "network_is_protected"
  ):  # fmt: skip
    if FLAGS[name].present and not in_processes:
      raise ValueError(
        f"{name}={FLAGS[name].value} belongs to placement=processes, not "
        f"{config.federation.placement}"
      )
  if FLAGS["process_id"].present and not FLAGS.coordinator:
    raise ValueError(
      f"process_id={FLAGS.process_id} starts a single process: give --coordinator=HOST:PORT, too"
    )
  if FLAGS.coordinator and not 0 <= FLAGS.process_id < num_sites:
    raise ValueError(
      f"process_id={FLAGS.process_id}; use 0 to {num_sites - 1}, the number of this process's site"
    )
  if FLAGS.coordinator:
    processes.check_address(
      FLAGS.coordinator, FLAGS.process_id, num_sites, FLAGS.network_is_protected
    )
  elif FLAGS.network_is_protected:
    raise ValueError(
      "network_is_protected=True concerns a coordinator on another machine: give --coordinator, too"
    )
  if not 0 < FLAGS.stage_timeout < float("inf"):
    raise ValueError(f"stage_timeout={FLAGS.stage_timeout} must be a positive number of seconds")
  if FLAGS.sites_dir:
    refusals.folder("sites_dir", FLAGS.sites_dir)
  if in_processes and not FLAGS.coordinator:
    jax.config.update("jax_platforms", "cpu")  # leaves the accelerator to the processes
    rehearse(config)
    inputs.check_sources(config)
    folder = running.open_run(config, FLAGS.run_dir)
    own = processes.sites_folder(folder, FLAGS.sites_dir)
    processes.launch(f"{__package__}.train_federated", sys.argv[1:], num_sites, folder, own)
    return
  seat = None
  if not in_processes:
    running.prepare_devices(config.federation.placement)
  rehearse(config)
  inputs.check_sources(config, FLAGS.process_id if in_processes else None)
  folder = running.open_run(config, FLAGS.run_dir)
  if in_processes:
    place = processes.sites_folder(folder, FLAGS.sites_dir)
    own = processes.own_folder(place, FLAGS.process_id)
    seat = processes.Seat(
      FLAGS.process_id, FLAGS.coordinator, FLAGS.stage_timeout, own, FLAGS.network_is_protected
    )
  log = running.tensorboard(folder) if FLAGS.tensorboard else lambda row: None
  result = running.run(config, folder, federated=True, baselines=baselines, log=log, seat=seat)
  if result:
    report.print_summary(result, folder)


if __name__ == "__main__":
  running.start(main)
