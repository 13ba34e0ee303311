"""Hospitals, their SuperNodes and the coordinator as users of one machine: who can open what."""

import multiprocessing
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "flower.md").read_text()
ROLE = str(ROOT / "tests" / "flower_user_role.py")
SITES, SUPERNODES, COORDINATOR = (65001, 65002), (65011, 65012), 65021
STRANGER = 65099

pytestmark = pytest.mark.skipif(
  not hasattr(os, "geteuid") or os.geteuid() != 0,
  reason="only root can start processes as other users; run this test as root, as in a container",
)


def command(role, user, *given, groups=()):
  listed = ",".join(map(str, (user, *groups)))
  return [sys.executable, ROLE, role, str(user), listed, *map(str, given)]


def environment():
  paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
  return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "JAX_PLATFORMS": "cpu"}


def documented():
  """The folders that step 4 of docs/flower.md makes: name to (mode, owner, group)."""
  made = re.findall(r"install -d -m (\d+) -o (\S+) -g (\S+) (\S+)", DOCS)
  return {pathlib.Path(path).name: (int(mode, 8), *owners) for mode, *owners, path in made}


def place(path, user, group, mode):
  path.mkdir(parents=True, exist_ok=True)
  os.chown(path, user, group)
  path.chmod(mode)
  return path


@pytest.fixture(scope="module")
def run():
  """A run of one round between users: what each role printed, and the folder of each user.

  The folder of a channel belongs to the site, and its group is of the SuperNode alone, which is in
  no group of the site's, nor the site in its.
  """
  root = pathlib.Path(tempfile.mkdtemp(prefix="primia-users-"))
  root.chmod(0o755)
  place(root / "own", 0, 0, 0o755)
  folders = {COORDINATOR: place(root / "coordinator", COORDINATOR, COORDINATOR, 0o700)}
  channels = []
  for i, (site, node) in enumerate(zip(SITES, SUPERNODES, strict=True)):
    folders[site] = place(root / "own" / f"site_{i}", site, site, 0o700)
    folders[node] = place(root / f"supernode_{i}", node, node, 0o700)
    (folders[node] / "node_key").write_bytes(b"the SuperNode's")
    os.chown(folders[node] / "node_key", node, node)
    (folders[node] / "node_key").chmod(0o600)
    mode, *of = documented()["a-channel"]
    owners = [{"hospital": site, "supernode": node}[name] for name in of]
    channels.append(place(root / f"channel_{i}", *owners, mode))
  pipes = [multiprocessing.Pipe() for _ in SITES]
  start = lambda call, *fds: subprocess.Popen(
    call, env=environment(), pass_fds=fds, stdout=subprocess.PIPE, text=True
  )
  theirs, ours = [a.fileno() for a, _ in pipes], [b.fileno() for _, b in pipes]
  children = {COORDINATOR: start(command("coordinator", COORDINATOR, root / "coordinator", *ours),
                                 *ours)}  # fmt: skip
  for i in range(2):
    children[SITES[i]] = start(command("site", SITES[i], root, i, channels[i]))
    node = command("supernode", SUPERNODES[i], channels[i], theirs[i])
    children[SUPERNODES[i]] = start(node, theirs[i])
  for end in (end for pipe in pipes for end in pipe):
    end.close()  # so that each child sees when the other ends
  try:
    said = {user: child.communicate(timeout=180)[0] for user, child in children.items()}
    assert {user: child.returncode for user, child in children.items()} == dict.fromkeys(
      children, 0
    )
    yield said, folders, channels
  finally:
    for child in children.values():
      child.kill()
      child.wait()
    shutil.rmtree(root)


def opened(user, folders, groups=()):
  """The files and folders below that a user can open."""
  paths = [p for folder in folders for p in (folder, *folder.rglob("*")) if not p.is_socket()]
  done = subprocess.run(
    command("openers", user, groups=groups), input="\n".join(map(str, paths)),
    capture_output=True, text=True, check=True, env=environment(),
  )  # fmt: skip
  return {pathlib.Path(line) for line in done.stdout.splitlines()}, set(paths)


