"""SecretFlow's SPU, all parties as threads of one process. spu_inference.py ROUNDS CASE BATCH SIZE
WANT PROTOCOL

PROTOCOL is SEMI2K (two parties) or ABY3 (three). A round is a run of all parties, including
dealing; compiling, sharing and reconstruction are not timed. Inputs and weights are secret. WANT is
a file with the answer in float32.
"""

import contextlib
import sys
import threading

import jax
import jax.numpy as jnp
import networks
import numpy as np
import stepping
from jax import lax
from spu import api, libspu
from spu.utils import frontend

num_rounds, case, batch, size, path, protocol = sys.argv[1:]
num_parties = {"SEMI2K": 2, "ABY3": 3}[protocol]


class Ops:
  """NHWC, HWIO, dense [in, out]."""

  layer = staticmethod(contextlib.nullcontext)
  relu = staticmethod(lambda x: jnp.maximum(x, 0.0))
  add = staticmethod(jnp.add)
  dense = staticmethod(lambda x, w, b: x @ w + b)
  flat = staticmethod(lambda x: x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1))
  mean = staticmethod(lambda x: x.mean((1, 2)))

  @staticmethod
  def conv(x, w, b, stride, padding):
    pads, numbers = [(padding, padding)] * 2, ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=numbers) + b

  @staticmethod
  def max_pool(x, window, stride, padding):
    least = -1000.0 if padding else -jnp.inf  # minus infinity has no fixed-point number
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return lax.reduce_window(
      x, least, lax.max, (1, window, window, 1), (1, stride, stride, 1), pads
    )


def last(array):
  """The order of axes that JAX computes fastest in."""
  order = {2: (1, 0), 4: (2, 3, 1, 0)}
  return np.ascontiguousarray(array.transpose(order[array.ndim]))


inputs = networks.inputs(case, int(batch), int(size))
if case == "relu":
  fn, args = Ops.relu, inputs
elif case == "matmul":
  fn, args = jnp.matmul, inputs
else:
  params = {name: (last(w), b) for name, (w, b) in networks.weights(case).items()}
  images = np.ascontiguousarray(inputs[0].transpose(0, 2, 3, 1))
  fn, args = (lambda params, x: networks.apply(case, Ops, params, x)), [params, images]

leaves = jax.tree_util.tree_leaves(tuple(args))
names = [f"in{i}" for i in range(len(leaves))]
program, _ = frontend.compile(
  frontend.Kind.JAX, fn, tuple(args), {}, names, [libspu.Visibility.VIS_SECRET] * len(leaves),
  lambda out: [f"out{i}" for i in range(len(out))],
)  # fmt: skip
config = libspu.RuntimeConfig(
  protocol=getattr(libspu.ProtocolKind, protocol), field=libspu.FieldType.FM64
)
io = api.Io(num_parties, config)
shares = [io.make_shares(np.asarray(leaf), libspu.Visibility.VIS_SECRET) for leaf in leaves]
link = libspu.link.Desc()
for party in range(num_parties):
  link.add_party(f"p{party}", f"thread_{party}")


def in_parallel(work):
  """work(party) in a thread for each, as they wait for one another."""
  results, errors = [None] * num_parties, []

  def one(party):
    try:
      results[party] = work(party)
    except BaseException as error:
      errors.append(error)

  threads = [threading.Thread(target=one, args=(party,)) for party in range(num_parties)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if errors:
    raise errors[0]
  return results


def start(party):
  runtime = api.Runtime(links[party], config)
  for name, share in zip(names, shares, strict=True):
    runtime.set_var(name, share[party])
  return runtime


links = in_parallel(lambda party: libspu.link.create_mem(link, party))
runtimes = in_parallel(start)


def one_round(_):
  in_parallel(lambda party: runtimes[party].run(program))


one_round(None)
found = io.reconstruct([runtime.get_var("out0") for runtime in runtimes])
error = float(np.abs(found - np.load(path)).max())
stepping.run(int(num_rounds), one_round, "spu", "jax", error=error)
