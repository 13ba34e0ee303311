"""Folders and servers of a publication whose clinics share their images, for tests."""

import contextlib
import json
import shutil

import service_institution as institution
from service_institution import MODEL, WEIGHTS, place, send

from primia_jax.mpc import multiprocess
from primia_jax.mpc.sharing import MODEL_OWNER
from primia_jax.service import (
  cards,
  certificates,
  folders,
  helped,
  inbox,
  journal,
  publications,
  supply,
)
from primia_jax.service.channel import Limits
from primia_jax.service.institutions import Served
from primia_jax.service.journal import Contract, Journal

CLINIC, HELPER = "hospital-a", "helper-h"
LIMITS = Limits(timeout=20.0)


class World:
  """Folders of all institutions of a publication whose clinics share their images."""

  def __init__(self, root, count):
    names = ("vendor", "helper", "dealer", "clinic", "stranger")
    self.root, self.plan = root, institution.planned("sharing")
    self.vendor, self.helper, self.dealer, self.clinic, self.stranger = (
      folders.make(root / name) for name in names
    )
    for folder, name in (
      (self.vendor, "vendor-b"), (self.helper, HELPER), (self.clinic, CLINIC),
      (self.stranger, "stranger"),
    ):  # fmt: skip
      certificates.create(folder, name)
    for folder in (self.vendor, self.helper):
      clinics = folders.make(folder / certificates.CLINICS)
      shutil.copy(self.clinic / certificates.CERTIFICATE, clinics / f"{CLINIC}.pem")
    shutil.copy(self.helper / certificates.CERTIFICATE, self.vendor / "helper.pem")
    publications.begin(self.vendor, MODEL, institution.ABOUT, self.plan, WEIGHTS)
    send(self.vendor, "dealer", self.dealer, inbox.MODEL_OWNER, inbox.DEALER)
    dealer = supply.dealer(self.dealer, MODEL)
    supply.top_up(self.dealer, dealer, MODEL, HELPER, count)
    send(self.dealer, "model_owner", self.vendor, inbox.DEALER, inbox.MODEL_OWNER)
    publications.finish(self.vendor, MODEL)
    send(self.dealer, HELPER, self.helper, inbox.DEALER, inbox.HELPER)
    send(self.vendor, "helper", self.helper, inbox.MODEL_OWNER, inbox.HELPER)
    kept = publications.kept(self.vendor, MODEL)
    online = multiprocess.online(self.plan, MODEL_OWNER)
    where = place(self.vendor)
    self.served = Served(MODEL, where, kept.owner, kept.publication, online)
    self.assisted = helped.helped(self.helper, MODEL)

  def left(self):
    """Inferences that are unused, at the model owner and at the helper."""
    of = place(self.vendor) / HELPER, place(self.helper)
    return tuple(len(folders.unused(folder)) for folder in of)

  @contextlib.contextmanager
  def serving(
    self, echo=None, at_helper=Contract(), limits=LIMITS, stopping=(None, None),  # noqa: B008
    only_checked=False, **contract,
  ):  # fmt: skip
    """Both servers; gives the card that the model owner issues."""
    with contextlib.ExitStack() as stack:
      logs = []
      for folder, kept in ((self.vendor, Contract(**contract)), (self.helper, at_helper)):
        logs.append(stack.enter_context(contextlib.closing(Journal(folder, kept, echo))))
      owner = helped.serve(
        self.vendor, [self.served], logs[0], "127.0.0.1:0", limits, stopping[0], only_checked
      )
      first = f"127.0.0.1:{stack.enter_context(owner)}"
      helper = helped.assisting(
        self.helper, [self.assisted], logs[1], "127.0.0.1:0", limits, stopping[1], first
      )
      two = stack.enter_context(helper)
      path = publications.issue(self.vendor, MODEL, (first, f"127.0.0.1:{two}"), 0.5, 0.25)
      yield cards.read(path)

  def lines(self):
    of = self.vendor, self.helper
    return [[json.loads(line) for line in (folder / journal.AUDIT).open()] for folder in of]


def identity(folder):
  return [(folder / name).read_bytes() for name in (certificates.KEY, certificates.CERTIFICATE)]
