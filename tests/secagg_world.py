"""Sites and a server that play a round of messages: what the tests of the protocol share."""

import hashlib
from typing import NamedTuple

import numpy as np

from primia_jax.secagg import keys, protocol, rounds
from primia_jax.secagg import server as serving

ROUND = 3


def masked_input(site, delivery, vectors):
  """What a site does in stage 2."""
  return protocol.mask_input(protocol.take_shares(site, delivery), vectors)


STEPS = (protocol.share_keys, masked_input, protocol.consistency, protocol.unmask)


class World(NamedTuple):
  setup: rounds.Setup
  identities: dict
  inputs: dict


def world(numbers=(0, 1, 2, 3, 4), sizes=(6, 1), num_bits=32, **kwargs):
  identities = {i: keys.identity(hashlib.sha256(b"%d" % i).digest()) for i in numbers}
  setup = rounds.setup(
    {i: k.public for i, k in identities.items()}, sizes, b"test", num_bits=num_bits, **kwargs
  )
  rng = np.random.default_rng(0)
  draw = lambda size: rng.integers(0, 2**num_bits, size, dtype=np.uint64).astype(setup.dtype)
  return World(setup, identities, {i: tuple(map(draw, sizes)) for i in numbers})


def total(w, sites):
  """The sum by Python integers."""
  rows = lambda leaf: zip(*[w.inputs[i][leaf].tolist() for i in sites], strict=True)
  return [
    [sum(column) % 2**w.setup.num_bits for column in rows(leaf)]
    for leaf in range(len(w.setup.sizes))
  ]


def answer(w, stage, site, told):
  """What a site sends in this stage when told so much."""
  return (
    STEPS[stage - 1](site, told, w.inputs[site.number])
    if stage == 2
    else STEPS[stage - 1](site, told)
  )


def begin(w, round_index=ROUND):
  return {i: protocol.advertise(w.setup, round_index, i, k) for i, k in w.identities.items()}


def for_site(out, site):
  return out[site] if isinstance(out, dict) else out


def play(w, until=5, who=lambda stage, site: True, round_index=ROUND):
  """Plays honestly up to a stage's closing; returns the sites, the server and what it tells them
  next.
  """
  said, server, out = begin(w, round_index), serving.start(w.setup, round_index), None
  for stage in range(until):
    if stage:
      said = {i: answer(w, stage, said[i][0], for_site(out, i)) for i in server.received[stage - 1]}
    said = {i: s for i, s in said.items() if who(stage, i)}
    for _, message in said.values():
      server = serving.receive(server, message)
    server, out = (*serving.CLOSE, serving.open_total)[stage](server)
  return {i: s for i, (s, _) in said.items()}, server, out


def resigned(w, message, context=b"", identity=None):
  identity = w.identities[message.site] if identity is None else identity
  text = rounds.signed_text(w.setup, message, context)
  return message._replace(signature=keys.sign(identity.private, text))


def without_last(boxes):
  return dict(list(boxes.items())[:-1])
