"""A process for each party, under `jax.distributed`. This file is the test and, run by itself, a
process.
"""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from primia_jax import mpc
from primia_jax.mpc import devices
from primia_jax.mpc.sharing import party_mesh

OWNERS = ("model_owner", "data_owner")
RNG = np.random.default_rng(0)
W, X = (RNG.normal(size=shape).astype(np.float32) for shape in ((6, 5), (3, 6)))


def fn(w, x):
  return jax.nn.relu(x @ w) @ w.T


def planned(client="trusted"):
  ranges = mpc.calibrate(fn, OWNERS, [(W, X)])
  return mpc.plan(fn, OWNERS, (W, X), mpc.Config(32, 10, 14, client=client), ranges)


def worker(process: int, address: str, folder: pathlib.Path) -> None:
  jax.distributed.initialize(address, num_processes=2, process_id=process)
  plan = mpc.read(folder / "plan")
  run = devices.online(plan, party_mesh())
  if process == 0:
    owner = mpc.ModelOwner(plan, W, secret=bytes(range(32)))
    owner.resume(mpc.read(folder / "publication").publication)
    prepared = owner.prepare(mpc.read(folder / "first"))
    while not (folder / "question").exists():
      time.sleep(0.05)
    assert run(owner.answer(prepared, mpc.read(folder / "question"))) is None
    return
  owner = mpc.DataOwner(plan, mpc.read(folder / "publication"))
  side, question = owner.ask(owner.prepare(mpc.read(folder / "second")), X)
  mpc.write(folder / "asking", question)
  (folder / "asking").rename(folder / "question")
  np.save(folder / "out.npy", owner.reveal(run(side)))


def test_two_processes_have_the_bits_of_one(tmp_path):
  plan = planned()
  owner = mpc.ModelOwner(plan, W, secret=bytes(range(32)))
  dealer = mpc.Dealer(plan, owner.tag)
  mpc.write(tmp_path / "plan", plan)
  mpc.write(tmp_path / "publication", owner.publish(dealer.blind()))
  for name, part in zip(("first", "second"), dealer.deal(), strict=True):
    mpc.write(tmp_path / name, part)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  path = os.pathsep.join(
    filter(None, [str(pathlib.Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
  )
  settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": path}
  command = [sys.executable, __file__, address, str(tmp_path)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
  parties = [
    subprocess.Popen([*command, str(i)], env=os.environ | settings, **pipes) for i in range(2)
  ]
  try:
    for process in parties:
      told, _ = process.communicate(timeout=180)
      assert process.returncode == 0, told[-3000:]
  finally:
    for process in parties:
      process.kill()
  np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), mpc.check(plan, (W, X)))


def test_what_it_cannot_carry_is_refused():
  with pytest.raises(ValueError, match="2 of 2 devices here"):
    devices.online(planned(), party_mesh())
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("sites",))
  with pytest.raises(ValueError, match="'sites'"):
    devices.online(planned(), mesh)


if __name__ == "__main__":
  worker(int(sys.argv[3]), sys.argv[1], pathlib.Path(sys.argv[2]))
