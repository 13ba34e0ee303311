"""Three lines make a function private; what is secret, public or shared follows from its owner."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mpc_reference import OWNERS, normal

from primia_jax import mpc, prng
from primia_jax.mpc import inference

W, X = normal(0, 6, 5), normal(1, 4, 6)
COARSE = mpc.Config(32, 10, 14)


def fn(w, x):
  return jax.nn.relu(x @ w)


@pytest.fixture(scope="module")
def private():
  return mpc.secret(fn, W, examples=X, target_error=1e-3)


def test_three_lines(private):
  assert "ring of 2^" in str(private.plan)
  logits, checked = private(X[1]), private.check(X[1])
  np.testing.assert_array_equal(logits, checked.outputs)
  np.testing.assert_allclose(checked.plain, fn(W, X[1]), rtol=1e-6)
  assert checked.error == np.abs(logits - checked.plain).max() <= 1e-3
  assert logits.dtype == jnp.float32
  np.testing.assert_array_equal(private(X[1]), logits)  # with other masks


def test_another_ring_is_the_callers_choice():
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # fn closes over nothing
    assert mpc.secret(fn, W, examples=X, config=COARSE).plan.config == COARSE
  with pytest.raises(ValueError, match="more than target_error=1e-06"):
    mpc.secret(fn, W, examples=X, config=COARSE, target_error=1e-6)


def test_tracers_are_sent_to_the_traceable_form(private):
  with pytest.raises(TypeError, match="takes arrays, not tracers"):
    jax.vmap(private)(X)
  got = jax.jit(private.transform)(prng.random_key(), X[0])
  np.testing.assert_array_equal(got, private(X[0]))


def test_under_vmap_every_element_has_a_key_of_its_own():
  """Inexact gates err by a unit that depends on the masks, so that equal masks would show."""
  config = mpc.Config(32, 8, 10, exact=False)
  w, x = normal(2, 6, 200), normal(4, 6)
  plan = mpc.plan(fn, OWNERS, (w, x), config, mpc.calibrate(fn, OWNERS, [(w, x)]))
  f, key = jax.jit(inference.transform(plan)), prng.random_key()
  same = np.stack([x, x])
  once = jax.vmap(f, in_axes=(None, None, 0))(key, w, same)
  for i in range(2):
    np.testing.assert_array_equal(once[i], f(prng.derive(key, i), w, x))
  assert np.any(once[0] != once[1])
  twice = jax.vmap(jax.vmap(f, in_axes=(None, None, 0)), in_axes=(None, None, 0))(
    key, w, np.stack([same, same])
  ).reshape(4, -1)
  assert len(np.unique(twice, axis=0)) == 4
  keys = np.stack([key, key])  # keys that are mapped are the caller's
  mapped = jax.vmap(f, in_axes=(0, None, 0))(keys, w, same)
  np.testing.assert_array_equal(mapped[0], mapped[1])
  np.testing.assert_allclose(twice, np.broadcast_to(fn(w, x), (4, 200)), atol=0.1)


# ---- owners


def test_owners_by_name_and_in_order_and_public_constants():
  def gated(image, weights, power):  # control flow on a public argument
    return jax.nn.relu(image @ weights) if power > 1 else image

  owners = {"image": "data_owner", "weights": "model_owner", "power": "public"}
  for given in (owners, list(owners.values())):
    private = mpc.secret(gated, W, 2, examples=X, owners=given, config=COARSE)
    np.testing.assert_allclose(private(X[0]), fn(W, X[0]), atol=0.05)
  both = lambda a, b, w: a * b + w
  private = mpc.secret(
    both,
    W[:, 0],
    examples=[(X[0], X[1])],
    config=COARSE,
    owners=["data_owner"] * 2 + ["model_owner"],
  )
  np.testing.assert_allclose(private(X[2], X[3]), both(X[2], X[3], W[:, 0]), atol=0.05)


@pytest.mark.parametrize(
  ("owners", "reason"),
  [
    ({"w": "model_owner", "y": "data_owner"}, r"names \['y'\], but the arguments are \['w', 'x'\]"),
    (["model_owner", "hospital"], "owners=.*hospital.*; use model_owner, data_owner, public"),
    (["data_owner", "data_owner"], "2 arguments of the data owner and 0 others"),
    ({"w": "model_owner"}, r"leaves out \['x'\]"),
  ],
)
def test_wrong_owners_are_refused(owners, reason):
  with pytest.raises(ValueError, match=reason):
    mpc.secret(fn, W, examples=X, owners=owners)


def test_examples_are_needed():
  with pytest.raises(ValueError, match="examples is empty"):
    mpc.secret(fn, W, examples=[])


# ---- modules


class Network(nnx.Module):
  def __init__(self, rngs):
    self.first, self.second = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)
    self.dropout, self.norm = nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)

  def __call__(self, x):
    return self.second(self.dropout(nnx.relu(self.norm(self.first(x)))))


@jax.tree_util.register_pytree_node_class
class Tree:
  """A callable pytree with a function among its leaves, as Equinox makes them."""

  def __init__(self, weights, act):
    self.weights, self.act = weights, act

  def __call__(self, x):
    return self.act(x @ self.weights)

  def tree_flatten(self):
    return (self.weights, self.act), None

  @classmethod
  def tree_unflatten(cls, _, leaves):
    return cls(*leaves)


def test_modules_are_taken_as_they_are():
  """NNX with dropout's PRNG keys, a callable pytree, Linen: their arrays are secret."""
  graph = Network(nnx.Rngs(0))
  graph.eval()
  linen = nn.Dense(3)
  variables = jax.jit(linen.init)(jax.random.key(0), X)
  x = X[:1]
  for make, want, secrets in (
    (lambda: mpc.secret(graph, examples=[x], config=COARSE), graph(x), nnx.state(graph, nnx.Param)),
    (lambda: mpc.secret(Tree(W, jax.nn.relu), examples=[x], config=COARSE), fn(W, x), W),
    (
      lambda: mpc.secret(linen.apply, variables, examples=[x], config=COARSE),
      linen.apply(variables, x),
      variables,
    ),
  ):
    private = make()
    np.testing.assert_allclose(private(x), want, atol=0.05)
    planned = [
      a.shape
      for a, by in zip(private.plan.program.avals, private.plan.owners, strict=True)
      if not by
    ]
    assert all(np.shape(v) in planned for v in jax.tree.leaves(secrets))
