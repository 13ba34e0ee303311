"""What the coordinator offers the sites: the configuration that their operators approve."""

from __future__ import annotations

import dataclasses
import os
import shlex

from absl import flags

from primia_jax import approval
from primia_jax.secagg import pinning, roster

from . import approving, presets, refusals, settings, site_folders
from .configs import Train
from .site_folders import COORDINATOR, Limits, Own

CONFIG = "config.json"  # in the coordinator's folder
_PLACEHOLDER = "of-each-site"  # for the path of its images


@dataclasses.dataclass(frozen=True)
class Offer:
  """What is to be trained; with offer."""

  settings: str = settings.setting(
    "",
    "flags of primia-train in quotes, such as '--label_names=normal,bacterial,viral --rounds=20'; "
    "where images are is each site's own affair, and left out",
  )


def offer(site_dir: str, s: Offer) -> None:
  """Writes the configuration into the coordinator's folder.

  Raises:
    ValueError, FileNotFoundError: it cannot be trained, the folder is a site's, or no roster was
      made.
  """
  folder = site_folders.find(site_dir)
  if site_folders.read(folder).role != COORDINATOR:
    raise ValueError(f"site_dir={site_dir} is the folder of a site; the coordinator offers")
  if not s.settings:
    raise ValueError("settings is empty; name at least the classes, --settings='--label_names=...'")
  num_sites = len(pinning.held(folder).sites)
  config = configuration(s.settings, num_sites)
  if config.hospitals.num_sites != num_sites:
    raise ValueError(
      f"num_sites={config.hospitals.num_sites} in settings, and the roster has {num_sites} sites; "
      "leave it out"
    )
  approving.label_names(config)
  approving.check(config, Limits())
  offered = approving.offered(config)
  path = folder / CONFIG
  settings.save(config, path, "train_federated")
  os.chmod(path, 0o600)
  digest = approval.digest(offered)
  site_folders.note(folder, "offer", digest=digest.hex())
  print(
    f"wrote {path}: {offered.model}, {config.training.rounds} rounds, dp={config.privacy.dp}, for "
    f"{num_sites} sites, each with images of its own"
  )
  print(f"send it to all; who approves it with this code gets the digest {roster.spoken(digest)}")


def configuration(text: str, num_sites: int) -> Train:
  """The configuration that flags of `train_federated` make.

  Args:
    text: the flags.
    num_sites: unless the flags say another number.

  Raises:
    ValueError: naming the flag, its value and the cure.
  """
  values = flags.FlagValues()
  settings.define_flags(Train, values)
  presets.define_flag(values)
  try:
    words = shlex.split(text)
  except ValueError as error:
    raise ValueError(f"settings={text!r}: {error}; close the quotes") from error
  refusals.parse(presets.expanded(["settings", *words], values), values)
  of_sites = approving.names_of_shared()
  given = {name: values[name].value for name in of_sites if values[name].present}
  data = str(values["data"].value) if values["data"].present else "folder:"
  own = Own(f"{data.partition(':')[0]}:{_PLACEHOLDER}")
  return approving.apart({"placement": "flower", "num_sites": num_sites} | given, own)
