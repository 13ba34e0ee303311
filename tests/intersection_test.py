"""Private set intersection: what comes out, and what a dictionary finds in the messages."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl import bindings

from primia_jax import intersection
from primia_jax.intersection import Site, point_of

CONTEXT = b"lungs, sites 0 and 1"
ALL_IDS = [f"{n:04}" for n in range(400)]  # as short as hospitals' numbers are


def both(ids_a, ids_b, context_b=CONTEXT):
  a, b = Site(ids_a, CONTEXT), Site(ids_b, context_b)
  to_a, to_b = b.answer(a.blinded), a.answer(b.blinded)
  return a.finish(to_a), b.finish(to_b)


@settings(max_examples=20, deadline=None)
@given(st.sets(st.sampled_from(ALL_IDS), max_size=12), st.sets(st.sampled_from(ALL_IDS[:30])))
def test_both_learn_what_plain_sets_say(ids_a, ids_b):
  assert both(ids_a, ids_b) == (ids_a & ids_b, ids_a & ids_b)


def test_forms_of_an_id_and_contexts():
  assert both([" 17", "17", "Mu\u0308ller"], ["17 ", "M\u00fcller", "3"])[0] == {"17", "Müller"}
  assert both(["17"], ["17"], b"another federation") == (set(), set())
  with pytest.raises(ValueError, match="a patient's id is empty"):
    Site(["17", "  "], CONTEXT)


def found_in(messages, image):
  """Ids that a dictionary of all ids finds in messages, knowing how ids become what is sent."""
  return {one for one in ALL_IDS if image(one) in messages}


def hashed(one):
  return hashlib.sha256(CONTEXT + one.encode()).digest()


@pytest.mark.parametrize("blinds", [True, False])
def test_a_dictionary_finds_hashed_ids_and_not_blinded_ones(monkeypatch, blinds):
  """Whoever carries the messages, or the other site, hashes every id that there is. Where no secret
  blinds the points, this test sees it.
  """
  ids_a, ids_b = set(ALL_IDS[10:30]), set(ALL_IDS[20:50])
  assert found_in({hashed(one) for one in ids_a}, hashed) == ids_a  # hashing alone hides nothing
  if not blinds:
    monkeypatch.setattr(intersection, "_secret", lambda: (1).to_bytes(32, "little"))
  a, b = Site(ids_a, CONTEXT), Site(ids_b, CONTEXT)
  messages = {*a.blinded, *b.blinded, *b.answer(a.blinded), *a.answer(b.blinded)}
  found = found_in(messages, lambda one: point_of(one, CONTEXT))
  assert found == (set() if blinds else ids_a | ids_b)


def test_two_runs_on_the_same_ids_share_no_point():
  one, other = Site(ALL_IDS[:20], CONTEXT), Site(ALL_IDS[:20], CONTEXT)
  assert not {*one.blinded} & {*other.blinded}


def test_the_order_of_points_tells_nothing(monkeypatch):
  """With one secret, ids given in order come out in another order each time."""
  monkeypatch.setattr(intersection, "_secret", lambda: (2).to_bytes(32, "little"))
  orders = {tuple(Site(ALL_IDS[:20], CONTEXT).blinded) for _ in range(3)}
  assert len(orders) == 3
  assert len(set(map(frozenset, orders))) == 1


def test_a_step_can_be_taken_once():
  a, b = Site(["1", "2"], CONTEXT), Site(["2"], CONTEXT)
  with pytest.raises(ValueError, match="answer the other site's message first"):
    a.finish([])
  to_b = a.answer(b.blinded)
  with pytest.raises(ValueError, match="this site has answered already"):
    a.answer(Site(["3"], CONTEXT).blinded)
  to_a = b.answer(a.blinded)
  assert a.finish(to_a) == {"2"}
  with pytest.raises(ValueError, match="answer the other"):
    a.finish(to_a)
  assert b.finish(to_b) == {"2"}
  assert repr(a) == "Site(2 ids)"


def test_steps_may_be_days_apart():
  """Each end is read back from its file before each step, and knows which steps it has taken."""
  a, b = Site(["1", "2"], CONTEXT, max_ids=2), Site(["2", "3"], CONTEXT)
  a, again = Site.decode(a.encode()), a.blinded
  assert a.blinded == again
  to_b = a.answer(b.blinded)
  to_a = b.answer(a.blinded)
  a = Site.decode(a.encode())
  with pytest.raises(ValueError, match="this site has answered already"):
    a.answer(b.blinded)
  assert a.finish(to_a) == b.finish(to_b) == {"2"}
  with pytest.raises(ValueError, match="answer the other"):
    Site.decode(a.encode()).finish(to_a)
  few = Site.decode(Site(["1"], CONTEXT, max_ids=1).encode())
  with pytest.raises(ValueError, match="sends 2 ids, more than 1"):
    few.answer(b.blinded)
  for wrong in (b"{", b"{}", b"[]", a.encode().replace(b'"version": 1', b'"version": 2')):
    with pytest.raises(ValueError, match="the intersection is damaged"):
      Site.decode(wrong)


SMALL_ORDER = bytes([1] + [0] * 31)  # the identity; a secret times it tells the secret's residue


@pytest.mark.parametrize("wrong", [b"", b"short", SMALL_ORDER, bytes(32), b"\xff" * 32, "text"])
def test_what_is_no_point_of_the_group_is_refused(wrong):
  a = Site(["1"], CONTEXT)
  with pytest.raises(ValueError, match="for id 0 is not a point of the group"):
    a.answer([wrong])
  with pytest.raises(ValueError, match="answered already"):  # the secret is gone
    a.answer(Site(["1"], CONTEXT).blinded)
  b = Site(["1"], CONTEXT)
  b.answer(Site(["2"], CONTEXT).blinded)
  with pytest.raises(ValueError, match="not a point of the group"):
    b.finish([wrong])


def test_a_point_outside_the_prime_order_subgroup_is_refused():
  order_8 = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
  mixed = bindings.crypto_core_ed25519_add(point_of("1", CONTEXT), order_8)
  with pytest.raises(ValueError, match="is not a point of the group"):
    Site(["1"], CONTEXT).answer([mixed])


def test_too_many_ids_and_wrong_numbers_are_refused():
  few, many = Site(["1"], CONTEXT, max_ids=2), Site(["1", "2", "3"], CONTEXT)
  with pytest.raises(ValueError, match="sends 3 ids, more than 2"):
    few.answer(many.blinded)
  point = many.blinded[0]
  with pytest.raises(ValueError, match="sends an id twice"):
    Site(["1"], CONTEXT).answer([point, point])
  many.answer(Site(["1"], CONTEXT).blinded)
  for returned in ([], [point] * 3):
    with pytest.raises(ValueError, match="different points for 3 ids"):
      many.finish(returned)
