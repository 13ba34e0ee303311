"""Which patients a site shares with another one, by files that the two send each other, on request.

  blinded-0-to-1.json   this site's ids, blinded
  answer-0-to-1.json    the other's, blinded a second time

Each file is signed by its sender's key in the roster. Who learns what: see
`primia_jax.intersection`. What this site keeps between two steps lies in its own folder, and is
written down before a message goes out, so that a secret blinds one message of the other site.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from primia_jax import disclosure, durable
from primia_jax.secagg import keys, pinning, roster
from primia_jax.secagg.roster import Roster

from . import site_folders
from .settings import setting
from .site_folders import SITE, Member

if TYPE_CHECKING:
  from primia_jax import intersection

_FOLDER = "intersections"  # in a site's folder
_BLINDED, _ANSWER = "blinded", "answer"
_ANSWERED = "answered intersection"  # in the journal
_VERSION = 1
_TEXT = b"primia_jax intersection message v1"


@dataclasses.dataclass(frozen=True)
class Intersect:
  """Which patients are also at another site; with intersect, a step at a time."""

  other: int = setting(-1, "number of the other site")
  again: bool = setting(
    False,
    "with ids: also if this site has answered the other under this roster before; each time the "
    "other may learn of most_ids more whether they are here",
  )
  ids: str = setting(
    "", "first step: file of this site's patient ids, one a line, in the form that both agreed on"
  )
  blinded: str = setting("", "second step: the file that the other site made in its first")
  returned: str = setting("", "third step: the file that the other site made in its second")


class Ends(NamedTuple):
  """The two sites of an intersection.

  Attributes:
    folder: of this site.
    member: what its `site.toml` says.
    known: the roster.
    own: this site's identity.
    other: the other's number.
  """

  folder: pathlib.Path
  member: Member
  known: Roster
  own: keys.Identity
  other: int

  @property
  def context(self) -> bytes:
    pair = sorted((self.member.number, self.other))
    return roster.digest(self.known) + json.dumps(pair).encode()

  @property
  def kept(self) -> pathlib.Path:
    """What this site keeps between two steps."""
    return self.folder / _FOLDER / f"with_{self.other}.json"

  def to_send(self, what: str) -> pathlib.Path:
    return self.folder / _FOLDER / f"{what}-{self.member.number}-to-{self.other}.json"


Step = Callable[[Ends, pathlib.Path], None]


def intersect(site_dir: str, s: Intersect) -> None:
  """Takes one step.

  Raises:
    ValueError, FileNotFoundError: naming what is wrong; the step is not taken.
  """
  folder = site_folders.find(site_dir)
  member = site_folders.read(folder)
  if member.role != SITE:
    raise ValueError(f"site_dir={site_dir} is the coordinator's, which has no patients")
  begin: Step = functools.partial(_begin, again=s.again)
  steps: dict[str, Step] = {"ids": begin, "blinded": _respond, "returned": _finish}
  given = {name: getattr(s, name) for name in steps if getattr(s, name)}
  if len(given) != 1:
    raise ValueError(
      f"{' and '.join(f'{n}={v}' for n, v in given.items()) or 'no step'}: give one of ids, "
      "blinded and returned"
    )
  if s.again and not s.ids:
    raise ValueError("again belongs to ids, the first step; leave it out")
  known = pinning.held(folder)
  if s.other not in known.sites or s.other == member.number:
    raise ValueError(
      f"other={s.other} is not another site; the roster has {', '.join(map(str, known.sites))}, "
      f"and this one is {member.number}"
    )
  ((name, value),) = given.items()
  path = pathlib.Path(value).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"{name}={value}: there is no such file; check the path")
  ends = Ends(folder, member, known, site_folders.identity(folder), s.other)
  (folder / _FOLDER).mkdir(mode=0o700, exist_ok=True)
  steps[name](ends, path)


def _is_answer(one: dict[str, Any], ends: Ends) -> bool:
  mine = one.get("other"), one.get("roster")
  return one["did"] == _ANSWERED and mine == (ends.other, roster.digest(ends.known).hex())


def _begin(ends: Ends, path: pathlib.Path, again: bool = False) -> None:
  if ends.kept.exists():
    raise ValueError(
      f"an intersection with site {ends.other} is under way; finish it, or remove {ends.kept} and "
      "begin another one"
    )
  answers = [one["at"] for one in site_folders.notes(ends.folder) if _is_answer(one, ends)]
  if answers and not again:
    raise ValueError(
      f"this site has answered site {ends.other} under this roster already, on {answers[-1][:10]}: "
      "with each answer the other may learn of more ids that it guesses whether they are here; if "
      "another is meant, give --again"
    )
  policy = ends.member.limits.policy()
  policy.check(disclosure.EXACT_COUNTS)  # the other learns how many ids there are
  try:
    ids = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
  except UnicodeDecodeError as error:
    raise ValueError(f"ids={path} is not UTF-8 text ({error}); write one id a line") from error
  made = _library().Site(ids, ends.context, ends.member.limits.most_ids)
  count = len(made.blinded)
  if isinstance(policy.count(count), disclosure.Suppressed):
    raise ValueError(
      f"ids={path} has fewer than fewest_patients={policy.fewest_patients} patients, and the other "
      "site would learn how many; lower that floor in site.toml if it may"
    )
  durable.replace(ends.kept, made.encode())
  _write(ends, _BLINDED, made.blinded, "")
  print(f"blinded {count:,} ids; the other site will learn how many")
  print(f"send {ends.to_send(_BLINDED)} to site {ends.other}, and go on with its file: --blinded")


def _respond(ends: Ends, path: pathlib.Path) -> None:
  made, theirs = _kept(ends), _read(ends, path, _BLINDED)
  points = made.answer(theirs["points"])
  durable.replace(ends.kept, made.encode())  # first: the secret must not blind a second message
  facts = {"other": ends.other, "theirs": len(points), "roster": roster.digest(ends.known).hex()}
  site_folders.note(ends.folder, _ANSWERED, **facts)
  _write(ends, _ANSWER, points, theirs["digest"])
  print(f"site {ends.other} has {len(points):,} ids; blinded them a second time")
  print(f"send {ends.to_send(_ANSWER)} to site {ends.other}, and go on with its file: --returned")


def _finish(ends: Ends, path: pathlib.Path) -> None:
  made, theirs = _kept(ends), _read(ends, path, _ANSWER)
  mine = ends.to_send(_BLINDED)
  if not mine.is_file() or theirs["of"] != _digest(mine.read_bytes()):
    raise ValueError(f"returned={path} does not answer {mine}; ask site {ends.other} for the one")
  both, total = made.finish(theirs["points"]), len(made.blinded)
  shared = ends.folder / _FOLDER / f"shared_with_{ends.other}.txt"
  durable.replace(shared, "".join(f"{one}\n" for one in sorted(both)).encode())
  ends.kept.unlink()
  site_folders.note(ends.folder, "intersect", other=ends.other, ids=total, shared=len(both))
  print(f"{len(both):,} of {total:,} patients are at site {ends.other}, too")
  print(f"their ids are in {shared}, for this site's own eyes")


def _kept(ends: Ends) -> intersection.Site:
  if not ends.kept.is_file():
    raise FileNotFoundError(
      f"no intersection with site {ends.other} is under way; begin with this site's own --ids"
    )
  made = _library().Site.decode(ends.kept.read_bytes(), str(ends.kept))
  if not made.is_of(ends.context):
    raise ValueError(
      f"another roster was accepted since the intersection with site {ends.other} began; remove "
      f"{ends.kept}, and begin another one at both sites"
    )
  return made


def _library() -> ModuleType:
  try:
    from primia_jax import intersection  # here, because PyNaCl is an extra
  except ImportError as error:
    raise ValueError(
      "primia-site intersect needs PyNaCl: pip install 'primia-jax[intersection]'"
    ) from error
  return intersection


def _write(ends: Ends, what: str, points: list[bytes], of: str) -> None:
  body = {
    "version": _VERSION,
    "what": what,
    "sender": ends.member.number,
    "receiver": ends.other,
    "roster": roster.digest(ends.known).hex(),
    "of": of,
    "points": [point.hex() for point in points],
  }
  signature = keys.sign(ends.own.private, _TEXT + roster.canonical(body)).hex()
  durable.replace(ends.to_send(what), roster.canonical({**body, "signature": signature}))


def _read(ends: Ends, path: pathlib.Path, what: str) -> dict[str, Any]:
  """A message that the other site has signed for this one."""
  data, who = path.read_bytes(), f"site {ends.other}"
  try:
    body = json.loads(data)
    signature = bytes.fromhex(body.pop("signature"))
    points = [bytes.fromhex(point) for point in body["points"]]
    of, made_with = str(body["of"]), body["roster"]
    way = body["version"], body["what"], body["sender"], body["receiver"]
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is not a file of an intersection ({error!r}); ask {who}") from error
  if way != (_VERSION, what, ends.other, ends.member.number):
    raise ValueError(f"{path} is not the file '{what}' that {who} made for this one; ask for it")
  if made_with != roster.digest(ends.known).hex():
    raise ValueError(f"{path}: {who} holds another roster than this site; accept the same one")
  public = ends.known.sites[ends.other].public
  if not keys.verify(public, _TEXT + roster.canonical(body), signature):
    raise ValueError(f"{path} is not signed by {who}'s key in the roster; ask there for it again")
  return {"points": points, "of": of, "digest": _digest(data)}


def _digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()
