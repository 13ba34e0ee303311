"""The roles give the right answer, hold only their own, and use nothing twice that serves once."""

import copy
import dataclasses
import gc
import pathlib
import pickle
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpc_reference import OWNERS, normal

from primia_jax import mpc
from primia_jax.mpc import inference, protocol, roles
from primia_jax.mpc.messages import Blind
from primia_jax.mpc.publications import bound
from primia_jax.mpc.roles import DataOwner, Dealer, ModelOwner
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = mpc.Config(32, 10, 14)
W, X = normal(0, 6, 5), normal(1, 3, 6)


def fn(w, x):
  return jax.nn.relu(x @ w)


def gated(w, x):
  """The data owner's image multiplies a shared value, as in attention pooling."""
  return (x @ w) * x[:, :5]


def planned(fn):
  return mpc.plan(fn, OWNERS, (W, X), CONFIG, mpc.calibrate(fn, OWNERS, [(W, X)]))


class Cast:
  """The roles of one plan, each made from what it may have, and every message between them."""

  def __init__(self, plan):
    self.plan, self.model_owner = plan, ModelOwner(plan, W)
    self.dealer = Dealer(plan, self.model_owner.tag)
    self.key = self.dealer._blind._secret[0]  # for attacks: what the model owner is told
    self.publication = self.model_owner.publish(self.dealer.blind())
    self.data_owner = DataOwner(plan, self.publication)
    self.online = mpc.online(plan)

  def sides(self):
    """Both parties' sides, the data owner's message, and party 0's part of what was dealt."""
    first, second = self.dealer.deal()
    part = first._secret[0]
    asked, question = self.data_owner.ask(self.data_owner.prepare(second), X)
    return self.model_owner.answer(self.model_owner.prepare(first), question), asked, question, part


@pytest.fixture(scope="module")
def cast():
  return Cast(planned(fn))


@pytest.fixture(scope="module")
def gated_cast():
  return Cast(planned(gated))


@pytest.mark.optimised
def test_a_model_owner_that_is_warm_compiles_nothing_for_an_inference(caplog):
  each = Cast(planned(gated))
  each.dealer.deal()  # the dealer's own work, and the data owner's, are not the model owner's
  each.data_owner.ask(each.data_owner.prepare(each.dealer.deal()[1]), X)

  def compiled(work):
    caplog.clear()
    with jax.log_compiles():
      work()
    return [r for r in caplog.records if "Compiling jit(prepare)" in r.getMessage()
            or "Compiling jit(complete)" in r.getMessage()]  # fmt: skip

  cold = compiled(each.model_owner.warm_up)
  assert len(cold) == 2
  assert compiled(each.sides) == []


# ---- the answer


def test_the_roles_have_the_integer_models_bits(cast, gated_cast):
  for each, function in ((cast, fn), (gated_cast, gated)):
    answered, asked, _, _ = each.sides()
    got = each.data_owner.reveal(each.online(answered, asked))
    np.testing.assert_array_equal(got, mpc.check(each.plan, (W, X)))
    np.testing.assert_allclose(got, function(W, X), atol=0.05)


def test_one_call_plays_all_roles_and_two_devices_agree(gated_cast):
  want = mpc.check(gated_cast.plan, (W, X))
  np.testing.assert_array_equal(mpc.infer(gated_cast.plan, W, X), want)
  answered, asked, _, _ = gated_cast.sides()
  apart = mpc.online(gated_cast.plan, mpc.party_mesh())(answered, asked)
  np.testing.assert_array_equal(gated_cast.data_owner.reveal(apart), want)


# ---- what each holds


def reachable(root):
  """Every array that Python code with `root` in its hands can get at, closures included."""
  found, seen, todo = [], set(), [root]
  while todo:
    v = todo.pop()
    if id(v) in seen or isinstance(v, type | types.ModuleType | types.FrameType):
      continue
    seen.add(id(v))
    if isinstance(v, jax.Array | np.ndarray):
      found.append(np.asarray(v))
    elif isinstance(v, types.FunctionType):
      todo += [cell.cell_contents for cell in v.__closure__ or () if cell != types.CellType()]
      todo += [v.__defaults__, v.__kwdefaults__]
    else:
      todo += [getattr(v, "__wrapped__", None), *gc.get_referents(v)]
    todo[:] = [v for v in todo if v is not None]
  return found


