"""The server's half of `protocol`: it takes the sites' messages by stages and opens only the sum.

`receive` takes one message, in any order of senders, and rejects by name one that does not belong.
One function for each stage closes it, when the caller's timeout has passed, and returns the
messages to send next. A site that is late has dropped out.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from primia_jax.secagg import keys, rounds, shamir
from primia_jax.secagg import messages as msg
from primia_jax.secagg.errors import Rejected, RoundFailed
from primia_jax.secagg.rounds import Setup


class Server(NamedTuple):
  """The server's state in one round; it holds nothing secret from those who may see the sum.

  Attributes:
    setup: what all agreed on.
    round: the round.
    stage: index in `messages.STAGES`; their number when the round is over.
    around: site to its neighbourhood, itself included.
    received: for each stage, sender to message.
    roster: the keys that all sites are shown.
    transcript: a digest of the roster.
    lists: the survivors and dropouts that all sites are shown.
  """

  setup: Setup
  round: int
  stage: int
  around: Mapping[int, tuple[int, ...]]
  received: tuple[Mapping[int, Any], ...]
  roster: msg.Roster | None
  transcript: bytes
  lists: msg.Survivors | None


class Opened(NamedTuple):
  """The result of a round.

  Attributes:
    total: the sum over the survivors, in Z_2^k.
    survivors: the sites whose inputs are in it.
    dropouts: the sites that shared keys but sent no input in time.
    liars: the sites that gave a share that does not belong to the secret opened, looked for only
      if such a share spoiled a secret.
  """

  total: tuple[np.ndarray, ...]
  survivors: tuple[int, ...]
  dropouts: tuple[int, ...]
  liars: tuple[int, ...]


def start(setup: Setup, round: int) -> Server:
  """The state of a server that waits for adverts."""
  around = rounds.neighbourhoods(setup, round)
  return Server(setup, round, 0, around, ({},) * len(msg.STAGES), None, b"", None)


def expected(server: Server) -> frozenset[int]:
  """The sites whose messages may still arrive in this stage: those that spoke in the one before."""
  before = server.received[server.stage - 1] if server.stage else server.setup.identities
  return frozenset(before) - frozenset(server.received[server.stage])


def receive(server: Server, message: Any) -> Server:
  """Takes one site's message.

  Raises:
    Rejected: for a message that is malformed, of an unknown site, not signed by it, of another
      round or stage, or the second one.
  """
  site: Any = getattr(message, "site", None)
  current = msg.STAGES[min(server.stage, len(msg.STAGES) - 1)]

  def reject(reason: str, detail: str) -> Rejected:
    return Rejected(site, current, reason, detail)

  if type(message) not in msg.FROM_SITES:
    raise reject("malformed", f"{type(message).__name__} is not a message of a site")
  stage = msg.FROM_SITES.index(type(message))
  if site not in server.setup.identities:
    raise reject("unknown", "no such site has a pinned identity")
  if message.round != server.round:
    raise reject("another round", f"round {message.round} instead of {server.round}")
  try:
    context = b""
    if stage == 3 and server.lists:
      context = rounds.context_of(server.transcript, server.lists)
    text = rounds.signed_text(server.setup, message, context)
  except (ValueError, TypeError, AttributeError) as e:
    raise reject("malformed", str(e)) from e
  early_consent = stage == 3 and not server.lists  # a signature of lists that do not exist yet
  if not early_consent and not keys.verify(server.setup.identities[site], text, message.signature):
    raise reject("forged", "the signature is not its pinned identity's")
  if site in server.received[stage]:
    raise reject("repeated", f"its {msg.STAGES[stage]} message is here already")
  if stage < server.stage:
    raise reject("late", f"stage {msg.STAGES[stage]} is closed")
  if stage > server.stage:
    raise reject("early", f"stage {msg.STAGES[stage]} is not open yet")
  if site not in expected(server):
    raise reject("late", f"it has missed stage {msg.STAGES[stage - 1]}, and dropped out")
  if wrong := _CHECKS[stage](server, message):
    raise reject("malformed", wrong)
  received = [*server.received]
  received[stage] = {**received[stage], site: message}
  return server._replace(received=tuple(received))


def close_advertise(server: Server) -> tuple[Server, msg.Roster]:
  """Ends stage 0; the roster is for every site that advertised.

  Raises:
    RoundFailed: for fewer than the quorum; as all the following.
  """
  server, adverts = _close(server, 0, server.setup.quorum)
  roster = msg.Roster(server.round, tuple(adverts[site] for site in sorted(adverts)))
  return server._replace(roster=roster, transcript=rounds.transcript_of(roster)), roster


def close_share_keys(server: Server) -> tuple[Server, dict[int, msg.Delivery]]:
  """Ends stage 1; each site that shared keys gets the boxes sealed for it."""
  server, shares = _close(server, 1, server.setup.quorum)
  near = {u: [v for v in server.around[u] if v in shares and v != u] for u in shares}
  return server, {
    u: msg.Delivery(server.round, {v: shares[v].boxes[u] for v in near[u]}) for u in shares
  }


def close_masked_input(server: Server) -> tuple[Server, msg.Survivors]:
  """Ends stage 2; the lists are for every survivor."""
  shared = server.received[1]
  server, masked = _close(server, 2, server.setup.quorum)
  alive, dead = sorted(masked), sorted(set(shared) - set(masked))
  inputs = digest_of_inputs(msg.encode(masked[v]) for v in alive)
  lists = msg.Survivors(server.round, tuple(alive), tuple(dead), inputs)
  return server._replace(lists=lists), lists


def digest_of_inputs(encoded: Iterable[bytes]) -> bytes:
  """`Survivors.inputs`, of the survivors' encoded masked inputs in the order of their numbers."""
  return hashlib.sha256(b"".join(hashlib.sha256(one).digest() for one in encoded)).digest()


