"""A role's folder, which its user alone can read, and the correlations in it, which serve once.

A party marks an inference as used, on disk, before it reads the correlations, and reading removes
them (`mpc.saving`). So what was used once is refused for ever, after a crash and when a backup is
put back, too.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re

from primia_jax import durable
from primia_jax.mpc import saving
from primia_jax.mpc.messages import Correlations
from primia_jax.mpc.roles import Dealer
from primia_jax.service.errors import Refused

CORRELATIONS, USED, SECRET = "correlations", "used", "secret"
CHECKED = "checked"


def make(path: pathlib.Path) -> pathlib.Path:
  """A folder of mode 0700, with its parents; one that is there must have no other readers.

  Raises:
    PermissionError: others can read it.
  """
  path.mkdir(0o700, parents=True, exist_ok=True)
  if path.stat().st_mode & 0o077:
    raise PermissionError(f"{path} can be read by others; run chmod 700 on it")
  return path


def secret(folder: pathlib.Path) -> bytes:
  """The model owner's 32 secret bytes for its tag, drawn once and kept in its folder."""
  path = folder / SECRET
  if not path.exists():
    durable.create(path, os.urandom(32))
    durable.sync_folder(folder)
  return path.read_bytes()


def deal(dealer: Dealer, count: int, model_owner: pathlib.Path, data_owner: pathlib.Path) -> None:
  """Deals for a number of inferences, into a folder for each party.

  Args:
    dealer: the dealer.
    count: of inferences.
    model_owner, data_owner: where the parties' correlations go. A model owner has one for each of
      its clinics, so that no clinic can use up another's.
  """
  for folder in (model_owner, data_owner):
    make(folder / CORRELATIONS)
  for _ in range(count):
    first, second = dealer.deal_committed()
    saving.write(model_owner / CORRELATIONS / first.inference, first)
    saving.write(data_owner / CORRELATIONS / second.inference, second)


def unused(folder: pathlib.Path) -> list[str]:
  """The numbers of the inferences that a folder has unused correlations for."""
  names = {path.name for path in (folder / CORRELATIONS).glob("*")}
  return sorted(names - {path.name for path in (folder / USED).glob("*")})


def destroy(folder: pathlib.Path, inference: str) -> None:
  """Marks correlations as used, and removes them; none of this name need be there."""
  with contextlib.suppress(FileExistsError):
    durable.create(make(folder / USED) / inference, b"")
  durable.sync_folder(folder / USED)
  (folder / CORRELATIONS / inference).unlink(missing_ok=True)


def checked(folder: pathlib.Path) -> set[str]:
  """The numbers of inferences of which the model owner had a random share opened and checked."""
  path = folder / CHECKED
  return set(path.read_text().split()) if path.exists() else set()


def take(folder: pathlib.Path, inference: str) -> Correlations:
  """The correlations of an inference, which are then used up.

  Args:
    folder: as given to `deal`.
    inference: its number, 64 hexadecimal digits.

  Raises:
    Refused: they were used, were never dealt, or are not those that the number commits to.
  """
  if not re.fullmatch("[0-9a-f]{64}", inference):
    raise Refused(f"{inference!r} is no number of an inference")
  path = folder / CORRELATIONS / inference
  if not path.is_file() and not (folder / USED / inference).exists():
    raise Refused(f"nothing was dealt for inference {inference}")
  try:
    durable.create(make(folder / USED) / inference, b"")
    durable.sync_folder(folder / USED)
    found: Correlations = saving.read(path)
    found.check_committed()
    return found
  except (FileExistsError, FileNotFoundError):
    raise Refused(f"the correlations of inference {inference} were used") from None
  except ValueError as error:
    raise Refused(str(error)) from error