def holds(root, secret):
  """Whether an array with all of the secret's elements, in any layout, can be reached."""
  number = lambda a: a.view(np.int32) if a.dtype == np.uint32 else a
  secret = number(np.asarray(secret)).ravel()
  arrays = [number(a) for a in reachable(root) if a.dtype.kind in "iuf"]
  return any(a.dtype.kind == secret.dtype.kind and np.isin(secret, a).all() for a in arrays)


def test_each_role_holds_only_its_own(cast, gated_cast):
  for each in (cast, gated_cast):
    circuit = each.plan.circuit
    answered, asked, question, _ = each.sides()
    operands = inference.encode(each.plan, (W, X))
    owned = lambda party, o=operands, c=circuit: [
      getattr(v, "elements", v) for i, v in o.items() if c.operands[i].owner == party
    ]
    weights, images = [W, *owned(MODEL_OWNER)], [X, *owned(DATA_OWNER)]
    key = bound(each.key, each.publication.publication)
    blind = protocol.blinds(circuit, key, MODEL_OWNER).values()
    for root, own, others in (
      (each.plan, [], [*weights, *images]),
      (each.dealer, blind, [*weights, *images]),
      (each.model_owner, weights[1:], images),
      (answered, weights[1:], images),
      (each.data_owner, each.publication.arrays.values(), [*weights, *blind, each.key]),
      (asked, images[1:], [*weights, *blind, each.key]),
      (each.publication, [], weights),
      (question, [], images),
    ):
      assert all(holds(root, v) for v in own)  # the search has teeth
      assert not any(holds(root, v) for v in others), type(root)


def test_no_role_can_do_anothers_step(cast):
  first, second = cast.dealer.deal()
  model_owner, data_owner = cast.model_owner, cast.data_owner
  with pytest.raises(ValueError, match="this Correlations is for the data owner, not the model"):
    model_owner.prepare(second)
  with pytest.raises(ValueError, match="for the model owner, not the data owner"):
    data_owner.prepare(first)
  mine = data_owner.prepare(second)
  with pytest.raises(ValueError, match="for the model owner, not the data owner"):
    data_owner.ask(model_owner.prepare(first), X)
  _, question = data_owner.ask(mine, X)
  with pytest.raises(ValueError, match="different inferences"):
    model_owner.answer(model_owner.prepare(cast.dealer.deal()[0]), question)
  with pytest.raises(TypeError, match="expected a Publication, not a Blind"):
    DataOwner(cast.plan, Dealer(cast.plan, cast.model_owner.tag).blind())
  steps = {
    role: {name for name in vars(role) if not name.startswith("_")}
    for role in (Dealer, ModelOwner, DataOwner)
  }
  assert steps[Dealer] == {"blind", "deal", "deal_committed"}
  assert steps[ModelOwner] == {
    "publish", "resume", "recomputed", "warm_up", "prepare", "answer",
  }  # fmt: skip
  assert steps[DataOwner] == {"encoded", "warm_up", "prepare", "ask", "reveal"}


# ---- single use


def test_what_serves_once_refuses_a_second_use(cast):
  model_owner = ModelOwner(cast.plan, W)
  dealer = Dealer(cast.plan, model_owner.tag)
  data_owner = DataOwner(cast.plan, model_owner.publish(dealer.blind()))
  with pytest.raises(ValueError, match="this Blind was used"):
    model_owner.publish(dealer.blind())
  first, second = dealer.deal()
  mine, theirs = data_owner.prepare(second), model_owner.prepare(first)
  for owner, used in ((model_owner, first), (data_owner, second)):
    with pytest.raises(ValueError, match="this Correlations was used; the dealer must make"):
      owner.prepare(used)
  with pytest.raises(ValueError, match="shapes"):
    data_owner.ask(mine, X[:1])  # a wrong image costs nothing
  _, question = data_owner.ask(mine, X)
  with pytest.raises(ValueError, match="this Prepared was used"):
    data_owner.ask(mine, -X)
  model_owner.answer(theirs, question)
  with pytest.raises(ValueError, match="this Prepared was used"):
    model_owner.answer(theirs, question)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_what_serves_once_cannot_be_doubled(cast, duplicate):
  first, _ = cast.dealer.deal()
  for once in (
    first,
    Dealer(cast.plan, cast.model_owner.tag).blind(),
    cast.model_owner.prepare(first),
  ):
    with pytest.raises(TypeError, match="serves once and cannot be copied or pickled"):
      duplicate(once)
    assert "key" not in repr(once)


