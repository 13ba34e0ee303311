"""Plans and messages survive a file; what serves once is gone when it is read."""

import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, normal

from primia_jax import mpc
from primia_jax.mpc import saving
from primia_jax.mpc.lowering import portable

W, X = {"k": normal(0, 3, 3, 1, 2), "d": normal(1, 18, 3)}, normal(2, 1, 6, 6, 1)
CONFIG = mpc.Config(40, 12, 16)


def fn(w, x):
  """Convolution, pooling, indexing and a scatter, whose parameters are of many kinds."""
  dims = ("NHWC", "HWIO", "NHWC")
  y = jax.nn.relu(lax.conv_general_dilated(x, w["k"], (1, 1), "SAME", dimension_numbers=dims))
  y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
  y = jnp.take(y, np.array([2, 0, 1]), axis=1)
  y = jnp.pad(y, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, :3]  # its widths are numbers of NumPy
  out = y.reshape(1, -1) @ w["d"]
  return {"logits": out + np.arange(3, dtype=np.float32)[None], "best": (jnp.argmax(out, -1), None)}


def planned():
  return mpc.plan(fn, OWNERS, (W, X), CONFIG, mpc.calibrate(fn, OWNERS, [(W, X)]))


@pytest.fixture(scope="module")
def plan():
  return planned()


def same(a, b):
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.filterwarnings("error::RuntimeWarning")  # the fill value of jnp.take is no integer
def test_all_messages_of_an_inference_through_files(plan, tmp_path):
  """Every role reads the plan and what it receives; the bits are those of one process."""
  through = lambda value, name: (
    saving.write(tmp_path / name, value),
    saving.read(tmp_path / name),
  )[1]
  mine, theirs, dealers = (through(plan, f"plan{i}") for i in range(3))
  model_owner = mpc.ModelOwner(mine, W)
  dealer = mpc.Dealer(dealers, model_owner.tag)
  publication = model_owner.publish(through(dealer.blind(), "blind"))
  data_owner = mpc.DataOwner(theirs, through(publication, "publication"))
  first, second = (through(c, f"dealt{i}") for i, c in enumerate(dealer.deal()))
  asked, question = data_owner.ask(data_owner.prepare(second), X)
  answered = model_owner.answer(model_owner.prepare(first), through(question, "question"))
  got = data_owner.reveal(mpc.online(plan)(answered, asked))
  assert same(got, mpc.check(plan, (W, X)))
  assert jax.tree.structure(got) == jax.tree.structure(fn(W, X))
  assert sorted(os.listdir(tmp_path)) == ["plan0", "plan1", "plan2", "publication", "question"]


def test_a_plan_is_the_same_after_a_file(plan, tmp_path):
  saving.write(tmp_path / "plan", plan)
  again = saving.read(tmp_path / "plan")
  assert (str(again), again.digest, again.config) == (str(plan), plan.digest, plan.config)
  assert again.program.equations[0].source == plan.program.equations[0].source != ""
  assert planned().digest == plan.digest  # traced and lowered anew
  other = mpc.plan(fn, OWNERS, (W, X), mpc.Config(40, 11, 16), None)
  assert other.digest != plan.digest


def test_a_single_use_ends_with_the_file(plan, tmp_path):
  dealer = mpc.Dealer(plan, mpc.ModelOwner(plan, W).tag)
  first, _ = dealer.deal()
  path = tmp_path / "first"
  saving.write(path, first)
  assert stat.S_IMODE(path.stat().st_mode) == 0o600
  with pytest.raises(ValueError, match="this Correlations was used"):
    saving.write(tmp_path / "again", first)
  assert not (tmp_path / "again").exists()
  saving.read(path)
  with pytest.raises(FileNotFoundError, match="what serves once is removed when it is read"):
    saving.read(path)


def test_a_reader_that_loses_the_race_gets_nothing(plan, tmp_path, monkeypatch):
  """The second of two readers, which saw the file before the first removed it."""
  path = tmp_path / "blind"
  saving.write(path, mpc.Dealer(plan, mpc.ModelOwner(plan, W).tag).blind())
  parsed, inner = saving._parsed, []

  def slow(p):
    out = parsed(p)
    if not inner:
      inner.append(None)
      inner.append(saving.read(path))
    return out

  monkeypatch.setattr(saving, "_parsed", slow)
  with pytest.raises(FileNotFoundError):
    saving.read(path)
  assert inner[1].take(0).shape == (8,)


@pytest.mark.parametrize(
  ("spoil", "reason"),
  [
    (lambda b: b[:-40] + bytes([b[-40] ^ 1]) + b[-39:], "damaged"),
    (lambda b: b[:200], "damaged"),
    (lambda b: b"", "not a file of a plan"),
    (lambda b: b"PK" + b, "not a file of a plan"),
  ],
)
def test_damaged_files_are_refused(plan, tmp_path, spoil, reason):
  path = tmp_path / "plan"
  saving.write(path, plan)
  path.write_bytes(spoil(path.read_bytes()))
  with pytest.raises(ValueError, match=reason):
    saving.read(path)


def test_other_versions_and_values_are_refused(plan, tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(saving, "_VERSION", 2)
    saving.write(tmp_path / "later", plan)
  with pytest.raises(ValueError, match=r"format primia_jax mpc 2, .* reads primia_jax mpc 1"):
    saving.read(tmp_path / "later")
  with pytest.raises(FileExistsError, match="name a new file"):
    saving.write(tmp_path / "later", plan)
  with pytest.raises(TypeError, match="a dict has no file; use one of Plan, Blind"):
    saving.write(tmp_path / "weights", W)
  with pytest.raises(FileNotFoundError, match="no such file"):
    saving.read(tmp_path / "nothing")


def test_what_has_no_plain_form_is_refused_by_name(tmp_path):
  def called(w, x):
    return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct((2,), np.float32), x) * w

  plan = mpc.plan(called, OWNERS, (np.ones(2, np.float32),) * 2, CONFIG)
  assert len(plan.digest) == 64
  with pytest.raises(ValueError, match=r"pure_callback at mpc_saving_test.py:.* cannot be written"):
    saving.write(tmp_path / "plan", plan)


def test_a_computation_among_the_parameters_is_traced_again():
  program = planned().program
  writer = portable.Writer()
  y = jnp.zeros(4)
  scatter = jax.make_jaxpr(lambda x: y.at[np.array([1, 3])].add(x))(jnp.ones(2))
  (eqn,) = [e for e in scatter.eqns if e.primitive.name == "scatter-add"]
  data = writer._params(eqn.params)
  params = {k: portable._value(v, writer.arrays) for k, v in data.items()}
  again = portable._bind("scatter-add", params)(y, np.array([[1], [3]]), jnp.ones(2))[0]
  np.testing.assert_array_equal(again, [0, 1, 0, 1])
  assert str(params["update_jaxpr"]) == str(eqn.params["update_jaxpr"])
  assert program.num_values
