"""The protocol over loopback. This file is the test and, run by itself, one site's process."""

import asyncio
import contextlib
import errno
import hashlib
import os
import pathlib
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from primia_jax import secagg
from primia_jax.secagg import keys, protocol, rounds, transport
from primia_jax.secagg import messages as msg

SITES, SIZES, ROUND = range(4), (300, 1), 4
SERVER, *_SITES = (
  keys.identity(lambda size, i=i: hashlib.sha256(b"%d" % i).digest()[:size]) for i in range(5)
)
IDENTITIES = dict(zip(SITES, _SITES, strict=True))


def agreed():
  return rounds.setup({i: k.public for i, k in IDENTITIES.items()}, SIZES, b"loopback")


def vectors(site):
  rng = np.random.default_rng(site)
  return tuple(rng.integers(0, 2**32, size, dtype=np.uint32) for size in SIZES)


def join(address, site, timeout=60.0):
  with socket.create_connection(address, timeout) as connection:
    begun = transport.begin(connection, agreed(), ROUND, site, IDENTITIES[site])
    return transport.finish(connection, begun, vectors(site), SERVER.public)


def serve(listener, timeout):
  host = transport.Host(listener, len(SITES), timeout, SERVER)
  try:
    return host.serve(agreed(), ROUND).result()
  finally:
    host.close()


class Thread(threading.Thread):
  """A thread whose result, or exception, is asked for."""

  def __init__(self, call):
    super().__init__(daemon=True)
    self.call, self.result, self.error = call, None, None
    self.start()

  def run(self):
    try:
      self.result = self.call()
    except Exception as e:
      self.error = e

  def get(self):
    self.join(60)
    assert not self.is_alive()
    if self.error:
      raise self.error
    return self.result


@pytest.fixture(autouse=True, scope="module")
def _compiled():
  """No stage's timeout is to be spent on a compiler."""
  rounds.mask_total([np.zeros(8, np.uint32)], [1], 0, agreed())


def play(strangers=(), honest=SITES, timeout=30.0):
  """A round in threads, with strangers(address, sent) who have sent all before the honest sites
  come.
  """
  listener = transport.listen()
  address, sent = listener.getsockname(), threading.Semaphore(0)
  server = Thread(lambda: serve(listener, timeout))
  beside = [Thread(lambda s=s: s(address, sent)) for s in strangers]
  for _ in strangers:
    assert sent.acquire(timeout=30)
  sites = {i: Thread(lambda i=i: join(address, i)) for i in honest}
  return server, sites, beside


def check(report, survivors):
  assert report.opened.survivors == tuple(survivors)
  check_total(report.opened.total, survivors)


def check_total(total, survivors):
  assert len(total) == len(SIZES)
  for leaf, got in enumerate(total):
    assert np.array_equal(
      got, np.sum([vectors(i)[leaf] for i in survivors], axis=0, dtype=np.uint32)
    )


def test_a_round_over_loopback_gives_every_site_the_sum_and_the_lists():
  server, sites, _ = play()
  check(server.get(), SITES)
  for site in sites.values():
    lists, total = site.get()
    assert lists == msg.Survivors(ROUND, tuple(SITES), ())
    check_total(total, SITES)


def test_separate_processes_with_one_killed_in_the_middle_give_the_survivors_sum():
  """Site 2 has shared its keys, and is killed while it masks its input."""
  listener = transport.listen()
  port = str(listener.getsockname()[1])
  root = str(pathlib.Path(__file__).parents[1])
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
  start = lambda i: subprocess.Popen(
    [sys.executable, __file__, port, str(i), "hang" if i == 2 else ""],
    stdout=subprocess.PIPE,
    env=environment,
  )
  processes = [start(i) for i in SITES]
  try:
    server = Thread(lambda: serve(listener, 60.0))
    assert processes[2].stdout.readline() == b"masking\n"
    processes[2].kill()
    report = server.get()
    check(report, (0, 1, 3))
    assert report.opened.dropouts == (2,)
    assert report.rejected == ()
    for i in (0, 1, 3):
      assert processes[i].communicate(timeout=30)[0] == b"(0, 1, 3) (2,)\n"
      assert processes[i].returncode == 0
  finally:
    for process in processes:
      process.kill()
      process.wait()
      process.stdout.close()


