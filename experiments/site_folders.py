"""A site's own folder: what its operator wrote down, what it keeps, and the journal of what it did.

  site.toml        number, name, data and limits; the operator may edit it
  identity         its private key, which never leaves; public.json goes to the coordinator
  identity_next    the key that was made last, until a roster has it
  roster.json      the roster that it accepted (`secagg.pinning`)
  approval.json    what its operator approved (`primia_jax.approval`)
  ledger           of its images (`privacy.chain`)
  journal.jsonl    what was done, a line each
  log, log.1       what its programs of a run printed (`site_log`)
  opened           which sums its images are in, so that none can be subtracted (`opened`)

The coordinator has such a folder, too, without data and ledger.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import tomllib
from typing import Any

from primia_jax import approval, disclosure, durable
from primia_jax.secagg import keys, pinning

from . import refusals
from .configs.data import NO_IMAGES, Data
from .settings import names, require, setting

SETTINGS, IDENTITY, PUBLIC = "site.toml", "identity", "public.json"
APPROVAL, LEDGER, JOURNAL = "approval.json", "ledger", "journal.jsonl"
_RUNS, _DIGITS = "runs", 12  # folder of a site's runs, each named by so many digits
SITE, COORDINATOR = "site", "coordinator"


def _of_data(name: str) -> Any:
  field = Data.__dataclass_fields__[name]
  return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True)
class Own:
  """Where this site's images are, and how they are read."""

  data: str = setting(
    "",
    "images of this site: folder:PATH (a folder or tar, also of DICOM files), csv:PATH (a table "
    "with file, label, patient), npz:PATH, msd:PATH, medimeta:PATH or tfds:NAME; none for a site "
    "without images",
  )
  layout: str = _of_data("layout")
  ignore: str = _of_data("ignore")
  csv_columns: str = _of_data("csv_columns")
  patient_column: str = _of_data("patient_column")
  patient_pattern: str = _of_data("patient_pattern")
  task: str = _of_data("task")
  splits: str = _of_data("splits")
  data_dir: str = _of_data("data_dir")
  manual_dir: str = _of_data("manual_dir")
  skip_bad_files: bool = _of_data("skip_bad_files")

  def __post_init__(self):
    if self.data and self.data != NO_IMAGES:
      Data(**dataclasses.asdict(self))
      return
    for field in dataclasses.fields(self):
      if field.name != "data" and (value := getattr(self, field.name)):
        raise ValueError(
          f"{field.name}={value!r} with data={self.data!r}; name images, or leave it out"
        )


@dataclasses.dataclass(frozen=True)
class Limits:
  """What this site agrees to."""

  fewest_patients: int = setting(
    10, "fewest patients in a count that leaves this site; smaller counts are suppressed"
  )
  fewest_sites: int = setting(2, "fewest sites in a sum that this site takes part in")
  fewest_images: int = setting(1, "fewest images with which this site takes part")
  max_rounds: int = setting(0, "rounds of a run that may be approved; 0 sets no limit")
  max_epsilon: float = setting(
    0.0, "epsilon that all runs on these images may cost together; 0 sets no limit"
  )
  fewest_colluding: int = setting(
    1,
    "sites that may collude with a coordinator that lies before a sum of three sites and more "
    "tells this one's part; 0 trusts all",
  )
  most_ids: int = setting(
    100_000,
    "patients that another site may put into an intersection with this one's; it learns of each "
    "whether he is here, so that a number beyond what it can have lets it guess",
  )
  looks_at_models: bool = setting(
    True,
    "whether this site looks at each model before it trains it, on 16 of its own images, and ends "
    "the run if it looks made to reveal single images, whatever the configuration says",
  )
  leaves: str = setting(
    ",".join(disclosure.KINDS), "kinds of numbers that may leave this site, separated by commas"
  )

  def __post_init__(self):
    self.policy()
    require(0 < self.most_ids < 2**31, "most_ids", self.most_ids, "must be positive")
    for name in ("max_rounds", "max_epsilon", "fewest_colluding"):
      require(0 <= getattr(self, name) < 2**31, name, getattr(self, name), "must be 0 or positive")

  def policy(self) -> disclosure.Policy:
    """The floors as the library takes them."""
    floors = self.fewest_patients, self.fewest_sites, self.fewest_images
    return disclosure.Policy(names(self.leaves), *floors)


@dataclasses.dataclass(frozen=True)
class Member:
  """What `site.toml` holds.

  Attributes:
    number: of the site; -1 for the coordinator.
    name: of the institution.
    own: its data.
    limits: of what it agrees to.
  """

  number: int
  name: str
  own: Own = dataclasses.field(default_factory=Own)
  limits: Limits = dataclasses.field(default_factory=Limits)

  @property
  def role(self) -> str:
    return COORDINATOR if self.number < 0 else SITE

  @property
  def has_images(self) -> bool:
    return self.own.data != NO_IMAGES


