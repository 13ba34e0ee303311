"""What a function holds is found, however it holds it, and what an argument holds is kept secret.

The attack is to read the plan, which everybody has.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mpc_reference import normal

from primia_jax import mpc
from primia_jax.mpc import constants
from primia_jax.mpc.lowering import portable

W, X = normal(0, 6, 5), normal(1, 4, 6)
TABLE = normal(3, 5)
COARSE = mpc.Config(32, 10, 14)


def fn(w, x):
  return jax.nn.relu(x @ w)


class Predictor:
  """A model as a class of one's own, which is no pytree."""

  def __init__(self, weights):
    self._models = [{"kernel": weights}]

  def predict(self, x):
    return fn(self._models[0]["kernel"], x)


class Encoder(nnx.Module):
  """A model whose method is asked for."""

  def __init__(self, rngs):
    self.layer = nnx.Linear(6, 5, rngs=rngs)

  def encode(self, x):
    return nnx.relu(self.layer(x))


def in_plan(plan):
  """The arrays that a plan's reader has."""
  writer = portable.Writer(strict=False)
  writer.program(plan.program)
  return writer.arrays


def has(arrays, secret):
  secret = np.asarray(secret)
  return any(np.array_equal(v, secret) for v in arrays if v.shape == secret.shape)


def wholly(how):
  predictor, module = Predictor(W), nn.Dense(5)
  return {
    "bound module": module.bind(module.init(jax.random.key(0), X)),
    "method": predictor.predict,
    "jitted method": jax.jit(predictor.predict),
    "lambda": lambda x: predictor.predict(x),
    "default": lambda x, w=W: fn(w, x),
    "partial": functools.partial(fn, W),
    "switches": lambda x: fn(np.where(TABLE[None] > 0, 1, 0) * (W > 0), x),
  }[how]


@pytest.mark.parametrize(
  ("how", "named"),
  [
    ("bound module", r"\['params'\]\['kernel'\] \(float32\[6, 5\]\)"),
    ("method", r"self\[0\]\['kernel'\] \(float32\[6, 5\]\)"),
    ("jitted method", r"self\[0\]\['kernel'\] \(float32\[6, 5\]\)"),
    ("lambda", r"predictor\[0\]\['kernel'\] \(float32\[6, 5\]\)"),
    ("default", r"w \(float32\[6, 5\]\)"),
    ("partial", r"argument 0 of partial \(float32\[6, 5\]\)"),
    ("switches", r"an array at mpc_constants_test.py:\d+ \(int\d+\[6, 5\]\)"),
  ],
)
def test_a_function_that_holds_the_whole_model_is_refused(how, named):
  with (
    jax.numpy_dtype_promotion("standard"),
    pytest.raises(ValueError, match=f"nothing is the model owner's: .*{named}.*public"),
  ):
    mpc.secret(wholly(how), examples=X, config=COARSE)


def test_a_function_without_any_array_is_refused():
  with pytest.raises(ValueError, match="the data owner could compute this function alone"):
    mpc.secret(lambda x: x * 2, examples=X)


@pytest.mark.filterwarnings("error")
def test_what_is_held_beside_weights_is_named():
  predictor, helper = Predictor(W), lambda x: x * TABLE
  inner = lambda w, x: helper(fn(w, x))
  with pytest.raises(UserWarning, match=r"closes over TABLE \(float32\[5\]\).*are public"):
    mpc.secret(inner, W, examples=X, config=COARSE)
  scaled = lambda w, x: w * predictor.predict(x)
  with pytest.raises(UserWarning, match=r"predictor\[0\]\['kernel'\] \(float32\[6, 5\]\)"):
    mpc.secret(scaled, np.float32(2), examples=X, config=COARSE)
  given = lambda w, table, x: fn(w, x) * table
  held = functools.partial(constants.held, lambda w, x: given(w, TABLE, x), (W, X[0]), given)
  assert held() == [f"an array at mpc_constants_test.py:{line_of(given)} (float32[5])"]
  assert held(TABLE) == []  # a public argument is known to be one
  few = lambda w, x: jnp.where(np.arange(5) > 2, fn(w, x), 0) * np.float32(3)
  assert constants.held(few, (W, X[0]), few) == []


def line_of(function):
  return function.__code__.co_firstlineno


@pytest.fixture
def planned_only(monkeypatch):
  """`secret` runs nothing under encryption."""
  monkeypatch.setattr(mpc.private, "_try", lambda *_: None)


@pytest.mark.usefixtures("planned_only")
def test_a_method_of_a_module_keeps_the_module_s_arrays():
  model = Encoder(nnx.Rngs(0))
  private = mpc.secret(model.encode, examples=X, config=COARSE)
  assert private.check(X[0]).error < 0.05
  np.testing.assert_allclose(private.check(X[0]).plain, model.encode(X[0]), rtol=1e-6)
  for secret in jax.tree.leaves(nnx.state(model, nnx.Param)):
    assert not has(in_plan(private.plan), secret)
  with pytest.raises(ValueError, match=r"\['image'\], but the arguments are \['self', 'x'\]"):
    mpc.secret(model.encode, examples=X, owners={"image": "data_owner"})


@pytest.mark.usefixtures("planned_only")
def test_the_model_owner_s_arrays_are_secret_whatever_their_dtype():
  """Quantised weights, a code book, a mask, and a filter in k-space."""
  rng = np.random.default_rng(0)
  weights = {
    "int8": rng.integers(-128, 128, (6, 5)).astype(np.int8),
    "uint8": rng.integers(0, 256, 6).astype(np.uint8),
    "bool": rng.random(6) > 0.5,
    "complex": (normal(4, 6) + 1j * normal(5, 6)).astype(np.complex64),
    "scale": np.float32(1 / 64),
    "step": np.int32(3),
    "key": jax.random.key(0),
  }

  def apply(w, x):
    x = jnp.real(jnp.fft.ifft(jnp.fft.fft(x * w["scale"]) * w["complex"]))
    x = x * w["bool"].astype(x.dtype) + w["uint8"].astype(x.dtype) * w["scale"]
    return x @ (w["int8"].astype(x.dtype) * w["scale"])

  private = mpc.secret(apply, weights, examples=X, config=mpc.Config(64, 16, 18))
  assert private.check(X[1]).error < 1e-3
  arrays = in_plan(private.plan)
  for name in ("int8", "uint8", "bool", "complex", "scale"):
    assert not has(arrays, weights[name]), name
  assert private.plan.owners.count(0) == 5
