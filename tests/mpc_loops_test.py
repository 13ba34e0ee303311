"""Recurrent networks are right on the integer model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from mpc_reference import OWNERS, normal

from primia_jax.mpc import clear, planning
from primia_jax.mpc.circuit import Config

pytestmark = pytest.mark.usefixtures("x64")


def checked(fn, args, atol):
  plan = planning.plan(fn, OWNERS, args, Config(), planning.calibrate(fn, OWNERS, [args]))
  np.testing.assert_allclose(clear.check(plan, args), jax.jit(fn)(*args), atol=atol)


def test_a_recurrence_with_a_skip_and_outputs_of_every_step():
  weights = {"in": normal(0, 3, 4), "state": normal(1, 4, 4), "out": normal(2, 4, 2)}

  def fn(weights, x):
    def step(state, row):
      state = jnp.tanh(row @ weights["in"] + state @ weights["state"])
      return state, state @ weights["out"]

    last, every = lax.scan(step, jnp.zeros((2, 4), np.float32), x)
    return every.sum(0) + last[:, :2]

  checked(fn, (weights, normal(3, 2, 2, 3)), 1e-3)


@pytest.mark.slow
def test_linen_cells():
  layer, x = linen.RNN(linen.OptimizedLSTMCell(4)), normal(0, 1, 2, 3)
  checked(layer.apply, (layer.init(jax.random.key(0), x), x), 1e-3)


@pytest.mark.slow
def test_nnx_cells_with_random_state():

  class Network(nnx.Module):
    def __init__(self, rngs):
      self.recurrent = nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs))
      self.dropout, self.out = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
      return self.out(self.dropout(self.recurrent(x)[:, -1], deterministic=True))

  graph, state = nnx.split(Network(nnx.Rngs(0)))
  checked(lambda state, x: nnx.merge(graph, state)(x), (state, normal(1, 1, 2, 3)), 1e-3)
