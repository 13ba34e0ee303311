"""What the processes of a run, one for each site, take as its charges when they start again, or
when one comes back (`secagg.returning`).

A process that was killed may have charged a round that no other has begun, or lack one that all
others have charged to it. So each tells all others its ledgers (`ledger.public`), and all take the
same of what was told.

Who learns what: charges are public. A site that lies can raise its own charge only: those of
another site's images come from that site's own word, which it has signed, or from the word of so
many others that one of them is honest. So nobody can use up another site's budget, and a site whose
own record was lost is still charged what the others know. A site can end the run by what it says of
itself: all stop where any budget is spent.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from primia_jax.privacy import accounting, ledger
from primia_jax.privacy.accounting import Ledger, Release
from primia_jax.privacy.plan import Plan

_WRONG = ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
_MOST = 2**31  # times that a release may be charged
_LAST_BITS = 1e-9  # relative: two machines may compute one noise with other last bits


class _Said(NamedTuple):
  """What a site has told of a run: the ledger of each site, and the class counts that it knows."""

  ledgers: list[Ledger]
  counts: list[float] | None


def reconcile(told: Mapping[int, bytes], path: pathlib.Path, plan: Plan, least: int) -> None:
  """Notes with what all processes continue; `Ledgers` then charges what it lacks itself.

  Of each release a site was charged as often as it says, or as at least `least` others say, if that
  is more. Class counts are taken if so many sites hold them; else they are released, and charged,
  once more.

  Args:
    told: what is `ledger.public` of each site's process, by site, in messages that it has signed;
      empty for one that is missing, of which only the others' word counts.
    path: of this process's run.
    plan: of the run.
    least: more than the sites that may lie.

  Raises:
    ValueError: naming a site that has told no ledgers, those of another number of sites, or a
      charge that is not of the plan; or the sites that tell different class counts.
  """
  ledger.forget_agreed(path)
  said = {i: _said(i, data, len(told), plan) for i, data in sorted(told.items())}
  if not any(told.values()):
    return
  kinds = list(dict.fromkeys(r._replace(times=1) for r in (*plan.before, *plan.releases)))
  ledgers = []
  for i in said:
    times = {j: ledger.times_of(one.ledgers[i]) for j, one in said.items()}
    own, spent = times.pop(i), Ledger(plan.unit, plan.delta)
    for kind in kinds:
      others = sorted((of.get(kind, 0) for of in times.values()), reverse=True)
      enough = others[least - 1] if len(others) >= least else 0
      spent = accounting.spend(spent, kind, max(own.get(kind, 0), enough))
    ledgers.append(spent)
  ledger.note_agreed(path, ledgers, _counts(said, least))


def _said(site: int, data: bytes, num_sites: int, plan: Plan) -> _Said:
  if not data:
    return _Said([Ledger(plan.unit, plan.delta)] * num_sites, None)
  try:
    found = json.loads(data)
    ledgers, counts = [ledger.from_json(json.dumps(x)) for x in found["ledgers"]], found["counts"]
    if len(ledgers) != num_sites:
      raise ValueError(f"ledgers of {len(ledgers)} sites, and there are {num_sites}")
    if counts is not None and not all(map(math.isfinite, counts)):
      raise ValueError(f"class counts {counts}")
    counts = None if counts is None else [float(number) for number in counts]
    return _Said([_of_plan(one, plan) for one in ledgers], counts)
  except _WRONG as error:
    raise ValueError(f"site {site} has told no ledgers of this run ({error})") from error


def _of_plan(told: Ledger, plan: Plan) -> Ledger:
  """The same charges as the plan's own releases."""
  if (told.unit, told.delta) != (plan.unit, plan.delta):
    raise ValueError(f"unit={told.unit!r}, delta={told.delta}, not those of the run")
  out = Ledger(plan.unit, plan.delta)
  for release in told.releases:
    own = next((r for r in (*plan.before, *plan.releases) if _is_alike(r, release)), None)
    if own is None or type(release.times) is not int or release.times >= _MOST:
      raise ValueError(f"a charge of {release.what!r} that is not of the run")
    out = accounting.spend(out, own._replace(times=1), release.times)
  return out


def _is_alike(one: Release, other: Release) -> bool:
  numbers = lambda r: (r.noise_multiplier, r.sampling_rate, r.extra_delta, *r.curve)
  pairs = list(zip(numbers(one), numbers(other), strict=False))
  near = all(math.isclose(a, b, rel_tol=_LAST_BITS) for a, b in pairs)
  return one.what == other.what and len(one.curve) == len(other.curve) and near


def _counts(said: Mapping[int, _Said], least: int) -> list[float] | None:
  known = {i: one.counts for i, one in said.items() if one.counts is not None}
  first = next(iter(known.values()), None)
  if others := [i for i, counts in known.items() if counts != first]:
    raise ValueError(
      f"sites {others} tell other class counts than site {min(known)}, and the run had one sum of "
      "them; see whose ledger was changed, and restore it"
    )
  return first if len(known) >= min(least, len(said)) else None
