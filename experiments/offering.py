"""What the coordinator offers the sites: the configuration that their operators approve."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

from absl import flags

from primia_jax import approval
from primia_jax.secagg import pinning, roster

from . import approving, evaluations, presets, refusals, settings, site_folders
from .configs import Train
from .evaluations import NO_MODEL, Finished
from .site_folders import COORDINATOR, Limits, Own

CONFIG = "config.json"  # in the coordinator's folder
_NOBODYS = Limits(fewest_patients=0, fewest_colluding=0)  # each site has limits of its own


@dataclasses.dataclass(frozen=True)
class Offer:
  """What is to be trained or scored; with offer."""

  settings: str = settings.setting(
    "",
    "flags of primia-train, or with model of primia-evaluate, in quotes, such as "
    "'--label_names=normal,bacterial,viral --rounds=20'; where images are is each site's own "
    "affair, and left out",
  )


def offer(site_dir: str, s: Offer, finished: Finished = NO_MODEL) -> None:
  """Writes the configuration into the coordinator's folder.

  Raises:
    ValueError, FileNotFoundError: it cannot be trained, the folder is a site's, or no roster was
      made.
  """
  folder = site_folders.find(site_dir)
  if site_folders.read(folder).role != COORDINATOR:
    raise ValueError(f"site_dir={site_dir} is the folder of a site; the coordinator offers")
  num_sites = len(pinning.held(folder).sites)
  if finished.model:
    _offer_evaluation(folder, s.settings, finished.model, num_sites)
    return
  if not s.settings:
    raise ValueError("settings is empty; name at least the classes, --settings='--label_names=...'")
  config = configuration(s.settings, num_sites)
  if config.hospitals.num_sites != num_sites:
    raise ValueError(
      f"num_sites={config.hospitals.num_sites} in settings, and the roster has {num_sites} sites; "
      "leave it out"
    )
  approving.label_names(config)
  approving.check(config, _NOBODYS)
  offered = approving.offered(config)
  digest = _write(folder, config, "train_federated", offered)
  print(
    f"wrote {folder / CONFIG}: {offered.model}, {config.training.rounds} rounds, "
    f"dp={config.privacy.dp}, for {num_sites} sites, each with images of its own"
  )
  print(f"send it to all; who approves it with this code gets the digest {digest}")


def _offer_evaluation(folder: pathlib.Path, text: str, path: str, num_sites: int) -> None:
  model = evaluations.load(path)
  config = evaluations.configuration(text, model, path, num_sites)
  evaluations.check(config, _NOBODYS)
  digest = _write(folder, config, evaluations.PROGRAM, evaluations.offered(config, model))
  print(
    f"wrote {folder / CONFIG}: {model.config.name}, model {model.sha256[:12]}, scored by "
    f"{num_sites} sites, each on images of its own"
  )
  print(f"send it to all, with the model; who approves it gets the digest {digest}")


def _write(folder: pathlib.Path, config: Any, program: str, offered: approval.Approval) -> str:
  """Writes and notes an offer; returns its digest, as people read it out."""
  path = folder / CONFIG
  settings.save(config, path, program)
  os.chmod(path, 0o600)
  digest = approval.digest(offered)
  site_folders.note(folder, "offer", digest=digest.hex())
  return roster.spoken(digest)


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
  words = refusals.words("settings", text)
  refusals.parse(presets.expanded(["settings", *words], values), values)
  of_sites = approving.names_of_shared()
  given = {name: values[name].value for name in of_sites if values[name].present}
  data = str(values["data"].value) if values["data"].present else "folder:"
  own = Own(f"{data.partition(':')[0]}:{evaluations.PLACEHOLDER}")
  return approving.multiprocess({"placement": "flower", "num_sites": num_sites} | given, own)
