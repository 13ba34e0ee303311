"""What a sender may put into a role's inbox, and what is taken from it."""

import pytest
from service_institution import CLINIC, MODEL

from primia_jax.service import folders, inbox


def put(folder, sender, name, data=b"x"):
  path = folder / "inbox" / sender / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  return path


@pytest.mark.parametrize(
  ("role", "sender", "name"),
  [
    ("model_owner", "dealer", "clinics/evil.pem"),
    ("model_owner", "dealer", "key.pem"),
    ("model_owner", "dealer", f"models/{MODEL}/secret"),
    ("model_owner", "dealer", f"models/{MODEL}/{CLINIC}/used/{'0' * 64}"),
    ("model_owner", "dealer", f"models/{MODEL}/{CLINIC}/checked"),
    ("clinic", "dealer", f"models/{MODEL}/server.pem"),
    ("clinic", "dealer", f"models/{MODEL}/plan"),
    ("clinic", "model_owner", f"models/{MODEL}/correlations/{'0' * 64}"),
    ("dealer", "model_owner", f"models/{MODEL}/secret"),
    ("dealer", "model_owner", f"models/{MODEL}/blind_given"),
  ],
)
def test_a_sender_gives_nothing_that_is_not_its_to_give(tmp_path, role, sender, name):
  folder = folders.make(tmp_path / role)
  path = put(folder, sender, name)
  with pytest.raises(ValueError, match="may send; remove it"):
    inbox.collect(folder, role)
  assert path.exists()
  assert not (folder / name).exists()


def test_what_is_held_is_never_replaced_and_links_are_refused(tmp_path):
  folder, name = folders.make(tmp_path / "clinic"), f"models/{MODEL}/server.pem"
  put(folder, "model_owner", name, b"first")
  assert inbox.collect(folder, "clinic") == 1
  put(folder, "model_owner", name, b"first")
  assert inbox.collect(folder, "clinic") == 0  # the same again
  put(folder, "model_owner", name, b"second")
  with pytest.raises(ValueError, match="never replaced"):
    inbox.collect(folder, "clinic")
  assert (folder / name).read_bytes() == b"first"
  put(folder, "model_owner", name, b"first")
  put(folder, "model_owner", f"models/{MODEL}/plan", b"no plan")
  with pytest.raises(ValueError, match="no file of a plan"):
    inbox.collect(folder, "clinic")
  (folder / "inbox" / "model_owner" / "models" / MODEL / "plan").unlink()
  (folder / "inbox" / "dealer" / "models" / MODEL / "correlations").mkdir(parents=True)
  link = folder / "inbox" / "dealer" / "models" / MODEL / "correlations" / ("0" * 64)
  link.symlink_to("/etc/hostname")
  with pytest.raises(ValueError, match="may send"):
    inbox.collect(folder, "clinic")
  link.rename(link.with_name(".part"))  # what rsync still copies
  assert inbox.collect(folder, "clinic") == 0