def close_consistency(server: Server) -> tuple[Server, msg.Consents]:
  """Ends stage 3; the signatures are for every site that gave one."""
  server, consents = _close(server, 3, server.setup.quorum)
  return server, msg.Consents(
    server.round, {site: consents[site].signature for site in sorted(consents)}
  )


def open_total(server: Server) -> tuple[Server, Opened]:
  """Ends stage 4: recovers and checks the secrets of the masks left, and removes these masks.

  Every recovered seed must open its commitment, and every recovered mask key must fit the public
  key advertised.

  Raises:
    RoundFailed: if a secret has fewer than t shares, or no t of those tried give the secret
      advertised.
  """
  server, answers = _close(server, 4, server.setup.threshold)
  assert server.lists is not None
  setup, adverts, (_, alive, dead, _) = server.setup, server.received[0], server.lists
  exposed = [v for v in dead if set(server.around[v]) & set(alive)]
  opens = lambda v, seed: keys.commit(seed) == adverts[v].commitment
  fits = lambda v, private: keys.public_key(private) == adverts[v].mask_key
  seeds, seed_liars = _recover(server, alive, {u: a.self_shares for u, a in answers.items()}, opens)
  privates, key_liars = _recover(
    server, exposed, {u: a.mask_shares for u, a in answers.items()}, fits
  )
  public = {v: adverts[v].mask_key for v in alive}
  mask_keys, signs = rounds.masks_left(server.round, seeds, privates, public, server.around)
  masks = rounds.mask_total(mask_keys, signs, server.round, setup)
  inputs = zip(*[server.received[2][v].vectors for v in alive], strict=True)
  total = tuple(
    rounds.reduce(functools.reduce(np.add, column) - mask, setup)
    for column, mask in zip(inputs, masks, strict=True)
  )
  return server, Opened(total, alive, dead, tuple(sorted(seed_liars | key_liars)))


Shares = Mapping[int, Mapping[int, bytes]]  # holder to owner to share


