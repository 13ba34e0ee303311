"""Receipts, by which a clinic finds that a server was put back to an earlier state.

A snapshot or backup that is put back holds correlations that were used since, and no marks of that.
A clinic that kept copies of its part could then have the same masks used for two images, which
tells it values that depend on weights, and queries of the time between count no more.

So with each inference that it takes, a model owner's server gives a receipt, under a key in its
folder. The clinic, or the helper, shows the last one with its next request. If the receipt is good
and the server has no mark of that inference, the server was put back (`PutBack`): it destroys all
correlations that it holds before anything more is computed. A clinic cannot forge a receipt, nor
use another's, so it cannot bring this about otherwise.

An honest clinic finds it with its first request after. One that deviates shows an old receipt, or
none: until an honest one asks, nothing stops it. Nobody finds it where both sides were put back to
the same state. Whoever puts a server back should therefore discard its correlations first
(`folders.discard`).
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import pathlib

from primia_jax import durable
from primia_jax.mpc.messages import Correlations
from primia_jax.service import folders
from primia_jax.service.errors import PutBack, Refused

RECEIPT = "receipt"  # of the last inference that the other side took, in a clinic's folder
BYTES = 32
SHOWN_BYTES = 32 + BYTES  # the inference's number, and its receipt
NONE = bytes(SHOWN_BYTES)


def key(folder: pathlib.Path) -> bytes:
  """Of a server, from the secret in the folder of a publication."""
  return hmac.digest(folders.secret(folder), b"receipts", "sha256")


def issued(key: bytes, who: str, inference: str) -> bytes:
  """The receipt of an inference of a clinic, or helper; 32 bytes."""
  return hmac.digest(key, f"{who} {inference}".encode(), hashlib.sha256)


def check(key: bytes, who: str, folder: pathlib.Path, shown: bytes) -> None:
  """Compares a server's marks with what it gave a receipt for.

  Args:
    key: the server's.
    who: shows it.
    folder: of the correlations that were dealt for them.
    shown: the number of an inference and its receipt, or NONE.

  Raises:
    PutBack: the receipt is good, and the inference is not marked as used.
    Refused: the receipt is not this server's.
  """
  if shown == NONE:
    return
  inference, receipt = shown[:-BYTES].hex(), shown[-BYTES:]
  if not hmac.compare_digest(receipt, issued(key, who, inference)):
    raise Refused(
      f"the receipt that {who} shows is not of this server; has either side's folder been mixed "
      "with another's?"
    )
  if not folders.is_used(folder, inference):
    raise PutBack(
      "this server was put back to an earlier state, in which correlations would serve twice: all "
      "of them are destroyed; the model owner must publish anew"
    )


def take(
  key: bytes, who: str, folder: pathlib.Path, inference: str, shown: bytes
) -> tuple[Correlations, bytes]:
  """The correlations of an inference, and its receipt; raises as `check` and `folders.take` do."""
  check(key, who, folder, shown)
  return folders.take(folder, inference), issued(key, who, inference)


def taking(key: bytes, who: str, folder: pathlib.Path) -> functools.partial:
  """`take` of one clinic: (inference, shown) -> correlations and receipt."""
  return functools.partial(take, key, who, folder)


def shown(folder: pathlib.Path) -> bytes:
  """What a clinic shows: the last number and its receipt, or NONE.

  Raises:
    ValueError: the file is damaged.
  """
  path = folder / RECEIPT
  if not path.exists():
    return NONE
  found = path.read_bytes()
  if len(found) != SHOWN_BYTES:
    raise ValueError(f"{path} is damaged; remove it, and say so to the model owner")
  return found


def keep(folder: pathlib.Path, inference: str, receipt: bytes) -> None:
  """Keeps what a clinic shows next; several of its sessions may do so at once."""
  part = folder / f".{RECEIPT}-{inference}"
  durable.create(part, bytes.fromhex(inference) + receipt)
  os.replace(part, folder / RECEIPT)
  durable.sync_folder(folder)
