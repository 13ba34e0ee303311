"""Who takes part in a run over Flower: members of the coordinator's roster, each by its own key."""

import json
import sys
import threading
import types

import pytest

pytest.importorskip("flwr")

from flower_apps_test import TOLERANT, Grid, _task, assert_total, elements  # noqa: F401
from flower_events import DOCS, row
from flwr.app import ConfigRecord, RecordDict

from primia_jax.flower import channel, coordinating
from primia_jax.secagg import carrier, exchange, keys, meeting, pinning, roster
from primia_jax.secagg import messages as msg

TIMEOUT = 30.0


def federation(root, numbers=range(3)):
  """Folders of members and a coordinator that hold one roster: those of sites, and the roster."""
  folders = {i: root / f"site_{i}" for i in numbers}
  everybody = {**folders, None: root / "coordinator"}
  own = {}
  for i, folder in everybody.items():
    folder.mkdir(mode=0o700)
    own[i] = meeting.own_identity(folder / "identity")
  named = lambda i: "coordinator" if i is None else f"hospital-{'abcdef'[i]}"
  members = [roster.Member(i, named(i), identity.public) for i, identity in own.items()]
  made = roster.make("lungs", 1, members)
  for i, folder in everybody.items():
    pinning.accept(folder, roster.encode(made), own[i], roster.digest(made).hex())
  return folders, made


def hospital(folder, i, known, results, errors, after=None):
  """A member's process: it meets the others, and takes part in a sum."""
  if after is not None:
    assert after.wait(TIMEOUT)
  end = carrier.Carrier(*channel.serve(folder, TIMEOUT))
  try:
    invitation, own = meeting.invited(end), pinning.own_identity(folder / "identity")
    hellos = meeting.tell_all(end, meeting.hello(own, i, invitation), 3)
    pinned = meeting.pin(hellos, invitation, own, i, pinning.pinned(known, own))
    sums = exchange.Exchange(end, i, pinned, roster.digest(known))
    results[i] = sums.finish(sums.begin(elements(i), 4, 1, TOLERANT), elements(i))
    sums.close()
  except Exception as error:
    errors[i] = error
    end.close()


def play(root, answer, known, folders):
  """A run beside a stranger's node, whose process answers first: results, errors, what it was told,
  and the coordinator's ending.
  """
  stranger = root / "stranger"
  stranger.mkdir(mode=0o700)
  results, errors, told, spoken = {}, {}, [], threading.Event()

  def strange():
    end = channel.serve(stranger, TIMEOUT)
    end.say(answer(msg.decode(end.hear(2**20))))
    spoken.set()
    try:
      told.append(msg.decode(end.hear(2**20)))
    except (OSError, ValueError) as error:
      told.append(error)
    end.close()

  calls = [(strange,)]
  calls += [(hospital, f, i, known, results, errors, spoken) for i, f in folders.items()]
  threads = [threading.Thread(target=f, args=args, daemon=True) for f, *args in calls]
  for thread in threads:
    thread.start()
  try:
    coordinating.run(Grid({**folders, 7: stranger}), root / "coordinator", 3, TIMEOUT)
  except Exception as error:
    errors["coordinator"] = error
  for thread in threads[1:]:
    thread.join(2 * TIMEOUT)
    assert not thread.is_alive()
  ending = json.loads((root / "coordinator" / "ending.json").read_text())
  threads[0].join(TIMEOUT)
  return results, errors, told, ending


STRANGER = keys.identity()


def claims_site_0(invitation):
  """Signed by its own key, with another's number."""
  return msg.encode(meeting.hello(STRANGER, 0, invitation))


def claims_its_key_too(known, invitation):
  made = meeting.hello(STRANGER, 0, invitation)
  return msg.encode(made._replace(identity=known.sites[0].public))


def says_again(member, invitation):
  """What the member said at an earlier start."""
  earlier = invitation._replace(fresh=bytes(32))
  return msg.encode(meeting.hello(member, 0, earlier))


def ends_for_it(invitation):
  return msg.encode(msg.Ended(0, b"I am site 0, and leave"))


def not_in_the_roster(invitation):
  return msg.encode(meeting.hello(STRANGER, 5, invitation))


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("other key", "site 0 in stage hello is rejected: unknown: the roster has another key"),
    ("forged", "site 0 in stage hello is rejected: forged"),
    ("replayed", "site 0 in stage hello is rejected: forged"),
    ("ended", "it is no hello but Ended I am site 0, and leave"),
    ("no member", "site 5 in stage hello is rejected: unknown: the roster has the sites"),
  ],
)
def test_whoever_takes_another_s_number_is_turned_away_by_name_and_the_run_goes_on(
  tmp_path, name, words
):
  folders, known = federation(tmp_path)
  member = pinning.own_identity(folders[0] / "identity")
  answers = {
    "other key": claims_site_0, "ended": ends_for_it, "no member": not_in_the_roster,
    "forged": lambda invitation: claims_its_key_too(known, invitation),
    "replayed": lambda invitation: says_again(member, invitation),
  }  # fmt: skip
  results, errors, told, ending = play(tmp_path, answers[name], known, folders)
  assert errors == {}
  for i in range(3):
    assert_total(results[i], range(3))
  (away,) = ending["turned away"]
  assert away.startswith("node 107 is turned away: ")
  assert words in away
  assert isinstance(told[0], msg.Dismissed)
  assert told[0].reason.decode() == away
  assert ending["failed"] == ""
  assert row("a stranger's node says that it is site 0") in DOCS.read_text().splitlines()


