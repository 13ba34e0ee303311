"""Whether a run may begin at a site: what its operator approved, its limits, and what is left of
its budget; and the journal of what was done.

A folder made by `primia-site init` decides for its site: images, columns and limits come from
`site.toml`, identities from the roster, settings from the approval. All is checked before the site
meets the others, but two things that depend on what these tell: the state that it takes from them
after it was lost, and what the run will cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax import approval, disclosure
from primia_jax.approval import Approval, NotApproved
from primia_jax.data.dataset import Dataset
from primia_jax.data.sites import Part
from primia_jax.privacy import accounting, histories
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.chain import FILE, Chain
from primia_jax.privacy.plan import Plan
from primia_jax.secagg import pinning, roster
from primia_jax.types import ModelState, Params

from . import approving, evaluations, folders, inputs, ledgers, settings, site_folders
from .configs import Train
from .configs.scoring import Evaluate
from .site_folders import COORDINATOR, Member

_ENTRY = "ledger"  # in the journal: the hash of the ledger's last entry
_DOES = {approving.TRAINING: ("trains", "train on"), approving.EVALUATION: ("scores", "score")}


class Site(NamedTuple):
  """A site's own folder, and what it says.

  Attributes:
    folder: of the site.
    member: what `site.toml` says.
    approved: by its operator.
  """

  folder: pathlib.Path
  member: Member
  approved: Approval

  @property
  def ledger(self) -> pathlib.Path:
    return self.folder / site_folders.LEDGER

  @property
  def run(self) -> pathlib.Path:
    """Where the approved run is kept."""
    return site_folders.run_of(self.folder, self.approved)


def of(run_dir: str, purpose: str = approving.TRAINING) -> Site | None:
  """The site whose folder this is; None if `primia-site` has not made it.

  Args:
    run_dir: the folder.
    purpose: what is to be done there, `approving.TRAINING` or `EVALUATION`.

  Raises:
    ValueError, FileNotFoundError: others can read it, it is no hospital's, or `site.toml` is wrong.
    NotApproved: its operator has approved nothing, or another purpose.
  """
  if not run_dir or not (pathlib.Path(run_dir).expanduser() / site_folders.SETTINGS).is_file():
    return None
  does, to = _DOES[purpose]
  folder = folders.role("run_dir", run_dir)
  member, approved = site_folders.read(folder), site_folders.approved(folder)
  if member.role == COORDINATOR:
    raise ValueError(
      f"run_dir={run_dir} is the coordinator's folder, which {does} nothing; its part is started "
      "with flwr run, as docs/flower.md says"
    )
  if not member.has_images and purpose == approving.EVALUATION:
    raise ValueError(
      f"data={site_folders.NO_IMAGES} in {folder / site_folders.SETTINGS}: a site without images "
      f"has nothing to {to}; name its images there, or take part once there are some"
    )
  if approved is None:
    raise NotApproved(
      f"run_dir={run_dir}: nothing is approved at this site, so that it {does} nothing; approve "
      f"the configuration that the coordinator sent: primia-site approve --site_dir={run_dir} "
      "--config=config.json" + " --model=COPY" * (purpose == approving.EVALUATION)
    )
  if (found := approving.purpose(approved)) != purpose:
    program = "primia-train" if found == approving.TRAINING else "primia-evaluate"
    raise NotApproved(
      f"run_dir={run_dir}: this site has approved a run of {program}; start that, or approve "
      "another configuration with primia-site approve"
    )
  return Site(folder, member, approved)


def number(site: Site, given: int | None) -> int:
  """The site's number; `given` is what a flag says, if it does.

  Raises:
    ValueError: the flag says another one.
  """
  if given not in (None, site.member.number):
    raise ValueError(
      f"site={given}, and number={site.member.number} in {site.folder / site_folders.SETTINGS}; "
      "leave --site out"
    )
  return site.member.number


def configured(site: Site, given: Mapping[str, Any]) -> Train:
  """What the site is offered: the approved settings, or others where flags are given, and its own
  images. `admit` refuses others.

  Args:
    site: the site.
    given: settings from the command line, by name.

  Raises:
    ValueError: a flag says what `site.toml` does, or the settings do not go together.
    NotApproved: the approval is for code with other settings.
  """
  if own := [name for name in given if name in approving.SITES_OWN]:
    raise ValueError(
      f"{own[0]}={given[own[0]]!r}: this site's images are named in "
      f"{site.folder / site_folders.SETTINGS}, and its ledger is beside it; leave {own[0]} out"
    )
  settled = json.loads(site.approved.configuration)
  if changed := set(settled) ^ set(approving.names_of_shared()):
    raise NotApproved(
      f"this code and the approved configuration differ in the settings {sorted(changed)}; approve "
      "the configuration again with primia-site approve"
    )
  return approving.multiprocess(settled | dict(given), site.member.own)


def admit(site: Site, config: Train) -> None:
  """Refuses a run that this site's operator has not approved, or that is beyond its limits.

  Raises:
    NotApproved: configuration, code, architecture or starting parameters are others.
    ValueError, FileNotFoundError: beyond a limit of `site.toml`, no roster was accepted, or it has
      other members.
  """
  with _noted(site):
    approval.check(site.approved, approving.offered(config))
    approving.check(config, site.member.limits)
    _check_roster(site, config.hospitals.num_sites)
    most, spent = site.member.limits.max_epsilon, ledgers.spent(_ledger(site))
    if most and spent >= most and not site.run.exists():
      raise ValueError(_beyond(site, spent, "have cost"))


def _ledger(site: Site) -> Chain:
  """The site's ledger, which must hold what the journal says that it held: a new one would forget
  what was spent.
  """
  if not (path := site.ledger / FILE).is_file():
    raise FileNotFoundError(
      f"{path}: this site's ledger is missing; restore it from a backup. Without it nobody knows "
      "what was spent"
    )
  chain = Chain(site.ledger, read_only=True)
  seen = [one[_ENTRY] for one in site_folders.notes(site.folder) if one.get(_ENTRY)]
  if seen and chain.place(seen[-1]) is None:
    raise ValueError(
      f"{chain.path} has lost entries: the journal of {site.folder} names the entry "
      f"{seen[-1][:16]}, which it does not hold; restore the file from a backup. Without it nobody "
      "knows what was spent"
    )
  return chain


@contextlib.contextmanager
def _noted(site: Site) -> Iterator[None]:
  """Notes a refusal in the journal."""
  try:
    yield
  except (ValueError, FileNotFoundError) as error:
    site_folders.note(site.folder, "refused", why=str(error))
    raise


def _check_roster(site: Site, num_sites: int) -> None:
  known, own = pinning.held(site.folder), site_folders.identity(site.folder)
  if len(known.sites) != num_sites:
    raise ValueError(
      f"num_sites={num_sites} of the approved configuration, and roster {known.serial} has "
      f"{len(known.sites)} sites; ask the coordinator which is right"
    )
  roster.check_numbers(known)
  mine = known.sites.get(site.member.number)
  if mine is None or mine.public != own.public:
    raise ValueError(
      f"number={site.member.number} in {site.folder / site_folders.SETTINGS}: roster "
      f"{known.serial} does not have this folder's key, {roster.fingerprint(own.public)}, at that "
      "number; correct it, or accept the roster that does"
    )


def check_images(site: Site, images: inputs.Inputs) -> None:
  """Refuses to take part with fewer images, or patients to train on, than the site's floors.

  Raises:
    ValueError: it does not say how many.
  """
  i, policy = site.member.number, site.member.limits.policy()
  train = images.train
  if not train.sizes[i]:  # nothing of it is in a sum of updates
    return
  ((patients, _),) = inputs.count_patients(Part(train.dataset, (train.sites[i],)))
  with _noted(site):
    policy.check_site(train.sizes[i] + images.validation.sizes[i] + len(images.test))
    if isinstance(policy.count(patients), disclosure.Suppressed):
      raise ValueError(
        f"fewest_patients={policy.fewest_patients} of this site: it would tell the others a "
        "smaller count, of its patients to train on, and takes no part; lower the floor in "
        f"{site.folder / site_folders.SETTINGS} if that count may be told"
      )


def check_sums(site: Site, config: Train) -> None:
  """Refuses sums over fewer sites than this site allows, where some turn out to have no images;
  raises as `approving.check_sums`.
  """
  with _noted(site):
    approving.check_sums(config, site.member.limits)


def check_start(site: Site, model: tuple[Params, ModelState]) -> None:
  """Refuses to go on from a model of another form than approved, or that is not finite; raises
  NotApproved.
  """
  with _noted(site):
    approval.check_parameters(site.approved, model)


def own_policy(site: Site, config: Train) -> disclosure.Policy:
  """What this site lets out: of its own floors and those of the configuration the larger ones."""
  mine, agreed = site.member.limits.policy(), config.disclosure.policy()
  floors = "fewest_patients", "fewest_sites", "fewest_images"
  larger = {name: max(getattr(mine, name), getattr(agreed, name)) for name in floors}
  return dataclasses.replace(mine, **larger)


def looking(site: Site, config: Train) -> Train:
  """The configuration by which this site trains: it looks at each model first if its operator
  wants that, whatever the coordinator has set.
  """
  if not site.member.limits.looks_at_models:
    return config
  return settings.replace(config, refuse_suspicious_models=True)


def check_budget(
  site: Site, plan: Plan, chain: Chain, rounds: int, done: int, counted: bool
) -> None:
  """Refuses a run that would cost this site's images more than is left of `max_epsilon`.

  Args:
    site: the site.
    plan: of the run.
    chain: the site's ledger.
    rounds: of the run.
    done: of these, the rounds after which it continues.
    counted: the releases before training were made, and are charged.

  Raises:
    ValueError: what all runs have cost, and what they would cost with this one.
  """
  if not (most := site.member.limits.max_epsilon):
    return
  left = rounds if math.isinf(plan.target_epsilon) else plan.rounds_within(rounds)
  if left <= done:
    return
  delta = min([plan.delta, *(one["delta"] for one in histories.runs(chain).values())])
  known = histories.histories(chain, delta)
  charged = [one.ledger for one in known if one.is_private] or [Ledger(plan.unit, delta)]
  before = () if counted else plan.before
  after = [plan.charge(functools.reduce(accounting.spend, before, x), left - done) for x in charged]
  bare = any(not one.is_private for one in known)
  total = math.inf if bare else max(map(accounting.epsilon, after))
  if total > most:
    with _noted(site):
      raise ValueError(_beyond(site, total, "would cost with this one"))


def _beyond(site: Site, total: float, what: str) -> str:
  spent = ledgers.spent(Chain(site.ledger, read_only=True))
  return (
    f"max_epsilon={site.member.limits.max_epsilon:g} of this site: all runs on its images {what} "
    f"epsilon {total:.4g}, of which {spent:.4g} is spent; it trains nothing. Offer a run with "
    f"fewer rounds or more noise, or raise the limit in {site.folder / site_folders.SETTINGS}"
  )


def note_start(site: Site, config: Train, done: int, last_entry: str) -> None:
  """Notes in the journal that training begins, after so many rounds, and the ledger's last entry,
  if any: a start may be charged.
  """
  digest = approval.digest(site.approved).hex()
  held = roster.digest(pinning.held(site.folder)).hex()
  facts = {"approval": digest, "roster": held, "after": done, "rounds": config.training.rounds}
  site_folders.note(site.folder, "start", **facts, **{_ENTRY: last_entry})


def note_round(site: Site, row: Mapping[str, Any], last_entry: str) -> None:
  """Notes a round in the journal: what its line says, and the ledger's last entry, if any."""
  told = {name: row[name] for name in ("round", "survivors", "lost", "epsilon") if name in row}
  site_folders.note(site.folder, "round", run=site.run.name, **told, **{_ENTRY: last_entry})


