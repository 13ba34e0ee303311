"""What sites and server agree on before a round, and what both of them compute from it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from primia_jax.secagg import graph, keys, masking, shamir, subkeys
from primia_jax.secagg import messages as msg

_MASKS_AT_ONCE = 8  # masks summed by one call, which is compiled for that many


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
  """What all sites and the server agree on before a round; made by `setup`, which checks it.

  Attributes:
    identities: site number to pinned Ed25519 public key, of all K sites of the round, in increasing
      order.
    sizes: the lengths of the vectors of an input, one for each leaf of the message.
    num_bits: k, of the ring Z_2^k in which inputs are summed.
    graph_key: [8] uint32, public randomness of the circle of neighbours.
    degree: P, the number of each site's neighbours.
    threshold: t of the P + 1 shares open a secret.
    quorum: the number of sites that must survive and sign the list of survivors.
    malicious_server: True if t and the quorum must be above two thirds, False for above half.
    purpose: tells several sums of one round apart.
    session: names the training run.
    label: a digest of all this; every signature covers it.
  """

  identities: Mapping[int, bytes]
  sizes: tuple[int, ...]
  num_bits: int
  graph_key: np.ndarray
  degree: int
  threshold: int
  quorum: int
  malicious_server: bool
  purpose: int
  session: bytes
  label: bytes

  @property
  def dtype(self) -> np.dtype:
    """uint32 or uint64, which holds Z_2^k."""
    return np.dtype(np.uint32 if self.num_bits <= 32 else np.uint64)


def setup(
  identities: Mapping[int, bytes],
  sizes: Sequence[int],
  session: bytes,
  *,
  num_bits: int = 32,
  graph_key: np.ndarray | None = None,
  degree: int | None = None,
  threshold: int | None = None,
  quorum: int | None = None,
  malicious_server: bool = True,
  purpose: int = 0,
) -> Setup:
  """Checks and completes what all agree on.

  Args:
    identities: site number to pinned public key.
    sizes: the lengths of the vectors of an input.
    session: names the training run; a signature of one run is invalid in every other.
    num_bits: k.
    graph_key: [8] uint32, public; needed for a sparse graph only. The sites must agree on it: a
      server that chose it could surround a site with corrupt ones.
    degree: P; None for all other sites. `graph.degree_for` tells how many are enough.
    threshold: t; None for the least legal one.
    quorum: None for the least legal one.
    malicious_server: sets the lower bound of threshold and quorum. True for above two thirds: fewer
      than a third of corrupt sites then cannot help a lying server to both secrets of a site or to
      two lists of survivors. False for above half, which is enough if server and sites follow the
      protocol.
    purpose: of the sum.

  Raises:
    ValueError: for fewer than two sites, or for numbers that are unsafe or impossible.
  """
  num_sites = len(identities)
  degree = num_sites - 1 if degree is None else degree
  if num_sites < 2:
    raise ValueError(
      f"{num_sites} identities: the sum over one site is that site's own input; use at least 2"
    )
  for site, public in identities.items():
    if not 0 <= site < 2**32 or len(public) != keys.KEY_BYTES:
      raise ValueError(
        f"site {site} with an identity of {len(public)} bytes; use a uint32 number and 32 bytes"
      )
  if len(set(identities.values())) < num_sites:
    raise ValueError("two sites have one identity; each needs its own")
  if degree != num_sites - 1 and graph_key is None:
    raise ValueError(
      f"degree={degree} of {num_sites - 1} other sites needs a graph_key that the sites have "
      f"agreed on"
    )
  graph_key = np.zeros(8, np.uint32) if graph_key is None else graph_key
  graph.neighbours(graph_key, num_sites, degree)
  if degree + 1 > shamir.MAX_SHARES:
    raise ValueError(
      f"degree={degree}; secrets can be shared among {shamir.MAX_SHARES} sites: use a sparser graph"
    )
  part = "two thirds" if malicious_server else "half"
  least, least_quorum = (
    graph.smallest_threshold(n, malicious_server) for n in (degree + 1, num_sites)
  )
  threshold = least if threshold is None else threshold
  quorum = least_quorum if quorum is None else quorum
  if not least <= threshold <= degree + 1:
    raise ValueError(
      f"threshold={threshold} of {degree + 1} shares; it must be above {part}: {least} to "
      f"{degree + 1}"
    )
  if not least_quorum <= quorum <= num_sites:
    raise ValueError(
      f"quorum={quorum} of {num_sites} sites; it must be above {part}: {least_quorum} to "
      f"{num_sites}"
    )
  if not sizes or min(sizes) < 0 or not 1 <= num_bits <= 64:
    raise ValueError(
      f"sizes={tuple(sizes)} in a ring of {num_bits} bits; give at least one vector, and 1 to 64 "
      f"bits"
    )
  ordered = {int(site): identities[site] for site in sorted(identities)}
  sizes = tuple(map(int, sizes))
  numbers = [*map(int, (num_bits, degree, threshold, quorum, malicious_server, purpose))]
  label = hashlib.sha256(
    repr((ordered, sizes, numbers, keys.raw(graph_key), session)).encode()
  ).digest()
  bounds = degree, threshold, quorum, malicious_server
  return Setup(ordered, sizes, num_bits, graph_key, *bounds, purpose, session, label)


def terms(setup: Setup) -> msg.Terms:
  """A setup as a message."""
  bounds = setup.degree, setup.threshold, setup.quorum, int(setup.malicious_server)
  words, graph_key = (setup.num_bits, setup.purpose), keys.raw(setup.graph_key)
  return msg.Terms(
    dict(setup.identities), setup.sizes, setup.session, words[0], graph_key, *bounds, words[1]
  )


def of_terms(told: msg.Terms) -> Setup:
  """The setup of a message.

  Raises:
    ValueError: as `setup`.
  """
  return setup(
    told.identities,
    told.sizes,
    told.session,
    num_bits=told.num_bits,
    graph_key=keys.words(told.graph_key),
    degree=told.degree,
    threshold=told.threshold,
    quorum=told.quorum,
    malicious_server=bool(told.malicious_server),
    purpose=told.purpose,
  )


def neighbourhoods(setup: Setup, round: int) -> dict[int, tuple[int, ...]]:
  """Maps each site to itself and its neighbours on this round's circle, in increasing order."""
  numbers = np.array(list(setup.identities))
  places = graph.neighbours(setup.graph_key, len(numbers), setup.degree, round)
  return {
    int(s): tuple(sorted({int(s), *numbers[row].tolist()}))
    for s, row in zip(numbers, places, strict=True)
  }


