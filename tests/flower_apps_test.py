"""Both of Flower's apps in one process: a grid that hands each message to the ClientApp."""

import base64
import datetime
import json
import threading
import types

import pytest

flwr = pytest.importorskip("flwr")

from flwr.app import Context, Message, RecordDict  # noqa: E402
from flwr.supercore import task_identity  # noqa: E402
from secagg_exchange_test import TOLERANT, assert_total, elements  # noqa: E402

from primia_jax.flower import bridging, channel, coordinating  # noqa: E402
from primia_jax.secagg import Lost, carrier, exchange, keys, meeting, returning  # noqa: E402
from primia_jax.secagg import messages as msg  # noqa: E402


class Grid:
  """Flower's grid as the ServerApp sees it; each node's ClientApp runs in a thread.

  Attributes:
    spoil: site to a function of its answer's bytes, by which a node may lie.
    dead: sites whose node answers nothing more.
  """

  def __init__(self, folders):
    self.folders, self.replies, self.spoil, self.dead = folders, {}, {}, set()
    self.count = 0

  def get_node_ids(self):
    return [100 + i for i in self.folders]

  def push_messages(self, messages):
    ids = []
    for message in messages:
      self.count += 1
      message.metadata.__dict__["_message_id"] = str(self.count)
      ids.append(str(self.count))
      threading.Thread(target=self.carry, args=(message,), daemon=True).start()
    return ids

  def carry(self, message):
    site = message.metadata.dst_node_id - 100
    if site in self.dead:
      return
    config = {"site-folder": str(self.folders[site])}
    context = Context(1, message.metadata.dst_node_id, config, RecordDict(), {})
    try:
      reply = bridging.app(message, context)
    except Exception as error:  # as Flower does
      reply = Message(flwr.app.Error(0, str(error)), reply_to=message)
    if site in self.spoil and reply.has_content():
      record = reply.content["primia"]
      record["message"] = self.spoil[site](record["message"])
    self.replies[message.metadata.message_id] = reply

  def pull_messages(self, ids):
    return [self.replies.pop(i) for i in list(ids) if i in self.replies]


def play(tmp_path, call, timeout=60.0, change=lambda grid: None, num_nodes=3):
  """call(site, exchange) for three sites behind the apps: results, errors, the folder, the grid."""
  folders = {i: tmp_path / f"site_{i}" for i in range(num_nodes)}
  results, errors = {}, {}
  for folder in folders.values():
    folder.mkdir(mode=0o700)
  grid = Grid(folders)
  change(grid)

  def one(i):
    end = carrier.Carrier(*channel.serve(folders[i], 2 * timeout))
    try:
      invitation, own = meeting.invited(end), meeting.own_identity(folders[i] / "identity")
      hellos = meeting.tell_all(end, meeting.hello(own, i, invitation), 3)
      pinned = meeting.pin(hellos, invitation, own, i, folders[i] / "known.json")
      sums = exchange.Exchange(end, i, pinned, b"run")
      results[i] = call(i, sums)
      sums.close()
    except Exception as error:
      errors[i] = error
      end.close()

  threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(3)]
  for thread in threads:
    thread.start()
  try:
    coordinating.run(grid, tmp_path / "coordinator", 3, timeout)
  except Exception as error:
    errors["coordinator"] = error
  for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
  return results, errors, tmp_path / "coordinator", grid


@pytest.fixture(autouse=True)
def _task(monkeypatch):
  """What Flower's processes know of themselves; and answers are looked for often."""
  for name in ("_run_id", "_node_id", "_task_id"):
    monkeypatch.setattr(task_identity.TaskIdentity, name, 1)
  monkeypatch.setattr(coordinating, "_PAUSE", 0.01)


def one_sum(i, sums):
  return sums.finish(sums.begin(elements(i), 4, 1, TOLERANT), elements(i))