def admit_scoring(site: Site, config: Evaluate, model: evaluations.Model) -> None:
  """Refuses an evaluation that this site's operator has not approved, or that is beyond its limits.

  Args:
    site: the site.
    config: what it is offered.
    model: its own copy.

  Raises:
    NotApproved: configuration, code or model are others.
    ValueError, FileNotFoundError: beyond a limit of `site.toml`, no roster was accepted, or it has
      other members.
  """
  with _noted(site):
    approval.check(site.approved, evaluations.offered(config, model))
    evaluations.check(config, site.member.limits)
    _check_roster(site, config.scoring.num_sites)
    if config.scoring.dp_count_noise:
      _ledger(site)


def check_scored(site: Site, images: Dataset) -> None:
  """Refuses to take part with fewer images, or patients, than the site's floors; raises a
  ValueError that does not say how many.
  """
  policy = site.member.limits.policy()
  with _noted(site):
    policy.check_site(len(images))
    if isinstance(policy.count(len(np.unique(images.groups))), disclosure.Suppressed):
      raise ValueError(
        f"fewest_patients={policy.fewest_patients} of this site: it has fewer patients to score, "
        f"and takes no part; lower the floor in {site.folder / site_folders.SETTINGS} if counts of "
        "so few may be summed"
      )


def note_charged(site: Site, last_entry: str) -> None:
  """Notes in the journal that the ledger was charged, and its last entry, before anything of what
  was charged leaves: an older copy of the ledger is then missed.
  """
  site_folders.note(site.folder, "charged", run=site.run.name, **{_ENTRY: last_entry})


def note_scored(site: Site, survivors: Sequence[int]) -> None:
  """Notes in the journal that the sum was opened, and over which sites."""
  site_folders.note(site.folder, "scored", run=site.run.name, sites=list(survivors))
