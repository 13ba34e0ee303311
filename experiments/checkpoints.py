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

  Where each site has a process, each saves its own copy of what all know, and what the site keeps.
  Each checkpoint holds the hash of the ledger's last entry that its process knew, so that a ledger
  which has lost entries is refused.
  """

  def __init__(self, folder: pathlib.Path, max_to_keep: int = 1):
    """Opens an arm's checkpoints.

    Args:
      folder: of the arm.
      max_to_keep: the newest that stay. Processes of one site each need two, in case that some were
        stopped before they saved the last round.
    """
    options = ocp.CheckpointManagerOptions(
      max_to_keep=max_to_keep, create=True, enable_async_checkpointing=False
    )
    path = (folder / "checkpoints").absolute()
    self._manager = ocp.CheckpointManager(path, options=options)

  @property
  def rounds(self) -> list[int]:
    """The rounds saved, in order."""
    return sorted(self._manager.all_steps())

  def restore(
    self, state: federated.State, best: Best, step: int | None = None
  ) -> tuple[federated.State, Best, str]:
    """The state saved after a round, the last by default, and the hash of the ledger's last entry
    then, empty without a ledger; the given state and no hash where there is none.
    """
    step = self._manager.latest_step() if step is None else step
    if step is None:
      return state, best, ""
    like = _saved(state, best, "")
    saved = self._manager.restore(step, args=ocp.args.StandardRestore(like))
    digest = np.asarray(saved["ledger"])
    known = digest.tobytes().hex() if digest.any() else ""
    return federated.State(**saved["state"]), Best(**saved["best"]), known

  def save(self, step: int, state: federated.State, best: Best, ledger: str = "") -> None:
    """Saves a round's state, with the hash of the ledger's last entry, if there is a ledger."""
    for later in self.rounds:
      if later >= step:  # not all sites had saved it, and it was repeated
        self._manager.delete(later)
    self._manager.save(step, args=ocp.args.StandardSave(_saved(state, best, ledger)))

  def close(self) -> None:
    self._manager.close()


def _saved(state: federated.State, best: Best, ledger: str) -> dict[str, Any]:
  digest = np.frombuffer(bytes.fromhex(ledger or "00" * 32), np.uint8)
  return {"state": state._asdict(), "best": best._asdict(), "ledger": digest}