def test_sums_go_through_both_apps_and_the_coordinator_keeps_what_it_may_know(tmp_path):
  def two(i, sums):
    one_sum(i, sums)
    return one_sum(i, sums)

  results, errors, folder, grid = play(tmp_path, two)
  assert errors == {}
  for i in range(3):
    assert_total(results[i], range(3))
  lines = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()]
  assert [line["survivors"] for line in lines] == [[0, 1, 2]] * 2
  assert grid.count == 3 * (1 + 1 + 5 + 3)  # invitation, hello, and those of two sums
  ending = json.loads((folder / "ending.json").read_text())
  assert ending == {"failed": "", "left": {"0": "", "1": "", "2": ""}, "turned away": []}
  names = {path.name for path in folder.iterdir()}
  assert names == {"ending.json", "identity", "lock", "sums.jsonl"}
  secrets = [(tmp_path / f"site_{i}" / "identity").read_bytes() for i in range(3)]
  kept = b"".join(path.read_bytes() for path in folder.iterdir())
  assert not any(secret in kept or secret.hex().encode() in kept for secret in secrets)


def test_a_program_that_is_started_again_comes_back_through_both_apps(tmp_path):
  """Its channel is closed in the second sum, and open again before the third."""
  lost, reopened = threading.Event(), threading.Event()

  def back(i, sums):
    """The second start of site 1."""
    folder = tmp_path / "site_1"
    end = carrier.Carrier(*channel.serve(folder, 120.0))
    reopened.set()
    invitation, hellos = returning.met(meeting.invited(end), i, 3)
    own = meeting.own_identity(folder / "identity")
    pinned = meeting.pin(hellos, invitation, own, i, folder / "known.json")
    again = exchange.Exchange(end, i, pinned, b"run")
    assert again.label == sums.label
    take = lambda back, state: state
    assert returning.come_back(end, again, pinned, i, 1, take)[1] == b"state"
    total = one_sum(i, again)
    again.close()
    return total

  def call(i, sums):
    one_sum(i, sums)
    if i == 1:
      sums._carrier.close()  # as the end of its process does
      lost.set()
      return back(i, sums)
    assert lost.wait(60)
    assert_total(one_sum(i, sums), (0, 2))
    assert reopened.wait(60)
    now = returning.Back(2, b"digest", b"", {})
    own = returning.start(sums, sums._pinned, i, now, b"", sums.sites)
    give = lambda: b"state"
    assert returning.roll_call(sums._carrier, sums, sums._pinned, own, give) == (1,)
    return one_sum(i, sums)

  results, errors, folder, _ = play(tmp_path, call)
  assert errors == {}
  for i in range(3):
    assert_total(results[i], range(3))
  lines = [json.loads(line) for line in (folder / "sums.jsonl").read_text().splitlines()]
  assert [line["survivors"] for line in lines] == [[0, 1, 2], [0, 2], [0, 1, 2]]


def test_a_node_that_falls_silent_or_lies_costs_its_site_only(tmp_path):
  for name in ("silent", "lies"):
    root = tmp_path / name
    root.mkdir()
    holder = []

    def call(i, sums, name=name, holder=holder):
      begun = sums.begin(elements(i), 4, 1, TOLERANT)
      if i == 1 and name == "silent":
        holder[0].dead.add(1)
      if i == 1 and name == "lies":
        flip = lambda some: bytes(255 - b for b in some)  # in its boxes, or its masked numbers
        holder[0].spoil[1] = lambda data: data[:100] + flip(data[100:101]) + data[101:]
      return sums.finish(begun, elements(i))

    results, errors, folder, _ = play(root, call, timeout=2.0, change=holder.append)
    assert sorted(results) == [0, 2]
    assert sorted(errors) == [1]
    for i in (0, 2):
      assert_total(results[i], (0, 2))
    line = json.loads((folder / "sums.jsonl").read_text())
    assert line["survivors"] == [0, 2]
    assert any("forged" in text for text in line["rejected"]) == (name == "lies")


def test_too_few_nodes_or_too_many_start_no_run_and_the_folder_says_why(tmp_path):
  for nodes, text in ((2, "2 of 3 SuperNodes are connected"), (4, "4 SuperNodes are connected")):
    grid = Grid(dict.fromkeys(range(nodes), tmp_path))
    folder = tmp_path / str(nodes)
    with pytest.raises(Lost, match=text):
      coordinating.run(grid, folder, 3, 0.1)
    assert text in json.loads((folder / "ending.json").read_text())["failed"]
    assert grid.count == 0


