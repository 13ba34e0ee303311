"""Sums over the protocol: every site a thread with its own exchange; a carrier only joins them."""

import dataclasses
import threading

import jax
import numpy as np
import pytest
from secagg_apart import Apart, Killed

from primia_jax import ring, secagg
from primia_jax.secagg import exchange, keys, opening, protocol, rounds
from primia_jax.secagg import messages as msg

THREE, FIVE = secagg.secure_sum(3), secagg.secure_sum(5)
TOLERANT = secagg.secure_sum(3, threshold=2)
SPARSE = secagg.secure_sum(5, num_peers=2, threshold=2)


def elements(i):
  rng = np.random.default_rng(i)
  return {"a": rng.integers(0, 2**32, (30, 4), dtype=np.uint32), "b": np.uint32(i)}


def total(numbers):
  return jax.tree.map(lambda *a: np.sum(a, axis=0, dtype=np.uint32), *map(elements, numbers))


def assert_total(got, numbers):
  jax.tree.map(np.testing.assert_array_equal, got, total(numbers))


def one_sum(own, i, config=THREE, round_index=4):
  return own.finish(own.begin(elements(i), round_index, 1, config), elements(i))


def looks_uniform(words):
  """Whether each bit is 1 half of the time, to six standard deviations."""
  ones = np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1).sum(axis=0)
  return bool(np.all(np.abs(ones - len(words) / 2) < 3 * len(words) ** 0.5))


@pytest.mark.parametrize("masked", [True, False])
def test_what_leaves_a_site_is_masked(monkeypatch, masked):
  """Each leaf is a vector of its own; and where no masks are made, this test sees it."""
  zeros = {"a": np.zeros((4, 100), np.uint32), "b": np.zeros(300, np.uint32)}
  if not masked:
    monkeypatch.setattr(
      rounds, "mask_total", lambda k, s, r, setup: [np.zeros(n, np.uint32) for n in setup.sizes]
    )
  apart = Apart(3).run(lambda i, own: own.finish(own.begin(zeros, 4, 1, THREE), zeros))
  assert apart.errors == {}
  inputs = [message.vectors for message in apart.wire if isinstance(message, msg.MaskedInput)]
  assert [[v.size for v in vectors] for vectors in inputs] == [[400, 300]] * 3
  assert all(looks_uniform(v) == masked for vectors in inputs for v in vectors)
  for result in apart.results.values():
    jax.tree.map(np.testing.assert_array_equal, result, zeros)
  others = [m for m in apart.wire if not isinstance(m, msg.MaskedInput)]
  assert not any(hasattr(m, "vectors") for m in others)  # and elements are in no other message


def test_sums_go_on_over_the_survivors_until_too_few_are_left():
  """Of five sites with a threshold of four, the last leaves between sums; then another in the
  middle of one.
  """
  ended = threading.Event()

  def call(i, own):
    first = one_sum(own, i, FIVE)
    assert own.sites == (0, 1, 2, 3, 4)
    if i == 4:
      ended.set()
      raise Killed
    assert ended.wait(60)
    assert_total(one_sum(own, i, FIVE, 5), range(4))
    assert own.sites == (0, 1, 2, 3)
    begun = own.begin(elements(i), 6, 1, FIVE)
    if i == 3:
      raise Killed
    own.finish(begun, elements(i))
    return first

  apart = Apart(5).run(call)
  assert apart.results == {}
  assert isinstance(apart.failure, secagg.RoundFailed)
  why = "stage masked_input: 3 sites of 4 sent their message in time, and 4 are needed"
  assert why in str(apart.failure)
  for i in (0, 1, 2):
    assert isinstance(apart.errors[i], secagg.Lost)
    assert f"site {i} is out of the run in round 6: the round fails in {why}" in str(
      apart.errors[i]
    )


def test_a_site_that_is_late_is_told_that_it_was_lost_and_the_others_wait_once():
  late = threading.Event()

  def call(i, own):
    begun = own.begin(elements(i), 4, 1, TOLERANT)
    if i == 1:
      late.wait(60)
    assert_total(own.finish(begun, elements(i)), (0, 2))
    late.set()
    return own.sites

  apart = Apart(3, timeout=2.0).run(call)
  assert apart.results == {0: (0, 2), 2: (0, 2)}
  assert "site 1 is out of the run in round 4: this site was lost in stage masked_input" in str(
    apart.errors[1]
  )


@pytest.mark.parametrize("lies", [True, False])
def test_sites_that_were_told_different_sums_do_not_go_on_together(monkeypatch, lies):
  """Else a server could have them train different models, and single out one site's update."""
  total = opening.total

  def told(site, evidence, public):
    return tuple(v + np.uint32(lies and site.number == 1) for v in total(site, evidence, public))

  def call(i, own):
    one_sum(own, i)
    return one_sum(own, i, round_index=5)

  monkeypatch.setattr(opening, "total", told)
  apart = Apart(3, timeout=2.0 if lies else 60.0).run(call)
  if not lies:
    assert sorted(apart.results) == [0, 1, 2]
    return
  assert apart.results == {}
  assert isinstance(apart.failure, secagg.RoundFailed)
  assert "message of site 1 in stage masked_input is rejected: forged" in apart.failure.__notes__[0]


@pytest.mark.parametrize("started", ["alike", "apart"])
def test_sites_that_start_from_different_states_open_no_sum(started):
  """Else a server could single out one site's update by the state that it gives to the others."""

  def call(i, own):
    own.bind(b"other" if started == "apart" and i == 1 else b"state")
    return one_sum(own, i)

  apart = Apart(3, timeout=2.0 if started == "apart" else 60.0).run(call)
  if started == "alike":
    assert sorted(apart.results) == [0, 1, 2]
    return
  assert apart.results == {}
  assert "message of site 1 in stage advertise is rejected: forged" in apart.failure.__notes__[0]


