"""What secure aggregation raises; a wrong argument is a ValueError, as everywhere."""

from __future__ import annotations


class Aborted(RuntimeError):
  """The caller gets no sum. Nothing partly masked is given out, and the keys are not used again."""


class RoundAborted(Aborted):
  """Too many of a round's sites are lost to open its sum, or to open it only as a whole.

  It is known before anything is sent. The caller may continue with the next round.
  """


class RoundFailed(Aborted):
  """Server: too few messages or shares came to open the sum.

  Attributes:
    stage: the stage that failed.
    have: how many sites or shares there are.
    need: how many are needed.
  """

  def __init__(self, stage: str, have: int, need: int, what: str):
    super().__init__(f"the round fails in stage {stage}: {have} {what}, and {need} are needed")
    self.stage, self.have, self.need = stage, have, need


class Refused(Aborted):
  """Site: the server's message would make it unsafe to continue, so this site leaves the round.

  Attributes:
    site: the site that refuses; -1 for the coordinator, or a key that is not a member's.
    stage: the stage in which it refuses, "total" where it opens a sum, or "roster", "hello" or
      "start" before the first round.
    reason: one of "out of turn", "another round", "unknown", "changed key", "forged", "too few",
      "malformed", "overlapping", "declared dead", "inconsistent", "falls apart", "older",
      "not confirmed".
  """

  def __init__(self, site: int, stage: str, reason: str, detail: str):
    who = f"site {site}" if site >= 0 else "this member"
    super().__init__(f"{who} refuses in stage {stage}: {reason}: {detail}")
    self.site, self.stage, self.reason = site, stage, reason


class Lost(Aborted):
  """Site: it is out of the run, or the run has ended. Later sums do not open for it either."""


class Rejected(ValueError):
  """Server: it does not take one message. Its state is unchanged and the round goes on.

  Attributes:
    site: the sender that the message names; None where not even that can be read.
    stage: the server's stage.
    reason: one of "malformed", "unknown", "forged", "another round", "repeated", "late", "early".
  """

  def __init__(self, site: int | None, stage: str, reason: str, detail: str):
    super().__init__(f"message of site {site} in stage {stage} is rejected: {reason}: {detail}")
    self.site, self.stage, self.reason = site, stage, reason


def readable(words: bytes) -> str:
  """What another machine says, as a terminal may show it: at most 500 printable characters."""
  return "".join(c for c in words[:2000].decode(errors="replace") if c.isprintable())[:500]
