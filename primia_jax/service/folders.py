"""A role's folder, which its user alone can read, and the correlations in it, which serve once.

A party marks an inference as used, on disk, before it reads the correlations, and reading removes
them (`mpc.saving`). So what was used once is refused for as long as the marks are there: after a
crash, and where files of correlations are copied back. Marks go where a whole folder is put back to
an earlier state. Then all correlations in it must be destroyed before anything is served
(`discard`); `receipts` find it where that was not done. A mark is taken back only if the other
party refused and nothing was read.
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
from primia_jax.service.errors import Refused, UsedUp

CORRELATIONS, USED, SECRET = "correlations", "used", "secret"
CHECKED = "checked"
_CARRIED = "inbox", "outbox"


def make(path: pathlib.Path) -> pathlib.Path:
  """A folder of mode 0700, as are parents that are missing; one that is there must have no other
  readers.

  Raises:
    PermissionError: others can read it.
  """
  for parent in [*reversed(path.parents), path]:
    parent.mkdir(0o700, exist_ok=True)
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


def is_used(folder: pathlib.Path, inference: str) -> bool:
  """Whether an inference is marked as used."""
  return (folder / USED / inference).exists()


def discard(folder: pathlib.Path) -> int:
  """Destroys all correlations in a role's folder, of every publication; returns how many.

  What is still in the inbox stays; take it first (`inbox.collect`).
  """
  count = 0
  for place in sorted(folder.rglob(CORRELATIONS)):
    if place.relative_to(folder).parts[0] in _CARRIED:
      continue
    for path in place.glob("*"):
      destroy(place.parent, path.name)
      count += 1
  return count


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


def check_unused(folder: pathlib.Path, inference: str) -> None:
  """Raises Refused, as `take` does, if these correlations cannot serve; nothing is drawn.

  Args:
    folder, inference: as given to `take`.
  """
  if not re.fullmatch("[0-9a-f]{64}", inference):
    raise Refused(f"{inference!r} is not a number of an inference")
  if is_used(folder, inference):
    raise _used(inference)
  if not (folder / CORRELATIONS / inference).is_file():
    raise Refused(f"nothing was dealt for inference {inference}")


def take(folder: pathlib.Path, inference: str) -> Correlations:
  """The correlations of an inference, which are then used up.

  Args:
    folder: as given to `deal`.
    inference: its number, 64 hexadecimal digits.

  Raises:
    UsedUp: they were used.
    Refused: they were never dealt, or are not those that the number commits to.
  """
  return Reserved(folder, inference).take()


class Reserved:
  """Correlations that are marked as used, on disk, and not read yet.

  Args:
    folder, inference: as given to `take`.

  Raises:
    Refused: as `take`; or the disk takes no mark.

  Attributes:
    inference, folder: as given.
  """

  def __init__(self, folder: pathlib.Path, inference: str):
    check_unused(folder, inference)
    self.inference, self.folder, self._is_open = inference, folder, True
    try:
      durable.create(make(folder / USED) / inference, b"")
      durable.sync_folder(folder / USED)
    except FileExistsError:
      raise _used(inference) from None
    except OSError as error:  # a full disk, for one
      raise Refused(
        f"inference {inference} could not be marked as used: {error.strerror or error}"
      ) from error

  def take(self) -> Correlations:
    """The correlations; raises as `folders.take` does."""
    self._close()
    try:
      found: Correlations = saving.read(self.folder / CORRELATIONS / self.inference)
      found.check_committed()
      return found
    except FileNotFoundError:
      raise _used(self.inference) from None
    except ValueError as error:
      raise Refused(str(error)) from error

  def release(self) -> None:
    """Takes the mark back: the other party has refused, so neither party has drawn any.

    Raises:
      ValueError: they were taken.
    """
    self._close()
    (self.folder / USED / self.inference).unlink()
    durable.sync_folder(self.folder / USED)

  def _close(self) -> None:
    if not self._is_open:
      raise ValueError(f"the correlations of inference {self.inference} were taken or released")
    self._is_open = False


def _used(inference: str) -> UsedUp:
  return UsedUp(f"the correlations of inference {inference} were used")
