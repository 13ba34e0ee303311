"""The coordinator of a run: it asks the sites what they want next, and passes on what opens one sum
after another, which it opens, too.

It holds no data, no model and no secret but its identity. Each site answers with its wish: to tell
all others something, to form a sum or to be told it, or to leave. `coordinate` knows nothing of
training. Every stage is a round trip over a carrier; a site that does not answer in time has
dropped out.

Who learns what: see `protocol`. The terms of a sum come from the sites: the coordinator takes those
on which most of them agree, and sites with other terms are not in the sum.
"""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax.secagg import ahead, errors, following, keys, opening, rounds
from primia_jax.secagg import messages as msg
from primia_jax.secagg import server as serving
from primia_jax.secagg.carrier import Ask
from primia_jax.secagg.errors import Aborted, Lost, Rejected, RoundFailed
from primia_jax.secagg.returning import giver_of

_IN_RUN = (msg.Proposal, msg.Start)  # the latter where a round begins without a site
_KNOCK = 20.0  # seconds for a site that was lost to say that it is back
_TO_ALL = {msg.Hello, msg.Word, msg.Start}  # what sites say to all others
_FAREWELL = 20.0  # seconds for the sites to take the news that a run has failed


class Report(NamedTuple):
  """The coordinator's account of a sum.

  Attributes:
    round, purpose: of the sum.
    opened: the sum and the sites in it.
    rejected: every message that it did not take: site, stage and reason.
    seconds: for each message to the sites, from the first request to the last answer: five, or
      three of a sum whose keys were agreed on before.
  """

  round: int
  purpose: int
  opened: serving.Opened
  rejected: tuple[Rejected, ...]
  seconds: tuple[float, ...]


def coordinate(
  ask: Ask,
  sites: Sequence[int],
  identity: keys.Identity,
  timeout: float,
  tell: Callable[[Report], None] = lambda report: None,
) -> dict[int, str]:
  """Serves a run from the first message to the last.

  Args:
    ask: the carrier.
    sites: numbers of all that must come to the meeting.
    identity: the coordinator's signing pair.
    timeout: seconds that a stage may take; a site's work between two messages is part of one.
    tell: called with each sum.

  Returns:
    What each site that left in order has said of its reason.

  Raises:
    Lost: a site is missing at the meeting, or every site has left for a reason or in silence.
    RoundFailed: too few messages came to open a sum. Both tell all sites why; and of what else is
      raised, such as by `tell`, they learn that the run has ended.
  """
  present = set(sites)
  fresh = os.urandom(keys.KEY_BYTES)
  invitation = msg.encode(msg.Invitation(identity.public, fresh))
  try:
    said = _round_trip(ask, dict.fromkeys(sites, invitation), timeout)
    left: dict[int, str] = {}
    met: set[type] = set()
    recalled = b""  # for sites that come back
    agreed: serving.Server | None = None  # the keys of the next sum
    has_begun = False  # the first sum, after which sites say nothing else to all others
    while True:
      for i in [i for i, one in said.items() if isinstance(one, msg.Ended)]:
        left[i] = errors.readable(said.pop(i).reason)
        present.discard(i)
      if has_begun := has_begun or any(isinstance(one, msg.Proposal) for one in said.values()):
        said = _alike(said)
      if not said:
        if all(left.values()):
          raise Lost(_said_on_leaving(left) or "no site answers any more")
        return left | dict.fromkeys(sorted(present), "without a word")
      if msg.Start in met:  # sums only: a site that says something else is lost, not the run
        said = {i: one for i, one in said.items() if isinstance(one, msg.Proposal)} or said
      kinds = collections.Counter(type(one) for one in said.values())
      if set(kinds) <= {msg.Proposal}:
        dismiss(ask, present - set(said), "this site did not answer in time")
        follow = {i for i, one in said.items() if not one.advert}
        report, said, agreed = _sum(ask, said, agreed, identity, timeout)
        tell(report)
        present = set(said) | set(report.opened.survivors) | follow
        continue
      if has_begun:
        back, said = _roll_call(ask, said, set(sites) - present, recalled, timeout)
        present |= back
        left = {i: reason for i, reason in left.items() if i not in back}
        continue
      if len(kinds) > 1 or set(said) != set(sites) or not set(kinds) <= _TO_ALL:
        raise Lost(_missing(sites, said, left, met))
      met |= set(kinds)
      spoken = {i: msg.encode(one) for i, one in said.items()}
      if set(kinds) == {msg.Hello}:
        recalled = msg.encode(msg.Recalled(identity.public, fresh, spoken))
      relayed = msg.encode(msg.Relayed(spoken))
      said = _round_trip(ask, dict.fromkeys(said, relayed), timeout)
  except Exception as error:
    known = isinstance(error, Aborted)
    why = str(error) if known else "the coordinator has failed; its own log says why"
    dismiss(ask, present, why, min(timeout, _FAREWELL))  # else a carrier may end too soon
    raise


