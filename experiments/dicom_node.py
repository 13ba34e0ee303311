"""A DICOM node: a PACS stores a chest X-ray here, and gets back a structured report of the answer.

  primia-node --checkpoint=runs/first --allowed=PACS --reports_to=PACS@127.0.0.1:4242
  primia-node --connect=HOST:PORT --folder=hospital --model=chest-1 --allowed=... --reports_to=...
  primia-node --card=chest-1.json --folder=hospital --allowed=... --reports_to=...

C-STORE succeeds once the report has been stored at the PACS. What is no frontal chest X-ray is
refused with a reason. The node is for a clinic's own network: AE titles are no proof of who sends.
With --checkpoint all three roles of the protocol run in this one process, which protects nothing by
itself. With --connect this is a clinic of a model owner's server, as in primia-infer; with --card
it shares images between two servers, as in primia-ask. It needs pip install 'primia_jax[clinic]'.
"""

import dataclasses
import datetime

from absl import flags

from . import clinics, running, settings
from .settings import setting


@dataclasses.dataclass(frozen=True)
class Node:
  """Who may send, and where reports go."""

  allowed: str = setting("", "AE titles that may send images, separated by commas")
  reports_to: str = setting(
    "", "where reports are stored, TITLE@HOST:PORT such as PACS@10.0.0.2:104"
  )
  title: str = setting("PRIMIA", "the node's own AE title; senders must call it by that")
  host: str = setting("127.0.0.1", "address to listen at, one that only the PACS reaches")
  port: int = setting(11112, "port to listen at; 0 takes any free one")
  max_mb: int = setting(64, "largest image, in MiB, 1 to 64")


settings.define_flags(Node)
settings.define_flags(clinics.Remote)
settings.define_flags(clinics.Clinic)
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def main() -> None:
  n, s = settings.from_flags(Node), settings.from_flags(clinics.Clinic)
  node, remote = _library(), settings.from_flags(clinics.Remote)
  clinics.check(s, remote, [name for name in FLAGS if FLAGS[name].present])
  title, at, where = n.reports_to.partition("@")
  host, _, port = where.rpartition(":")
  if not (at and title and host and port.isdigit() and 0 < int(port) < 65536):
    raise ValueError(f"reports_to={n.reports_to!r}; use TITLE@HOST:PORT, such as PACS@10.0.0.2:104")
  allowed = settings.names(n.allowed)
  if not allowed:
    raise ValueError("allowed is empty; name the AE titles that may send, such as --allowed=PACS")
  for name, value in (
    ("title", n.title),
    ("reports_to", title),
    *(("allowed", a) for a in allowed),
  ):
    if not 0 < len(value.strip()) <= 16 or not value.isascii():
      raise ValueError(f"{name}={value!r} is not an AE title; use 1 to 16 ASCII characters")
  settings.require(0 <= n.port < 65536, "port", n.port, "must lie between 0 and 65535")
  settings.require(1 <= n.max_mb <= 64, "max_mb", n.max_mb, "must lie between 1 and 64")
  model, ask, *_ = clinics.load(s, remote)
  to, limits = node.Destination(host, int(port), title), node.Limits(file=n.max_mb << 20)
  with node.serve(model, ask, to, allowed, n.title, n.host, n.port, limits, _log) as number:
    print(f"{n.title} listens at {n.host}:{number} for {n.allowed}. Ctrl-C stops it.", flush=True)
    clinics.wait()


def _library():
  try:
    from primia_jax.clinic import node
  except ImportError as error:
    raise ValueError(
      f"{error.name} is missing; run pip install 'primia_jax[clinic]' for the DICOM node"
    ) from error
  return node


def _log(caller: str, status: int, reason: str) -> None:
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  print(f"{now} {caller} {status:04X} {reason or 'the report is stored'}", flush=True)


if __name__ == "__main__":
  running.start(main, keeps_small=True)
