"""What a site writes down of a sum before it sends the message that opens it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from primia_jax.secagg import protocol


class Opening(NamedTuple):
  """A sum that a site's next message opens.

  Attributes:
    round, purpose: of the sum.
    sites: number to public key, of all sites in it.
    digest: SHA-256 of this site's own ring elements, without masks.
  """

  round: int
  purpose: int
  sites: Mapping[int, bytes]
  digest: bytes


def of(site: protocol.Site, vectors: Sequence[np.ndarray]) -> Opening:
  """The record of a sum whose consents this site has seen, with its input."""
  assert site.lists is not None
  own = hashlib.sha256()
  for vector in vectors:
    own.update(vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes())
  among = {i: site.setup.identities[i] for i in site.lists.survivors}
  return Opening(site.round, site.setup.purpose, among, own.digest())