def test_a_coordinator_that_cannot_write_ends_the_run_for_all_and_says_so(tmp_path):
  (tmp_path / "coordinator" / "sums.jsonl").mkdir(parents=True)

  def two(i, sums):
    one_sum(i, sums)
    return one_sum(i, sums)

  results, errors, folder, _ = play(tmp_path, two)
  assert results == {}
  assert isinstance(errors["coordinator"], IsADirectoryError)
  assert "sums.jsonl" in str(errors["coordinator"])
  assert "sums.jsonl" in json.loads((folder / "ending.json").read_text())["failed"]
  for i in range(3):
    assert "the coordinator has failed; its own log says why" in str(errors[i])


def test_without_a_roster_a_site_that_does_not_come_itself_ends_the_meeting_for_all(tmp_path):
  """It takes another's number, and is turned away."""
  stranger = keys.identity()

  def claims(data):
    if not data:  # the site has left
      return data
    return msg.encode(msg.decode(data)._replace(site=0, identity=stranger.public))

  change = lambda grid: grid.spoil.update({1: claims})
  results, errors, folder, _ = play(tmp_path, one_sum, timeout=2.0, change=change)
  assert results == {}
  assert set(errors) >= {"coordinator", 0, 2}
  assert "no hello of sites [1]" in str(errors["coordinator"])
  assert "node 101 is turned away" in json.loads((folder / "ending.json").read_text())["failed"]


def test_a_coordinator_names_no_folder_for_a_supernode():
  """The run's configuration, which is the coordinator's, counts in the simulation engine alone."""
  run, simulated = {"sites": "/a"}, {"partition-id": 2, "num-partitions": 3}
  folder = lambda node, run: str(bridging.site_folder(node, run))
  assert folder({"site-folder": "/own"}, run) == "/own"
  assert folder({"site-folder": "/own", **simulated}, run) == "/own"
  assert folder(simulated, run) == "/a/site_2"
  for node, config in (({}, run), ({"partition-id": 2}, run), (simulated, {"sites": ""})):
    with pytest.raises(ValueError, match="names no folder of a site"):
      bridging.site_folder(node, config)


def test_a_message_lives_no_longer_than_its_sender_says_whatever_the_clock(tmp_path):
  """A clock that is a day behind makes it look as if the message had a day left."""
  folder = tmp_path / "site"
  folder.mkdir(mode=0o700)
  record = {"primia": flwr.app.ConfigRecord({"message": b"x", "waits": True})}
  message = Message(RecordDict(record), dst_node_id=100, message_type="query", ttl=1.0)
  message.metadata.__dict__["_message_id"] = "1"
  message.metadata.__dict__["_created_at"] = message.metadata.created_at + 86400
  context = Context(1, 100, {"site-folder": str(folder)}, RecordDict(), {})
  with pytest.raises(TimeoutError, match="no hospital's process waits"):
    bridging.app(message, context)


@pytest.mark.parametrize(
  ("ahead", "is_taken"), [(0, True), (4, True), (6, False), (-300, True), (-306, False)]
)
def test_flower_refuses_a_node_whose_clock_is_off(monkeypatch, ahead, is_taken):
  """As docs/flower.md says; the signature itself is right."""
  fastapi = pytest.importorskip("fastapi")
  primitives = pytest.importorskip("flwr.supercore.primitives.asymmetric")
  node_auth = pytest.importorskip("flwr.superlink.routers.fleet.node_auth")
  private, public = primitives.generate_key_pairs()
  public = primitives.public_key_to_bytes(public)
  at = (node_auth.now() + datetime.timedelta(seconds=ahead)).isoformat()
  signed = primitives.sign_message(private, at.encode("ascii"))
  headers = {
    node_auth.FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public),
    node_auth.FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signed),
    node_auth.TIMESTAMP_HEADER: at,
  }
  of_node = types.SimpleNamespace(get_node_id_by_public_key=lambda key: 7)
  monkeypatch.setattr(node_auth, "get_linkstate", lambda request: of_node)
  state = types.SimpleNamespace(protobuf_request=types.SimpleNamespace(node_id=7))
  request = types.SimpleNamespace(headers=headers, state=state)
  if is_taken:
    node_auth.authenticate_node(request)
    return
  with pytest.raises(fastapi.HTTPException, match="401"):
    node_auth.authenticate_node(request)
