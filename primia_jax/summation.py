"""Sums over sites: the one contract by which messages leave a site and become their sum.

A `Summation` begins a session for each sum, says what a site sends in it, and opens the sum. The
same contract serves sums in the clear, sums under masks that one process simulates, sums between
processes by the secure aggregation protocol, and robust rules. The keys of a masked sum are drawn
from the operating system when its session begins, are in no state, and die with the session, so
no caller can use a mask twice.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import ring, secagg
from primia_jax.secagg import exchange, simulation
from primia_jax.types import Array, PyTree


class Purpose(enum.IntEnum):
  """What a sum is for. No two purposes of a round share a mask."""

  TRAINING = 0
  EVALUATION = 1
  COUNTING = 2


class Outcome(NamedTuple):
  """What a sum reports besides its value.

  Attributes:
    survivors: numbers of the sites whose message is in the sum, in increasing order.
    out_of_range: number of sites whose message did not fit the encoding; unless it is 0, the sum
      must not be used.
  """

  survivors: np.ndarray
  out_of_range: Array


class Session:
  """One sum, from the drawing of its keys to its opening.

  It serves once, in the process that began it. It cannot be copied or pickled, and nothing of it
  belongs in a checkpoint.

  Attributes:
    round, purpose: of the sum.
    ids: numbers of the K sites, int32.
  """

  def __init__(
    self, round: int, purpose: Purpose, ids: np.ndarray, rows: PyTree, private: PyTree = None
  ):
    """Called by the `begin` of a summation.

    Args:
      round, purpose, ids: see the attributes.
      rows: [K, ...], what each site needs to send its message.
      private: what only `end` needs.
    """
    if not 0 <= round < 2**31:
      raise ValueError(f"round={round}; the number of a round is in [0, 2^31)")
    self.round, self.purpose, self.ids = round, purpose, ids
    self._rows, self._private, self._process = [rows], [private], os.getpid()

  def rows(self, positions: np.ndarray) -> PyTree:
    """The rows of the sites at these positions among the K; given out once.

    Raises:
      RuntimeError: the rows were given out before, or the process was forked since.
    """
    rows = self._take(self._rows, "its sites have sent their messages")
    if np.array_equal(positions, np.arange(len(self.ids))):
      return rows
    return jax.tree.map(lambda a: a[positions], rows)

  def close(self) -> PyTree:
    """What `end` needs to open the sum; given out once.

    Raises:
      RuntimeError: the sum was opened before, or the process was forked since.
    """
    private = self._take(self._private, "its sum was opened")
    self._rows.clear()
    return private

  def _take(self, held: list[PyTree], how: str) -> PyTree:
    where = f"the session of round {self.round}, {self.purpose.name},"
    if os.getpid() != self._process:
      raise RuntimeError(
        f"{where} was begun before this process was forked, and its masks may be used in the other "
        "one; begin a session in this process"
      )
    try:
      return held.pop()  # atomic, so that two threads never get the same
    except IndexError:
      raise RuntimeError(
        f"{where} is used up: {how}. One-time masks serve one sum; begin a session for each"
      ) from None

  def __reduce__(self):
    raise TypeError("a session holds one-time keys; it cannot be copied, pickled or saved")


# () -> the message's shapes; called by summations whose parties agree on them before they train
Shapes = Callable[[], PyTree]


class Summation(NamedTuple):
  """How the messages of a round's sites become their sum.

  Attributes:
    name: as reports print it.
    begin: (round, purpose, site numbers [K] int32, shapes=None, dropouts=None) -> Session, on the
      host. It raises a ValueError for sites that the summation cannot serve, and
      `secagg.RoundAborted` where too few of them are left. `secagg.Dropouts` simulates losses.
    send: (message, the site's row) -> what the site sends; pure, under jit. A row serves one
      message: `federated.over_sites` sees to that. The row of a lost site turns its message into
      zeros.
    end: (Session, what the placement gathered) -> (message, Outcome), on the host. Gathered is the
      sum over sites or, with `stacks`, every site's message [K, ...].
    stacks: whether `end` takes single messages instead of their sum.
    hides: whether every single site's message is hidden.
    is_rule: whether `end` combines messages by a robust rule, which treats all sites alike, and not
      by a sum.
    between_processes: whether each process sends its own site's message, so that the sum forms
      between them; exactly these summations go with `sites.own_process`.
  """

  name: str
  begin: Callable[..., Session]
  send: Callable[[PyTree, PyTree], PyTree]
  end: Callable[[Session, PyTree], tuple[PyTree, Outcome]]
  stacks: bool = False
  hides: bool = False
  between_processes: bool = False
  is_rule: bool = False


class Coding(NamedTuple):
  """How a message becomes ring elements for a masked sum, and back.

  Attributes:
    name: as reports print it.
    encode: (message, secagg.Row, (round, purpose)) -> secagg.Masked, without masks; under jit.
    decode: (sum of the encoded messages, (round, purpose)) -> message; under jit.
    min_survivors: fewest messages in a sum, e.g. for the noise that each brings; a round with fewer
      is aborted.
  """

  name: str
  encode: Callable[[PyTree, secagg.Row, Array], secagg.Masked]
  decode: Callable[[secagg.Masked, Array], PyTree]
  min_survivors: int = 1


def fixed_point(config: secagg.SecureSum) -> Coding:
  """Numbers up to `config.max_abs` in fixed point; see `secagg.encode` and `secagg.open_sum`."""
  return Coding(
    "secure aggregation",
    lambda message, row, words: secagg.encode(message, config),
    lambda total, words: secagg.open_sum(total, config)[0],
  )


def clear(min_survivors: int = 1) -> Summation:
  """The plain sum. The server sees every site's message.

  A sum that is not finite counts as one site out of range.
  """
  return Summation("in the clear", _begin_clear(None, min_survivors), _send_clear, _end_clear)


def alone() -> Summation:
  """The message of one site that trains by itself (local or pooled training): nothing leaves it."""
  return clear()._replace(name="one site", begin=_begin_clear(1, 1), hides=True)


def by_rule(name: str, rule: Callable[[PyTree], PyTree]) -> Summation:
  """A robust rule, which sees every site's message; see `robust`.

  Args:
    name: as reports print it.
    rule: messages [K, ...] -> one message, which is used as a sum over one site.
  """
  rule = jax.jit(rule)

  def end(session: Session, stack: PyTree) -> tuple[PyTree, Outcome]:
    counted, positions = session.close(), None
    if not counted.all():
      positions = np.flatnonzero(counted)
      stack = _take(stack, positions)
    message, out_of_range = _check_finite(rule(stack))
    return message, Outcome(np.sort(session.ids[counted]), out_of_range)

  return clear()._replace(name=name, end=end, stacks=True, is_rule=True)


def masked(config: secagg.SecureSum, coding: Coding | None = None) -> Summation:
  """Secure aggregation with all sites in one process, or in the processes of one operator.

  Who learns what: the server's part sees the sum of the messages only; see `secagg`. The process
  that plays all sites could see everything. With `config.masked=False` there are no masks and no
  protection, for comparison.

  Args:
    config: the masks, the sites of a round and the threshold.
    coding: None for `fixed_point(config)`.
  """
  coding = fixed_point(config) if coding is None else coding

  def begin(round, purpose, ids, shapes=None, dropouts=None) -> Session:
    _check_sites(coding.name, ids, config.num_sites)
    words = (int(round), Purpose(purpose))
    begun = simulation.begin(config, words, ids, dropouts)
    _check_survivors(int(begun.counted.sum()), coding.min_survivors)
    each = np.broadcast_to(np.array(words, np.uint32), (len(ids), 2))
    rows = begun.rows, begun.counted, each
    return Session(int(round), Purpose(purpose), ids, rows, (begun.counted, begun.residue))

  def send(message: PyTree, row: tuple[secagg.Row, Array, Array]) -> secagg.Masked:
    keys, is_counted, words = row
    sent = secagg.mask(coding.encode(message, keys, words), keys, (words[0], words[1]), config)
    return _where(is_counted, sent)

  @jax.jit
  def decode(total: secagg.Masked, residue: secagg.Residue, words: Array) -> tuple[PyTree, Array]:
    total = secagg.unmask(total, residue, (words[0], words[1]), config)
    return coding.decode(total, words), ring.reduce(total.out_of_range, config.fixed.num_bits)

  def end(session: Session, total: secagg.Masked) -> tuple[PyTree, Outcome]:
    counted, residue = session.close()
    words = np.array([session.round, session.purpose], np.uint32)
    message, out_of_range = decode(total, residue, words)
    return message, Outcome(np.sort(session.ids[counted]), out_of_range)

  return Summation(coding.name, begin, send, end, hides=config.masked)


def over(
  messages: exchange.Exchange, config: secagg.SecureSum, coding: Coding | None = None
) -> Summation:
  """Secure aggregation between processes that share nothing but messages; see `secagg.exchange`.

  Who learns what: see `secagg.protocol`. The site function returns ring elements without masks,
  which stay in this process; the exchange masks them. A process whose site is not in the sum runs
  no site function, and is told the sum.

  Args:
    messages: this process's end of all sums.
    config, coding: see `masked`; all processes have the same.
  """
  coding = fixed_point(config) if coding is None else coding
  # The shapes of a site's row, which has no peers: the exchange adds the masks.
  shape: Any = jax.ShapeDtypeStruct
  site, peers, pair_keys = shape((), np.int32), shape((0,), np.int32), shape((0, 8), np.uint32)
  like = secagg.Row(site, peers, pair_keys, None, shape((8,), np.uint32))

  def begin(round, purpose, ids, shapes=None, dropouts=None) -> Session:
    _check_sites(coding.name, ids, config.num_sites)
    if dropouts is not None:
      raise ValueError("dropouts simulate losses; sites in processes of their own are really lost")
    words = np.array([round, purpose], np.uint32)
    elements = jax.eval_shape(coding.encode, shapes(), like, words)
    least, sites = coding.min_survivors, ids.tolist()
    begun = messages.begin(elements, int(round), int(purpose), config, least, sites)
    if begun.site is None:  # this site follows the sum, and sends nothing
      return Session(int(round), Purpose(purpose), ids, None, begun)
    stretched = lambda a: np.broadcast_to(np.asarray(a), (len(ids), *a.shape[1:]))
    rows = jax.tree.map(stretched, begun.rows), np.tile(words, (len(ids), 1))
    return Session(int(round), Purpose(purpose), ids, rows, begun)

  def send(message: PyTree, row: tuple[secagg.Row, Array]) -> secagg.Masked:
    return coding.encode(message, *row)

  @jax.jit
  def decode(total: secagg.Masked, words: Array) -> tuple[PyTree, Array]:
    return coding.decode(total, words), ring.reduce(total.out_of_range, config.fixed.num_bits)

  def end(session: Session, elements: secagg.Masked) -> tuple[PyTree, Outcome]:
    total = messages.finish(session.close(), elements)
    words = np.array([session.round, session.purpose], np.uint32)
    message, out_of_range = decode(total, words)
    return message, Outcome(np.asarray(messages.survivors, np.int32), out_of_range)

  name = f"{coding.name} between processes"
  return Summation(name, begin, send, end, hides=True, between_processes=True)


def losing(
  summation: Summation, dropouts: Callable[[int, Purpose, np.ndarray], secagg.Dropouts | None]
) -> Summation:
  """The summation with sites lost as `dropouts` (round, purpose, site numbers) says."""

  def begin(round, purpose, ids, shapes=None) -> Session:
    return summation.begin(round, purpose, ids, shapes, dropouts(int(round), Purpose(purpose), ids))

  return summation._replace(begin=begin)


def _begin_clear(num_sites: int | None, min_survivors: int) -> Callable[..., Session]:
  def begin(round, purpose, ids, shapes=None, dropouts=None) -> Session:
    _check_sites("the plain sum" if num_sites is None else "one site", ids, num_sites)
    counted = ~simulation.stages_of(dropouts, len(ids))[:2].any(axis=0)
    _check_survivors(int(counted.sum()), min_survivors)
    return Session(int(round), Purpose(purpose), ids, counted, counted)

  return begin


def _send_clear(message: PyTree, is_counted: Array) -> PyTree:
  return _where(is_counted, message)


def _end_clear(session: Session, total: PyTree) -> tuple[PyTree, Outcome]:
  counted = session.close()
  message, out_of_range = _check_finite(total)
  return message, Outcome(np.sort(session.ids[counted]), out_of_range)


@jax.jit
def _check_finite(total: PyTree) -> tuple[PyTree, Array]:
  finite = jnp.stack([jnp.isfinite(t).all() for t in jax.tree.leaves(total)]).all()
  return total, jnp.logical_not(finite).astype(jnp.uint32)


@jax.jit
def _take(stack: PyTree, positions: Array) -> PyTree:
  return jax.tree.map(lambda a: a[positions], stack)


def _where(is_counted: Array, sent: PyTree) -> PyTree:
  return jax.tree.map(lambda a: jnp.where(is_counted, a, jnp.zeros_like(a)), sent)


def _check_sites(name: str, ids: np.ndarray, num_sites: int | None) -> None:
  if num_sites not in (None, len(ids)):
    raise ValueError(f"{name} was set up for {num_sites} sites, but {len(ids)} take part")
  if not len(ids) or len(np.unique(ids)) != len(ids) or np.min(ids) < 0:
    raise ValueError(
      f"site numbers {ids.tolist()}; a sum needs at least one, all different and none negative"
    )


def _check_survivors(num_survivors: int, min_survivors: int) -> None:
  if num_survivors < min_survivors:
    raise secagg.RoundAborted(
      f"round aborted: {num_survivors} sites' messages came, and {min_survivors} must"
    )
