"""What a sender may put into a role's inbox, and what is taken from it."""

import pytest
from service_institution import CLINIC, MODEL

from primia_jax.service import certificates, folders, inbox


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


@pytest.mark.parametrize("name", certificates.RESERVED)
def test_no_clinic_has_the_name_of_a_file(tmp_path, name):
  """It could not have a folder, and the server would end each session without a reason."""
  with pytest.raises(ValueError, match="name of a file of a publication"):
    certificates.check_name(name)
  folder = folders.make(tmp_path / "model_owner")
  held = folders.make(folder / "models" / MODEL) / name
  held.write_bytes(b"x")
  put(folder, "dealer", f"models/{MODEL}/{name}/correlations/{'0' * 64}")
  with pytest.raises(ValueError, match="may send; remove it"):
    inbox.collect(folder, "model_owner")
  assert held.read_bytes() == b"x"
  (folders.make(folder / certificates.CLINICS) / f"{name}.pem").write_bytes(b"x")
  with pytest.raises(ValueError, match=f"{name}.pem"):
    certificates.clinics(folder)


def test_one_wrong_file_keeps_no_other_from_being_taken(tmp_path):
  folder = folders.make(tmp_path / "model_owner")
  for name in ("aaa", f"models/{MODEL}/{CLINIC}/other"):
    put(folder, "dealer", name)
  good = f"models/{MODEL}/{CLINIC}/correlations/{'0' * 64}"
  put(folder, "dealer", good)
  with pytest.raises(ValueError, match=r"aaa is nothing that .* \(and 1 other files\)"):
    inbox.collect(folder, "model_owner")
  assert (folder / good).exists()


def test_what_stands_in_the_way_is_named(tmp_path):
  folder = folders.make(tmp_path / "model_owner")
  (folders.make(folder / "models" / MODEL) / CLINIC).write_bytes(b"no folder")
  put(folder, "dealer", f"models/{MODEL}/{CLINIC}/correlations/{'0' * 64}")
  with pytest.raises(ValueError, match="cannot be taken"):
    inbox.collect(folder, "model_owner")


@pytest.mark.parametrize("was_used", [False, True])
def test_one_seed_for_two_clinics_is_refused(tmp_path, was_used):
  """The number is that of the seed; the other clinic has it, or had it."""
  folder, number = folders.make(tmp_path / "model_owner"), "0" * 64
  of = lambda clinic: f"models/{MODEL}/{clinic}/correlations/{number}"
  put(folder, "dealer", of(CLINIC))
  assert inbox.collect(folder, "model_owner") == 1
  if was_used:
    folders.destroy(folder / "models" / MODEL / CLINIC, number)
  put(folder, "dealer", of("hospital-z"))
  with pytest.raises(ValueError, match=f"dealt to {CLINIC}, too"):
    inbox.collect(folder, "model_owner")
  assert not (folder / of("hospital-z")).exists()


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
  with pytest.raises(ValueError, match="not a file of a plan"):
    inbox.collect(folder, "clinic")
  (folder / "inbox" / "model_owner" / "models" / MODEL / "plan").unlink()
  (folder / "inbox" / "dealer" / "models" / MODEL / "correlations").mkdir(parents=True)
  link = folder / "inbox" / "dealer" / "models" / MODEL / "correlations" / ("0" * 64)
  link.symlink_to("/etc/hostname")
  with pytest.raises(ValueError, match="may send"):
    inbox.collect(folder, "clinic")
  link.rename(link.with_name(".part"))  # what rsync still copies
  assert inbox.collect(folder, "clinic") == 0
