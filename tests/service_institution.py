"""A vendor, a dealer and a clinic as folders, for tests of the roles."""

import functools
import pathlib
import shutil
from typing import NamedTuple

import jax
import numpy as np
from mpc_reference import OWNERS, normal

from primia_jax import mpc
from primia_jax.service import certificates, folders, inbox, publications, supply
from primia_jax.service.publications import About

MODEL, CLINIC = "chest-1", "hospital-a"
WEIGHTS = [normal(0, 16, 6), normal(1, 6, 3)]
ABOUT = About("7", 4, 1, ("normal", "bacterial", "viral"), "probabilities", 1)


def fn(w, x):
  return jax.nn.relu(x.reshape(1, -1) @ w[0]) @ w[1]


def image(seed=2):
  return normal(seed, 1, 4, 4, 1)


@functools.cache
def planned(client="trusted"):
  args, owners = (WEIGHTS, image()), ("model_owner", "shared") if client == "sharing" else OWNERS
  ranges = mpc.calibrate(fn, owners, [args])
  return mpc.plan(fn, owners, args, mpc.Config(32, 10, 14, margin=8.0, client=client), ranges)


class Roles(NamedTuple):
  """The folder of each role."""

  vendor: pathlib.Path
  dealer: pathlib.Path
  clinic: pathlib.Path


def made(root, plan, model=MODEL, about=ABOUT):
  """Certificates are exchanged, and the vendor has begun a publication."""
  roles = Roles(*(folders.make(root / name) for name in Roles._fields))
  certificates.create(roles.vendor, "vendor-b")
  own = certificates.create(roles.clinic, CLINIC)
  clinics = folders.make(roles.vendor / certificates.CLINICS)
  shutil.copy(own, clinics / f"{CLINIC}.pem")
  publications.begin(roles.vendor, model, about, plan, WEIGHTS)
  send(roles.vendor, "dealer", roles.dealer, inbox.MODEL_OWNER, inbox.DEALER)
  return roles


def send(sender, to, receiver, of, role):
  """Carries an outbox to an inbox, and takes what is there."""
  outbox = sender / "outbox" / to
  if outbox.exists():
    shutil.copytree(outbox, receiver / "inbox" / of, dirs_exist_ok=True)
    shutil.rmtree(outbox)
  return inbox.collect(receiver, role)


def deal(roles, count, audited=False, model=MODEL):
  """The dealer deals, and the vendor has its part and publishes."""
  dealer = supply.dealer(roles.dealer, model)
  supply.top_up(roles.dealer, dealer, model, CLINIC, count, audited)
  send(roles.dealer, "model_owner", roles.vendor, inbox.DEALER, inbox.MODEL_OWNER)
  publications.finish(roles.vendor, model)
  return dealer


def deliver(roles):
  """The clinic gets its part and the publication."""
  send(roles.dealer, CLINIC, roles.clinic, inbox.DEALER, inbox.CLINIC)
  send(roles.vendor, "clinics", roles.clinic, inbox.MODEL_OWNER, inbox.CLINIC)


def place(folder, model=MODEL):
  return publications.model_folder(folder, model)


def every_file(folder):
  return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def wanted(plan, seed=2):
  """What one process computes."""
  return np.asarray(mpc.check(plan, (WEIGHTS, image(seed))))


def both(roles):
  """The numbers that each party holds unused."""
  return (folders.unused(place(roles.vendor) / CLINIC), folders.unused(place(roles.clinic)))


def killed_after(count):
  """step -> the same step, which a kill comes before once so many of all these have run."""
  steps = [0]

  def counted(step):
    def run(*args, **kwargs):
      steps[0] += 1
      if steps[0] > count:
        raise KeyboardInterrupt
      return step(*args, **kwargs)

    return run

  return counted