def _recover(
  server: Server, owners: Iterable[int], shares: Shares, right: Callable[[int, bytes], bool]
) -> tuple[dict[int, bytes], set[int]]:
  """The owners' secrets, and the holders whose shares do not belong to them.

  Of m shares it tries the m runs of t on the ring of holders. If m > t, this withstands m - t liars
  side by side, and one liar anywhere.
  """
  threshold, secrets, liars = server.setup.threshold, dict[int, bytes](), set[int]()
  for v in owners:
    holders = [u for u in server.around[v] if v in shares.get(u, {})]
    if len(holders) < threshold:
      raise RoundFailed(
        "unmask", len(holders), threshold, f"sites answered with a share of site {v}'s secret"
      )
    points = np.array([server.around[v].index(u) + 1 for u in holders])
    held = np.frombuffer(b"".join(shares[u][v] for u in holders), np.uint8).reshape(
      1, -1, keys.KEY_BYTES
    )
    for first in range(len(holders)):
      run = (np.arange(threshold) + first) % len(holders)
      secret = shamir.combine(points[run], held[:, run], threshold)[0].tobytes()
      if right(v, secret):
        break
    else:
      raise RoundFailed(
        "unmask",
        0,
        1,
        f"runs of site {v}'s {len(holders)} shares give the secret it has advertised",
      )
    secrets[v] = secret
    if first:
      wrong = np.any(shamir.extend(points[run], held[:, run], points) != held, axis=(0, 2))
      liars |= {holders[i] for i in np.flatnonzero(wrong)}
  return secrets, liars


def _close(server: Server, stage: int, need: int) -> tuple[Server, Mapping[int, Any]]:
  if server.stage != stage:
    raise ValueError(
      f"stage {msg.STAGES[stage]} cannot be closed while the server is in stage {server.stage}; "
      f"close the stages in order"
    )
  have, num_sites = len(server.received[stage]), len(server.setup.identities)
  if have < need:
    raise RoundFailed(
      msg.STAGES[stage], have, need, f"sites of {num_sites} sent their message in time"
    )
  return server._replace(stage=stage + 1), server.received[stage]


def _check_advert(server: Server, advert: msg.Advert) -> str:
  taken = {k for a in server.received[0].values() for k in (a.box_key, a.mask_key)}
  if advert.box_key == advert.mask_key or taken & {advert.box_key, advert.mask_key}:
    return "its two keys are equal, or another site has advertised one of them"
  for public in (advert.box_key, advert.mask_key):
    try:
      keys.agree(b"\1" * keys.KEY_BYTES, public)
    except ValueError as e:
      return str(e)
  return "" if len(advert.commitment) == keys.KEY_BYTES else "its commitment is not 32 bytes"


def _check_shares(server: Server, shares: msg.Shares) -> str:
  near = {v for v in server.around[shares.site] if v in server.received[0] and v != shares.site}
  if set(shares.boxes) != near:
    return f"boxes for sites {sorted(shares.boxes)} instead of {sorted(near)}"
  size = 2 * keys.KEY_BYTES + keys.BOX_OVERHEAD
  legal = all(len(box) == size for box in shares.boxes.values())
  return "" if legal else f"boxes must have {size} bytes"


def _check_masked(server: Server, masked: msg.MaskedInput) -> str:
  setup, legal = server.setup, rounds.legal_vectors(masked.vectors, server.setup)
  return "" if legal else f"vectors must have {setup.sizes} elements of Z_2^{setup.num_bits}"


def _check_answer(server: Server, answer: msg.Answer) -> str:
  assert server.lists is not None
  near, me = set(server.around[answer.site]), {answer.site}
  wanted = near & set(server.lists.survivors), near & set(server.lists.dropouts) - me
  if (set(answer.self_shares), set(answer.mask_shares)) != wanted:
    return (
      f"seed shares must be of sites {sorted(wanted[0])}, mask-key shares of {sorted(wanted[1])}"
    )
  given = [*answer.self_shares.values(), *answer.mask_shares.values()]
  legal = all(len(share) == keys.KEY_BYTES for share in given)
  return "" if legal else f"shares must have {keys.KEY_BYTES} bytes"


_CHECKS: tuple[Callable[[Server, Any], str], ...] = (
  _check_advert,
  _check_shares,
  _check_masked,
  lambda server, consent: "",
  _check_answer,
)
# The functions that end each stage but the last, with messages for the sites that spoke in it.
CLOSE: tuple[Callable[[Server], tuple[Server, Any]], ...] = (
  close_advertise,
  close_share_keys,
  close_masked_input,
  close_consistency,
)
