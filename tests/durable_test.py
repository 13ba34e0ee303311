"""Files that survive a crash: made once, replaced whole, readable by their owner alone."""

import os

import pytest

from primia_jax import durable


def test_a_new_file_replaces_none(tmp_path):
  path = tmp_path / "key"
  durable.create(path, b"first")
  assert path.read_bytes() == b"first"
  assert path.stat().st_mode & 0o777 == 0o600
  with pytest.raises(FileExistsError):
    durable.create(path, b"second")
  assert path.read_bytes() == b"first"


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
  path = tmp_path / "state.json"
  durable.replace(path, b"old")

  def full(descriptor):
    raise OSError("no space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="no space"):
    durable.replace(path, b"new")
  assert path.read_bytes() == b"old"
  monkeypatch.undo()
  durable.replace(path, b"new")
  assert path.read_bytes() == b"new"
  assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("write", [durable.create, durable.replace])
def test_what_is_written_is_synced_with_its_name(tmp_path, monkeypatch, write):
  synced = []
  real = os.fsync
  monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd)))
  write(tmp_path / "a", b"x")
  if write is durable.create:
    durable.sync_folder(tmp_path)
  assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.parametrize("before", [b"", b"one\n", b"one\nhal", b"hal", b"one\n" + b"x" * 200_000])
def test_a_line_is_added_over_one_that_a_crash_left_unfinished(tmp_path, before):
  path = tmp_path / "lines"
  path.write_bytes(before)
  for line in (b"two", b"three"):
    durable.append(path, line)
  assert path.read_bytes() == before[: before.rfind(b"\n") + 1] + b"two\nthree\n"


def test_a_file_of_lines_is_made_for_its_owner(tmp_path):
  durable.append(tmp_path / "lines", b"x")
  assert (tmp_path / "lines").stat().st_mode & 0o777 == 0o600
