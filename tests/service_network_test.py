"""Sessions over TLS through a network that fails: a named error in time, or the right answer."""

import shutil
import time

import numpy as np
import pytest
import service_world
from service_proxy import Proxy
from service_world import CLINIC, W, X, dealt

from primia_jax import mpc
from primia_jax.service import certificates, folders, institutions
from primia_jax.service.channel import Limits
from primia_jax.service.errors import PeerLate, PeerLost, Refused

TIMEOUT = 2.0
PLACES = 3  # of a fault, in each direction
ENDS = {
  "it flips a bit": (PeerLost, Refused),
  "it loses a byte": (PeerLost, Refused, PeerLate),
  "it repeats bytes": (PeerLost, Refused),
  "it breaks": (PeerLost, Refused),
  "it stalls": (PeerLost, PeerLate),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  """A model owner that serves one clinic: (world, both folders, port, certificate, ends)."""
  world, root = service_world.world(), tmp_path_factory.mktemp("served")
  server, clinic = both = dealt(world, root, 2 * PLACES * len(ENDS) + 4)
  certificate = certificates.create(server, "model-owner").read_bytes()
  (server / institutions.CLINICS).mkdir()
  own = certificates.create(clinic, CLINIC)
  shutil.copy(own, server / institutions.CLINICS / f"{CLINIC}.pem")
  ends, name = [], world.publication.publication
  told = lambda clinic, error: ends.append(error)
  with institutions.serve(
    server, world.model_owner, name, online=world.online[0], limits=Limits(TIMEOUT), ended=told
  ) as port:
    yield world, both, port, certificate, ends


def asked(served, port):
  world, both, _, certificate, _ = served
  with institutions.ask(
    both[1], world.data_owner, world.publication.publication, f"127.0.0.1:{port}", certificate,
    world.online[1], Limits(TIMEOUT),
  ) as session:  # fmt: skip
    return session.ask(X)


@pytest.mark.parametrize("name", ["nothing", "it is slow"])
def test_a_network_that_only_delays_changes_nothing(served, name):
  world, _, port, _, ends = served
  before = len(ends)
  with Proxy(port, name) as proxy:
    np.testing.assert_array_equal(asked(served, proxy.port), mpc.check(world.plan, (W, X)))
  assert len(ends) == before


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("direction", [0, 1])
def test_a_network_that_fails_is_named_in_time(served, name, direction):
  _, both, port, _, ends = served
  with Proxy(port) as proxy:
    asked(served, proxy.port)
    length = proxy.passed[direction]
  for place in range(PLACES):
    before, start = len(ends), time.monotonic()
    byte = 20 + place * (length - 400) // PLACES  # the last bytes only close the connection
    with Proxy(port, name, direction, byte) as proxy, pytest.raises(ENDS[name]):
      asked(served, proxy.port)
    assert time.monotonic() - start < 40
    assert all(isinstance(end, PeerLost | PeerLate) for end in ends[before:]), (byte, ends[before:])
  clinic, model_owner = (set(folders.unused(folder)) for folder in (both[1], both[0] / CLINIC))
  assert clinic <= model_owner
