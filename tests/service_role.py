"""One role of an encrypted inference as a process: `service_role.py ROLE ROOT`.

Roles share nothing but files: ROOT/public, and what a role puts into another's folder, as its
operator would carry it there. Each line that a role prints is a step that it has done.
"""

import pathlib
import sys
import time

import jax
import numpy as np
from mpc_reference import OWNERS, normal

from primia_jax import mpc
from primia_jax.service import folders, institutions
from primia_jax.service.channel import Limits
from primia_jax.service.errors import SessionEnded

CLINIC, TIMEOUT = "clinic-a", 10.0


def fn(w, x):
  return jax.nn.relu(x @ w["in"]) @ w["out"]


def weights():
  return {"in": normal(0, 6, 5), "out": normal(2, 5, 2)}


def image(seed):
  return normal(seed, 3, 6)


def waited(path):
  """A file that another role puts there whole, by renaming."""
  while not path.exists():
    time.sleep(0.05)
  return path


def put(path, value):
  part = path.with_suffix(".part")
  if isinstance(value, bytes):
    part.write_bytes(value)
  else:
    mpc.write(part, value)
  part.rename(path)


def say(*words):
  print(*words, flush=True)


def model_owner(root):
  folder, public = root / "model_owner", root / "public"
  w, x, again = weights(), image(9), (public / "publication").exists()
  if again:
    plan = mpc.read(public / "plan")
  else:
    config = mpc.Config(32, 10, 14)
    plan = mpc.plan(fn, OWNERS, (w, x), config, mpc.calibrate(fn, OWNERS, [(w, x)]))
    put(public / "plan", plan)
  owner = mpc.ModelOwner(plan, w, secret=folders.secret(folder))
  if again:
    publication = mpc.read(public / "publication")
    owner.resume(publication.publication)
  else:
    put(public / "tag", owner.tag.encode())
    publication = owner.publish(mpc.read(waited(folder / "blind")))
    put(public / "publication", publication)
  ended = lambda clinic, error: say("ended", clinic, type(error).__name__)
  waited(public / "dealt")
  with institutions.serve(
    folder, owner, publication.publication, limits=Limits(timeout=TIMEOUT), ended=ended
  ) as port:
    put(public / "port", str(port).encode())
    say("serving")
    sys.stdin.read()
  say("stopped")


def dealer(root):
  public = root / "public"
  plan = mpc.read(waited(public / "plan"))
  one = mpc.Dealer(plan, waited(public / "tag").read_text())
  put(root / "model_owner" / "blind", one.blind())
  folders.deal(one, 6, root / "model_owner" / CLINIC, root / "clinic")
  put(public / "dealt", b"")


def clinic(root):
  folder, public = root / "clinic", root / "public"
  publication = mpc.read(waited(public / "publication"))
  owner = mpc.DataOwner(mpc.read(public / "plan"), publication)
  address = f"127.0.0.1:{waited(public / 'port').read_text()}"
  server = (public / "model-owner.pem").read_bytes()
  try:
    with institutions.ask(
      folder, owner, publication.publication, address, server, limits=Limits(timeout=TIMEOUT)
    ) as session:
      for seed in map(int, iter(sys.stdin.readline, "")):
        session.prepare()
        say("prepared")
        sys.stdin.readline()
        start = time.perf_counter()
        np.save(folder / f"{seed}.npy", session.ask(image(seed)))
        say("answered", f"{time.perf_counter() - start:.3f}")
  except SessionEnded as error:
    say("error", type(error).__name__, f"{time.perf_counter() - start:.3f}")


if __name__ == "__main__":
  {"model_owner": model_owner, "dealer": dealer, "clinic": clinic}[sys.argv[1]](
    pathlib.Path(sys.argv[2])
  )
