"""The dealer's folder: what it keeps for each publication, and correlations for two parties.

| in the dealer's `models/NAME` | what |
| --- | --- |
| plan, tag | from the model owner |
| secret | of this dealer, for this publication |
| held/CLINIC, seeds/CLINIC | a clinic's part and the seeds, until some are checked |

What goes to the parties lies in `outbox/model_owner` and `outbox/CLINIC`; each is moved into its
receiver's `inbox/dealer` as it is (`inbox`). Anyone with both learns images and weights: each must
travel to its receiver alone, encrypted. The dealer keeps no copy, and without checks no seed
either.

**Checks** (`audited`): the dealer gives the model owner its part of all inferences, and holds back
the clinic's. It says which these are (HELD), since others may be with the clinic already. The model
owner draws some of them at random (`challenge`), the dealer opens their seeds to it alone
(`release`), destroys these inferences and all seeds, and only then gives the clinic its part of the
others. So no seed of an inference that can be used was ever opened, or still exists. The
model owner computes each opened one anew (`check`). If b of N are bad and m are opened, all checks
pass with probability C(N - b, m) / C(N, m) <= (1 - m/N)^b: with half of them opened, 20 bad ones
stay unseen with probability 1e-6 at most. A clinic's part that differs from what the model owner
checked has another number, which the clinic sees when it takes it. N counts what the dealer says
that it holds; what it leaves out is not checked, and `institutions` can refuse to use it.

Each step may be repeated after a kill. A dealer's folder must not be put back to an earlier state:
it would hold seeds of inferences that a clinic has.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Mapping

from primia_jax import durable
from primia_jax.mpc import committing, pricing, saving
from primia_jax.mpc.messages import Correlations
from primia_jax.mpc.roles import Dealer
from primia_jax.service import folders, inbox, publications
from primia_jax.service.folders import CORRELATIONS

MODEL_OWNER = inbox.MODEL_OWNER
CHALLENGE, OPENINGS, HELD = "challenge.json", "openings.json", "held.json"
_REST, _DECIDED = "rest", ".decided"
_OVERHEAD = 2**16  # bytes of a file besides what is dealt


def dealer(folder: pathlib.Path, name: str) -> Dealer:
  """The dealer of a publication, the same in each process; its blind lies in the outbox, once.

  Raises:
    FileNotFoundError: the model owner's plan or tag is missing.
  """
  place = publications.model_folder(folder, name)
  missing = [file for file in ("plan", "tag") if not (place / file).is_file()]
  if missing:
    raise FileNotFoundError(
      f"model={name}: {place} lacks {', '.join(missing)}; copy the model owner's outbox/dealer "
      f"into {folder}/inbox/model_owner"
    )
  found = Dealer(saving.read(place / "plan"), (place / "tag").read_text(), folders.secret(place))
  if not (place / "blind_given").exists():
    outbox = folders.make(_outbox(folder, MODEL_OWNER, name))
    (outbox / "blind").unlink(missing_ok=True)  # of a process that was killed
    saving.write(outbox / "blind", found.blind())
    durable.create(place / "blind_given", b"")
  return found


def inference_bytes(dealer: Dealer) -> int:
  """What one inference takes on the dealer's disk, about."""
  return sum(row.dealt for row in pricing.rows(dealer.plan.circuit)) + 2 * _OVERHEAD


def check_disk(folder: pathlib.Path, needed: int, most: float) -> None:
  """Raises ValueError unless a dealer's folder may grow by a number of bytes.

  Args:
    folder: the dealer's.
    needed: bytes that it will take besides what it holds.
    most: bytes that it may take in all.
  """
  text, free = pricing.bytes_text, shutil.disk_usage(folder).free
  if needed > 0.95 * free:
    raise ValueError(f"{text(needed)} are needed, and the disk has {text(free)} free; deal fewer")
  taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
  if taken + needed > most:
    raise ValueError(
      f"{text(needed)} are needed besides {text(taken)} that are there, and {text(int(most))} are "
      "allowed; move away what is dealt, or deal fewer"
    )


def ready(folder: pathlib.Path, name: str, clinic: str) -> int:
  """Inferences whose clinic's part has not left the dealer's folder."""
  places = _outbox(folder, clinic, name) / CORRELATIONS, _held(folder, name, clinic)
  return sum(len([*place.glob("*")]) for place in places)


