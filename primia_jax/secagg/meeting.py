"""How the sites of a run meet before its first sum: who they are, and from which state they start.

Each site writes two signed messages to a folder that all can read, `Hello` and `Start`. Whoever can
write to the folder can keep sites apart. At the first meeting this person can also take the place
of a site that has not come yet, because identities are pinned on first use. Every site keeps the
identities, and from then on refuses another one by name.

A run that continues starts from a global state that somebody saved. Who saves it could give each
site another one, or one of their own making, and learn a single site's update from the next sum
(see `exchange`). So each site records a digest of the state after each round, in a place of its
own, and `check` compares. A site without that record, because it was lost in that round, takes the
digest that all other sites of the round have signed, provided that they are more than the sites
that may collude.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, TypeVar

from primia_jax import durable
from primia_jax.secagg import keys
from primia_jax.secagg import messages as msg
from primia_jax.secagg.errors import Lost, Refused
from primia_jax.secagg.exchange import Pinned

_Said = TypeVar("_Said", msg.Hello, msg.Start)


def own_identity(path: pathlib.Path) -> keys.Identity:
  """The identity in a file; a fresh one is kept there at the first call.

  Raises:
    ValueError: the file holds no private key.
  """
  if not path.is_file():
    durable.replace(path, keys.identity().private)
  private = path.read_bytes()
  if len(private) != keys.KEY_BYTES:
    raise ValueError(f"{path} has {len(private)} bytes and is no private key; restore it")
  return keys.identity(lambda _: private)


def hello(own: keys.Identity, site: int, told: bytes = b"", server: bytes = b"") -> msg.Hello:
  """A site's first message; `server` is the public key of the server that it hosts."""
  made = msg.Hello(site, own.public, server, os.urandom(keys.KEY_BYTES), told, b"")
  return made._replace(signature=keys.sign(own.private, _text(b"", made)))


def start(
  own: keys.Identity,
  label: bytes,
  site: int,
  round: int,
  state: bytes,
  sites: tuple[int, ...],
  told: bytes = b"",
) -> msg.Start:
  """A site's second message; see `messages.Start`. `label` is that of its `Exchange`, so that the
  message holds for this start only.
  """
  made = msg.Start(site, round, state, sites, told, b"")
  return made._replace(signature=keys.sign(own.private, _text(label, made)))


def publish(folder: pathlib.Path, message: msg.Hello | msg.Start) -> None:
  """Writes a message to where the others look for it."""
  path = folder / file_name(type(message), message.site)
  part = path.with_suffix(".part")
  part.write_bytes(msg.encode(message))
  part.replace(path)


def file_name(kind: type, site: int) -> str:
  """The name of the file with a site's message of this kind."""
  return f"site_{site}.{kind.__name__.lower()}"


def gather(
  folder: pathlib.Path, kind: type[_Said], num_sites: int, timeout: float
) -> dict[int, _Said]:
  """Waits for the messages of this kind from all sites, by site.

  Raises:
    Lost: some are missing when the timeout has passed.
    ValueError: a file holds something else.
  """
  end, paths = time.monotonic() + timeout, [folder / file_name(kind, i) for i in range(num_sites)]
  while missing := [i for i, path in enumerate(paths) if not path.is_file()]:
    if time.monotonic() > end:
      raise Lost(
        f"no {kind.__name__.lower()} of sites {missing} in {folder} after {timeout:g} seconds; "
        "start their processes within that time"
      )
    time.sleep(0.02)
  said: dict[int, Any] = {}
  for i, path in enumerate(paths):
    try:
      message = msg.decode(path.read_bytes())
    except ValueError as error:
      raise ValueError(f"{path}: {error}") from error
    if type(message) is not kind or message.site != i:
      raise ValueError(f"{path} is no {kind.__name__.lower()} of site {i}")
    said[i] = message
  return said


def pin(
  hellos: Mapping[int, msg.Hello], own: keys.Identity, number: int, known: pathlib.Path
) -> Pinned:
  """Pins the identities of all sites, and that of the server which site 0 hosts.

  Args:
    hellos: by site.
    own: this site's identity.
    number: this site.
    known: its file of the identities that it pinned at the first meeting; made there.

  Raises:
    Refused: a message is not signed by its identity, or an identity is not the one known.
    ValueError: the file of known identities is damaged.
  """
  for i, message in hellos.items():
    if not keys.verify(message.identity, _text(b"", message), message.signature):
      raise Refused(number, "hello", "forged", f"site {i}'s is not signed by the identity in it")
  found = {f"site {i}": message.identity.hex() for i, message in hellos.items()}
  found["the server"] = hellos[0].server.hex()
  if hellos[number].identity != own.public:
    raise Refused(number, "hello", "changed key", "another identity stands in its own place")
  if len(hellos[0].server) != keys.KEY_BYTES:
    raise Refused(number, "hello", "malformed", "site 0 names no server")
  if not known.is_file():
    durable.replace(known, json.dumps(found, indent=2).encode())
  try:
    before = dict(json.loads(known.read_text()))
  except (TypeError, ValueError) as error:
    raise ValueError(f"{known} is damaged ({error}); restore it") from error
  if changed := [who for who in {**before, **found} if before.get(who) != found.get(who)]:
    raise Refused(
      number,
      "hello",
      "changed key",
      f"{', '.join(changed)} shows another identity than at the first meeting ({known}): somebody "
      "takes its place, or its own folder was lost. Ask there for the key, and correct the file "
      "only if it is right",
    )
  return Pinned(own, {i: message.identity for i, message in hellos.items()}, hellos[0].server)


def check(
  starts: Mapping[int, msg.Start], pinned: Pinned, label: bytes, number: int, colluding: int
) -> tuple[int, ...]:
  """Checks that all sites start from one state, and that this site has a reason to trust it.

  A site that has recorded the state needs nobody's word. Any other needs that of every other site
  of that round, and of at least max(2, colluding + 1): one of them is honest and has recorded it.

  Args:
    starts: by site, of all.
    pinned: the identities.
    label: of this start.
    number: this site.
    colluding: how many sites may collude with the server.

  Returns:
    The sites of the last round.

  Raises:
    Refused: for a forged message, other states elsewhere, or too few who have signed this one.
  """
  own = starts[number]
  for i, one in starts.items():
    if not keys.verify(pinned.sites[i], _text(label, one), one.signature):
      raise Refused(number, "start", "forged", f"site {i}'s message is not signed for this start")
  same = [i for i, one in starts.items() if (one.round, one.state) == (own.round, own.state)]
  if others := sorted(set(starts) - set(same)):
    raise Refused(
      number,
      "start",
      "inconsistent",
      f"sites {others} start from another state than this one, which is that of round {own.round}",
    )
  if own.sites:
    return own.sites
  recorded = {i: one.sites for i, one in starts.items() if one.sites}
  lists, least = set(recorded.values()), max(2, colluding + 1)
  sites = lists.pop() if lists else ()
  needed = set(sites) - {number}
  if lists or len(needed) < least or not needed <= set(recorded):
    raise Refused(
      number,
      "start",
      "too few",
      f"it has no record of round {own.round}, and sites {sorted(recorded)} have signed its state. "
      f"All other sites of that round must have, and at least {least}. To continue from the round "
      "before it, take the last checkpoint away; or begin a new run",
    )
  return sites


def _text(label: bytes, message: msg.Hello | msg.Start) -> bytes:
  body = msg.encode(message._replace(signature=b""))
  return b"primia_jax meeting" + label + hashlib.sha256(body).digest()
