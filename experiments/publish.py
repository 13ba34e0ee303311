"""Model owner: publishes a model for encrypted inference by clinics.

  primia-publish --folder=vendor --model=chest-1 --checkpoint=runs/first

The first call calibrates, plans, and puts the plan and a tag into vendor/outbox/dealer. Copy what
is there into the dealer's inbox/model_owner, and the dealer's outbox/model_owner into your
inbox/dealer. The same call again then masks the weights and fills vendor/outbox/clinics, which goes
into the inbox/model_owner of every clinic.

A new name is a new publication with new keys: --rotate=OLD publishes the weights of an old one
again, for new keys or another dealer. --check_dealer=CLINIC draws inferences that the dealer must
open, and checks its answer when called again.

With --client=sharing clinics only share their images between this model owner and a helper. The
publication then goes to the helper (vendor/outbox/helper), and the dealer deals for it. Clinics get
vendor/outbox/cards/NAME.json, which tells them both servers' addresses and certificates.

--discard is for a folder that was put back from a snapshot or backup: it destroys all correlations
in it, since some of them were used. Publish anew afterwards.

--score=confusion publishes a score on a hospital's labelled images, of which only the sum is opened
(primia-score --connect).
"""

import dataclasses
import datetime

import numpy as np
from absl import flags

from primia_jax.mpc.circuit import CHECKED, CLIENTS, SHARING, TRUSTED
from primia_jax.service import certificates, folders, inbox, publications, scores, supply
from primia_jax.service.publications import About

from . import encrypted, model_files, running, scored, settings
from .folders import alone, certified, host_and_port, role_folder
from .planned import Planned


@dataclasses.dataclass(frozen=True)
class Publish:
  """Where, and under which name."""

  folder: str = settings.setting("", "the model owner's own folder, of mode 0700")
  model: str = settings.setting("", "name of the publication: letters a to z, digits and hyphens")
  version: str = settings.setting(
    "", "the model's version, for its users; empty takes today's date"
  )
  intended_use: str = settings.setting(
    About.intended_use, "what the model is for, as clinics are told with each answer"
  )
  client: str = settings.setting(
    TRUSTED,
    "what clinics may be: trusted (each follows the protocol), checked (one that deviates is "
    "refused before it learns anything; tables in a ring of up to 32 bits, and more is dealt), or "
    "sharing (each only shares its images between this model owner and a helper)",
  )
  address: str = settings.setting(
    "", "sharing: HOST:PORT at which clinics reach this model owner's server"
  )
  helper_address: str = settings.setting(
    "", "sharing: HOST:PORT at which clinics reach the helper's server"
  )
  score: str = settings.setting(
    "",
    "publish a score on a hospital's labelled images instead of answers: confusion (the matrix of "
    "counts) or roc (counts at --bins thresholds of the probability of --positive)",
  )
  opened_to: str = settings.setting(
    scores.HOSPITAL,
    "score: who learns the result: hospital, vendor or both; the hospital must name the same",
  )
  positive: str = settings.setting("", "score=roc: the class whose probability is compared")
  bins: int = settings.setting(20, "score=roc: thresholds between 0 and 1, 1 to 100")
  rotate: str = settings.setting(
    "", "publish the weights and plan of this publication under a new name, with new keys"
  )
  discard: bool = settings.setting(
    False,
    "the folder was put back to an earlier state: destroy all correlations in it, of every model",
  )
  check_dealer: str = settings.setting(
    "", "name of a clinic: have the dealer account for a share of what it dealt to it"
  )
  check_share: float = settings.setting(
    0.5, "share of the inferences held back for the clinic that the dealer must open"
  )


settings.define_flags(Publish)
settings.define_flags(Planned)
flags.adopt_module_key_flags(settings)