def test_a_sum_goes_from_user_to_user_through_a_channel_that_two_may_enter(run):
  """As docs/flower.md says: a folder of mode 0750 for a group that only the SuperNode is in."""
  said, folders, channels = run
  first, second = (said[site].splitlines()[-1] for site in SITES)
  assert first == second
  assert said[COORDINATOR].strip() == "{0: '', 1: ''}"
  assert not any(said[node] for node in SUPERNODES)
  assert "'survivors': [0, 1]" in (folders[COORDINATOR] / "sums.jsonl").read_text()
  assert not any(path.is_socket() for folder in channels for path in folder.iterdir())


def test_no_role_can_open_a_file_of_another(run):
  _, folders, channels = run
  for user, own in folders.items():
    mine, all_mine = opened(user, [own])
    assert mine == all_mine  # so that the check sees what can be opened
    assert len(mine) > 1
    others = [folder for other, folder in folders.items() if other != user]
    assert opened(user, others)[0] == set()
    mine = [c for i, c in enumerate(channels) if user in (SITES[i], SUPERNODES[i])]
    assert opened(user, channels)[0] == set(mine)
  assert opened(STRANGER, [*folders.values(), *channels])[0] == set()


def test_the_documented_commands_give_a_supernode_nothing_but_the_channel():
  """Each path that its commands name is its own, or the channel of the hospital's programs."""
  assert documented()["supernode"] == (0o700, "supernode", "supernode")
  commands = "\n".join(re.findall(r"^n\$ (?:.*\\\n)*.*", DOCS, re.MULTILINE))
  assert "flower-supernode" in commands
  assert set(re.findall(r"/srv/([\w/-]+)", commands)) == {
    "supernode/node_key", "supernode/flower", "primia/a-channel"
  }  # fmt: skip
  programs = re.findall(r"^a\$ (primia-(?:train|evaluate) .*)", DOCS, re.MULTILINE)
  assert len(programs) == 2
  assert all("--channel_dir=/srv/primia/a-channel" in one for one in programs)


def test_with_open_folders_they_could(run):
  """What the modes of the folders are for."""
  _, folders, _ = run
  folder = folders[SITES[1]]
  folder.chmod(0o755)
  try:
    found, _ = opened(SITES[0], [folder])
    assert folder in found
  finally:
    folder.chmod(0o700)


def test_a_channel_is_closed_to_whoever_is_not_in_its_group(run):
  """Neither another site's SuperNode nor the coordinator can speak to a hospital's process."""
  _, _, channels = run
  code = (
    "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import flower_user_role as role\n"
    "from primia_jax.flower import channel\n"
    "role.become(int(sys.argv[2]), [int(sys.argv[2])])\n"
    "print(channel.relay(pathlib.Path(sys.argv[3]), b'x', 2.0, False))"
  )
  serve = (
    "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import flower_user_role as role\n"
    "from primia_jax.flower import channel\n"
    "role.become(int(sys.argv[2]), [int(sys.argv[2])])\n"
    "end = channel.serve(pathlib.Path(sys.argv[3]), 30.0); print('open', flush=True)\n"
    "print(end.hear(10)); end.say(b'answer'); end.close()"
  )
  call = lambda text, user: [sys.executable, "-c", text, str(ROOT / "tests"), str(user),
                             str(channels[0])]  # fmt: skip
  own = subprocess.Popen(
    call(serve, SITES[0]), env=environment(), stdout=subprocess.PIPE, text=True
  )
  try:
    assert own.stdout.readline() == "open\n"
    tried = lambda user: subprocess.run(
      call(code, user), env=environment(), capture_output=True, text=True, check=False
    )
    for user in (SITES[1], SUPERNODES[1], COORDINATOR, STRANGER):
      assert "Permission denied" in tried(user).stderr
    assert tried(SUPERNODES[0]).stdout == "b'answer'\n"
    assert own.communicate(timeout=30)[0] == "b'x'\n"
  finally:
    own.kill()
    own.wait()