def test_without_the_check_the_stranger_has_the_number_and_the_run_stops(tmp_path, monkeypatch):
  """The same attack where a hello is taken by the number in it."""
  monkeypatch.setattr(meeting, "answered", lambda data, invitation, members=None: msg.decode(data))
  monkeypatch.setattr(sys.modules[__name__], "TIMEOUT", 3.0)
  folders, known = federation(tmp_path)
  results, errors, _, ending = play(tmp_path, claims_site_0, known, folders)
  assert results == {}
  assert "coordinator" in errors
  assert ending["failed"]


def test_a_stranger_that_is_there_before_a_member_does_not_take_its_place(tmp_path):
  """Three nodes are connected for three sites, and the third site's comes later."""
  folders, known = federation(tmp_path)
  stranger = tmp_path / "stranger"
  stranger.mkdir(mode=0o700)  # its program never opens a channel
  grid, looks = Grid({**folders, 7: stranger}), []

  def connected():
    looks.append(1)
    return [100, 101, 107, *([102] if len(looks) > 5 else [])]

  grid.get_node_ids = connected
  results, errors = {}, {}
  calls = [(f, i, known, results, errors) for i, f in folders.items()]
  threads = [threading.Thread(target=hospital, args=args, daemon=True) for args in calls]
  for thread in threads:
    thread.start()
  coordinating.run(grid, tmp_path / "coordinator", 3, TIMEOUT)
  for thread in threads:
    thread.join(2 * TIMEOUT)
  assert errors == {}
  assert sorted(results) == [0, 1, 2]


def test_a_coordinator_with_another_roster_or_key_starts_nothing_and_its_folder_says_why(tmp_path):
  _, _ = federation(tmp_path)
  folder = tmp_path / "coordinator"
  grid = Grid({})

  def ends(text, num_sites=3):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
      coordinating.run(grid, folder, num_sites, 0.1)
    assert json.loads((folder / "ending.json").read_text())["failed"]

  ends("num-sites=4, and roster 1 of .* has 3 sites", 4)
  kept = (folder / "identity").read_bytes()
  (folder / "identity").write_bytes(keys.identity().private)
  ends("has another key for the coordinator")
  (folder / "identity").unlink()  # none is made anew
  ends("the identity is missing")
  (folder / "identity").write_bytes(kept)
  (folder / pinning.FILE).unlink()
  ends("no roster was accepted")
  assert grid.count == 0


def test_numbers_with_a_gap_are_refused_before_anybody_waits(tmp_path):
  federation(tmp_path, (0, 1, 5))
  with pytest.raises(
    ValueError, match=r"have the numbers \[0, 1, 5\], .* must be 0 to 2.*renumber"
  ):
    coordinating.run(Grid({}), tmp_path / "coordinator", 3, 0.1)


class Nodes:
  """A grid whose nodes answer each message by what comes next in their list of contents."""

  def __init__(self, answers):
    self.answers, self.sent = answers, []

  def get_node_ids(self):
    return [*self.answers]

  def push_messages(self, messages):
    self.sent += [(str(len(self.sent) + i), one) for i, one in enumerate(messages)]
    return [name for name, _ in self.sent[-len(messages) :]]

  def pull_messages(self, names):
    for name, one in self.sent:
      node = one.metadata.dst_node_id
      if name in names and self.answers[node]:
        content = self.answers[node].pop(0)(one)
        yield types.SimpleNamespace(
          metadata=types.SimpleNamespace(reply_to_message_id=name, src_node_id=node),
          has_content=lambda content=content: content is not None,
          content=content,
        )


def test_a_node_that_was_away_is_invited_again_and_another_form_is_no_answer():
  """Its program had ended before its hello, or Flower had lost it."""
  own, server = keys.identity(), keys.identity()
  invitation = msg.Invitation(server.public, bytes(32))
  wrap = lambda data: RecordDict({"primia": ConfigRecord({"message": data})})
  hello = lambda one: wrap(msg.encode(meeting.hello(own, 0, invitation)))
  odd = lambda one: RecordDict({"other": ConfigRecord({"message": b"x"})})
  grid = Nodes({5: [lambda one: wrap(b""), lambda one: None, odd, hello, odd]})
  ask = coordinating.over(grid, [5], {0: own.public})
  (said,) = ask({0: msg.encode(invitation)}, TIMEOUT).items()
  assert said[0] == 0
  assert isinstance(msg.decode(said[1]), msg.Hello)
  assert len(grid.sent) == 4
  assert ask({0: msg.encode(msg.Dismissed(b"over"))}, 1.0) == {}