def top_up(
  folder: pathlib.Path,
  dealer: Dealer,
  name: str,
  clinic: str,
  count: int,
  audited: bool = False,
  dealt: Callable[[], None] = lambda: None,
) -> None:
  """Deals until there are `count` inferences in the dealer's folder; writes one while it computes
  the next. A process that was killed loses the one at work, and the next call goes on.

  Args:
    folder: the dealer's.
    dealer: from `dealer`.
    name: of the publication.
    clinic: the data owner's name.
    count: of inferences.
    audited: hold back the clinic's part until `release`.
    dealt: called after each inference.

  Raises:
    ValueError: a challenge is open, or earlier inferences were dealt in the other way.
  """
  place = publications.model_folder(folder, name)
  first = _outbox(folder, MODEL_OWNER, name) / clinic / CORRELATIONS
  held, out = _held(folder, name, clinic), _outbox(folder, clinic, name) / CORRELATIONS
  is_open = _seeds(folder, name, clinic).with_suffix(_DECIDED).exists()
  if is_open or (not audited and any(held.glob("*"))):
    raise ValueError(
      f"inferences of {clinic} wait to be checked; open some of them before more are dealt"
    )
  second = held if audited else out
  stage = place / "dealing" / clinic
  for path in (first, second, stage):
    folders.make(path)
  _finish(stage, first, second)

  def write(both: tuple[Correlations, Correlations], seed: bytes) -> None:
    number = both[0].inference
    if audited:
      durable.create(folders.make(_seeds(folder, name, clinic)) / number, seed)
    for party in (1, 0):  # `_finish` rests on this order
      saving.write(stage / f"{number}.{party}", both[party])
    _finish(stage, first, second)

  missing = count - len([*held.glob("*")]) - len([*out.glob("*")])
  with concurrent.futures.ThreadPoolExecutor(1) as writer:
    before: concurrent.futures.Future[None] | None = None
    for _ in range(missing):
      seed = os.urandom(committing.SEED_BYTES)
      both = dealer.deal_committed(seed)
      if before is not None:
        before.result()
        dealt()
      before = writer.submit(write, both, seed if audited else b"")
    if before is not None:
      before.result()
      dealt()
  _say_held(folder, name, clinic)


def _say_held(folder: pathlib.Path, name: str, clinic: str) -> None:
  """Tells the model owner which of a clinic's inferences have not left the dealer's folder."""
  held = sorted(path.name for path in _held(folder, name, clinic).glob("*"))
  outbox = folders.make(_outbox(folder, MODEL_OWNER, name) / clinic)
  durable.replace(outbox / HELD, json.dumps(held).encode())


def _finish(stage: pathlib.Path, first: pathlib.Path, second: pathlib.Path) -> None:
  """Moves what is complete to where it leaves from; the clinic's file goes first, so that a model
  owner's alone is complete, too. The rest is of a killed process, and nobody has a part of it.
  """
  numbers = {path.name.rpartition(".")[0] for path in stage.glob("*")}
  for number in numbers:
    ours, theirs = (stage / f"{number}.{party}" for party in (0, 1))
    if ours.exists() and theirs.exists() and not _is_whole(ours):
      ours.unlink()
    if not ours.exists():
      theirs.unlink()
      continue
    if theirs.exists():
      theirs.rename(second / number)
      durable.sync_folder(second)
    ours.rename(first / number)
    durable.sync_folder(first)


def _is_whole(path: pathlib.Path) -> bool:
  try:
    saving.check(path)
  except ValueError:
    return False
  return True


def release(folder: pathlib.Path, name: str, clinic: str) -> tuple[int, int]:
  """Opens what the model owner's challenge asks for, to it alone, and releases the rest.

  Returns:
    The numbers of inferences opened and released.

  Raises:
    FileNotFoundError: there is no challenge.
    ValueError: the challenge names what is not held, or leaves nothing.
  """
  place = publications.model_folder(folder, name)
  held, seeds = _held(folder, name, clinic), _seeds(folder, name, clinic)
  decided = seeds.with_suffix(_DECIDED)
  if not decided.exists():  # a second challenge changes nothing
    asked = place / clinic / CHALLENGE
    if not asked.is_file():
      raise FileNotFoundError(
        f"{asked}: the model owner asks for nothing; copy its outbox/dealer into "
        f"{folder}/inbox/model_owner"
      )
    numbers, there = set(_listed(asked)), {path.name for path in held.glob("*")}
    if not numbers or not numbers < there:
      raise ValueError(
        f"{asked} names {len(numbers - there)} inferences that are not held, of {len(numbers)}; "
        "only some of those that no clinic has are opened, and each once. If this challenge was "
        f"answered before, copy {folder}/outbox/model_owner again; else publish anew"
      )
    durable.replace(decided, json.dumps(sorted(numbers)).encode())
    asked.unlink()
  opened = _listed(decided)
  outbox = folders.make(_outbox(folder, MODEL_OWNER, name) / clinic)
  if seeds.exists() and all((seeds / number).exists() for number in opened):
    shown = {number: (seeds / number).read_bytes().hex() for number in opened}
    durable.replace(outbox / OPENINGS, json.dumps(shown).encode())
  for path in [held / number for number in opened] + [*seeds.glob("*")]:
    path.unlink(missing_ok=True)
  for path in (held, seeds):
    if path.exists():
      durable.sync_folder(path)
  released = folders.make(_outbox(folder, clinic, name) / CORRELATIONS)
  left = [*held.glob("*")]
  for path in left:
    path.rename(released / path.name)
  durable.sync_folder(released)
  _say_held(folder, name, clinic)
  decided.unlink()
  return len(opened), len(left)


