"""The coordinator over a carrier within the process: sites that fall silent, lie or flood."""

import re
import threading

import pytest
import secagg_carried
from secagg_apart import Apart, Killed
from secagg_exchange_test import TOLERANT, assert_total, one_sum

from primia_jax import secagg
from primia_jax.secagg import coordinator, keys, meeting, opening, protocol, rounds
from primia_jax.secagg import messages as msg

STAGES = (protocol.share_keys, protocol.mask_input, protocol.consistency, protocol.unmask)


def test_a_sum_gives_every_site_the_same_and_the_report_tells_no_number_of_it():
  apart = Apart(3).run(lambda i, own: one_sum(own, i))
  for i in range(3):
    assert_total(apart.results[i], range(3))
  (report,) = apart.reports
  line = coordinator.numbers(report)
  assert (line["survivors"], line["dropouts"], line["rejected"]) == ([0, 1, 2], [], [])
  assert (line["round"], line["numbers"], len(line["seconds"])) == (4, 121, 5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dies", [True, False])
def test_a_site_that_dies_or_falls_silent_at_any_stage_is_a_dropout(monkeypatch, stage, dies):
  """At once where the carrier knows that it is gone, and else after the stage's timeout."""
  ended = threading.Event()
  step = STAGES[stage]

  def stopping(site, *more):
    if site.number == 1:
      if not dies:
        assert ended.wait(30)
      raise Killed
    return step(site, *more)

  monkeypatch.setattr(protocol, step.__name__, stopping)

  def call(i, own):
    got = one_sum(own, i, TOLERANT)
    ended.set()
    return got

  apart = Apart(3, timeout=60.0 if dies else 1.0).run(call)
  survivors = (0, 2) if stage < 2 else (0, 1, 2)
  assert sorted(apart.results) == [0, 2]
  for i in (0, 2):
    assert_total(apart.results[i], survivors)
  (report,) = apart.reports
  assert report.opened.survivors == survivors
  assert report.opened.dropouts == ((1,) if stage == 1 else ())


def coordinate(answer, timeout=0.2, sites=(0, 1, 2)):
  """A coordinator whose sites answer as given: (site, request) -> bytes, or None for silence."""
  told = {}

  def ask(requests, timeout):
    told.update({i: msg.decode(data) for i, data in requests.items()})
    answers = {i: answer(i, msg.decode(data)) for i, data in requests.items()}
    return {i: data for i, data in answers.items() if data is not None}

  try:
    return coordinator.coordinate(ask, sites, keys.identity(), timeout), told
  except secagg.Aborted as error:
    return error, told


def test_a_site_that_is_missing_or_speaks_out_of_turn_ends_the_meeting_by_name_for_all():
  own = [keys.identity() for _ in range(3)]
  hello = lambda i, request: msg.encode(meeting.hello(own[i], i, request))

  def answers(kind):
    def answer(i, request):
      if isinstance(request, msg.Invitation):
        wrong = {"silent": None, "garbage": b"\xff", "other": hello(0, request)}
        wrong["ended"] = msg.encode(msg.Ended(1, b"no images"))
        return wrong[kind] if i == 1 else hello(i, request)
      return None

    return answer

  for kind, text in (
    ("silent", r"no hello of sites \[1\]"),
    ("garbage", r"no hello of sites \[1\]"),
    ("other", r"no hello of sites \[1\]"),
    ("ended", "site 1 left: no images"),
  ):
    error, told = coordinate(answers(kind))
    assert isinstance(error, secagg.Lost)
    assert re.search(text, str(error))
    assert told[0] == msg.Dismissed(str(error).encode())


def proposals(change):
  """What three sites propose; the second one's is changed."""
  own = [keys.identity() for _ in range(3)]
  setup = rounds.setup({i: k.public for i, k in enumerate(own)}, (4,), b"run", threshold=3)
  made = {}
  for i in range(3):
    _, advert = protocol.advertise(setup, 4, i, own[i])
    terms = msg.encode(rounds.terms(setup))
    made[i] = msg.Proposal(i, 4, terms, msg.encode(advert), b"")
  made[1] = change(made[1])
  return {i: msg.encode(one) for i, one in made.items()}


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    (lambda p: p._replace(terms=b"\xff"), "another round"),
    (lambda p: p._replace(round=5), "another round"),
    (lambda p: p._replace(advert=p.advert[:-64] + bytes(64)), "forged"),
    (lambda p: p._replace(advert=b"\x80\x04."), "malformed"),  # the beginning of a pickle
    (lambda p: p._replace(advert=msg.encode(msg.Roster(4, ()))), "malformed"),
    (lambda p: p._replace(advert=msg.encode(msg.decode(p.advert)._replace(site=0))), "malformed"),
  ],
)
def test_what_one_site_says_wrong_is_rejected_by_name(change, reason):
  said = proposals(change)

  def answer(i, request):
    return said[i] if isinstance(request, msg.Invitation) else None

  error, _ = coordinate(answer)
  assert isinstance(error, secagg.RoundFailed)
  assert f"message of site 1 in stage advertise is rejected: {reason}" in error.__notes__[0] or (
    reason == "another round" and "2 sites of 3" in str(error)
  )