def test_a_survivor_that_is_late_to_sign_the_lists_is_told_so_and_not_waited_for_again(monkeypatch):
  late, consistency = threading.Event(), protocol.consistency

  def slow(site, lists):
    if site.number == 1:
      late.wait(60)
    return consistency(site, lists)

  monkeypatch.setattr(protocol, "consistency", slow)

  def call(i, own):
    assert_total(one_sum(own, i, TOLERANT), (0, 1, 2))
    assert own.sites == (0, 1, 2)
    assert_total(one_sum(own, i, TOLERANT, 5), (0, 2))
    late.set()
    return own.sites

  apart = Apart(3, timeout=2.0).run(call)
  assert apart.results == {0: (0, 2), 2: (0, 2)}
  assert "this site was lost in stage consistency" in str(apart.errors[1])


def test_sites_of_another_run_or_with_another_server_are_shown_out_and_not_summed():
  """Site 3 has another configuration, and site 4 has pinned another server."""
  apart, stranger = Apart(5, timeout=2.0), keys.identity().public
  for i, run, server in ((3, b"other", None), (4, b"test", stranger)):
    pinned = apart.pinned[i]
    apart.exchanges[i] = apart.make(i, pinned._replace(server=server or pinned.server), run)

  def call(i, own):
    assert_total(one_sum(own, i, secagg.secure_sum(5, threshold=3)), (0, 1, 2))
    return own.sites

  apart.run(call)
  assert apart.results == dict.fromkeys((0, 1, 2), (0, 1, 2))
  assert all(
    isinstance(apart.errors[i], secagg.Lost) for i in (3, 4)
  )  # long before their patience ends


def test_no_sum_is_over_fewer_than_the_quorum_of_those_that_have_begun():
  """One of five after the other leaves between sums; two of them would be a majority of the three
  that are left.
  """
  ended = [threading.Event() for _ in range(5)]

  def call(i, own):
    for left in (5, 4, 3, 2):
      if left < 5:
        assert ended[left].wait(60)
      assert_total(one_sum(own, i, SPARSE, 9 - left), range(left))
      if i == left - 1:
        ended[i].set()
        return left
    return "two"

  apart = Apart(5).run(call)
  assert apart.results == {4: 5, 3: 4, 2: 3}
  assert isinstance(apart.failure, secagg.RoundFailed)
  assert "2 sites of 3 sent their message in time, and 3 are needed" in str(apart.failure)


@pytest.mark.parametrize(
  ("num_peers", "threshold", "left", "want"),
  [
    (3, None, 4, (3, 3, 3, True)),
    (3, None, 3, (2, 3, 3, True)),
    (3, 2, 4, "threshold=2 of 4 shares; it must be above half"),
    (3, 2, 2, "2 of 4 sites are left, and the next sum needs at least 3"),
    (2, 2, 2, (1, 2, 2, False)),
    (9, 7, 7, (6, 7, 7, True)),
    (4, None, 8, (4, 4, 7, True)),
    (4, 3, 6, (4, 3, 6, False)),
  ],
)
def test_what_the_sites_that_are_left_agree_on_is_as_safe_as_with_all(
  num_peers, threshold, left, want
):
  num_sites = num_peers + 1 if num_peers != 4 else 10
  identities = {i: keys.identity().public for i in range(left)}
  config = dataclasses.replace(
    secagg.secure_sum(num_sites, num_peers=num_peers), threshold=threshold
  )
  agree = lambda config=config, min_survivors=1: exchange.agree(
    identities, num_sites, [120, 1], 1, config, min_survivors, b"run", np.zeros(8, np.uint32)
  )
  if isinstance(want, str):
    with pytest.raises((ValueError, secagg.Lost), match=want):
      agree()
    return
  setup = agree()
  assert (setup.degree, setup.threshold, setup.quorum, setup.malicious_server) == want
  assert (setup.sizes, setup.purpose, setup.num_bits) == ((120, 1), 1, 32)
  wide = dataclasses.replace(config, fixed=ring.FixedPoint(40, 20))
  with pytest.raises(ValueError, match="JAX_ENABLE_X64"):  # else the sum would be cut to 32 bits
    agree(wide)
  with pytest.raises(ValueError, match=r"config\.masked is False"):
    agree(dataclasses.replace(config, masked=False))
  with pytest.raises(ValueError, match=f"run of {num_sites} sites, whose sum could overflow"):
    agree(dataclasses.replace(config, num_sites=num_sites - 1))
  too_many = (
    f"quorum={left + 1} of {left} sites"
    if left == num_sites
    else f"{left} of {num_sites} sites are left"
  )
  with pytest.raises(ValueError if left == num_sites else secagg.Lost, match=too_many):
    agree(min_survivors=left + 1)


def test_a_site_has_a_fresh_noise_key_for_each_sum_and_no_key_of_a_mask():
  def call(i, own):
    keys_of_noise = []
    for round_index in (4, 5):
      begun = own.begin(elements(i), round_index, 1, THREE)
      assert (begun.rows.site.tolist(), begun.rows.self_mask) == ([i], None)
      assert (begun.rows.peers.shape, begun.rows.keys.shape) == ((1, 0), (1, 0, 8))
      assert begun.rows.noise.shape == (1, 8)
      keys_of_noise.append(np.asarray(begun.rows.noise).tobytes())
      own.finish(begun, elements(i))
    return keys_of_noise

  apart = Apart(3).run(call)
  assert len({key for pair in apart.results.values() for key in pair}) == 6
