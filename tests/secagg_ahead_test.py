"""Keys of the next sum, agreed on with the messages of this one: what it saves, and what it must
not give away.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from secagg_apart import Apart, Killed
from secagg_exchange_test import THREE, TOLERANT, assert_total, one_sum
from secagg_world import ROUND, play, total, world

from primia_jax import secagg
from primia_jax.secagg import ahead, keys, masking, protocol, rounds, simulation
from primia_jax.secagg import messages as msg
from primia_jax.secagg import server as serving


def messages(apart):
  """How many messages each sum took."""
  return [len(report.seconds) for report in apart.reports]


def test_later_sums_take_three_messages_and_each_has_keys_of_its_own():
  def call(i, own):
    for n in (4, 5, 6):
      assert_total(one_sum(own, i, THREE, n), range(3))

  apart = Apart(3).run(call)
  assert (apart.errors, apart.failure) == ({}, None)
  assert messages(apart) == [5, 3, 3]
  assert [report.rejected for report in apart.reports] == [(), (), ()]
  rosters = {msg.encode(m) for m in apart.wire if isinstance(m, msg.Roster)}
  adverts = [a for data in rosters for a in msg.decode(data).adverts]
  public = [key for a in adverts for key in (a.box_key, a.mask_key, a.commitment)]
  assert len(rosters) == 4  # the last one's are never used
  assert len(set(public)) == len(public) == 4 * 3 * 3


def test_a_site_that_is_lost_with_keys_agreed_on_is_a_dropout_and_its_masks_are_opened():
  """It has begun the second sum, and never sends its input."""

  def call(i, own):
    assert_total(one_sum(own, i, TOLERANT), (0, 1, 2))
    begun = own.begin({"a": np.zeros(3, np.uint32)}, 5, 1, TOLERANT)
    assert begun.bond is not None
    if i == 1:
      raise Killed
    own.finish(begun, {"a": np.full(3, i, np.uint32)})
    assert own.survivors == (0, 2)
    assert_total(one_sum(own, i, TOLERANT, 6), (0, 2))
    assert_total(one_sum(own, i, TOLERANT, 7), (0, 2))
    return True

  apart = Apart(3).run(call)
  assert (sorted(apart.results), apart.failure) == ([0, 2], None)
  assert messages(apart) == [5, 3, 5, 3]
  assert apart.reports[1].opened.total[0].tolist() == [2, 2, 2]
  assert apart.reports[1].opened.dropouts == (1,)


@pytest.mark.parametrize("step", ["mask_input", "consistency", "unmask"])
def test_a_site_that_is_lost_at_any_message_of_a_later_sum(monkeypatch, step):
  real = getattr(protocol, step)

  def stopping(site, *more):
    if site.number == 1 and site.round == 5:
      raise Killed
    return real(site, *more)

  monkeypatch.setattr(protocol, step, stopping)
  survivors = (0, 2) if step == "mask_input" else (0, 1, 2)

  def call(i, own):
    one_sum(own, i, TOLERANT)
    assert_total(one_sum(own, i, TOLERANT, 5), survivors)
    assert_total(one_sum(own, i, TOLERANT, 6), (0, 2))
    return True

  apart = Apart(3).run(call)
  assert (sorted(apart.results), list(apart.errors), apart.failure) == ([0, 2], [1], None)
  # a site that is lost after it has sent its shares, and after its keys are agreed on, is missed
  # in the third sum, whose keys the others have
  assert messages(apart) == [5, 3, 3 if step == "unmask" else 5]


@pytest.mark.parametrize("step", ["advertise", "share"])
def test_what_is_wrong_with_the_next_keys_costs_two_messages_and_no_site(monkeypatch, step):
  real = getattr(ahead, step)

  def lying(site, *more):
    coming, message = real(site, *more)
    if site.number == 1 and site.round == 4:
      message = message._replace(signature=bytes(64))
    return coming, message

  monkeypatch.setattr(ahead, step, lying)

  def call(i, own):
    for n in (4, 5, 6):
      assert_total(one_sum(own, i, TOLERANT, n), range(3))
    return True

  apart = Apart(3).run(call)
  assert sorted(apart.results) == [0, 1, 2]
  assert messages(apart) == [5, 5, 3]
  (rejected,) = apart.reports[0].rejected
  assert (rejected.site, rejected.reason) == (1, "forged")


def test_a_site_from_which_the_last_shares_were_kept_is_left_out_by_the_others():
  def call(i, own):
    one_sum(own, i, TOLERANT)
    if i == 1:
      own._agreed = None
    assert_total(one_sum(own, i, TOLERANT, 5), (0, 2))
    return True

  apart = Apart(3).run(call)
  assert sorted(apart.results) == [0, 2]
  assert "this site was lost in stage masked_input" in str(apart.errors[1])


def test_keys_for_other_sites_or_another_threshold_are_not_used():
  """They would be shares of other secrets, or too few sites could open them."""
  identities = world().setup.identities
  of = lambda known=identities, **more: rounds.setup(known, (1,), b"", **more)
  assert ahead.fits(of(), of(purpose=2, num_bits=40, quorum=5))
  assert not ahead.fits(of(threshold=4), of(threshold=5))
  assert not ahead.fits(of(malicious_server=False, threshold=4, quorum=4), of(threshold=4))
  assert not ahead.fits(of(), of(dict(list(identities.items())[:4])))
  sparse = of(degree=2, graph_key=np.arange(8, dtype=np.uint32))
  assert not ahead.fits(sparse, sparse)

  def call(i, own):
    one_sum(own, i, THREE)
    assert_total(one_sum(own, i, TOLERANT, 5), range(3))
    return True

  apart = Apart(3).run(call)
  assert sorted(apart.results) == [0, 1, 2]
  assert messages(apart) == [5, 5]


def agreed(w):
  """The states of sites and server with keys for the sum after one of w."""
  sites, server, _ = play(w, 2)
  made = {i: ahead.advertise(site) for i, site in sites.items()}
  coming = serving.start(ahead.setup(w.setup, server.transcript), ROUND)
  gather = lambda coming, made: ahead.gather(coming, {i: m for i, (_, m) in made.items()}, [])
  coming, roster = serving.close_advertise(gather(coming, made))
  made = {i: ahead.share(site, roster) for i, (site, _) in made.items()}
  coming, out = serving.close_share_keys(gather(coming, made))
  return {i: ahead.take(site, out[i]) for i, (site, _) in made.items()}, coming


def next_setup(w, total):
  """Of a sum that is bound to this total of the one before."""
  return rounds.of_terms(rounds.terms(w.setup)._replace(session=total))


def test_masks_are_those_of_a_simulation_whose_sites_have_the_same_secrets():
  w = world(sizes=(6,))
  sites, _ = agreed(w)
  setup = next_setup(w, b"total")

  def entropy(name):
    if isinstance(name, str):
      return lambda size: bytes(size)
    secrets = sites[name].secrets
    left = [secrets.mask.private, secrets.seed, secrets.noise]
    return lambda size: left.pop(0)

  config, words = secagg.secure_sum(5, threshold=4), (ROUND + 1, setup.purpose)
  begun = simulation._begin(config, words, np.arange(5, dtype=np.int32), None, entropy)
  for i, site in sites.items():
    now, _ = ahead.begin(site, setup, ROUND + 1)
    _, sent = protocol.mask_input(now, w.inputs[i])
    row = jax.tree.map(lambda a, i=i: a[i], begun.rows)
    element = secagg.Masked(jnp.asarray(w.inputs[i][0]), jnp.uint32(0))
    masked = masking.mask(element, row, words, config)
    np.testing.assert_array_equal(np.asarray(masked.message), sent.vectors[0])


@pytest.mark.parametrize("checked", [True, False])
def test_a_site_with_another_total_is_in_no_sum_that_opens(checked, monkeypatch):
  """Its input is of another model: in the others' sum, it could be told from theirs. Its keys were
  agreed on before, so its masks cancel; only its bond says that it goes on from another total.
  """
  w = world(sizes=(6,))
  sites, coming = agreed(w)
  honest, other = next_setup(w, b"total"), next_setup(w, b"another")
  begun = {
    i: ahead.begin(site, other if i == 1 else honest, ROUND + 1) for i, site in sites.items()
  }
  said = {i: protocol.mask_input(site, w.inputs[i]) for i, (site, _) in begun.items()}
  server = ahead.serve(coming, honest, ROUND + 1)
  with pytest.raises(secagg.Rejected, match="forged: its bond is not of this sum"):
    ahead.check_bond(server, 1, msg.encode(begun[1][1]))
  assert ahead.check_bond(server, 2, msg.encode(begun[2][1])) == begun[2][1].signature
  with pytest.raises(secagg.Rejected, match="forged"):
    serving.receive(server, said[1][1])
  with monkeypatch.context() as patch:  # a server that takes it all the same
    patch.setattr(keys, "verify", lambda *_: True)
    server = functools.reduce(serving.receive, [m for _, m in said.values()], server)
  server, lists = serving.close_masked_input(server)
  bonds = msg.Bonds(ROUND + 1, {i: bond.signature for i, (_, bond) in begun.items()})
  without = msg.Bonds(ROUND + 1, {i: s for i, s in bonds.signatures.items() if i != 1})
  if checked:
    for i in (0, 2, 3, 4):
      with pytest.raises(secagg.Refused, match="forged: site 1 is not bound to this sum"):
        ahead.check_bonds(said[i][0], bonds, lists)
      with pytest.raises(secagg.Refused, match="unknown: there is no bond of site 1"):
        ahead.check_bonds(said[i][0], without, lists)
      with pytest.raises(secagg.Refused, match="malformed"):
        ahead.check_bonds(said[i][0], lists, lists)
      ahead.check_bonds(said[i][0], without, msg.Survivors(ROUND + 1, (0, 2, 3, 4), (1,), b""))
    return
  agree = {i: protocol.consistency(said[i][0], lists) for i in (0, 2, 3, 4)}
  server = functools.reduce(serving.receive, [m for _, m in agree.values()], server)
  server, consents = serving.close_consistency(server)
  answers = [protocol.unmask(site, consents)[1] for site, _ in agree.values()]
  server, opened = serving.open_total(functools.reduce(serving.receive, answers, server))
  assert [v.tolist() for v in opened.total] == total(w, range(5))


def test_keys_of_the_next_sum_are_refused_where_a_site_is_missing():
  w = world()
  sites, server, _ = play(w, 2)
  made = {i: ahead.advertise(site) for i, site in sites.items()}
  adverts = {i: advert for i, (_, advert) in made.items()}
  start = serving.start(ahead.setup(w.setup, server.transcript), ROUND)
  four = {i: one for i, one in adverts.items() if i}
  assert ahead.gather(start, four, []) is None
  rejected = []
  swapped = adverts | {0: adverts[1]}
  assert ahead.gather(start, swapped, rejected) is None
  assert "no message of this site" in str(rejected[0])
  roster = msg.Roster(ROUND, tuple(four[i] for i in sorted(four)))
  with pytest.raises(secagg.Refused, match=r"too few: keys for the next sum without sites \[0\]"):
    ahead.share(made[1][0], roster)
  with pytest.raises(secagg.Refused, match="Survivors instead of Roster"):
    ahead.share(made[1][0], msg.Survivors(ROUND, (), (), b""))
  other = world(sizes=(7,))
  stale, *_ = play(other, 2)
  theirs = {i: ahead.advertise(site)[1] for i, site in stale.items()}
  mixed = msg.Roster(ROUND, tuple((theirs if i == 2 else adverts)[i] for i in sorted(adverts)))
  with pytest.raises(secagg.Refused, match="forged: site 2's advert"):
    ahead.share(made[1][0], mixed)
