"""One role of a federation as an operating-system user: `flower_user_role.py ROLE USER GROUPS FD`.

It loads everything as the user that started it, and then becomes another, for good; a role that is
no site of Flower's is spoken to over a pipe.
"""

import os
import pathlib
import sys
import tempfile
from multiprocessing import connection


def become(user, groups):
  """Gives up the first user, and all of its groups."""
  os.setgroups(groups)
  os.setresgid(user, user, user)
  os.setresuid(user, user, user)
  os.umask(0o077)
  try:
    os.setuid(0)
  except PermissionError:
    return
  raise AssertionError("this process can become root again")


def site(root, number, channel_dir, user, groups):
  """The hospital's own process: meeting, ledger, records and a sum."""
  from flower_world import CONFIG, World, quick
  from flower_world import site as program

  from experiments import settings
  from primia_jax.flower import channel
  from primia_jax.secagg.carrier import Carrier

  two = settings.replace(CONFIG, num_sites=2)
  with tempfile.TemporaryDirectory() as folder, quick():  # all that is loaded late
    World(2).run(pathlib.Path(folder), program=lambda *given: program(*given, config=two))
  become(user, groups)
  end = Carrier(*channel.serve(channel_dir, 60.0))
  print(program(root, number, end, 1, config=two).tolist(), flush=True)


def supernode(folder, pipe, user, groups):
  """A SuperNode's part: it hands each message to the hospital's process."""
  from primia_jax.flower import channel

  become(user, groups)
  while (request := pipe.recv_bytes()) != b"end":
    try:
      answer = channel.relay(folder, request, 60.0)
    except OSError as error:
      print(f"the SuperNode: {error}", flush=True)
      answer = b""
    pipe.send_bytes(answer)


def coordinator(folder, pipes, user, groups):
  """The coordinator's part, over pipes to both SuperNodes."""
  from primia_jax.secagg import coordinator as coordinating
  from primia_jax.secagg import meeting

  become(user, groups)

  def ask(requests, timeout):
    for i, request in requests.items():
      pipes[i].send_bytes(request)
    answers = {i: pipes[i].recv_bytes() for i in requests}
    return {i: answer for i, answer in answers.items() if answer}

  identity = meeting.own_identity(folder / "identity")
  with (folder / "sums.jsonl").open("w") as file:
    tell = lambda report: file.write(f"{coordinating.numbers(report)}\n")
    left = coordinating.coordinate(ask, range(2), identity, 60.0, tell)
  for pipe in pipes.values():
    pipe.send_bytes(b"end")
  print(left, flush=True)


def openers(paths, user, groups):
  """Prints which of these files the user can open, and which folders it can list."""
  become(user, groups)
  for path in paths:
    try:
      os.listdir(path) if os.path.isdir(path) else open(path, "rb").close()
      print(path)
    except OSError:
      pass


def main():
  role, user, groups, *given = sys.argv[1:]
  user, groups = int(user), [int(group) for group in groups.split(",")]
  pipes = lambda names: {i: connection.Connection(int(name)) for i, name in enumerate(names)}
  if role == "site":
    root, number, channel_dir = given
    site(pathlib.Path(root), int(number), pathlib.Path(channel_dir), user, groups)
  elif role == "supernode":
    supernode(pathlib.Path(given[0]), pipes(given[1:])[0], user, groups)
  elif role == "coordinator":
    coordinator(pathlib.Path(given[0]), pipes(given[1:]), user, groups)
  else:
    openers(sys.stdin.read().splitlines(), user, groups)


if __name__ == "__main__":
  main()
