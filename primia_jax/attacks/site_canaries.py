"""Canary sites in the mechanism of whole-site privacy: what their noised updates tell of epsilon.

A canary is a site whose update is one number, ten times the clip, in every round; where it does not
take part, its update is zero, as in the definition of adjacent data. The mechanism is the run's own
`site_privacy`: its clip, its noise, its rounds. Each canary sits among the sites of a round, which
send zero: so nothing but noise hides it, and its score is the best there is.

One run has as many canaries as sites, and a few sites prove nothing (`fewest_canaries`). So the
rounds are run again for each canary, with secrets of their own. That audits the mechanism and not
the run's one outcome, which is all that an audit by canaries can do for few sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import secagg, site_privacy
from primia_jax.attacks import one_run
from primia_jax.federated import Algorithm, Global, Message
from primia_jax.privacy import accounting
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.plan import SiteLevel
from primia_jax.types import Array, Key, Metrics, PyTree, Site

_NUMBER = "update"


class Observed(NamedTuple):
  """What was released, in units of the clip; float32.

  Attributes:
    alone: [T, m], the canary's own noised update in each round; None where sites make noise
      together, so that a single one is not private.
    summed: [T, m], the opened sum of each round, of the canary and sites that send zero.
    included: [m] bool, which canaries took part.
  """

  alone: Array | None
  summed: Array
  included: Array


class Audit(NamedTuple):
  """What canary sites prove of epsilon.

  Attributes:
    claim: epsilon by the ledger, of all rounds.
    delta: of the claim and of the bounds.
    num_canaries, num_guesses: m, and c.
    alone_right, alone: right guesses, and the epsilon that they prove, from single updates; None
      where these are not private.
    summed_right, summed: the same from the sums.
    final: from the sum over all rounds, as the final model has it.
    limit: what would be proved if all guesses were right.
  """

  claim: float
  delta: float
  num_canaries: int
  num_guesses: int
  alone_right: int | None
  alone: float | None
  summed_right: int
  summed: float
  final: float
  limit: float


def watch(made: SiteLevel, rounds: int, num_sites: int) -> Callable[..., Observed]:
  """(key, number of canaries m, norm = 10 clips) -> Observed; compiled once for many audits.

  Args:
    made: the plan that runs.
    rounds: T.
    num_sites: K of a round.
  """
  algorithm, units = _algorithm(), made.clip.l2_clip_norm
  moves = made.clip.target_quantile is not None
  private = site_privacy.private(algorithm, made)
  params = {_NUMBER: jnp.zeros(1, jnp.float32)}
  coding = None
  if made.noise is not None:
    noise = dataclasses.replace(made.noise, dim=1)  # of an update of one number
    threshold = noise.min_survivors
    secure = secagg.secure_sum(num_sites, num_bits=noise.num_bits, threshold=threshold)
    coding = site_privacy.distributed_noise(noise, secure, params, {}, made.clip if moves else None)

  def messages(sizes: Array, secrets: Array, number: Array) -> Message:
    """[K, ...] of the sites of a round."""
    server = Global(params, {}, private.init_server(params), number, jax.random.key(0))

    def send(size: Array, secret: Array, index: Array) -> Message:
      site = Site(
        index, size.reshape(1, 1, 1, 1), jnp.zeros(1, jnp.int32), jnp.int32(1), secret=secret
      )
      return private.site(server, (), site)[0]

    return jax.vmap(send)(sizes, secrets, jnp.arange(num_sites, dtype=jnp.int32))

  def one_round(size: Array, key: Key, number: Array) -> tuple[Array, Array]:
    secrets = jax.random.bits(key, (num_sites, 8), jnp.uint32)
    sizes = jnp.zeros(num_sites, jnp.float32).at[0].set(size)
    sent = messages(sizes, secrets, number)
    number_of = lambda message: message.update[0][_NUMBER][..., 0]
    if coding is None:
      return number_of(sent)[0], jnp.sum(number_of(sent))
    words = jnp.stack([number.astype(jnp.uint32), jnp.uint32(0)])
    blank = jnp.zeros((1, 8), jnp.uint32)

    def encode(message: Message, secret: Array) -> secagg.Masked:
      row = secagg.Row(jnp.int32(0), jnp.zeros(1, jnp.int32), blank, None, secret)
      return coding.encode(message, row, words)

    encoded = jax.vmap(encode)(sent, secrets)
    total = jax.tree.map(lambda a: jnp.sum(a, axis=0, dtype=a.dtype), encoded)
    return jnp.float32(0), number_of(coding.decode(total, words))

  scale = 1.0 if moves else units

  def canary(key: Key, norm: Array) -> Observed:
    coin, secret = jax.random.split(key)
    is_in = jax.random.bernoulli(coin)
    size = is_in.astype(jnp.float32) * norm * np.float32(units)

    def step(_, number: Array):
      return (), one_round(size, jax.random.fold_in(secret, number), number)

    _, (alone, summed) = jax.lax.scan(step, (), jnp.arange(rounds, dtype=jnp.int32))
    return Observed(alone / scale, summed / scale, is_in)

  @jax.jit
  def run(keys: Key, norm: Array) -> Observed:
    # A few at a time: the draws of many canaries' discrete noise are far larger than the caches.
    found = jax.lax.map(lambda key: canary(key, norm), keys, batch_size=8)
    alone = None if coding is not None else found.alone.T  # type: ignore[union-attr]
    return Observed(alone, found.summed.T, found.included)

  return lambda key, num_canaries, norm=10.0: run(
    jax.random.split(key, num_canaries), jnp.float32(norm)
  )


def judge(observed: Observed, made: SiteLevel, rounds: int, num_guesses: int) -> Audit:
  """What is proved by what was observed, against the claim of a plan.

  Bounds are in the family of Gaussian noise; that which sites make together is nearly so, and a
  little stronger than its claim.

  Args:
    observed: of `watch`.
    made: the plan that is claimed to have run.
    rounds: T.
    num_guesses: c, fixed before anything is observed.
  """
  included = np.asarray(observed.included)
  total = len(included)
  claimed, family = ledgers(made, rounds, total)
  bound = lambda right: one_run.f_dp_bound(family, total, num_guesses, right)

  def right(released: Array) -> int:
    scores = np.sum(np.asarray(released, np.float64), axis=0)
    return one_run.right_guesses(scores, included, num_guesses)

  of_sum = right(observed.summed)
  alone = None if observed.alone is None else right(observed.alone)
  return Audit(
    claim=accounting.epsilon(claimed),
    delta=claimed.delta,
    num_canaries=total,
    num_guesses=num_guesses,
    alone_right=alone,
    alone=None if alone is None else bound(alone),
    summed_right=of_sum,
    summed=bound(of_sum),
    final=bound(of_sum),  # a site is in every round, so the sum over rounds tells as much
    limit=bound(num_guesses),
  )


def ledgers(made: SiteLevel, rounds: int, num_canaries: int) -> tuple[Ledger, Ledger]:
  """What a plan claims for all rounds, and the same as Gaussian releases; delta is the plan's, or
  1 / num_canaries where that is smaller.
  """
  start = Ledger("site", min(made.delta, 1 / num_canaries))
  claimed = made.charge(start, rounds)
  if not any(release.curve for release in claimed.releases):
    return claimed, claimed
  release = accounting.gaussian("updates", made.noise_multiplier)
  return claimed, accounting.spend(start, release, rounds)


def fewest_canaries(made: SiteLevel, rounds: int, most: int = 2**14) -> int:
  """The fewest sites of which one run could refute its claim: all guesses about them being right,
  as where nothing is hidden. `most` + 1 where that many could not.
  """

  def refutes(num: int) -> bool:
    claimed, family = ledgers(made, rounds, num)
    return one_run.f_dp_bound(family, num, num, num) > accounting.epsilon(claimed)

  low, high = 0, 1
  while not refutes(high):
    if high == most:
      return most + 1
    low, high = high, min(2 * high, most)
  while high > low + 1:
    middle = (low + high) // 2
    low, high = (low, middle) if refutes(middle) else (middle, high)
  return high


def _algorithm() -> Algorithm:
  """FedAvg whose site sends the number that it holds."""

  def site(server: Global, state: tuple, site: Site):
    zero = jnp.zeros((), jnp.float32)
    update: PyTree = {_NUMBER: site.images.reshape(1)}, {}
    return Message(update, jnp.float32(1), Metrics(zero, zero, zero)), state

  return Algorithm(
    "canary", lambda params: (), lambda params, state: (), site, lambda server, total: None,  # type: ignore[arg-type, return-value]
    lambda server, state: (server.params, {}), uniform=True, shares_statistics=False,
  )  # fmt: skip
