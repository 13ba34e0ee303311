"""Every message that crosses a site's boundary is in its list, with its bytes and its type."""

import collections
import json
from typing import get_args

import pytest
from flower_world import World, decoded, parts, quick

from experiments import crossings, messages_crossed
from experiments.messages_crossed import FILE, KINDS
from primia_jax.disclosure import Policy
from primia_jax.secagg import carrier
from primia_jax.secagg import messages as msg


def test_every_type_of_message_is_described():
  """A new one must be entered before anything of it can cross unnamed."""
  assert set(KINDS) == set(get_args(msg.Message))
  for kind in KINDS.values():
    assert all(text.strip() for text in kind)
    assert "|" not in "".join(kind)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of one round, and a start of two more: what was said and told, by site; the folder."""
  root = tmp_path_factory.mktemp("run")
  with quick():
    worlds = [World().run(root), World().run(root, rounds=3)]
  assert all(world.errors == {} for world in worlds)
  join = lambda name: {i: [d for w in worlds for d in getattr(w, name)[i]] for i in range(3)}
  return join("said"), join("told"), root / "own"


def test_the_list_has_each_message_of_all_starts_with_its_bytes(run):
  said, told, own = run
  for i in range(3):
    rows = messages_crossed.listed(own / f"site_{i}" / FILE)
    for way, data in (("sender", said[i]), ("receiver", told[i])):
      here = [row for row in rows if getattr(row, way) == "this site"]
      here = [row for row in here if way == "sender" or row.sender == "coordinator"]
      found, sizes = collections.Counter(), collections.Counter()
      for one in (part for whole in filter(None, data) for part in parts(whole)):
        found[type(decoded(one)).__name__] += 1
        sizes[type(decoded(one)).__name__] += len(one) - len(getattr(decoded(one), "masked", b""))
      listed, bytes_of = collections.Counter(), collections.Counter()
      for row in here:
        name = row.what.removeprefix("message ").partition(":")[0].partition(" ")[0]
        listed[name] += row.messages
        bytes_of[name] += row.num_bytes
      assert listed == found
      assert bytes_of == sizes


def test_what_is_relayed_is_named_and_all_is_in_the_page(run, tmp_path):
  own = run[2]
  rows = messages_crossed.listed(own / "site_0" / FILE)
  whats = [row.what for row in rows]
  for name in ("Hello", "Word", "Start"):
    assert any(what.startswith(f"message {name}: ") for what in whats)
    assert f"message Relayed: the {name} of all sites" in whats
  hello = next(row for row in rows if row.what.startswith("message Hello"))
  assert "how many images" in hello.what
  assert hello.receiver == "coordinator and all sites"
  assert hello.charge == "nothing: exact counts"
  crossings.write(tmp_path, "A run", Policy(), rows)
  text = (tmp_path / "disclosure.md").read_text()
  assert all(f"| {row.what} |" in text for row in rows)
  assert "Flower adds its node's number and times to each" in text


def test_a_message_that_is_not_in_the_list_does_not_leave(tmp_path):
  """It is written down first; a full disk is named."""
  sent = []
  end = carrier.Carrier(lambda limit: b"\xff?", sent.append, lambda: None)
  path = tmp_path / FILE
  kept = messages_crossed.written_down(end, path)
  hello = msg.encode(msg.Word(0, b"x"))
  kept.say(hello)
  kept.say(b"")  # an answer that is none
  assert kept.hear(10) == b"\xff?"
  assert sent == [hello, b""]
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert lines == [
    {"message": "Word", "way": "sent", "bytes": len(hello)},
    {"message": "unknown", "way": "heard", "bytes": 2},
  ]
  assert "what is not a message" in messages_crossed.listed(path)[1].what
  path.unlink()
  path.mkdir()
  with pytest.raises(OSError, match=FILE):
    kept.say(hello)
  assert sent == [hello, b""]
  (tmp_path / "torn").write_text('{"message": "Word"}\n')
  with pytest.raises(ValueError, match="torn is damaged"):
    messages_crossed.listed(tmp_path / "torn")
  assert messages_crossed.listed(tmp_path / "none") == []


def test_a_line_that_a_crash_left_unfinished_is_written_over(tmp_path):
  path = tmp_path / FILE
  whole = json.dumps({"message": "Word", "way": "sent", "bytes": 3}) + "\n"
  path.write_text(whole + whole[:9])
  sent = []
  nobody = carrier.Carrier(lambda limit: b"", sent.append, lambda: None)
  messages_crossed.written_down(nobody, path).say(msg.encode(msg.Word(1, b"")))
  (row,) = messages_crossed.listed(path)
  assert (row.messages, row.num_bytes) == (2, 3 + len(sent[0]))