def dismiss(ask: Ask, sites: Sequence[int] | set[int], reason: str, timeout: float = 0.0) -> None:
  """Tells sites that the run goes on without them, or has ended; they do not answer."""
  if sites:
    ask(dict.fromkeys(sorted(sites), msg.encode(msg.Dismissed(reason.encode()))), timeout)


def _alike(said: dict[int, Any]) -> dict[int, Any]:
  """What most sites say, of the two that they may say in a run; the others count as silent."""
  proposals, starts = ({i: m for i, m in said.items() if isinstance(m, k)} for k in _IN_RUN)
  return starts if len(starts) > len(proposals) else proposals


def _roll_call(
  ask: Ask, starts: Mapping[int, Any], lost: set[int], recalled: bytes, timeout: float
) -> tuple[set[int], dict[int, Any]]:
  """Takes back the sites that were lost and are there again; see `returning`.

  Returns:
    (the sites that are back, what all want next).
  """
  here = _round_trip(ask, dict.fromkeys(lost, recalled), min(timeout, _KNOCK))
  waiting = sorted(i for i, one in here.items() if isinstance(one, msg.Word))
  giver = giver_of(starts)
  returning = msg.encode(msg.Returning(tuple(waiting), giver))
  said = _round_trip(ask, dict.fromkeys(starts, returning), timeout)
  if not waiting:
    return set(), said
  given = said[giver].told if isinstance(said.get(giver), msg.Word) else b""
  resumed = msg.Resumed({i: msg.encode(one) for i, one in starts.items()}, given)
  back = {}
  if given:
    back = _round_trip(ask, dict.fromkeys(waiting, msg.encode(resumed)), timeout)
    back = {i: one for i, one in back.items() if isinstance(one, msg.Start)}
  relayed = msg.encode(msg.Relayed({i: msg.encode(one) for i, one in back.items()}))
  staying = {i for i, one in said.items() if isinstance(one, msg.Word)}
  ended = {i: one for i, one in said.items() if isinstance(one, msg.Ended)}
  return set(back), ended | _round_trip(ask, dict.fromkeys(staying | set(back), relayed), timeout)


def _missing(
  sites: Sequence[int], said: Mapping[int, Any], left: Mapping[int, str], met: set[type]
) -> str:
  gone = _said_on_leaving(left)
  absent = sorted(set(sites) - set(said) - set(left))
  what = "start" if msg.Hello in met else "hello"
  told = f"no {what} of sites {absent}; start their programs, too" if absent else ""
  kinds = {i: type(one).__name__ for i, one in said.items()}
  return "; ".join(filter(None, [told, gone])) or f"the sites do not say the same: {kinds}"


def _said_on_leaving(left: Mapping[int, str]) -> str:
  return "; ".join(f"site {i} left: {reason}" for i, reason in left.items())


def _round_trip(ask: Ask, requests: Mapping[int, bytes], timeout: float) -> dict[int, Any]:
  """The answers as messages, by site; what is none, or names another site, counts as silence."""
  said = {}
  for i, data in ask(requests, timeout).items():
    try:
      message: Any = msg.decode(data)
    except ValueError:
      continue
    if getattr(message, "site", None) == i:
      said[i] = message
  return said


def _sum(
  ask: Ask,
  proposals: Mapping[int, Any],
  agreed: serving.Server | None,
  identity: keys.Identity,
  timeout: float,
) -> tuple[Report, dict[int, Any], serving.Server | None]:
  """One sum over proposals, perhaps under keys that were agreed on before.

  Returns:
    (its report; what its survivors, and the sites that follow it, want next; the keys of the next
    sum, if all sites have agreed on them: see `ahead`).
  """
  rejected: list[Rejected] = []
  setup, round, follow = _agreed(proposals, rejected)
  dismiss(ask, _others(proposals, follow), "this site follows another sum than most sites form")
  seconds, limit = list[float](), rounds.message_bytes(setup)
  try:
    spoke = {i for i, one in proposals.items() if one.advert}
    state, bonds, beside = _begun(proposals, spoke, agreed, setup, round, limit, rejected)
    coming: serving.Server | None = None
    for close in serving.CLOSE[state.stage :]:
      state, out = close(state)
      sites = set(state.received[state.stage - 1])
      dismiss(ask, spoke - sites, f"this site was lost in stage {msg.STAGES[state.stage - 1]}")
      spoke, begun = sites, time.monotonic()
      more: Any = None  # for the keys of the next sum
      if isinstance(out, msg.Survivors) and set(beside) == set(setup.identities):
        start = serving.start(ahead.setup(setup, state.transcript), round)
        if coming := ahead.gather(start, beside, rejected):
          coming, more = serving.close_advertise(coming)
      elif isinstance(out, msg.Consents) and (coming := ahead.gather(coming, beside, rejected)):
        coming, more = serving.close_share_keys(coming)
      proof = bonds if isinstance(out, msg.Survivors) else None
      parts = out, proof, more
      to = lambda u, parts=parts: [one[u] if isinstance(one, dict) else one for one in parts]
      answers = ask({u: msg.encode(msg.together(*to(u))) for u in sites}, timeout)
      state, beside = _take(state, answers, limit, rejected)
      seconds.append(time.monotonic() - begun)
    state, opened = serving.open_total(state)
  except RoundFailed as error:
    error.add_note(f"rejected messages: {[str(r) for r in rejected]}")
    raise
  told = set(state.received[3])
  dismiss(ask, spoke - told, "this site was lost in stage consistency")
  evidence = opening.evidence(state, identity)
  requests = dict.fromkeys(told, msg.encode(evidence))
  if follow:
    requests |= dict.fromkeys(follow, msg.encode(following.tell(state, evidence)))
  begun = time.monotonic()
  said = _round_trip(ask, requests, timeout)
  seconds.append(time.monotonic() - begun)
  report = Report(round, setup.purpose, opened, tuple(rejected), tuple(seconds))
  return report, said, coming


