"""The file that only grows: what is on the disk, what is refused, and what a crash leaves."""

import base64
import json
import os
import stat
import subprocess
import sys

import pytest

from primia_jax.privacy import chain
from primia_jax.privacy.chain import Chain

CHARGES = [{"kind": "charge", "run": "a", "number": i} for i in range(4)]


@pytest.fixture
def filled(tmp_path):
  """A folder with four charges."""
  folder = tmp_path / "ledger"
  one = Chain(folder)
  for charge in CHARGES:
    one.append(charge)
  return folder


def lines(folder):
  return (folder / chain.FILE).read_bytes().splitlines(keepends=True)


def numbers(of):
  return [entry["number"] for entry in of.entries if entry["kind"] == "charge"]


def test_entries_come_back_in_order_and_are_known_by_their_hashes(filled):
  one = Chain(filled)
  assert numbers(one) == [0, 1, 2, 3]
  last = one.append({"kind": "charge", "number": 4}, {"kind": "charge", "number": 5})
  again = Chain(filled, read_only=True)
  assert numbers(again) == [0, 1, 2, 3, 4, 5]
  assert again.entries == one.entries
  assert last == one.last == again.last
  assert again.place(last) == 6
  assert again.place(one.entries[-1]["previous"]) == 5
  assert again.place("0" * 64) is None


def test_folder_key_and_file_are_for_their_owner_alone(filled):
  modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (filled, *filled.iterdir())}
  assert modes["ledger"] == 0o700
  assert modes["key"] == modes[chain.FILE] == 0o600
  (filled / "key").chmod(0o640)
  with pytest.raises(ValueError, match=r"key can be read by others.*chmod 600"):
    Chain(filled)


def test_a_new_folder_is_on_the_disk_before_anything_is_charged(tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
  Chain(tmp_path / "ledger")
  paths = tmp_path, tmp_path / "ledger", tmp_path / "ledger/key", tmp_path / "ledger" / chain.FILE
  assert set(synced) == {path.stat().st_ino for path in paths}


def test_an_entry_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
  """Without its fsync, a power cut would forget what was released."""
  one, synced = Chain(tmp_path), []
  monkeypatch.setattr(
    os, "fsync", lambda number: synced.append(os.pread(number, 2**20, 0).splitlines()[-1])
  )
  one.append(CHARGES[0])
  assert [json.loads(line)["number"] for line in synced] == [0]


def test_names_need_the_key_and_tell_parts_apart(tmp_path):
  one, other = Chain(tmp_path / "one"), Chain(tmp_path / "other")
  assert one.name(b"image") == Chain(tmp_path / "one").name(b"image") != other.name(b"image")
  assert len(one.name(b"image")) == chain.NAME_BYTES
  assert len({one.name(b"ab", b"c"), one.name(b"a", b"bc"), one.name(b"abc"), one.name(b"")}) == 4
  names = sorted(one.name(bytes([i])) for i in range(50))
  packed = chain.packed([*reversed(names), names[0]])
  assert chain.unpacked(packed, chain.NAME_BYTES) == names
  for text in ("%", base64.b64encode(b"short").decode()):
    with pytest.raises(ValueError, match="not names of units"):
      chain.unpacked(text, chain.NAME_BYTES)


@pytest.mark.parametrize(
  ("attack", "told"),
  [
    (lambda old: [*old[:2], old[2].replace(b'"number":1', b'"number":9'), *old[3:]], "line 4"),
    (lambda old: [*old[:2], *old[3:]], "line 3"),
    (lambda old: [*old[:2], old[3], old[2], old[4]], "line 3"),
    (lambda old: [*old[:2], b"\n", *old[2:]], "line 3"),
    (lambda old: [*old[:2], b"[1]\n", *old[2:]], "line 3"),
    (lambda old: old[1:], "line 1"),
  ],
  ids=["edited", "removed", "moved", "blank", "foreign", "beheaded"],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_chain_that_is_broken_in_the_middle_is_refused_by_line(filled, attack, told, read_only):
  (filled / chain.FILE).write_bytes(b"".join(attack(lines(filled))))
  with pytest.raises(ValueError, match=rf"ledger\.jsonl: the chain is broken at {told}"):
    Chain(filled, read_only)


def test_lines_missing_at_the_end_are_seen_by_who_has_a_later_hash(filled):
  last = Chain(filled).last
  (filled / chain.FILE).write_bytes(b"".join(lines(filled)[:-1]))
  assert Chain(filled).place(last) is None


def test_lines_that_vanish_while_it_is_open_are_missed(filled):
  one = Chain(filled)
  (filled / chain.FILE).write_bytes(b"".join(lines(filled)[:-1]))
  with pytest.raises(ValueError, match="has lost lines while it was open"):
    one.append(CHARGES[0])
  (filled / chain.FILE).unlink()
  with pytest.raises(ValueError, match="cannot be written"):
    one.append(CHARGES[0])


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_line_that_a_crash_left_unfinished_is_dropped(filled, left):
  """It was not on the disk as a whole, so `append` had not returned: nothing was released."""
  *old, torn = lines(filled)
  (filled / chain.FILE).write_bytes(b"".join(old) + torn[:left])
  assert numbers(Chain(filled, read_only=True)) == [0, 1, 2]
  one = Chain(filled)
  assert numbers(one) == [0, 1, 2]
  one.append({"kind": "charge", "number": 7})
  assert numbers(Chain(filled)) == [0, 1, 2, 7]
  assert b"".join(lines(filled)[:-1]) == b"".join(old)


@pytest.mark.parametrize("gone", ["key", chain.FILE])
def test_a_ledger_without_its_key_or_a_key_without_its_ledger_is_refused(filled, gone):
  """A new key would know no unit again; a new file would know no charge."""
  (filled / gone).unlink()
  with pytest.raises(ValueError, match=f"{gone} is missing and .* restore it from a backup"):
    Chain(filled)
  assert not (filled / gone).exists()


def test_another_key_is_refused(filled, tmp_path):
  Chain(tmp_path / "other")
  (filled / "key").write_bytes((tmp_path / "other" / "key").read_bytes())
  with pytest.raises(ValueError, match="begun with another key"):
    Chain(filled)


def test_a_folder_that_cannot_be_written_is_refused_with_its_flag(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match=r"ledger_dir=.*ledger cannot be written .*--ledger_dir"):
    Chain(tmp_path / "file" / "ledger")
  with pytest.raises(FileNotFoundError, match="holds no ledger"):
    Chain(tmp_path / "none", read_only=True)
  assert not (tmp_path / "none").exists()


def test_processes_that_append_at_a_time_keep_one_chain(tmp_path):
  """Two that begin the folder together, too."""
  code = "import pathlib, sys; from primia_jax.privacy.chain import Chain\n"
  code += f"one = Chain(pathlib.Path({str(tmp_path / 'ledger')!r}))\n"
  code += "for i in range(40): one.append({'kind': 'charge', 'run': sys.argv[1], 'number': i})"
  run = lambda name: subprocess.Popen([sys.executable, "-c", code, name])
  assert [process.wait() for process in [run("a"), run("b")]] == [0, 0]
  one = Chain(tmp_path / "ledger")
  assert len(one.entries) == 1 + 80
  for name in "ab":
    assert [e["number"] for e in one.entries if e.get("run") == name] == list(range(40))
