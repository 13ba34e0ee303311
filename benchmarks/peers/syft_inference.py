"""PySyft 0.2.9, the engine that PriMIA contains: both parties and the dealer in one process,
function secret sharing.

syft_inference.py ROUNDS CASE BATCH SIZE WANT

Keys are made as they are needed. Inputs and weights are secret, with its four decimal places. WANT
is a file with the answer in float32. Python 3.7.
"""
# ruff: noqa: E402 - stand-ins come before imports

import contextlib
import os
import sys
import types
import warnings

os.environ["OMP_NUM_THREADS"] = "1"  # it forks, which hangs once OpenMP has run
warnings.filterwarnings("ignore")


class Absent(types.ModuleType):
  """Stands for a package that PySyft imports and does not use here."""

  __path__ = ()

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return object


for name in ("aiortc", "aiortc.contrib", "aiortc.contrib.signaling"):
  sys.modules[name] = Absent(name)

import networks
import numpy as np
import stepping
import syft
import syft.frameworks.torch.mpc.fss
import torch
from torch.nn import functional

syft.frameworks.torch.mpc.fss.MULTI_LIMIT = 1 << 60  # its way with more processes hangs here
num_rounds, case, batch, size, path = sys.argv[1:]
hook = syft.TorchHook(torch)
first, second, dealer = (
  syft.VirtualWorker(hook, id=name) for name in ("first", "second", "dealer")
)


class Ops:
  """NCHW, OIHW, dense [in, out]."""

  layer = staticmethod(contextlib.nullcontext)
  relu = staticmethod(lambda x: x.relu())
  add = staticmethod(lambda a, b: a + b)
  conv = staticmethod(
    lambda x, w, b, stride, padding: functional.conv2d(x, w, b, stride=stride, padding=padding)
  )
  max_pool = staticmethod(
    lambda x, window, stride, padding: functional.max_pool2d(
      x, kernel_size=window, stride=stride, padding=padding
    )
  )
  dense = staticmethod(lambda x, w, b: x.matmul(w) + b)
  flat = staticmethod(lambda x: x.view(x.shape[0], -1))
  mean = staticmethod(
    lambda x: functional.avg_pool2d(x, kernel_size=x.shape[-1]).view(x.shape[0], -1)
  )


def encrypt(array):
  fixed = torch.tensor(np.ascontiguousarray(array)).fix_prec(base=10, precision_fractional=4)
  return fixed.share(first, second, protocol="fss", dtype="long", crypto_provider=dealer)


args = [encrypt(a) for a in networks.inputs(case, int(batch), int(size))]
if case == "relu":
  function = args[0].relu
elif case == "matmul":
  function = lambda: args[0].matmul(args[1])
else:
  params = {
    n: (encrypt(w if w.ndim == 4 else w.T), encrypt(b))
    for n, (w, b) in networks.weights(case).items()
  }
  function = lambda: networks.apply(case, Ops, params, args[0])

error = float(np.abs(function().get().float_prec().numpy() - np.load(path)).max())
stepping.run(int(num_rounds), lambda _: function(), "syft", "torch", error=error)
