"""A SuperLink whose certificate has expired, or is not valid yet for a clock that is a day behind.

Flower's own processes are started, so `.ci/run` runs this file once.
"""

import functools
import time

import pytest

pytest.importorskip("flwr")

from flower_events import DOCS, OVER_FLOWER, row

from experiments import processes, trial, trial_keys
from primia_jax.flower import channel
from primia_jax.secagg import Lost, carrier, meeting

pytestmark = pytest.mark.flower

OUT_OF_TIME = {  # days of validity: until, and from
  "certificate has expired": {"days": -1.0},
  "certificate is not yet valid": {"days": 30.0, "begin": 1.0},
}


def deployment(folder, own):
  made = trial.Deployment(folder, [own], {}, trial.free_port())
  made.flower.mkdir(parents=True, exist_ok=True)
  (own / trial.FLOWER).mkdir(exist_ok=True)
  return made


@pytest.mark.parametrize("name", OUT_OF_TIME)
def test_a_certificate_out_of_time_ends_the_supernode_and_its_hospital_by_name(
  tmp_path, monkeypatch, name
):
  """Nothing is carried, nobody hangs, and with a new certificate all is right."""
  own = processes.own_folder(tmp_path / "own", 0).resolve()
  spoiled = deployment(tmp_path / "run", own)
  with monkeypatch.context() as patch:
    made = functools.partial(trial_keys.make_certificates, **OUT_OF_TIME[name])
    patch.setattr(trial_keys, "make_certificates", made)
    trial._start_superlink(spoiled)
  try:
    trial_keys.make_node_key(own / trial.FLOWER / "node_key")
    trial.start_supernode(spoiled, 0)
    end = carrier.Carrier(*channel.serve(own, 20.0))
    with pytest.raises(Lost, match="no invitation of a coordinator has come") as lost:
      meeting.invited(end)
    end.close()
    node, until = spoiled.processes["supernode 0"], time.monotonic() + 120
    while node.poll() is None and time.monotonic() < until:
      time.sleep(0.1)
    assert node.poll() == 1
    assert name in spoiled.log("supernode 0").read_text()
    with pytest.raises(RuntimeError, match=r"flwr supernode failed.*|.*failed: .* SuperLink"):
      trial.register(spoiled, 0)
    assert name in spoiled.log("superlink").read_text()  # its own parts cannot reach it either
  finally:
    trial._stop(spoiled)
  ends = "SuperNode ends, exit code 1", type(lost.value).__name__, "right"
  renewed = deployment(tmp_path / "run", own)
  try:
    trial._start_superlink(renewed)
    trial.register(renewed, 0)
  finally:
    trial._stop(renewed)
  assert ends == OVER_FLOWER["a certificate that has expired, or is not valid yet"]
  assert row("a certificate that has expired, or is not valid yet") in DOCS.read_text().splitlines()