def main() -> None:
  s, protocol = settings.from_flags(Publish), settings.from_flags(Planned)
  folder = role_folder(s.folder)
  if s.discard:
    _discard(s, folder)
    return
  place = publications.model_folder(folder, s.model)
  inbox.collect(folder, inbox.MODEL_OWNER)
  certified(s.folder)
  if s.check_dealer:
    certificates.check_name(s.check_dealer, "check_dealer")
    if not 0 < s.check_share < 1:
      raise ValueError(f"check_share={s.check_share}; use more than 0 and less than 1")
  if s.rotate and protocol.checkpoint:
    raise ValueError(f"rotate={s.rotate} with checkpoint={protocol.checkpoint}: use one of them")
  if s.rotate and not publications.model_folder(folder, s.rotate).is_dir():
    raise FileNotFoundError(f"rotate={s.rotate}: folder={s.folder} holds no such publication")
  settings.choose("client", s.client, CLIENTS)
  if s.client == CHECKED and (protocol.ring_bits > 32 or protocol.comparison != "tables"):
    raise ValueError(
      f"client={CHECKED} with ring_bits={protocol.ring_bits} and comparison={protocol.comparison}: "
      "tags need a ring of at most 32 bits and comparison=tables"
    )
  given = [f"{k}={getattr(s, k)}" for k in ("address", "helper_address") if getattr(s, k)]
  if given and s.client != SHARING:
    raise ValueError(f"{given[0]} with client={s.client}: it is for --client={SHARING} only")
  if s.score:
    _check_score(s)
    if not flags.FLAGS["batch"].present:
      protocol = dataclasses.replace(protocol, batch=scored.Score.batch)
  is_new = not place.exists()
  if s.client == SHARING and (given or not (is_new or s.check_dealer)):
    for name in ("address", "helper_address"):
      host_and_port(name, getattr(s, name))
    if s.address == s.helper_address:
      raise ValueError(f"helper_address={s.address} is the model owner's own; name the helper's")
  if (
    not is_new
    and not s.check_dealer
    and publications.is_shared(folder, s.model) != (s.client == SHARING)
  ):
    raise ValueError(f"client={s.client}: {s.model} was begun with another one; give it the same")
  if is_new and not s.rotate:
    encrypted.check_planned(protocol)
  with alone(folder / "lock"):
    if s.check_dealer:
      _check(s, folder)
    elif is_new:
      _begin(s, protocol, folder)
    else:
      _finish(s, folder)


def _discard(s: Publish, folder) -> None:
  if s.model:
    raise ValueError(f"discard with model={s.model}: it is about every model; leave model out")
  inbox.collect(folder, inbox.MODEL_OWNER)
  count = folders.discard(folder)
  print(
    f"{count} unused inferences are destroyed. Publish each model anew (primia-publish --folder="
    f"{s.folder} --model=NEW --rotate=OLD), and remove models/OLD. Queries since this state are "
    "forgotten, too: lower --total_images by them."
  )


def _check_score(s: Publish) -> None:
  settings.choose("score", s.score, ("confusion", "roc"))
  settings.choose("opened_to", s.opened_to, scores.RECEIVERS)
  settings.require(1 <= s.bins <= 100, "bins", s.bins, "must be 1 to 100")
  if bool(s.positive) != (s.score == "roc"):
    raise ValueError(
      f"positive={s.positive!r} with score={s.score}: name a class with score=roc, and only there"
    )
  if s.rotate:
    raise ValueError(f"score={s.score} with rotate={s.rotate}: the old publication says what it is")
  if s.client != TRUSTED:
    raise ValueError(
      f"score={s.score} with client={s.client}: a hospital's labels are its word, so nothing would "
      "hold what the other kinds of clients promise; leave client out"
    )


def _begin(s: Publish, protocol: Planned, folder) -> None:
  version = s.version or datetime.date.today().isoformat()
  if s.rotate:
    about, plan, leaves = publications.copy_of(folder, s.rotate)
    about = dataclasses.replace(about, version=s.version or about.version)
  else:
    load = encrypted.load_model if s.score or s.client != TRUSTED else encrypted.load_any
    model, weights, label_names, config = load(protocol.checkpoint, protocol.classes)
    calibration, source = encrypted.calibration_images(protocol, config, label_names)
    print(f"Calibrating on {source} and choosing the ring ...", flush=True)
    if s.score:
      opened = scored.Score(opened=s.score, positive=s.positive, bins=s.bins)
      score, rows, columns = scored.function(opened, model, label_names)
      task = scored.Task(score, np.zeros(0, int), rows, columns)
      plan = scored.make_plan(protocol, task, model, weights, calibration)
    else:
      plan = encrypted.make_plan(protocol, model, weights, calibration, s.client)
    leaves = publications.leaves(weights)
    size, _, channels = config.image_shape
    about = About(
      version, size, channels, label_names, s.score or protocol.output, protocol.batch,
      protocol.grey_bits or model_files.grey_bits(protocol.checkpoint),
      model_files.ct_window(protocol.checkpoint), s.intended_use,
      s.opened_to if s.score else "", s.positive, s.bins if s.positive else 0,
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
  if s.client == SHARING:
    publications.helper_of(folder)
  publications.finish(folder, s.model)
  if s.client == SHARING:
    addresses = s.address, s.helper_address
    card = publications.issue(folder, s.model, addresses, *encrypted.ENCODER)
    print(
      f"{s.model} {'was published before' if was else 'is published'}.\n"
      f"Copy {folder}/outbox/helper/ into the helper's inbox/model_owner/.\nGive clinics {card}.\n"
      f"Serve: primia-serve --folder={folder}\n"
      f"The helper serves: primia-serve --folder=HELPER --model_owner={s.address}"
    )
    return
  print(
    f"{s.model} {'was published before' if was else 'is published'}. Copy {folder}/outbox/clinics/ "
    f"into\nthe inbox/model_owner/ of every clinic, and serve: primia-serve --folder={s.folder}"
  )


def _check(s: Publish, folder) -> None:
  if not supply.is_answered(folder, s.model, s.check_dealer):
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