# ---- the model owner


def is_answered(folder: pathlib.Path, name: str, clinic: str) -> bool:
  """Whether a challenge is open and the dealer's answer to it has come."""
  place = publications.model_folder(folder, name) / clinic
  return (place / CHALLENGE).exists() and (place / OPENINGS).exists()


def challenge(folder: pathlib.Path, name: str, clinic: str, share: float) -> int:
  """Draws a share of what the dealer holds back to be opened, and destroys its own part of that.

  While a challenge is open, the same one is sent again.

  Args:
    folder: the model owner's.
    name: of the publication.
    clinic: the clinic's name.
    share: of the unused inferences that were not checked and that no clinic has.

  Returns:
    How many are asked for; the list is in the dealer's outbox.

  Raises:
    ValueError: the share is not in (0, 1), or the dealer holds too few.
  """
  if not 0 < share < 1:
    raise ValueError(f"share={share}; use more than 0 and less than 1")
  place = publications.model_folder(folder, name) / clinic
  if not (place / CHALLENGE).exists():
    (place / OPENINGS).unlink(missing_ok=True)  # of no challenge: nothing was asked yet
    held = set(_listed(place / HELD)) if (place / HELD).is_file() else set()
    numbers = sorted(held & set(folders.unused(place)) - folders.checked(place))
    count = round(share * len(numbers))
    if not 0 < count < len(numbers):
      raise ValueError(
        f"share={share} of the {len(numbers)} inferences that the dealer holds back for {clinic} "
        "is none or all; have it deal more with primia-deal --checked"
      )
    asked = sorted(secrets.SystemRandom().sample(numbers, count))
    rest = "\n".join(sorted(set(numbers) - set(asked)))
    durable.replace(place / _REST, rest.encode())
    durable.replace(place / CHALLENGE, json.dumps(asked).encode())
  asked = _listed(place / CHALLENGE)
  for number in asked:
    folders.destroy(place, number)
  outbox = folder / publications.OUTBOX / "dealer" / publications.MODELS / name / clinic
  durable.replace(folders.make(outbox) / CHALLENGE, json.dumps(asked).encode())
  return len(asked)


def check(folder: pathlib.Path, name: str, clinic: str, recomputed: Callable[[bytes], str]) -> int:
  """Checks what the dealer opened; bad ones cost it all of this clinic's correlations.

  The challenge is closed at last, so that a process that was killed checks the same again.

  Args:
    folder: the model owner's.
    name: of the publication.
    clinic: the clinic's name.
    recomputed: the number that an honest dealer gives a seed (`ModelOwner.recomputed`).

  Returns:
    How many were opened, all of them good.

  Raises:
    ValueError: the dealer opened others than were asked for, or some are bad. An answer to another
      challenge costs it nothing.
  """
  place = publications.model_folder(folder, name) / clinic
  asked = _listed(place / CHALLENGE)
  try:
    openings: Mapping[str, str] = json.loads((place / OPENINGS).read_bytes())
    seeds = {number: bytes.fromhex(seed) for number, seed in openings.items()}
  except (ValueError, AttributeError, TypeError) as error:
    raise ValueError(f"{place / OPENINGS} is damaged ({error}); copy it again") from error
  if not seeds.keys() & set(asked):
    (place / OPENINGS).unlink()
    raise ValueError(
      f"{place / OPENINGS} answers another challenge than the one that is open, and was removed; "
      "copy the dealer's answer to this one into inbox/dealer"
    )
  bad = [n for n in asked if n not in seeds or recomputed(seeds[n]) != n]
  if bad:
    for number in folders.unused(place):
      folders.destroy(place, number)
  else:
    known = folders.checked(place) | set((place / _REST).read_text().split())
    durable.replace(place / folders.CHECKED, "\n".join(sorted(known)).encode())
  for file in (CHALLENGE, OPENINGS, _REST):
    (place / file).unlink(missing_ok=True)
  if bad:
    raise ValueError(
      f"the dealer cannot account for {len(bad)} of {len(asked)} inferences that it dealt to "
      f"{clinic}: all of them are destroyed; publish anew, with another dealer"
    )
  return len(asked)


def _listed(path: pathlib.Path) -> list[str]:
  try:
    found = json.loads(path.read_bytes())
    if not (isinstance(found, list) and all(isinstance(v, str) for v in found)):
      raise ValueError("it is not a list of numbers")
  except ValueError as error:
    raise ValueError(f"{path} is damaged ({error}); copy it again") from error
  return found


def _outbox(folder: pathlib.Path, peer: str, name: str) -> pathlib.Path:
  return folder / publications.OUTBOX / peer / publications.MODELS / name


def _held(folder: pathlib.Path, name: str, clinic: str) -> pathlib.Path:
  return publications.model_folder(folder, name) / "held" / clinic


def _seeds(folder: pathlib.Path, name: str, clinic: str) -> pathlib.Path:
  return publications.model_folder(folder, name) / "seeds" / clinic