def test_terms_that_no_machine_could_hold_are_refused_before_memory_is_taken():
  own = [keys.identity() for _ in range(3)]
  setup = rounds.setup({i: k.public for i, k in enumerate(own)}, (2**31,), b"run")
  _, advert = protocol.advertise(setup, 4, 0, own[0])
  made = msg.Proposal(0, 4, msg.encode(rounds.terms(setup)), msg.encode(advert), b"")
  error, _ = coordinate(lambda i, request: msg.encode(made._replace(site=i)))
  assert isinstance(error, secagg.RoundFailed)
  assert "needs messages of" in str(error)


def test_an_answer_longer_than_any_of_the_sum_is_rejected_unread(monkeypatch):
  apart = Apart(3)

  def ask(requests, timeout):
    answers = apart.ask(requests, timeout)
    is_roster = any(isinstance(msg.decode(r), msg.Roster) for r in requests.values())
    return answers | {1: bytes(2**20)} if is_roster else answers

  apart.recorded = ask
  apart.run(lambda i, own: one_sum(own, i, TOLERANT))
  (report,) = apart.reports
  assert report.opened.survivors == (0, 2)
  assert [str(r) for r in report.rejected if "1048576 bytes; no message has over" in str(r)]
  assert "this site was lost in stage share_keys" in str(apart.errors[1])


def test_terms_are_carried_whole():
  setup = rounds.setup(
    {i: keys.identity().public for i in (3, 5, 9, 11)}, (4, 1), b"run", num_bits=40, purpose=2,
    degree=2, graph_key=keys.words(bytes(range(32))), malicious_server=False,
  )  # fmt: skip
  again = rounds.of_terms(msg.decode(msg.encode(rounds.terms(setup))))
  assert again.label == setup.label
  assert rounds.terms(again) == rounds.terms(setup)


def test_a_carrier_drops_late_answers_and_tells_of_an_end_at_once():
  ask, ends = secagg_carried.in_process([0], timeout=0.1)
  assert ask({0: b"a"}, 0.0) == {}
  assert ends[0].hear(9) == b"a"
  ends[0].say(b"late")
  assert ask({0: b"longer than nine"}, 0.0) == {}
  with pytest.raises(ValueError, match="16 bytes; the limit is 9"):
    ends[0].hear(9)
  with pytest.raises(TimeoutError, match="nothing for 0"):
    ends[0].hear(9)
  ends[0].close()
  assert ask({0: b"b"}, 60.0) == {}
  with pytest.raises(ConnectionError, match="has left"):
    ends[0].hear(9)


def test_the_size_limit_is_above_every_message_of_a_sum():
  """And an honest site refuses what is longer. The second sum's keys are agreed on in the first."""
  apart = Apart(4)
  whole = record_whole(apart)
  apart.run(lambda i, own: [one_sum(own, i, four(), n) for n in (4, 5)])
  setup = rounds.setup({i: keys.identity().public for i in range(4)}, (120, 1), b"run")
  sent = [m for m in apart.wire if type(m) in (*msg.FROM_SITES, *msg.FROM_SERVER)]
  assert {type(m) for m in sent} == {*msg.FROM_SITES, *msg.FROM_SERVER}
  assert len([m for m in sent if isinstance(m, msg.MaskedInput)]) == 8
  passed_on = [len(msg.encode(m)) for m in apart.wire if isinstance(m, msg.Evidence)]
  assert max(passed_on) <= opening.message_bytes(setup) < 2 * max(passed_on)
  others = [size for size in whole if size not in passed_on]
  assert max(others) <= rounds.message_bytes(setup) < 2 * max(others)


def record_whole(apart):
  """The sizes of all messages of sums, also of several that travel together."""
  ask, sizes = apart.ask, []

  def recorded(requests, timeout):
    answers = ask(requests, timeout)
    for data in [*requests.values(), *answers.values()]:
      message = msg.decode(data)
      data = message.masked if isinstance(message, msg.Proposal) else data
      sizes.append(len(data))
    return answers

  apart.ask = recorded
  return sizes


def four():
  return secagg.secure_sum(4)
