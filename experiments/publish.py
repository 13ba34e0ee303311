"""Model owner: publishes a model for encrypted inference by clinics.

  primia-publish --folder=vendor --model=chest-1 --checkpoint=runs/first

The first call calibrates, plans, and puts the plan and a tag into vendor/outbox/dealer. Copy what
is there into the dealer's inbox/model_owner, and the dealer's outbox/model_owner into your
inbox/dealer. The same call again then masks the weights and fills vendor/outbox/clinics, which goes
into the inbox/model_owner of every clinic.

A new name is a new publication with new keys: --rotate=OLD publishes the weights of an old one
again, for new keys or another dealer. --check_dealer=CLINIC draws inferences that the dealer must
open, and checks its answer when called again.
"""

import dataclasses
import datetime

from absl import flags

from primia_jax.mpc.circuit import CHECKED, TRUSTED
from primia_jax.service import certificates, inbox, publications, supply
from primia_jax.service.publications import About

from . import encrypted, model_files, running, settings
from .folders import alone, role_folder


@dataclasses.dataclass(frozen=True)
class Publish:
  """Where, and under which name."""

  folder: str = settings.setting("", "the model owner's own folder, of mode 0700")
  model: str = settings.setting("", "name of the publication: letters a to z, digits and hyphens")
  version: str = settings.setting("", "of the model, for its users; empty takes today's date")
  intended_use: str = settings.setting(
    About.intended_use, "what the model is for, as clinics are told with each answer"
  )
  client: str = settings.setting(
    TRUSTED,
    "what clinics may be: trusted (each follows the protocol), or checked (one that deviates is "
    "refused before it learns anything; tables in a ring of up to 32 bits, and more is dealt)",
  )
  rotate: str = settings.setting(
    "", "publish the weights and plan of this publication under a new name, with new keys"
  )
  check_dealer: str = settings.setting(
    "", "name of a clinic: have the dealer account for a share of what it dealt to it"
  )
  check_share: float = settings.setting(
    0.5, "share of the clinic's unused inferences that the dealer must open"
  )


settings.define_flags(Publish)
settings.define_flags(encrypted.Planned)
flags.adopt_module_key_flags(settings)


def main() -> None:
  s, protocol = settings.from_flags(Publish), settings.from_flags(encrypted.Planned)
  folder = role_folder(s.folder)
  place = publications.model_folder(folder, s.model)
  inbox.collect(folder, inbox.MODEL_OWNER)
  if not (folder / certificates.CERTIFICATE).is_file():
    raise FileNotFoundError(
      f"folder={s.folder} holds no certificate; make one: primia-certificate --folder={s.folder} "
      "--name=NAME"
    )
  if s.check_dealer:
    certificates.check_name(s.check_dealer, "check_dealer")
    if not 0 < s.check_share < 1:
      raise ValueError(f"check_share={s.check_share}; use more than 0 and less than 1")
  if s.rotate and protocol.checkpoint:
    raise ValueError(f"rotate={s.rotate} with checkpoint={protocol.checkpoint}: use one of them")
  if s.rotate and not publications.model_folder(folder, s.rotate).is_dir():
    raise FileNotFoundError(f"rotate={s.rotate}: folder={s.folder} holds no such publication")
  settings.choose("client", s.client, (TRUSTED, CHECKED))
  if s.client == CHECKED and (protocol.ring_bits > 32 or protocol.comparison != "tables"):
    raise ValueError(
      f"client={CHECKED} with ring_bits={protocol.ring_bits} and comparison={protocol.comparison}: "
      "tags need a ring of at most 32 bits and comparison=tables"
    )
  is_new = not place.exists()
  if is_new and not s.rotate:
    encrypted.check_planned(protocol)
  with alone(folder / "lock"):
    if s.check_dealer:
      _check(s, folder)
    elif is_new:
      _begin(s, protocol, folder)
    else:
      _finish(s, folder)


def _begin(s: Publish, protocol: encrypted.Planned, folder) -> None:
  version = s.version or datetime.date.today().isoformat()
  if s.rotate:
    about, plan, leaves = publications.copy_of(folder, s.rotate)
    about = dataclasses.replace(about, version=s.version or about.version)
  else:
    model, weights, label_names, config = encrypted.load_model(
      protocol.checkpoint, protocol.classes
    )
    calibration, source = encrypted.calibration_images(protocol, config, label_names)
    print(f"Calibrating on {source} and choosing the ring ...", flush=True)
    plan = encrypted.make_plan(protocol, model, weights, calibration, s.client)
    leaves = publications.leaves(weights)
    size, _, channels = config.image_shape
    about = About(
      version, size, channels, label_names, protocol.output, protocol.batch,
      protocol.grey_bits or model_files.grey_bits(protocol.checkpoint),
      model_files.ct_window(protocol.checkpoint), s.intended_use,
    )  # fmt: skip
    print(f"\nThe plan, which clinics and the dealer see:\n\n{plan}\n")
  outbox = publications.begin(folder, s.model, about, plan, leaves)
  print(
    f"{outbox} holds plan and tag for the dealer.\nCopy {folder}/outbox/dealer/ into the dealer's "
    f"inbox/model_owner/, its outbox/model_owner/ into\n"
    f"{folder}/inbox/dealer/, and call this again."
  )


def _finish(s: Publish, folder) -> None:
  was = publications.is_published(folder, s.model)
  publications.finish(folder, s.model)
  print(
    f"{s.model} {'was published before' if was else 'is published'}. Copy {folder}/outbox/clinics/ "
    f"into\nthe inbox/model_owner/ of every clinic, and serve: primia-serve --folder={s.folder}"
  )


def _check(s: Publish, folder) -> None:
  place = publications.model_folder(folder, s.model) / s.check_dealer
  if not (place / supply.OPENINGS).exists():
    count = supply.challenge(folder, s.model, s.check_dealer, s.check_share)
    print(
      f"{count} inferences of {s.check_dealer} are to be opened; this side's part of them is "
      f"destroyed.\nCopy {folder}/outbox/dealer/ into the dealer's inbox/model_owner/, its answer "
      "back, and call this again."
    )
    return
  kept = publications.kept(folder, s.model)
  count = supply.check(folder, s.model, s.check_dealer, kept.recomputed)
  print(f"The dealer accounts for all {count} inferences that it opened; the others may be used.")


if __name__ == "__main__":
  running.start(main, keeps_small=True)
