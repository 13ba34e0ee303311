"""What crossed in a sum, kept for attacks on it: a simulation that protects nobody."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.summation import Outcome, Purpose, Session, Summation
from primia_jax.types import PyTree


class Seen(NamedTuple):
  """What crossed in one sum.

  Attributes:
    round, purpose: of the sum.
    ids: [K] int32, numbers of the sites whose message is in it, in increasing order.
    messages: [K, ...], what each of them sent before it was masked.
    total: the message that was opened.
  """

  round: int
  purpose: Purpose
  ids: np.ndarray
  messages: PyTree
  total: PyTree


def recorded(summation: Summation, sink: Callable[[Seen], None]) -> Summation:
  """The summation, which also gives every single message to `sink`; sums of integers stay the same.

  Who learns what: whoever has what the sink keeps sees each site's message, as the server does in
  the clear. It is for simulations that are attacked on purpose, and protects nobody.

  Args:
    summation: of one process, which plays all sites.
    sink: called on the host when a sum has been opened, before it is used.

  Raises:
    ValueError: the sum forms between processes, whose messages are never in one place.
  """
  if summation.between_processes:
    raise ValueError(
      f"{summation.name!r} masks a message before it leaves its process, so that nobody can record "
      "it; record a simulation, with summation.masked or clear"
    )

  def send(message: PyTree, row: PyTree) -> tuple[PyTree, PyTree]:
    return summation.send(message, row), message

  @jax.jit
  def add(sent: PyTree) -> PyTree:
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), sent)
    step = lambda total, row: (jax.tree.map(jnp.add, total, row), None)
    return jax.lax.scan(step, zeros, sent)[0]  # in the order of `sites.scan`

  def end(session: Session, gathered: tuple[PyTree, PyTree]) -> tuple[PyTree, Outcome]:
    sent, messages = gathered
    total, outcome = summation.end(session, sent if summation.stacks else add(sent))
    order = np.argsort(session.ids)
    positions = order[np.isin(session.ids[order], outcome.survivors)]
    seen = Seen(
      session.round,
      session.purpose,
      outcome.survivors,
      jax.tree.map(lambda a: a[positions], messages),
      total,
    )
    sink(jax.tree.map(np.asarray, seen))
    return total, outcome

  return summation._replace(send=send, end=end, stacks=True)
