"""Every fault at every message of a round between hospitals, and the table of what comes of it.

`PYTHONPATH=.:tests python tests/flower_faults_test.py` prints docs/flower_faults.md.
"""

import contextlib
import pathlib
import shutil
import sys
import tempfile

import flower_events
import flower_sampled
import numpy as np
import pytest
from flower_events import DOCS, OVER_FLOWER, row
from flower_world import Killed, World, charged, expected, quick, records, released

from primia_jax.secagg import Aborted

SAID = (  # what a site says in a run of two rounds
  "Hello", "Word", "Start", "Proposal", "Shares", "MaskedInput", "Consent", "Answer",
  "2: Proposal", "2: Consent", "2: Answer", "Ended",
)  # fmt: skip
TOLD = (  # and what it is told
  "Invitation", "hellos", "words", "starts", "Roster", "Delivery", "Survivors", "Consents",
  "Evidence", "2: Survivors", "2: Consents", "2: Evidence",
)  # fmt: skip
ROUNDS = 2
FAULTY = 1  # the site at which it happens
EVENTS = flower_events.EVENTS | flower_sampled.EVENTS


# ---- faults of a message: (the clean messages of the same place in an earlier run, by site; its
# number, its bytes, the one before) -> what arrives


def flipped(before, number, data, last):
  spoiled = bytearray(data)
  spoiled[len(data) // 2] ^= 128
  return bytes(spoiled)


SPOILED = {
  "a bit flips": flipped,
  "its last byte is missing": lambda before, number, data, last: data[:-1],
  "a million bytes too many": lambda before, number, data, last: data + bytes(10**6),
  "nothing is in it": lambda before, number, data, last: b"",
  "random bytes, as a stranger's": lambda before, number, data, last: b"\xff" + data[::-1],
  "the message before": lambda before, number, data, last: last,
  "that of an earlier start": lambda before, number, data, last: before[FAULTY][number],
  "another site's of an earlier start": lambda before, number, data, last: before[0][number],
}


def killed(world, number, says):
  """Kills the site before it says a message, or when it has said it."""

  def now(site, n, at=number + (not says)):
    if (site, n) == (FAULTY, at):
      world.kill(site)

  if says:
    world.on_say = now
  else:
    world.on_hear = now


def spoiled(world, number, name, before, said):
  def spoil(site, n, data):
    if (site, n) != (FAULTY, number):
      return data
    sent = world.said[site] if said else world.told[site]
    last = sent[n - 1] if n else data[:1]
    clean = before.said if said else before.told
    return SPOILED[name](clean, number, data, last)

  if said:
    world.spoil_said = spoil
  else:
    world.spoil_told = spoil


def silent(world, number):
  world.silent = (FAULTY, number)


def unheard(world, number):
  def spoil(site, n, data):
    return None if site == FAULTY and n >= number else data

  world.spoil_told = spoil


# name -> (world, number of the message, clean world) -> None
FROM_SITE = {
  "the site is killed before it": lambda world, number, before: killed(world, number, True),
  "the site is killed after it": lambda world, number, before: killed(world, number, False),
  "the site stalls": lambda world, number, before: silent(world, number),
  **{
    name: lambda world, number, before, name=name: spoiled(world, number, name, before, True)
    for name in SPOILED
  },
}
TO_SITE = {
  "nothing comes any more": lambda world, number, before: unheard(world, number),
  **{
    name: lambda world, number, before, name=name: spoiled(world, number, name, before, False)
    for name in SPOILED
    if name != "another site's of an earlier start"  # most of these are told to all alike
  },
}


def outcome(world, number):
  """What comes of a run: over whom the sum of a fault was, and how the site ends.

  `number` is that of the sum.
  """
  failed = world.errors.get("coordinator")
  others = [i for i in range(world.num_sites) if i != FAULTY]
  ends = {type(world.errors[i]).__name__ if i in world.errors else "right" for i in others}
  assert failed is None or isinstance(failed, Aborted), failed
  assert all(isinstance(world.errors[i], Aborted) for i in others if i in world.errors)
  assert len(ends) == 1, world.errors
  (end,) = ends
  own = world.errors.get(FAULTY)
  assert own is None or isinstance(own, (Aborted, Killed)), repr(own)
  who = {(): "none", tuple(others): "others", tuple(range(world.num_sites)): "all"}
  over = who[world.reports[number].opened.survivors if world.reports else ()]
  assert (end == "right") == bool(world.reports) == (failed is None)
  words = [over if end == "right" else f"none ({end})"]
  if not isinstance(own, Killed):
    words.append("right" if own is None else type(own).__name__)
  return "; ".join(words)


def check_kept(root, worlds):
  """All agree again, nothing that was summed is lost, and no ledger lacks what was released."""
  last = worlds[-1]
  assert last.errors == {}, last.errors
  known = records(root, (FAULTY + 1) % last.num_sites)
  for i in range(last.num_sites):
    assert records(root, i).items() <= known.items()  # of a site that was away, there are gaps
    np.testing.assert_array_equal(last.results[i], expected(known))
    np.testing.assert_array_equal(last.results[i], last.results[0])
    assert charged(root, i) >= sum(released(world, i) for world in worlds)


def begun(clean, root):
  """Folders of members that know each other, and have trained nothing."""
  for own in (clean / "own").iterdir():
    made = root / "own" / own.name
    if own.is_file():
      made.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(own, made)
      continue
    made.mkdir(parents=True, mode=0o700)
    for name in ("identity", "identities.json"):
      shutil.copy(own / name, made / name)
  return root


def cells(table, name, columns, clean, before, root):
  """A line of a table; after each fault all start again, and train another round."""
  found = []
  for number, _ in enumerate(columns):
    if name == "the site is killed after it" and number == len(columns) - 1:
      found.append("")  # it has left
      continue
    place, world = begun(clean, root / str(number)), World()
    table[name](world, number, before)
    world.run(place, ROUNDS)
    found.append(outcome(world, int(columns[number].startswith("2") or columns[number] == "Ended")))
    for i in world.results:
      assert charged(place, i) == released(world, i) == ROUNDS
    check_kept(place, [world, World().run(place, ROUNDS + 1)])
  return f"| {name} | {' | '.join(found)} |"


@pytest.fixture(scope="module", autouse=True)
def _quick():
  with quick():
    yield


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
  """A run without a fault: its folder, and its messages."""
  root = tmp_path_factory.mktemp("clean")
  return root, World().run(root, ROUNDS)


def test_without_a_fault_all_end_and_each_message_is_in_the_table(clean):
  root, world = clean
  assert world.errors == {}
  check_kept(root, [world])
  for i in range(3):
    assert (len(world.said[i]), len(world.told[i])) == (len(SAID), len(TOLD))
    assert charged(root, i) == ROUNDS


@pytest.mark.parametrize("name", FROM_SITE)
def test_a_fault_at_any_message_of_a_site_ends_as_the_table_says(clean, tmp_path, name):
  assert cells(FROM_SITE, name, SAID, *clean, tmp_path) in DOCS.read_text().splitlines()


@pytest.mark.parametrize("site", [0, 2])
def test_it_is_the_same_whichever_site_is_killed(clean, tmp_path, monkeypatch, site):
  monkeypatch.setattr(sys.modules[__name__], "FAULTY", site)
  name = "the site is killed before it"
  assert cells(FROM_SITE, name, SAID, *clean, tmp_path) in DOCS.read_text().splitlines()


@pytest.mark.parametrize("name", TO_SITE)
def test_a_fault_at_any_message_to_a_site_ends_as_the_table_says(clean, tmp_path, name):
  assert cells(TO_SITE, name, TOLD, *clean, tmp_path) in DOCS.read_text().splitlines()


@pytest.mark.parametrize("name", EVENTS)
def test_what_else_may_happen_ends_as_the_table_says(tmp_path, name):
  assert event(name, tmp_path) in DOCS.read_text().splitlines()


def event(name, root):
  return f"| {name} | {' | '.join(EVENTS[name](root))} |"


def test_the_tables_have_no_line_that_nothing_tests():
  lines = [text.split(" | ")[0][2:] for text in DOCS.read_text().splitlines() if text[:2] == "| "]
  tables = [FROM_SITE, TO_SITE, EVENTS, OVER_FLOWER]
  assert lines == [name for table in tables for name in ("", "---", *table)]


# ---- the document


def rows(head, lines):
  return "\n".join([f"| | {' | '.join(head)} |", f"|{' --- |' * (1 + len(head))}", *lines])


TEXT = """# What faults do to a run between hospitals

Made by `PYTHONPATH=.:tests python tests/flower_faults_test.py > docs/flower_faults.md`. The tests
do each fault at every message of a run of two rounds, between three sites of which one may be lost
(`--secagg_threshold=2`), and compare with these tables. The keys of the second sum are agreed on
with the messages of the first, so it has three messages (2:), and a proposal has the input in it.
The carrier is one within the process, and
the updates are vectors; all else is as in a run: the meeting, the agreement on the state to start
from, ledgers, records, and the sum.

A cell says over whom the sum was ("all", the "others" without the site, or "none" with what these
others end with) and then how the site itself ends: "right", that is with the sum, or with an error
of `secagg.errors`. Lost: the site is out of the run. Refused: it would have been unsafe to go on.
An OSError or ValueError names the file that cannot be written. Nobody waits longer than its
timeout. After each fault all are started again; the tests check that all then agree on one state,
which is that of the sums recorded, that another round is summed over all, and that no ledger was
charged for fewer rounds than updates have left its site.

## A message of a site

{said}

## A message to a site

{told}

Before the first Proposal all must be there: a fault ends the start for all.

## Everything else

{events}

## With Flower itself

{over_flower}

The stranger, whose node the SuperLink knows, is told why it is turned away, and the coordinator
notes it: `tests/flower_meeting_test.py`. The SuperNode says that the certificate has expired or is
not yet valid, and its hospital's program ends after its patience:
`tests/flower_certificates_test.py`.
The jump of clocks above is without Flower. Its SuperLink refuses a node whose clock is 5 s or more
ahead of its own, or 305 s or more behind (`flwr/superlink/routers/fleet/node_auth.py`): a test in
`tests/flower_apps_test.py` asks Flower's own code. So keep clocks by NTP. The hospital's program
says so when it ends. A second run ends at once and says that one goes on, since both would be the
same coordinator's. A SuperLink that is started again knows no node: register all anew, and start
the SuperNodes again. `tests/flower_processes_test.py` does this with Flower's own processes.
Strangers that flood the channel between a SuperNode and its hospital's program, or let bytes drip,
hold nobody up: `tests/flower_channel_test.py`. That Flower's ClientApp does not wait for longer
than its message may live, whatever its clock: `tests/flower_apps_test.py`.
"""


def main():
  with tempfile.TemporaryDirectory() as folder, quick():
    root = pathlib.Path(folder)
    new = lambda: pathlib.Path(tempfile.mkdtemp(dir=root))
    with contextlib.redirect_stdout(sys.stderr):  # what the sites say
      clean = root / "clean", World().run(root / "clean", ROUNDS)
      tables = [
        rows(columns, [cells(table, name, columns, *clean, new()) for name in table])
        for table, columns in ((FROM_SITE, SAID), (TO_SITE, TOLD))
      ]
      head = ("the coordinator", "the sites", "at the next start")
      events = rows(head, [event(name, new()) for name in EVENTS])
      over_flower = rows(head, [row(name) for name in OVER_FLOWER])
    text = TEXT.format(said=tables[0], told=tables[1], events=events, over_flower=over_flower)
    print(text, end="")


if __name__ == "__main__":
  main()
