"""The keys of a trial on one machine: nobody else can take a site's number."""

import pytest

from experiments import trial_keys
from primia_jax.secagg import Refused, pinning


def test_all_members_of_a_trial_hold_one_roster_of_their_own_keys(tmp_path):
  """Also at later starts, and where a crash came between two of them; but not where a folder was
  lost, or has been put in another's place.
  """
  coordinator, sites = tmp_path / "coordinator", [tmp_path / f"site_{i}" for i in range(3)]
  for site in sites:
    site.mkdir(mode=0o700)
  trial_keys.introduce(coordinator, sites)
  known = pinning.held(coordinator)
  own = [pinning.own_identity(site / "identity").public for site in sites]
  assert [member.public for member in known.sites.values()] == own
  assert known.coordinator.public == pinning.own_identity(coordinator / "identity").public
  for name in (pinning.FILE, pinning.SEEN):
    (sites[1] / name).unlink()
  trial_keys.introduce(coordinator, sites)
  assert all(pinning.held(site) == known for site in sites)
  for name in (pinning.FILE, pinning.SEEN):
    (sites[1] / name).unlink()
  key = (sites[1] / "identity").read_bytes()
  (sites[1] / "identity").write_bytes(key[::-1])
  with pytest.raises(Refused, match="no member has this folder's key"):
    trial_keys.introduce(coordinator, sites)
  (sites[1] / "identity").unlink()
  with pytest.raises(FileNotFoundError, match="site_1/identity: the identity is missing"):
    trial_keys.introduce(coordinator, sites)