def silent_after(stage, seconds):
  """A site that says no more after so many messages, with its connection open."""

  def site(address, sent):
    sent.release()
    me, message = protocol.advertise(agreed(), ROUND, 2, IDENTITIES[2])
    steps = (
      protocol.share_keys,
      lambda s, m: protocol.masked_input(s, m, vectors(2)),
      protocol.consistency,
    )
    with socket.create_connection(address, 30) as connection:
      for step in steps[:stage]:
        connection.sendall(transport.frame(message))
        head = connection.recv(4, socket.MSG_WAITALL)
        (size,) = struct.unpack("<I", head)
        me, message = step(me, msg.decode(connection.recv(size, socket.MSG_WAITALL)))
      time.sleep(seconds)

  return site


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_site_that_falls_silent_is_a_dropout_after_the_timeout(stage):
  others = [i for i in SITES if i != 2]
  server, sites, beside = play([silent_after(stage, 2.5)], others, timeout=1.5)
  report = server.get()
  check(report, SITES if stage == 3 else others)
  assert report.opened.dropouts == ((2,) if stage == 2 else ())
  for thread in [*sites.values(), *beside]:
    thread.get()


def test_too_few_sites_end_the_round_by_name_for_server_and_sites():
  server, sites, _ = play(honest=(0, 3), timeout=0.7)
  with pytest.raises(
    secagg.RoundFailed, match="stage advertise: 2 sites of 4 sent their message in time, and 3 are"
  ):
    server.get()
  for site in sites.values():
    with pytest.raises(ConnectionError):
      site.get()


def send(*frames):
  def stranger(address, sent):
    with socket.create_connection(address, 30) as connection:
      for data in frames:
        connection.sendall(data)
      sent.release()
      with contextlib.suppress(ConnectionError):
        connection.recv(1)

  return stranger


def test_garbage_and_strangers_are_rejected_by_name_and_the_round_goes_on():
  stranger = keys.identity()
  advert = protocol.advertise(agreed(), ROUND, 3, IDENTITIES[3])[1]
  forged = advert._replace(
    signature=keys.sign(stranger.private, rounds.signed_text(agreed(), advert))
  )
  strangers = [
    send(struct.pack("<I", 2**31), b"x" * 100),
    send(struct.pack("<I", 5) + b"\xffabcd"),
    send(struct.pack("<I", 3) + b"\x80\x04."),  # the beginning of a pickle
    send(transport.frame(advert._replace(site=9))),
    send(transport.frame(forged)),
    send(transport.frame(advert._replace(round=ROUND - 1))),
    send(transport.frame(msg.Roster(ROUND, ()))),
    send(b"\1\0"),
    send(),
  ]
  server, sites, beside = play(strangers)
  report = server.get()
  check(report, SITES)
  nameless = [r for r in report.rejected if r.site is None]
  # a busy server may come to what no site sent when the sites are a stage further
  assert [r.reason for r in nameless] == ["malformed"] * 4
  got = sorted((r.site, r.stage, r.reason) for r in report.rejected if r.site is not None)
  assert got == [
    (3, "advertise", "another round"),
    (3, "advertise", "forged"),
    (9, "advertise", "unknown"),
  ]
  assert any("2147483648 bytes announced" in str(r) for r in report.rejected)
  assert all(
    r.__traceback__ is None for r in report.rejected
  )  # whose frames would keep the messages in memory
  for thread in [*sites.values(), *beside]:
    thread.get()


def test_a_site_that_takes_nothing_is_cut_off_and_known_to_be_gone():
  async def check():
    hub, listener = transport._Hub(1), transport.listen()
    await hub.listen(listener)
    with socket.create_connection(listener.getsockname(), 30):
      while not hub.open:
        await asyncio.sleep(0.01)
      (writer,) = hub.open
      total = msg.Total(ROUND, (np.zeros(2**23, np.uint32),), b"")  # more than any socket's buffer
      await transport._send_all([(writer, total)], 0.2)
      assert await asyncio.wait_for(hub.inbox.get(), 20) == (writer, None)
    await hub.end(1.0)

  asyncio.run(check())


