"""The local channel between a SuperNode and its hospital's own process, without Flower."""

import socket
import stat
import struct
import subprocess
import sys
import threading
import time

import pytest

from primia_jax.flower import channel


def asking(folder, request, timeout=20.0, waits=True):
  """A thread that relays; its answer or error is in a list."""
  found = []

  def ask():
    try:
      found.append(channel.relay(folder, request, timeout, waits))
    except Exception as error:
      found.append(error)

  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  return thread, found


def own(tmp_path, *names):
  folder = tmp_path.joinpath(*names)
  folder.mkdir(parents=True, exist_ok=True)
  folder.chmod(0o700)
  return folder


@pytest.mark.parametrize("names", [("site",), ("x" * 90, "y" * 90)])
def test_requests_are_answered_in_turn_however_long_the_folder_s_path(tmp_path, names):
  folder = own(tmp_path, *names)
  first, answer = asking(folder, b"first")  # before the hospital's process is there
  end = channel.serve(folder, 20.0)
  assert end.hear(100) == b"first"
  end.say(b"\x80\x04.")  # the beginning of a pickle, which nobody reads as one
  first.join(20)
  assert answer == [b"\x80\x04."]
  second, answer = asking(folder, bytes(2**20))
  assert end.hear(2**21) == bytes(2**20)
  end.say(b"2")
  second.join(20)
  assert answer == [b"2"]
  end.close()
  assert not (folder / channel.NAME).exists()


def test_a_request_that_is_too_long_is_refused_and_silence_ends(tmp_path):
  folder = own(tmp_path)
  end = channel.serve(folder, 0.3)
  thread, answer = asking(folder, bytes(1000))
  with pytest.raises(ValueError, match="1000 bytes; the limit is 10"):
    end.hear(10)
  thread.join(20)
  assert answer == [b""]
  with pytest.raises(TimeoutError, match=r"sent nothing for 0\.3 seconds"):
    end.hear(10)
  end.close()


def test_whoever_asks_learns_that_the_process_has_ended_or_is_not_there(tmp_path):
  folder = own(tmp_path)
  assert channel.relay(folder, b"x", 9.0, waits=False) == b""
  with pytest.raises(TimeoutError, match="no hospital's process waits at"):
    channel.relay(folder, b"x", 0.1)
  end = channel.serve(folder, 20.0)
  thread, answer = asking(folder, b"x")
  assert end.hear(9) == b"x"
  end.close()  # as the end of the process does
  thread.join(20)
  assert answer == [b""]
  end = channel.serve(folder, 20.0)
  thread, answer = asking(folder, b"x", timeout=0.2)
  assert end.hear(9) == b"x"
  thread.join(20)
  assert "has not answered in 0.2 seconds" in str(answer[0])
  end.say(b"late")  # is dropped
  thread, answer = asking(folder, b"y")
  assert end.hear(9) == b"y"
  end.say(b"z")
  thread.join(20)
  assert answer == [b"z"]
  end.close()


def test_strangers_that_flood_or_drip_hold_nobody_up_and_are_forgotten(tmp_path):
  """Three hundred that connect and say nothing, one that drips, and one that says too much."""
  folder, timeout = own(tmp_path), 20.0
  end = channel.serve(folder, timeout)
  begun, stop = time.monotonic(), threading.Event()

  def connected(data=b""):
    one = socket.socket(socket.AF_UNIX)
    one.connect(str(folder / channel.NAME))
    one.sendall(data)
    return one

  def flood():
    idle = [connected() for _ in range(300)]
    idle += [connected(struct.pack("<Q", 3) + b"four"), connected(b"dri")]
    while not stop.wait(0.01):
      try:
        idle[-1].sendall(b"p")
      except OSError:
        idle[-1] = connected(b"dri")
    for one in idle:
      one.close()

  flooding = threading.Thread(target=flood, daemon=True)
  flooding.start()
  for number in range(5):
    thread, answer = asking(folder, b"request %d" % number)
    assert end.hear(100) == b"request %d" % number
    end.say(b"answer")
    thread.join(20)
    assert answer == [b"answer"]
  stop.set()
  flooding.join(20)
  assert time.monotonic() - begun < timeout
  end.close()


def test_requests_that_do_not_end_take_no_more_memory_than_one(tmp_path, monkeypatch):
  """Each says that it is as long as one may be, and is not sent whole; the longest are ended."""
  monkeypatch.setattr(channel, "_PIECE", 64)  # bytes above the limit that may be held
  folder, limit = own(tmp_path), 1000
  end, begun = channel.serve(folder, 20.0), []
  for _ in range(6):
    begun.append(socket.socket(socket.AF_UNIX))
    begun[-1].connect(str(folder / channel.NAME))
    begun[-1].sendall(struct.pack("<Q", limit) + bytes(500))
  thread, answer = asking(folder, bytes(limit))
  assert end.hear(limit) == bytes(limit)
  end.say(b"answer")
  thread.join(20)
  assert answer == [b"answer"]

  def is_ended(one):
    one.settimeout(0.05)
    try:
      return one.recv(1) == b""
    except TimeoutError:
      return False
    except ConnectionResetError:
      return True

  assert sum(map(is_ended, begun)) >= 5  # two of 508 bytes are more than 1064 with a third
  end.close()


def test_a_process_that_stops_in_the_middle_of_its_answer_is_late(tmp_path):
  folder = own(tmp_path)
  listener = socket.socket(socket.AF_UNIX)
  listener.bind(str(folder / channel.NAME))
  listener.listen(1)
  thread, answer = asking(folder, b"x", timeout=0.3)
  accepted, _ = listener.accept()
  accepted.sendall(struct.pack("<Q", 9) + b"four")
  thread.join(20)
  assert "has not answered in 0.3 seconds" in str(answer[0])
  accepted.close()
  listener.close()


def test_the_channel_lies_where_its_owner_alone_may_enter(tmp_path):
  folder = own(tmp_path)
  end = channel.serve(folder, 1.0)
  mode = (folder / channel.NAME).stat().st_mode
  assert stat.S_ISSOCK(mode)
  assert mode & 0o777 == 0o600
  end.close()
  folder.chmod(0o750)  # for the group of a SuperNode's user
  end = channel.serve(folder, 1.0)
  assert (folder / channel.NAME).stat().st_mode & 0o777 == 0o666  # its folder keeps all others out
  end.close()
  for mode in (0o701, 0o705, 0o770):
    folder.chmod(mode)
    with pytest.raises(ValueError, match=rf"mode {mode:o} .* so that others can enter; chmod it"):
      channel.serve(folder, 1.0)


def test_what_flower_starts_for_each_message_needs_the_standard_library_alone():
  code = """
import sys
before = set(sys.modules)
import primia_jax.flower.channel
known = sys.stdlib_module_names
loaded = {name.split(".")[0] for name in set(sys.modules) - before} - known
assert {name for name in loaded if not name.startswith("__")} == {"primia_jax"}, loaded
"""
  subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
