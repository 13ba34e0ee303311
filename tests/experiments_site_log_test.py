"""What a hospital's program prints is in its own folder, too."""

import datetime
import io
import stat
import sys

import pytest
from absl import logging

from experiments import site_folders, site_log


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A site's folder."""
  handler = logging.get_absl_handler().python_handler
  monkeypatch.setattr(handler, "stream", handler.stream)
  monkeypatch.setattr(sys, "argv", ["primia-train", "--run_dir=x"])
  tmp_path.chmod(0o700)
  site_folders.write(tmp_path, site_folders.Member(0, "hospital-a"))
  return tmp_path


def streams(monkeypatch):
  """What a start shows; pytest's own are back at the end."""
  for name in ("stdout", "stderr"):
    monkeypatch.setattr(sys, name, io.StringIO())
  return sys.stdout, sys.stderr


def lines(path):
  found = [line.split(" ", 1) for line in path.read_text().splitlines()]
  assert all(datetime.datetime.fromisoformat(at).tzinfo for at, _ in found)
  return [said for _, said in found]


def test_lines_are_shown_and_kept_with_their_times_over_starts(folder, monkeypatch):
  shown = streams(monkeypatch)
  site_log.keep(str(folder))
  print("round 1", "of 2")
  print("begun, ", end="")
  print("a\rb\rthe bar at its end\nerror: the reason", file=sys.stderr)
  logging.get_absl_handler().python_handler.stream.write("a warning of a library\n")
  assert shown[0].getvalue() == "round 1 of 2\nbegun, "
  assert "a\rb\rthe bar at its end\nerror: the reason\n" in shown[1].getvalue()
  streams(monkeypatch)  # of the next start
  site_log.keep(str(folder))
  print("zweite Zeile \udcff, ü")
  started, first, bar, why, warning, again, last = lines(folder / "log")
  assert started == again == "started: primia-train --run_dir=x"
  assert (first, bar, why) == ("round 1 of 2", "the bar at its end", "error: the reason")
  assert warning.endswith("a warning of a library")
  assert last == "zweite Zeile \\udcff, ü"
  assert stat.S_IMODE((folder / "log").stat().st_mode) == 0o600


def test_it_is_bounded_and_a_full_disk_ends_nothing(folder, monkeypatch):
  monkeypatch.setattr(site_log, "_MOST", 1000)
  shown, _ = streams(monkeypatch)
  site_log.keep(str(folder))
  for i in range(100):
    print(f"line {i}")
  sizes = [(folder / name).stat().st_size for name in ("log", "log.1")]
  assert max(sizes) <= 1000
  assert lines(folder / "log")[-1] == "line 99"
  kept = lines(folder / "log.1") + lines(folder / "log")
  assert kept == [f"line {i}" for i in range(100 - len(kept), 100)]

  def full(*args):
    raise OSError("no space left")

  monkeypatch.setattr(site_log.os, "open", full)
  print("goes on")
  assert "goes on" in shown.getvalue()


def test_a_folder_that_is_open_or_no_site_s_gets_no_log(folder, monkeypatch):
  shown, _ = streams(monkeypatch)
  folder.chmod(0o750)
  site_log.keep(str(folder))
  (folder / "site.toml").unlink()
  folder.chmod(0o700)
  site_log.keep(str(folder))
  site_log.keep("")
  assert not (folder / "log").exists()
  assert sys.stdout is shown
