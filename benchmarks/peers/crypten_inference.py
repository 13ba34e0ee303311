"""CrypTen: two processes on the loopback device, Beaver triples. crypten_inference.py ROUNDS CASE
BATCH SIZE WANT HOW

HOW is total (triples are made when needed) or online (triples are made before each round and not
timed). Inputs and weights are secret. WANT is a file with the answer in float32.
"""
# ruff: noqa: E402 - stand-ins come before imports

import os
import sys
import time
import types

sys.modules["torch.onnx._internal.registration"] = types.SimpleNamespace(
  registry=None
)  # gone from torch 2.9 on

import contextlib

import crypten
import crypten.communicator
import crypten.mpc
import networks
import numpy as np
import stepping
import torch
from crypten.config import cfg

num_rounds, case, batch, size, path, how = sys.argv[1:]
commands = os.dup(0)  # the two processes are started without standard input


class Ops:
  """NCHW, OIHW, dense [in, out]."""

  layer = staticmethod(contextlib.nullcontext)
  relu = staticmethod(lambda x: x.relu())
  add = staticmethod(lambda a, b: a + b)
  conv = staticmethod(
    lambda x, w, b, stride, padding: x.conv2d(w, stride=stride, padding=padding) + b
  )
  max_pool = staticmethod(
    lambda x, window, stride, padding: x.max_pool2d(window, stride=stride, padding=padding)
  )
  dense = staticmethod(lambda x, w, b: x.matmul(w) + b)
  flat = staticmethod(lambda x: x.flatten(1))
  mean = staticmethod(lambda x: x.mean((2, 3)))


def encrypt(array):
  return crypten.cryptensor(torch.as_tensor(np.ascontiguousarray(array)), src=0)


def function():
  """The computation, ready to be repeated."""
  args = [encrypt(a) for a in networks.inputs(case, int(batch), int(size))]
  if case == "relu":
    return args[0].relu
  if case == "matmul":
    return lambda: args[0].matmul(args[1])
  params = {
    name: (
      encrypt(w if w.ndim == 4 else w.T),
      encrypt(b.reshape(1, -1, 1, 1) if w.ndim == 4 else b),
    )
    for name, (w, b) in networks.weights(case).items()
  }
  return lambda: networks.apply(case, Ops, params, args[0])


def main():
  torch.set_num_threads(1)
  torch.set_grad_enabled(False)
  link, provider = crypten.communicator.get(), crypten.mpc.get_default_provider()
  leads, run = link.get_rank() == 0, function()
  cfg.communicator.verbose = True
  link.reset_communication_stats()
  if how == "online":
    provider.trace(True)
  found = run()
  provider.trace(False)
  stats = link.get_communication_stats()
  cfg.communicator.verbose = False
  error = float(np.abs(found.get_plain_text().numpy() - np.load(path)).max())
  if leads:
    sys.stdin = os.fdopen(commands)
    stepping.ready("crypten", "torch", rounds=stats["rounds"], sent=stats["bytes"], error=error)
  for _ in range(int(num_rounds)):
    if how == "online":
      provider.fill_cache()
    if leads:
      stepping.wait()
    cpu, wall = stepping.tree_cpu() if leads else 0.0, time.perf_counter()
    link.barrier()  # the other process waits here for the round to begin
    run()
    link.barrier()
    seconds = time.perf_counter() - wall
    if leads:
      stepping.answer(seconds, stepping.tree_cpu() - cpu)


if __name__ == "__main__":
  crypten.mpc.context.run_multiprocess(2)(main)()
