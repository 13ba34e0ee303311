"""Three roles in three processes, each with nothing but its own folder, over TLS on loopback."""

import os
import pathlib
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import service_role

from primia_jax import mpc
from primia_jax.service import certificates, folders

TESTS = pathlib.Path(__file__).parent
PATIENCE = 240.0  # seconds for a step on a busy machine


class Role:
  """A process, what it has said, and how to tell it to go on."""

  def __init__(self, role, root):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    self.process = subprocess.Popen(
      [sys.executable, str(TESTS / "service_role.py"), role, str(root)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
      env=dict(os.environ, PYTHONPATH=path, JAX_PLATFORMS="cpu"),
    )  # fmt: skip

  def tell(self, line=""):
    self.process.stdin.write(f"{line}\n")
    self.process.stdin.flush()

  def hear(self):
    """The next line that it says."""
    timer = threading.Timer(PATIENCE, self.process.kill)
    timer.start()
    line = self.process.stdout.readline().split()
    timer.cancel()
    return line

  def kill(self):
    self.process.kill()
    self.process.wait()


@pytest.fixture
def roles(tmp_path):
  """Folders with certificates, the dealer's work done, and a model owner that serves."""
  for name in ("model_owner", "clinic", "public"):
    folders.make(tmp_path / name)
  (tmp_path / "model_owner" / "clinics").mkdir()
  server = certificates.create(tmp_path / "model_owner", "model-owner")
  clinic = certificates.create(tmp_path / "clinic", service_role.CLINIC)
  shutil.copy(server, tmp_path / "public" / "model-owner.pem")
  known = tmp_path / "model_owner" / "clinics" / f"{service_role.CLINIC}.pem"
  shutil.copy(clinic, known)
  found = {name: Role(name, tmp_path) for name in ("model_owner", "dealer", "clinic")}
  try:
    assert found["model_owner"].hear() == ["serving"]
    yield found
  finally:
    for role in found.values():
      role.kill()


@pytest.mark.slow
def test_three_processes_and_what_happens_when_one_dies(roles, tmp_path):
  assert roles["dealer"].process.wait(PATIENCE) == 0
  folder, clinic = tmp_path / "clinic", roles["clinic"]
  plan = mpc.read(tmp_path / "public" / "plan")
  assert len(folders.unused(folder)) == 6
  for seed in (1, 3):
    clinic.tell(seed)
    assert clinic.hear() == ["prepared"]
    clinic.tell()
    assert clinic.hear()[0] == "answered"
    got, arguments = (
      np.load(folder / f"{seed}.npy"),
      (service_role.weights(), service_role.image(seed)),
    )
    np.testing.assert_array_equal(got, mpc.check(plan, arguments))
    np.testing.assert_allclose(got, service_role.fn(*arguments), atol=0.1)
  # a clinic that dies costs its own session only
  clinic.tell(4)
  assert clinic.hear() == ["prepared"]
  clinic.kill()
  assert roles["model_owner"].hear() == ["ended", service_role.CLINIC, "PeerLost"]
  roles["clinic"] = clinic = Role("clinic", tmp_path)
  clinic.tell(5)
  assert clinic.hear() == ["prepared"]
  clinic.tell()
  assert clinic.hear()[0] == "answered"
  # a model owner that dies is named at once, and the correlations are gone on both sides
  left = set(folders.unused(folder))
  clinic.tell(6)
  assert clinic.hear() == ["prepared"]
  roles["model_owner"].kill()
  clinic.tell()
  what, name, seconds = clinic.hear()
  assert (what, name) == ("error", "PeerLost")
  assert float(seconds) < service_role.TIMEOUT
  assert len(left - set(folders.unused(folder))) == 1
  assert folders.unused(folder) == folders.unused(tmp_path / "model_owner" / service_role.CLINIC)
  # it comes back with the same weights, and the clinic's remaining correlations serve
  (tmp_path / "public" / "port").unlink()
  roles["model_owner"] = server = Role("model_owner", tmp_path)
  assert server.hear() == ["serving"]
  roles["clinic"] = clinic = Role("clinic", tmp_path)
  clinic.tell(7)
  assert clinic.hear() == ["prepared"]
  clinic.tell()
  assert clinic.hear()[0] == "answered"
  server.process.stdin.close()  # it stops once its sessions are over
  clinic.process.stdin.close()
  assert server.hear() == ["stopped"]
  assert (server.process.wait(PATIENCE), clinic.process.wait(PATIENCE)) == (0, 0)
