"""Networks at an eighth of their width: encrypted, they equal the integer model bit for bit, which
is near float64, and gates are driven through their ranges. Plans of the networks at full size.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import networks
from benchmarks.conformance import measure
from primia_jax import mpc
from primia_jax.mpc import clear, inference
from primia_jax.mpc.circuit import Apply, Linear
from primia_jax.mpc.gates.elementwise import RELU

pytestmark = pytest.mark.slow
TARGET_ERROR = {
  "ResNet-50": 1e-2,
  "VGG-16": 1e-3,
  "DenseNet-121": 1e-2,
  "U-Net, 2-D": 1e-3,
  "U-Net, 3-D": 1e-3,
  "ViT-B/16": 1e-3,
  "LSTM, two layers": 1e-3,
}
NUM_RELUS = {"ResNet-50": 49, "VGG-16": 15, "DenseNet-121": 121}
NUM_LAYERS = {"U-Net, 2-D": 23, "U-Net, 3-D": 23, "ViT-B/16": 74, "LSTM, two layers": 5}  # at least


@pytest.fixture(autouse=True)
def _as_users_have_it():
  with measure.as_users_have_it():
    yield
  jax.clear_caches()  # the programs of all networks together take 15 GiB


class Seen(NamedTuple):
  """The inputs of one gate in units of its range: the least and the greatest."""

  action: str
  low: float
  high: float


def watched(plan, args):
  """The integer model's outputs, and what each gate saw."""
  gates = []

  @jax.jit
  def run(operands):
    ends = []

    def watch(op, z):
      gates.append(op.gate)
      ends.append((jnp.min(z), jnp.max(z)))

    return clear.compute(plan.circuit, operands, watch), ends

  elements, ends = run(inference.encode(plan, args))
  share = lambda gate, z: int(z) / 2.0**gate.range_bits
  seen = [
    Seen(gate.action, *(share(gate, z) for z in each))
    for gate, each in zip(gates, ends, strict=True)
  ]
  return inference.outputs(plan, inference.decoded(plan, elements)), seen


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_network(name):
  module, variables, x = networks.small(networks.NETWORKS[name])
  args, fn = (variables, x), module.apply
  exact = measure.in_float64(fn, args)
  assert np.asarray(exact).dtype == np.float64
  config = dataclasses.replace(measure.CONFIG, margin=1.0)  # the image is that of calibration
  plan = mpc.plan(fn, measure.OWNERS, args, config, mpc.calibrate(fn, measure.OWNERS, [args]))
  want, seen = watched(plan, args)
  np.testing.assert_allclose(want, exact, atol=TARGET_ERROR[name], rtol=0)
  np.testing.assert_array_equal(mpc.infer(plan, *args), want)
  assert_driven(seen)


def assert_driven(seen):
  """Most gates are filled to a quarter of their range, and ReLUs from both sides."""
  filled = np.array([max(-gate.low, gate.high) for gate in seen])
  assert np.all(filled < 1)
  assert np.mean(filled >= 1 / 4) > 0.75, np.sort(filled)
  signs = [gate.low < 0 < gate.high for gate in seen if gate.action == RELU]
  assert np.mean(signs or [True]) > 0.9


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_a_plan_at_full_size(name):
  """From shapes alone: a gate for each ReLU that no pool swallows, a product for each layer."""
  network = networks.NETWORKS[name]
  plan = mpc.plan(network.module().apply, measure.OWNERS, networks.shapes(network))
  gates = [op.gate for op in plan.circuit.operations if isinstance(op, Apply)]
  relus = sum(gate.action == RELU and gate.shift > 0 for gate in gates)
  layers = sum(isinstance(op, Linear) for op in plan.circuit.operations)
  assert relus == NUM_RELUS.get(name, relus)
  assert layers >= NUM_LAYERS.get(name, 0)