def test_one_mask_cannot_be_traced_onto_many_images(cast):
  first, second = cast.dealer.deal()
  mine = cast.data_owner.prepare(second)
  with pytest.raises(TypeError, match="takes arrays, not tracers"):
    jax.vmap(lambda x: cast.data_owner.ask(mine, x)[0].operands)(np.stack([X, -X]))
  with pytest.raises(TypeError, match="takes arrays, not tracers"):
    jax.jit(lambda w: ModelOwner(cast.plan, w)._operands)(W)
  with pytest.raises(TypeError):
    jax.jit(cast.model_owner.prepare)(first)
  cast.data_owner.ask(mine, X)  # and nothing was used up


def test_every_key_is_fresh(cast):
  seeds = [
    np.asarray(side._secret[0][0]).tobytes() for _ in range(4) for side in cast.dealer.deal()[:1]
  ]
  keys = [np.asarray(cast.dealer.deal()[1]._secret[0][1]).tobytes() for _ in range(4)]
  tag = cast.model_owner.tag
  blinds = [np.asarray(Dealer(cast.plan, tag).blind()._secret[0]).tobytes() for _ in range(4)]
  assert len({*seeds, *keys, *blinds}) == 12


def test_correlations_of_another_publication_are_refused(cast):
  other = Dealer(cast.plan, cast.model_owner.tag)
  other.blind()
  first, second = other.deal()
  with pytest.raises(ValueError, match="another publication"):
    cast.model_owner.prepare(first)
  with pytest.raises(ValueError, match="another publication"):
    cast.data_owner.prepare(second)
  np.testing.assert_array_equal(first.take(MODEL_OWNER).seed.shape, (8,))  # and are still unused


def test_sides_of_different_inferences_do_not_meet(cast):
  answered, asked, _, _ = cast.sides()
  other, _, _, _ = cast.sides()
  with pytest.raises(ValueError, match="different inferences"):
    cast.online(other, asked)
  with pytest.raises(ValueError, match="model owner's side comes first"):
    cast.online(asked, answered)


# ---- attacks


def test_the_model_owner_cannot_unblind_the_image(gated_cast):
  """D = x - B' with every key that it ever receives; the test of the attack succeeds with B'."""
  circuit = gated_cast.plan.circuit
  (number,) = circuit.linear_operands(DATA_OWNER)
  image = inference.encode(gated_cast.plan, (W, X))[number].elements
  first, second = gated_cast.dealer.deal()
  seed, key = first._secret[0].seed, second._secret[0][1]
  _, question = gated_cast.data_owner.ask(gated_cast.data_owner.prepare(second), X)
  unblinded = lambda key: (
    question.arrays[number] + protocol.blinds(circuit, key, DATA_OWNER)[number]
  )
  np.testing.assert_array_equal(unblinded(key), image)
  for known in (gated_cast.key, seed):
    assert np.mean(np.asarray(unblinded(known)) == np.asarray(image)) < 0.2


def test_two_questions_about_one_image_do_not_agree(gated_cast):
  _, _, one, _ = gated_cast.sides()
  _, _, two, _ = gated_cast.sides()
  for number, d in one.arrays.items():
    assert np.mean(np.asarray(d) == np.asarray(two.arrays[number])) < 0.2


def stolen(plan, weights, key):
  """D of a publication whose blind was made from a key that served before."""
  owner = ModelOwner(plan, weights)
  blind = Blind(MODEL_OWNER, f"{plan.digest}-{owner.tag}-0", "", key)
  return {i: np.asarray(d) for i, d in owner.publish(blind).arrays.items()}