def signed_text(setup: Setup, message: msg.Message, context: bytes = b"") -> bytes:
  """The text that the sender signs: the message without its signature, under the setup's label."""
  body = msg.encode(message._replace(signature=b""))  # type: ignore[call-arg]
  return (
    b"primia_jax secagg"
    + setup.label
    + hashlib.sha256(context).digest()
    + hashlib.sha256(body).digest()
  )


def transcript_of(roster: msg.Roster) -> bytes:
  """A digest of all keys of the round. They are fresh, so it belongs to one attempt at it only."""
  return hashlib.sha256(msg.encode(roster)).digest()


def context_of(transcript: bytes, lists: msg.Survivors) -> bytes:
  """The text that a `Consent` signs besides itself."""
  return transcript + msg.encode(lists)


def mask_total(
  mask_keys: Sequence[np.ndarray], signs: Sequence[int], round: int, setup: Setup
) -> list[np.ndarray]:
  """The signed sum of masks in Z_2^k for each vector of an input: `masking.leaf_masks` on the host.

  Equal bit for bit to what `masking.mask` adds to leaves of the same sizes.
  """
  missing = -len(signs) % _MASKS_AT_ONCE
  padded = np.array([*mask_keys, *[np.zeros(8, np.uint32)] * missing]).reshape(
    -1, _MASKS_AT_ONCE, 8
  )
  factors = np.array([*signs, *[0] * missing], np.int32).reshape(-1, _MASKS_AT_ONCE)
  totals = [np.zeros(size, setup.dtype) for size in setup.sizes]
  words = np.uint32(round), np.uint32(setup.purpose)
  with jax.enable_x64(setup.num_bits > 32):
    for some, factor in zip(padded, factors, strict=True):
      masks = _leaf_masks(some, factor, words, setup.sizes, setup.dtype)
      totals = [total + np.asarray(mask) for total, mask in zip(totals, masks, strict=True)]
  return [reduce(total, setup) for total in totals]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _leaf_masks(mask_keys, signs, words, sizes, dtype):
  return masking.leaf_masks(mask_keys, signs, words, [(size,) for size in sizes], dtype)


def masks_left(
  round: int,
  seeds: Mapping[int, bytes],
  privates: Mapping[int, bytes],
  mask_keys: Mapping[int, bytes],
  around: Mapping[int, Sequence[int]],
) -> tuple[list[np.ndarray], list[int]]:
  """The masks that are left in the survivors' sum, from the secrets that were recovered.

  Args:
    round: the round.
    seeds: survivor to the seed of its own mask.
    privates: lost site to its private mask key.
    mask_keys: survivor to its public mask key.
    around: site to its neighbourhood.

  Returns:
    The keys, [8] uint32, and the signs with which survivors have added the masks: each survivor's
    own, and each lost site's with each surviving neighbour.
  """
  found = [(subkeys.self_mask_key(seed, round, v), 1) for v, seed in seeds.items()]
  for v, private in privates.items():
    peers = {w: mask_keys[w] for w in around[v] if w in seeds}
    shared = subkeys.pair_mask_keys(private, peers, round, v)
    found += [(key, 1 if v > w else -1) for w, key in shared.items()]
  return [key for key, _ in found], [sign for _, sign in found]


def reduce(v: np.ndarray, setup: Setup) -> np.ndarray:
  """v modulo 2^k."""
  return v & setup.dtype.type(2**setup.num_bits - 1)


def legal_vectors(vectors: Sequence[np.ndarray], setup: Setup) -> bool:
  """Whether an input has the agreed sizes and dtype and is reduced modulo 2^k."""
  return [(v.shape, v.dtype) for v in vectors] == [
    ((size,), setup.dtype) for size in setup.sizes
  ] and not any(v.size and int(v.max()) >> setup.num_bits for v in vectors)


def message_bytes(setup: Setup) -> int:
  """An upper bound on the bytes of every honest message of the round, also with one for the keys of
  the next (`ahead`).
  """
  advert = 6 * 4 + 3 * keys.KEY_BYTES + keys.SIGNATURE_BYTES
  signed = len(setup.identities) * (3 * 4 + keys.SIGNATURE_BYTES)  # bonds, or consents
  boxes = setup.degree * (2 * 4 + 2 * keys.KEY_BYTES + keys.BOX_OVERHEAD)
  vectors = sum(3 * 4 + size * -(-setup.num_bits // 8) for size in setup.sizes)
  return 256 + max(signed + len(setup.identities) * advert, signed + boxes, advert + vectors)
