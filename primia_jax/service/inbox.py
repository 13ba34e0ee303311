"""What other institutions give a role: it lies in `inbox/SENDER` until it is taken from there.

A role takes only what this sender may give it, under the names that it may have, and never replaces
what it holds. So a dealer cannot let itself in as a clinic, and a delivery cannot change a pinned
certificate. A model owner also refuses correlations that it has, or had, for another clinic: with
one seed for two clinics, each would know the other's masks.
"""

from __future__ import annotations

import os
import pathlib
import re

from primia_jax import durable
from primia_jax.mpc import saving
from primia_jax.service import certificates, folders

INBOX = "inbox"
MODEL_OWNER, DEALER, CLINIC, HELPER = "model_owner", "dealer", "clinic", "helper"
_NAME = r"[a-z0-9][a-z0-9-]{0,62}"
_WHO = rf"(?!(?:{'|'.join(certificates.RESERVED)})/){_NAME}"  # a clinic or helper
_INFERENCE = "correlations/[0-9a-f]{64}"
# (role, sender) -> what it takes: a path, and whether a later one replaces it
_TAKES = {
  (MODEL_OWNER, DEALER): (
    (f"models/{_NAME}/blind", False),
    (f"models/{_NAME}/{_WHO}/{_INFERENCE}", False),
    (f"models/{_NAME}/{_WHO}/(openings|held).json", True),
  ),
  (DEALER, MODEL_OWNER): (
    (f"models/{_NAME}/(plan|tag)", False),
    (f"models/{_NAME}/{_WHO}/challenge.json", True),
  ),
  (CLINIC, MODEL_OWNER): ((rf"models/{_NAME}/(about\.json|plan|publication|server\.pem)", False),),
  (CLINIC, DEALER): ((f"models/{_NAME}/{_INFERENCE}", False),),
}
_TAKES |= {(HELPER, sender): _TAKES[CLINIC, sender] for sender in (MODEL_OWNER, DEALER)}
_CHECKED = ("plan", "publication", "blind")


def collect(folder: pathlib.Path, role: str) -> int:
  """Takes what other institutions have sent into the role's folder, and returns how many files.

  Names that begin with a dot are left alone, since rsync calls so what it is still copying. A file
  that the role holds already is removed if it is the same. What is refused stays where it is, and
  keeps nothing else from being taken.

  Raises:
    ValueError: a sender gives what it may not, a file is damaged, or it differs from what is held;
      or the file system refuses. The message says so of the first file, and how many others.
  """
  count, reasons = 0, list[str]()
  for (receiver, sender), takes in _TAKES.items():
    place = folder / INBOX / sender
    if receiver != role or not place.is_dir():
      continue
    for path in sorted(place.rglob("*")):
      name = path.relative_to(place).as_posix()
      if path.is_dir() and not path.is_symlink():
        continue
      if not any(part.startswith(".") for part in path.relative_to(place).parts):
        try:
          count += _take(folder, path, name, takes)
        except ValueError as error:
          reasons.append(str(error))
        except OSError as error:
          reasons.append(f"{path} cannot be taken ({error.strerror}); make room for it")
  if reasons:
    others = f" (and {len(reasons) - 1} other files)" * (len(reasons) > 1)
    raise ValueError(reasons[0] + others)
  return count


def _take(
  folder: pathlib.Path, path: pathlib.Path, name: str, takes: tuple[tuple[str, bool], ...]
) -> int:
  replaces = [again for pattern, again in takes if re.fullmatch(pattern, name)]
  if not replaces or path.is_symlink() or not path.is_file():
    raise ValueError(f"{path} is nothing that {path.parents[0]} may send; remove it, and ask why")
  if path.name in _CHECKED:
    saving.check(path)
  target = folder / name
  if re.fullmatch(f"models/{_NAME}/{_WHO}/{_INFERENCE}", name):
    _check_alone(path, target)
  if target.exists() and not replaces[0]:
    if target.read_bytes() != path.read_bytes():
      raise ValueError(
        f"{path} differs from {target}, which is never replaced; remove one of them, and ask why"
      )
    path.unlink()
    return 0
  _folders(folder, target.parent)
  os.replace(path, target)
  durable.sync_folder(target.parent)
  return 1


def _check_alone(path: pathlib.Path, target: pathlib.Path) -> None:
  """Refuses an inference that another clinic of the same publication has, or had."""
  who, number = target.parents[1], target.name
  others = (p for p in who.parent.glob("*") if p != who)
  for other in others:
    if any((other / kept / number).exists() for kept in (folders.CORRELATIONS, folders.USED)):
      raise ValueError(
        f"{path} was dealt to {other.name}, too: one seed for two clinics gives each the other's "
        "masks; remove it, and publish anew with another dealer"
      )


def _folders(folder: pathlib.Path, path: pathlib.Path) -> None:
  for parent in [*reversed(path.relative_to(folder).parents), path.relative_to(folder)]:
    (folder / parent).mkdir(0o700, exist_ok=True)
