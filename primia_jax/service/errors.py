"""How a session of encrypted inference ends early; a wrong argument is a ValueError, as everywhere.

Whatever ends a session, its correlations are used up.
"""

from __future__ import annotations


class SessionEnded(RuntimeError):
  """The session is over without an answer."""


class Refused(SessionEnded):
  """One side does not agree to a session or an inference; the message says why."""


class Malformed(SessionEnded):
  """The other side sent what the protocol does not allow at this place."""


class PeerLost(SessionEnded):
  """The connection ended, or could not be made."""


class PeerLate(SessionEnded):
  """The other side sent nothing for too long."""