@pytest.mark.parametrize("what", ["fine-tuned weights", "another plan", "other weight bits"])
def test_one_key_for_two_publications_tells_nothing(cast, what):
  """The attack: D - D' is the weights' change, or with other scales a multiple of the weights."""
  other, weights = cast.plan, W
  if what == "fine-tuned weights":
    weights = W + np.float32(2.0**-8)
  elif what == "another plan":
    other = mpc.plan(fn, OWNERS, (W, X), CONFIG, 8 * mpc.calibrate(fn, OWNERS, [(W, X)]))
  else:
    config = dataclasses.replace(CONFIG, weight_bits=10)
    other = mpc.plan(fn, OWNERS, (W, X), config, mpc.calibrate(fn, OWNERS, [(W, X)]))
  one, two = stolen(cast.plan, W, cast.key), stolen(other, weights, cast.key)
  for i, d in one.items():
    change = (d - two[i]).view(np.int32).astype(np.int64)
    assert np.abs(change).max() > 2**26  # with one B it is below 2^14, the weights' bits
    assert np.unique(change >> 16).size > change.size / 2


def test_the_attack_on_one_key_works_where_nothing_binds_it(cast, monkeypatch):
  """The control: with B from the key alone, D - D' is the weights' change to the last bit."""
  monkeypatch.setattr(roles, "bound", lambda key, publication: key)
  tuned = W + np.float32(2.0**-8)
  one, two = stolen(cast.plan, W, cast.key), stolen(cast.plan, tuned, cast.key)
  for i, d in one.items():
    unit = cast.plan.circuit.operands[i].scale
    np.testing.assert_allclose((two[i] - d).view(np.int32) * unit, tuned - W, atol=unit)


def test_the_tag_confirms_no_guess_of_the_weights(cast):
  """The dealer sees the tag and the plan: without the model owner's secret W has no one tag."""
  assert ModelOwner(cast.plan, W).tag != ModelOwner(cast.plan, W).tag
  for wrong in ("", "ab", cast.model_owner.tag.upper() + "g", None):
    with pytest.raises(ValueError, match="take the model owner's `tag`"):
      Dealer(cast.plan, wrong)


def test_messages_of_another_plan_or_other_weights_are_refused(cast):
  other = planned(lambda w, x: jax.nn.relu(x @ w) * 2)
  dealer = Dealer(other, cast.model_owner.tag)
  with pytest.raises(ValueError, match="made for another plan"):
    cast.model_owner.publish(dealer.blind())
  with pytest.raises(ValueError, match="made for another plan"):
    DataOwner(other, cast.publication)
  with pytest.raises(ValueError, match="made for another plan"):
    cast.data_owner.prepare(dealer.deal()[1])
  blind = Dealer(cast.plan, cast.model_owner.tag).blind()
  with pytest.raises(ValueError, match="this Blind is for other weights"):
    ModelOwner(cast.plan, W).publish(blind)


# ---- bad input


def test_arguments_must_have_the_planned_shapes(cast):
  with pytest.raises(ValueError, match=r"\[\(6, 5\)\] for the model owner, not \[\(5, 6\)\]"):
    ModelOwner(cast.plan, W.T)
  with pytest.raises(ValueError, match="does not fit"):
    ModelOwner(cast.plan, W * np.float32(1e6))


def test_shared_arguments_have_no_role():
  shapes = [jax.ShapeDtypeStruct(v.shape, jnp.float32) for v in (W, X)]
  plan = mpc.plan(fn, ("model_owner", "shared"), shapes, CONFIG)
  for make in (
    lambda: Dealer(plan, "0" * 64),
    lambda: ModelOwner(plan, W),
    lambda: DataOwner(plan, None),
  ):
    with pytest.raises(ValueError, match='owner "shared", which no role holds'):
      make()


def test_roles_of_another_type_are_refused(cast):
  with pytest.raises(TypeError, match="expected a Blind, not a Correlations"):
    cast.model_owner.publish(cast.dealer.deal()[0])


FORKING = """
import os
from primia_jax.mpc import messages
secret = messages.Correlations(1, "publication", "inference", b"mask")
child = os.fork()
try:
  told = secret.take(1).decode()
except ValueError as error:
  told = str(error)
os.write(1, (("parent" if child else "child") + "|" + told + chr(10)).encode())
os.waitpid(child, 0) if child else None
"""


def test_a_forked_process_does_not_use_what_its_parent_holds():
  run = [sys.executable, "-W", "ignore", "-c", FORKING]
  out = subprocess.check_output(run, cwd=ROOT, text=True, timeout=120)
  told = dict(line.split("|") for line in out.splitlines())
  assert told["parent"] == "mask"
  assert "before this process was forked" in told["child"]
