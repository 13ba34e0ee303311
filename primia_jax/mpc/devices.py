"""The online phase on machines of one operator: a process and a device for each party.

Each process joins `jax.distributed`, holds its own party's side only, and runs the same program;
openings are XLA's collectives. That gives neither encryption nor authentication: messages cross the
network in the clear, and whoever reaches the coordinator's port can be a party. Use it for speed
within one operator's own network, and `primia_jax.service` between institutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from primia_jax.mpc import inference, protocol
from primia_jax.mpc.circuit import CHECKED
from primia_jax.mpc.messages import NAMES, Side
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER, PARTY, Wire
from primia_jax.types import Array


def online(plan: Plan, mesh: jax.sharding.Mesh) -> Callable[[Side], list[Array] | None]:
  """One party's part of the online phase; both processes call it for the same inference.

  Opened values have the same bits as in one process.

  Args:
    plan: the plan; its client must be "trusted" or "sharing", since nothing is checked here.
    mesh: over the axis "party", of one device of each process: the model owner's first.

  Returns:
    This process's side -> the outputs' shares, [2, ...] each, at the data owner, and None at the
    model owner. It raises a ValueError for the other party's side.

  Raises:
    ValueError: the mesh is another, or the plan's client is "checked".
  """
  devices = list(mesh.devices.flat)
  mine = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
  if mesh.axis_names != (PARTY,) or len(devices) != 2 or len(mine) != 1:
    raise ValueError(
      f"this mesh has the axes {mesh.axis_names} and {len(mine)} of {len(devices)} devices here; "
      f"use party_mesh with one device of each of two processes"
    )
  if plan.config.client == CHECKED:
    raise ValueError(
      f"client={CHECKED!r} is not checked here; carry messages by `mpc.multiprocess`"
    )
  (party,), spec = mine, jax.sharding.PartitionSpec(PARTY)
  sharding = jax.sharding.NamedSharding(mesh, spec)

  def body(ready: Any, operands: Any) -> tuple[list[Array], list[Array]]:
    own = jax.tree.map(lambda v: v[0], (ready, operands))
    shares = protocol.run(plan.circuit, Wire(swap=True), *own)
    sent = [lax.ppermute(v, PARTY, [(MODEL_OWNER, DATA_OWNER)]) for v in shares]
    return [v[None] for v in shares], [v[None] for v in sent]

  run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))

  def placed(v: Any) -> Array:
    row = jax.device_put(np.asarray(v)[None], devices[party])
    return jax.make_array_from_single_device_arrays((2, *row.shape[1:]), sharding, [row])

  def here(v: Array) -> np.ndarray:
    return np.asarray(v.addressable_shards[0].data)[0]

  def party_run(side: Side) -> list[Array] | None:
    if side.party != party:
      raise ValueError(f"this process is the {NAMES[party]}, not the {NAMES[side.party]}")
    with plan.config.scope():
      own = side.ready, inference.filled(plan, side.operands)
      shares, sent = run(*jax.tree.map(placed, own))
      if party == MODEL_OWNER:
        jax.block_until_ready(shares)
        return None
      pairs = zip(sent, shares, strict=True)
      return [jax.numpy.stack([here(theirs), here(mine)]) for theirs, mine in pairs]

  return party_run
