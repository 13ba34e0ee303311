"""Sums over some of a run's sites, which the others are told: what these check, and who is left."""

import numpy as np
import pytest
from secagg_apart import Apart, Killed
from secagg_exchange_test import FIVE, THREE, TOLERANT, assert_total, elements, one_sum

from primia_jax import secagg
from primia_jax.secagg import carrier, exchange, following, keys, rounds
from primia_jax.secagg import messages as msg


def some_sum(own, i, sites, round_index=4, config=TOLERANT):
  begun = own.begin(elements(i), round_index, 1, config, sites=sites)
  assert (begun.site is None) == (i not in sites)
  return own.finish(begun, elements(i) if i in sites else None)


def test_all_sites_learn_a_sum_of_some_and_form_the_next_together():
  def call(i, own):
    for n, sites in enumerate([(0, 1, 2), (1, 3, 4), (0, 2, 4)]):
      assert_total(some_sum(own, i, sites, n, THREE), sites)
      assert (own.survivors, own.sites) == (sites, (0, 1, 2, 3, 4))
    assert_total(one_sum(own, i, FIVE), range(5))
    return "all"

  apart = Apart(5).run(call)
  assert (apart.errors, apart.failure) == ({}, None)
  assert apart.results == dict.fromkeys(range(5), "all")
  inputs = [m for m in apart.wire if isinstance(m, msg.MaskedInput)]
  assert len(inputs) == 3 + 3 + 3 + 5


def test_all_know_who_was_lost_and_a_sum_of_too_few_is_aborted_by_all_alike():
  """Site 4 is killed in the second sum. The third cannot be without it, and nothing is sent."""

  def call(i, own):
    some_sum(own, i, (0, 1, 2), 0)
    begun = own.begin(elements(i), 1, 1, TOLERANT, sites=(1, 3, 4))
    if i == 4:
      raise Killed
    assert_total(own.finish(begun, elements(i)), (1, 3))
    assert (own.survivors, own.sites) == ((1, 3), (0, 1, 2, 3))
    with pytest.raises(secagg.RoundAborted, match=r"of its sites \[0, 2, 4\], \[4\] are lost"):
      some_sum(own, i, (0, 2, 4), 2, THREE)
    assert_total(some_sum(own, i, (0, 2, 4), 3), (0, 2))
    assert_total(one_sum(own, i, FIVE, 4), range(4))
    return own.sites

  apart = Apart(5).run(call)
  assert apart.results == dict.fromkeys(range(4), (0, 1, 2, 3))
  assert apart.failure is None


def test_a_site_that_is_killed_while_others_form_a_sum_is_lost_in_its_own_next_one():
  def call(i, own):
    begun = own.begin(elements(i), 0, 1, TOLERANT, sites=(0, 1, 2))
    if i == 3:
      raise Killed
    assert_total(own.finish(begun, elements(i)), (0, 1, 2))
    assert own.sites == (0, 1, 2, 3)
    assert_total(some_sum(own, i, (0, 1, 3), 1), (0, 1))
    return own.sites

  apart = Apart(4).run(call)
  assert apart.results == dict.fromkeys(range(3), (0, 1, 2))


@pytest.mark.parametrize("lies", [True, False])
def test_sites_that_were_told_another_sum_take_part_in_no_other(monkeypatch, lies):
  """Site 3 is to be in the next sum, and site 4 to follow it."""
  take = following.take

  def told(setup, round, number, *more):
    total, survivors = take(setup, round, number, *more)
    return tuple(v + np.uint32(lies) for v in total), survivors

  monkeypatch.setattr(following, "take", told)

  def call(i, own):
    some_sum(own, i, (0, 1, 2), 0)
    some_sum(own, i, (0, 1, 3), 1)
    return own.survivors

  apart = Apart(5, timeout=2.0 if lies else 60.0).run(call)
  if not lies:
    assert apart.results == dict.fromkeys(range(5), (0, 1, 3))
    return
  assert apart.results == dict.fromkeys((0, 1, 2), (0, 1))
  assert sorted(apart.errors) == [3, 4]
  assert "follows another sum than most sites form" in str(apart.errors[4])


def test_a_site_waits_as_long_as_all_stages_of_a_sum_of_others_may_take():
  own = {i: keys.identity() for i in range(4)}
  pinned = exchange.Pinned(own[3], {i: one.public for i, one in own.items()}, bytes(32))
  for silences, why in ((4, "the end"), (5, "nothing for 1 s")):
    said, left = [], [silences]

    def hear(limit, left=left):
      left[0] -= 1
      if left[0] >= 0:
        raise TimeoutError("nothing for 1 s")
      return msg.encode(msg.Dismissed(b"the end"))

    end = exchange.Exchange(carrier.Carrier(hear, said.append, lambda: None), 3, pinned, b"run")
    begun = end.begin(elements(3), 0, 1, THREE, sites=(0, 1, 2))
    with pytest.raises(secagg.Lost, match=why):
      end.finish(begun, None)
    (proposal,) = map(msg.decode, said)
    assert proposal.advert == b""


def test_what_a_site_is_told_of_a_sum_is_refused_by_name_where_it_is_not_signed_for_it(monkeypatch):
  seen, take = [], following.take

  def taking(*args):
    seen.append(args)
    return take(*args)

  monkeypatch.setattr(following, "take", taking)
  Apart(4).run(lambda i, own: some_sum(own, i, (0, 1, 2)))
  ((setup, round, number, told, public),) = seen
  lists, consents, evidence = told
  assert (round, number, lists.survivors) == (4, 3, (0, 1, 2))
  assert len(msg.encode(msg.together(*told))) <= following.message_bytes(setup)
  signed, stranger = consents.signatures, keys.identity()
  text = rounds.signed_text(setup, msg.Consent(0, 4, b""))
  other = signed | {0: keys.sign(stranger.private, text)}
  by = lambda **signatures: consents._replace(**signatures)
  two = by(signatures={0: signed[0], 1: signed[1]})
  masked = msg.decode(evidence.masked[0])
  one_more = masked._replace(vectors=tuple(v + np.uint32(1) for v in masked.vectors))
  for wrong, reason in (
    ([msg.Dismissed(b"")], "malformed"),
    ([lists._replace(round=3), consents, evidence], "another round"),
    ([lists._replace(survivors=(0, 2, 1)), consents, evidence], "malformed"),
    ([lists._replace(dropouts=(2,)), consents, evidence], "overlapping"),
    ([lists._replace(survivors=(0, 1, 3)), consents, evidence], "unknown"),
    ([lists, by(signatures=signed | {3: b""}), evidence], "unknown"),
    ([lists, by(signatures={0: signed[0]}), evidence], "too few"),
    ([lists._replace(survivors=(0,)), by(signatures={0: signed[0]}), evidence], "too few"),
    ([lists._replace(survivors=(0, 1), dropouts=(2,)), two, evidence], "forged"),
    ([lists._replace(inputs=bytes(32)), consents, evidence], "forged"),
    ([lists, by(signatures=other), evidence], "forged"),
    ([lists, consents, evidence._replace(roster=b"")], "forged"),
    (
      [lists, consents, evidence._replace(masked=evidence.masked | {0: msg.encode(one_more)})],
      "forged",
    ),
  ):
    with pytest.raises(secagg.Refused, match=f"site 3 refuses in stage total: {reason}"):
      take(setup, round, number, wrong, public)
  with pytest.raises(secagg.Refused, match="not signed by the coordinator"):
    take(setup, round, number, told, stranger.public)