def _begun(
  proposals: Mapping[int, Any],
  spoke: set[int],
  agreed: serving.Server | None,
  setup: rounds.Setup,
  round: int,
  limit: int,
  rejected: list[Rejected],
) -> tuple[serving.Server, msg.Bonds | None, dict[int, Any]]:
  """The state of a sum with what the sites have proposed: adverts, or bonds and masked inputs.

  Returns:
    (the state, the survivors' bonds, what came beside the masked inputs).
  """
  masked = {i: proposals[i].masked for i in sorted(spoke) if proposals[i].masked}
  if agreed is None or not ahead.fits(agreed.setup, setup) or 2 * len(masked) <= len(spoke):
    adverts = {i: proposals[i].advert for i in sorted(spoke)}
    state, beside = _take(serving.start(setup, round), adverts, limit, rejected)
    return state, None, beside
  state, bonds = ahead.serve(agreed, setup, round), dict[int, bytes]()
  for i in masked:
    try:
      bonds[i] = ahead.check_bond(state, i, proposals[i].advert)
    except Rejected as error:
      rejected.append(error.with_traceback(None))
  state, beside = _take(state, {i: masked[i] for i in bonds}, limit, rejected)
  signatures = {i: bonds[i] for i in sorted(state.received[2])}
  return state, msg.Bonds(round, signatures), beside


def _agreed(
  proposals: Mapping[int, Any], rejected: list[Rejected]
) -> tuple[rounds.Setup, int, set[int]]:
  """The terms and the round that most sites of a sum propose, and the sites that follow it."""
  wishes = collections.Counter((one.round, one.terms) for one in proposals.values() if one.advert)
  if not wishes:
    raise RoundFailed(msg.STAGES[0], 0, len(proposals), "sites want to be in the sum")
  (round, terms), _ = wishes.most_common(1)[0]
  follow = {
    i for i, one in proposals.items() if not one.advert and (one.round, one.terms) == (round, terms)
  }
  for i, one in proposals.items():
    if (one.round, one.terms) != (round, terms):
      why = "it proposes other terms than most sites"
      rejected.append(Rejected(i, msg.STAGES[0], "another round", why))
  try:
    told = msg.decode(terms)
    if not isinstance(told, msg.Terms):
      raise ValueError(f"{type(told).__name__} instead of terms")
    setup = rounds.of_terms(told)
    following.check_size(setup)
  except ValueError as error:
    raise RoundFailed(msg.STAGES[0], 0, len(proposals), f"sites propose a sum ({error})") from error
  return setup, round, follow


def _others(proposals: Mapping[int, Any], follow: set[int]) -> set[int]:
  """The sites that want to follow another sum."""
  return {i for i, one in proposals.items() if not one.advert} - follow


def _take(
  state: serving.Server, answers: Mapping[int, bytes], limit: int, rejected: list[Rejected]
) -> tuple[serving.Server, dict[int, Any]]:
  """Takes the sites' messages of a stage; also returns what came beside those that were taken."""
  beside = dict[int, Any]()
  for i, data in sorted(answers.items()):
    try:
      if len(data) > limit:
        raise ValueError(f"{len(data)} bytes; no message has over {limit}")
      message, *more = msg.apart(msg.decode(data))
      if getattr(message, "site", None) != i:
        raise ValueError(f"{type(message).__name__} is not a message of this site")
      state = serving.receive(state, message)
      beside.update(zip([i], more, strict=False))
    except Rejected as error:
      rejected.append(error.with_traceback(None))  # which would keep the message in memory
    except ValueError as error:
      rejected.append(Rejected(i, msg.STAGES[state.stage], "malformed", str(error)))
  return state, beside


def numbers(report: Report) -> dict[str, Any]:
  """A sum as a line of JSON: what happened, and nothing of what was summed."""
  opened = report.opened
  return {
    "round": report.round,
    "purpose": report.purpose,
    "survivors": list(opened.survivors),
    "dropouts": list(opened.dropouts),
    "liars": list(opened.liars),
    "rejected": [str(one) for one in report.rejected],
    "numbers": int(np.sum([v.size for v in opened.total])),
    "seconds": [float(f"{s:.3f}") for s in report.seconds],
  }
