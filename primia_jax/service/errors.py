"""How a session of encrypted inference ends early; a wrong argument is a ValueError, as everywhere.

Whatever ends a session, the correlations that are at work in it are used up. A refusal that comes
before any are drawn costs none.
"""

from __future__ import annotations


class SessionEnded(RuntimeError):
  """The session is over without an answer."""


class Refused(SessionEnded):
  """One side does not agree to a session or an inference; the message says why."""


class UsedUp(Refused):
  """The correlations of this inference were used on the other side, and serve no more."""


class PutBack(UsedUp):
  """The other side was put back to an earlier state, and has destroyed its correlations."""


class Malformed(SessionEnded):
  """The other side sent what the protocol does not allow at this place."""


class PeerLost(SessionEnded):
  """The connection ended, or could not be made."""


class PeerLate(SessionEnded):
  """The other side sent nothing for too long."""
