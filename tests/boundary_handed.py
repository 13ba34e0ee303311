"""Ways to break what an inference hands out: the model owner's shares of the outputs, and what the
dealer gives to each party; see boundary_mutations_test."""

import jax
from boundary_breaking import Patch, plan

from primia_jax.mpc import protocol
from primia_jax.mpc.circuit import Apply, Linear, Open
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER

# ---- a share of an output, replaced by an input of the party's program


def _last(kind) -> int:
  return max(i for i, op in enumerate(plan().circuit.operations) if isinstance(op, kind))


OPERANDS = {  # of the model owner
  "weights of the first layer": lambda ready, operands: jax.tree.leaves(operands[1])[0],
  "bias": lambda ready, operands: jax.tree.leaves(operands[2])[0],
  "weights of the last layer": lambda ready, operands: jax.tree.leaves(operands[3])[0],
}
DEALT = {
  "mask of an opened value": lambda ready, operands: ready[_last(Open)]["r"],
  "mask of the gate's input": lambda ready, operands: ready[_last(Apply)]["r"],
  "share of the mask's high bits": lambda ready, operands: ready[_last(Apply)]["rho"],
  "share of the mask's sign": lambda ready, operands: ready[_last(Apply)]["sigma"],
  "share of the last layer": lambda ready, operands: ready[_last(Linear)]["u"],
}


def share_replaced(name: str, patch: Patch) -> None:
  run = protocol.run

  def other(circuit, wire, ready, operands, **rest):
    found = run(circuit, wire, ready, operands, **rest)
    return [(OPERANDS | DEALT)[name](ready, operands), *found[1:]]

  patch.setattr(protocol, "run", other)


def more_than_the_outputs(patch: Patch) -> None:
  outputs = protocol.outputs
  patch.setattr(protocol, "outputs", lambda circuit, env: 2 * outputs(circuit, env))


# ---- what the dealer gives


def _with_part(patch: Patch, change) -> None:
  part = protocol.part
  patch.setattr(protocol, "part", lambda dealt, party: change(dealt, party, part(dealt, party)))


def seeds_whole(patch: Patch) -> None:
  _with_part(patch, lambda dealt, party, own: own._replace(tags=dealt.seeds))


def seed_of_the_other_party(patch: Patch) -> None:
  _with_part(patch, lambda dealt, party, own: own._replace(seed=dealt.seeds[1 - party]))


def seeds_added(patch: Patch) -> None:
  _with_part(patch, lambda dealt, party, own: own._replace(tags=dealt.seeds[0] ^ dealt.seeds[1]))


def shares_to_the_model_owner(patch: Patch) -> None:
  sent = lambda dealt, party: dealt.sent if party == MODEL_OWNER else None
  _with_part(patch, lambda dealt, party, own: own._replace(tags=sent(dealt, party)))


def share_of_the_model_owner(patch: Patch) -> None:
  """The data owner gets the other half of what the last layer was dealt, too."""
  number = _last(Linear)
  u = plan().circuit.operations[number].shape

  def change(dealt, party, own):
    if party != DATA_OWNER:
      return own
    blank = {number: {"u": jax.ShapeDtypeStruct(u, dealt.sent[number]["u"].dtype)}}
    first = protocol.expand({}, blank[number], dealt.seeds[MODEL_OWNER], number)
    return own._replace(tags={number: first})

  _with_part(patch, change)