def named(site_dir: str) -> pathlib.Path:
  """The folder that the operator named, which need not exist.

  Raises:
    ValueError: there is no name, or it cannot be a folder.
  """
  if not site_dir:
    raise ValueError("site_dir is empty; name this site's own folder, such as --site_dir=hospital")
  return refusals.folder("site_dir", site_dir)


def find(site_dir: str) -> pathlib.Path:
  """The folder of a member, which must be there.

  Raises:
    ValueError, FileNotFoundError: it is none, or others can read it.
  """
  folder = named(site_dir)
  if not (folder / SETTINGS).is_file():
    raise FileNotFoundError(
      f"site_dir={site_dir} holds no {SETTINGS}; make the folder with primia-site init"
    )
  if folder.stat().st_mode & 0o077:
    raise ValueError(f"site_dir={site_dir} can be read by other users; run chmod 700 on it")
  return folder


def write(folder: pathlib.Path, member: Member) -> None:
  """Writes `site.toml`."""
  lines = [f"number = {member.number}", f"name = {_toml(member.name)}"]
  for title, part in (("data", member.own), ("limits", member.limits)):
    lines += ["", f"[{title}]"]
    lines += [f"{name} = {_toml(value)}" for name, value in dataclasses.asdict(part).items()]
  durable.replace(folder / SETTINGS, ("\n".join(lines) + "\n").encode())


def read(folder: pathlib.Path) -> Member:
  """Reads `site.toml`.

  Raises:
    ValueError: naming the file, the line or the setting, and its value.
  """
  path = folder / SETTINGS
  try:
    found = tomllib.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not TOML ({error}); mend that line") from error
  parts = {"data": Own, "limits": Limits}
  if unknown := set(found) - {"number", "name", *parts}:
    raise ValueError(f"{path} has {sorted(unknown)}, which no site has; remove them")
  try:
    number, name = found["number"], found["name"]
    made = {title: _record(kind, found.get(title, {})) for title, kind in parts.items()}
  except KeyError as error:
    raise ValueError(f"{path} lacks {error}; write it") from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  if type(number) is not int or not isinstance(name, str):
    raise ValueError(f"{path}: number={number!r}, name={name!r}; give an integer and a text")
  return Member(number, name, made["data"], made["limits"])


def identity(folder: pathlib.Path) -> keys.Identity:
  """The member's identity; raises as `pinning.own_identity`."""
  return pinning.own_identity(folder / IDENTITY)


def approved(folder: pathlib.Path) -> approval.Approval | None:
  """What the operator approved; None before that.

  Raises:
    ValueError: the file is damaged.
  """
  path = folder / APPROVAL
  return approval.decode(path.read_bytes(), str(path)) if path.is_file() else None


def record(folder: pathlib.Path, approved: approval.Approval) -> None:
  """Records what the operator approves."""
  durable.replace(folder / APPROVAL, approval.encode(approved))
  note(folder, "approve", digest=approval.digest(approved).hex())


def run_of(folder: pathlib.Path, approved: approval.Approval) -> pathlib.Path:
  """Where an approved run is kept; another approval is another run."""
  return folder / _RUNS / approval.digest(approved).hex()[:_DIGITS]


def note(folder: pathlib.Path, did: str, **facts: Any) -> None:
  """Adds a line to the journal; it is on disk when this returns."""
  at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  line = json.dumps({"at": at, "did": did} | facts)
  durable.append(folder / JOURNAL, line.encode())


def notes(folder: pathlib.Path) -> list[dict[str, Any]]:
  """The journal.

  Raises:
    ValueError: a line is damaged.
  """
  path = folder / JOURNAL
  if not path.is_file():
    return []
  *lines, _ = path.read_bytes().split(b"\n")
  try:
    return [dict(json.loads(line)) for line in lines]
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error}); restore it") from error


def _record(kind: type, values: dict[str, Any]) -> Any:
  fields = {field.name: type(field.default) for field in dataclasses.fields(kind)}
  for name, value in values.items():
    if name not in fields:
      raise ValueError(
        f"{name}={value!r} is not a setting of a site; there are {', '.join(fields)}"
      )
    wanted = fields[name]
    is_whole = wanted is float and type(value) is int
    if type(value) is not wanted and not is_whole:
      raise ValueError(f"{name}={value!r} must be of type {wanted.__name__}")
  return kind(**values)


def _toml(value: Any) -> str:
  if isinstance(value, str):
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
  return str(value).lower() if isinstance(value, bool) else repr(value)
