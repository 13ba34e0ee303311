"""What a run continues from: the state after its last round, and the best model so far."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from primia_jax import federated
from primia_jax.types import Array, ModelState, Params, PyTree


class Best(NamedTuple):
  """The model of the round with the best MCC on validation, or of the last without validation."""

  params: Params
  model_state: ModelState
  server_state: PyTree
  site_state: PyTree
  mcc: Array
  round: Array


class Checkpoints:
  """The checkpoints of an arm. No secret and no key of a mask is in them.

  Where each site has a process, that of site 0 saves what all know, and each saves what its site
  keeps in its own folder. All processes that are started again continue from the last round that
  site 0 saved. A site that has not saved that round, because it was lost, begins with its own
  newest state before it. Each checkpoint holds the hash of the ledger's last entry that its process
  knew, so that a ledger which has lost entries is refused.
  """

  def __init__(self, folder: pathlib.Path, own: pathlib.Path | None, number: int, keeps: bool):
    """Opens an arm's checkpoints.

    Args:
      folder: of the arm.
      own: the folder of this process's site; None where one process plays all.
      number: of this process's site; 0 where one process plays all.
      keeps: whether sites keep anything from round to round: state, or a ledger.
    """
    self._in_processes, self._writes = own is not None, number == 0
    # Two between processes, in case that some were stopped before they recorded the last.
    most = 2 if self._in_processes else 1
    self._all = _manager(folder / "checkpoints", most, read_only=not self._writes)
    # Two, since site 0 may have been stopped before it saved the round that this process has.
    self._own = _manager(own / "checkpoints", 2) if own is not None and keeps else None

  def restore(self, state: federated.State, best: Best) -> tuple[federated.State, Best, str]:
    """The last state saved, and the hash of the ledger's last entry then, empty without a ledger;
    the given state and no hash where there is none.
    """
    if (last := self._all.latest_step()) is None:
      return state, best, ""
    shared, kept = self._split(state, best, "")
    saved = self._all.restore(last, args=ocp.args.StandardRestore(shared))
    if self._in_processes:
      own = self._restore_own(last, kept)
      for name in ("state", "best"):
        saved[name]["site_state"] = own[name]
      saved["ledger"] = own["ledger"]
    digest = np.asarray(saved["ledger"])
    known = digest.tobytes().hex() if digest.any() else ""
    return federated.State(**saved["state"]), Best(**saved["best"]), known

  def _restore_own(self, last: int, kept: dict[str, PyTree]) -> dict[str, PyTree]:
    steps = [step for step in self._own.all_steps() if step <= last] if self._own else []
    if not self._own or not steps:
      return kept
    return self._own.restore(max(steps), args=ocp.args.StandardRestore(kept))

  def save(self, step: int, state: federated.State, best: Best, ledger: str = "") -> None:
    """Saves a round's state, with the hash of the ledger's last entry, if there is a ledger."""
    shared, kept = self._split(state, best, ledger)
    if self._own:
      for later in self._own.all_steps():
        if later >= step:  # site 0 had not saved it, and it was repeated
          self._own.delete(later)
      self._own.save(step, args=ocp.args.StandardSave(kept))
    if self._writes:
      self._all.save(step, args=ocp.args.StandardSave(shared))

  def close(self) -> None:
    self._all.close()
    if self._own:
      self._own.close()

  def _split(
    self, state: federated.State, best: Best, ledger: str
  ) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what all know, what each process keeps); all of it is known where one process plays all."""
    digest = np.frombuffer(bytes.fromhex(ledger or "00" * 32), np.uint8)
    shared = {"state": state._asdict(), "best": best._asdict()}
    if not self._in_processes:
      return shared | {"ledger": digest}, {}
    kept = {name: part.pop("site_state") for name, part in shared.items()}
    return shared, kept | {"ledger": digest}


def _manager(
  folder: pathlib.Path, max_to_keep: int, read_only: bool = False
) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(
    max_to_keep=max_to_keep,
    create=not read_only,
    read_only=read_only,
    enable_async_checkpointing=False,
  )
  return ocp.CheckpointManager(folder.absolute(), options=options)