@pytest.mark.parametrize("busy", [True, False])
def test_a_host_that_closes_leaves_no_task_however_many_strangers_came(busy):
  listener = transport.listen()
  host = transport.Host(listener, 1, 30.0, keys.identity())
  pending = host.serve(agreed(), ROUND) if busy else None
  with contextlib.ExitStack() as stack:
    for _ in range(6):
      stack.enter_context(socket.create_connection(listener.getsockname(), 30)).sendall(
        b"\3\0\0\0abc"
      )
    while len(host._hub.open) < 6 and not busy:  # in a round they are shown out at once
      time.sleep(0.01)
    host.close()
    host.close()
  assert pending is None or pending.cancelled()
  assert asyncio.all_tasks(host._loop) == set()


class Unreachable:
  """A stream writer, and its transport, of a connection that has broken; with an error that is no
  ConnectionError.
  """

  def __init__(self):
    self.transport, self.aborted = self, False

  def write(self, data):
    pass

  async def drain(self):
    raise OSError(errno.EHOSTUNREACH, "no route to host")

  def abort(self):
    self.aborted = True


def test_a_connection_that_breaks_in_whatever_way_is_a_dropout():
  async def check():
    hub, writer, reader = transport._Hub(1), Unreachable(), asyncio.StreamReader()
    reader.set_exception(OSError(errno.EHOSTUNREACH, "no route to host"))
    await hub.connected(reader, writer)
    assert hub.inbox.get_nowait() == (writer, None)
    await transport._send_all([(writer, msg.Consents(ROUND, {}))], 1.0)
    assert writer.aborted

  asyncio.run(check())


@pytest.mark.parametrize("known", [True, False])
def test_who_has_not_advertised_can_send_nothing_longer_than_an_advert(known):
  async def check():
    hub, writer, reader = transport._Hub(2), Unreachable(), asyncio.StreamReader()
    hub.limit, hub.writers = 2**20, {0: writer} if known else {}
    reader.feed_data(struct.pack("<I", 2**13) + bytes(2**13))
    reader.feed_eof()
    await hub.connected(reader, writer)
    _, data = hub.inbox.get_nowait()
    assert data == bytes(2**13) if known else isinstance(data, ValueError)

  asyncio.run(check())
  advert = protocol.advertise(agreed(), ROUND, 3, IDENTITIES[3])[1]
  assert len(msg.encode(advert)) < transport._ADVERT_BYTES


def test_a_site_refuses_a_frame_that_is_too_long_or_no_message():
  for data, told in (
    (struct.pack("<I", 2**30), "1073741824 bytes announced"),
    (b"\2\0\0\0\xff\0", "no kind 255"),
  ):
    listener = transport.listen()
    site = Thread(lambda listener=listener: join(listener.getsockname(), 0, timeout=20))
    connection, _ = listener.accept()
    connection.sendall(data)
    with pytest.raises(ValueError, match=told):
      site.get()
    connection.close()
    listener.close()


def test_a_site_gives_up_a_server_that_does_not_speak():
  with transport.listen() as listener, pytest.raises(TimeoutError):
    join(listener.getsockname(), 0, timeout=0.2)


def test_the_size_limit_is_above_every_message_of_a_round():
  setup = agreed()
  masked = msg.MaskedInput(2**32 - 1, ROUND, vectors(0), bytes(64))
  advert = msg.Advert(3, ROUND, bytes(32), bytes(32), bytes(32), bytes(64))
  boxes = {i: bytes(64 + keys.BOX_OVERHEAD) for i in range(3)}
  answer = msg.Answer(0, ROUND, {i: bytes(32) for i in SITES}, {}, bytes(64))
  consents = msg.Consents(ROUND, {i: bytes(64) for i in SITES})
  roster = msg.Roster(ROUND, (advert,) * 4)
  for message in (masked, advert, roster, msg.Shares(0, ROUND, boxes, bytes(64)), answer, consents):
    assert len(msg.encode(message)) <= rounds.message_bytes(setup)
  assert rounds.message_bytes(setup) < 2 * len(msg.encode(masked))


def main(port, site, hang):
  if hang:
    masked_input = protocol.masked_input

    def slow(*args, **kwargs):
      print("masking", flush=True)
      time.sleep(60)
      return masked_input(*args, **kwargs)

    protocol.masked_input = slow
  lists, _ = join(("127.0.0.1", int(port)), int(site))
  print(lists.survivors, lists.dropouts, flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
