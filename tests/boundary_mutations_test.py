"""Eighty and more ways to break what crosses, each listed with the check that must catch it.

Half of them are mechanical: each mask dropped, each keystream swapped for an earlier one, each key
dropped or swapped for another's, each output replaced by an input. The others are by hand. Nothing
is compiled but for the neighbour test: the analysis only traces. The ways themselves are in
`boundary_breaking`, `boundary_hiding` and `boundary_handed`.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import boundary_breaking as breaking
import boundary_handed as handed
import boundary_hiding as hiding
import federated_sites as small
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from boundary_breaking import LEAVES, SECURE, K, Patch, gate_masks, round_report, secret_report

from primia_jax import algorithms, boundary, federated, summation
from primia_jax.mpc import messages
from primia_jax.types import Site


def test_nothing_is_found_where_nothing_is_broken():
  for report in (round_report(), secret_report()):
    report.check()
    assert {c.status for c in report.crossings} <= {"masked", "key", "output"}


# ---- the list


class Mutation(NamedTuple):
  """A mutation, and what the first violation must say: where, or what is wrong."""

  what: str
  report: Callable[[], boundary.Report]
  apply: Callable[[Patch], None]
  finds: str


def of_each(what: str, names: Any, report: Callable, apply: Callable, finds: str) -> list[Mutation]:
  return [
    Mutation(f"{what} {name}", report, functools.partial(apply, i), finds.format(name=name))
    for i, name in names
  ]


LEAF, KEYS = list(enumerate(LEAVES)), list(enumerate(("peer 1", "peer 2", "the site itself")))
GATE = list(enumerate(("compared bits", "bits below", "value", "sign")))
MECHANICAL = [
  *of_each("mask dropped:", LEAF, round_report, breaking.drop_mask, r"{name}.*: not masked; it"),
  *of_each("stream of an earlier leaf:", LEAF[1:], round_report, breaking.repeat_stream,
    r"{name}.*: open to .*: its mask is in \[sent"),
  *of_each("key dropped:", KEYS, round_report, breaking.drop_key, "open to .*: it knows the mask"),
  *of_each("key swapped for another:", KEYS, round_report, breaking.swap_key,
    "open to .*: it knows the mask"),
  *of_each("output replaced by input:", list(enumerate(("images", "labels", "num_examples"))),
    round_report, breaking.send_input, r"an input as it is: .*it tells site\.{name}"),
  *of_each("gate's mask dropped:", GATE, secret_report, breaking.drop_gate_mask,
    r"mpc/(gates/(elementwise|tables)|protocol)\.py:\d+: .* opens"),
  *of_each("stream of an earlier mask:", GATE[1:], secret_report, breaking.repeat_gate_mask,
    r"mpc/gates/(elementwise|tables)\.py:\d+: .* opens .*its mask is in \[.* opens"),
  *of_each("output's share replaced by:", [(name, name) for name in handed.OPERANDS],
    secret_report, handed.share_replaced, "share of output 0: not masked; it tells the model own"),
  *of_each("output's share replaced by:", [(name, name) for name in handed.DEALT],
    secret_report, handed.share_replaced, "opens .*: open to the data owner: its mask is in"),
]  # fmt: skip
BY_HAND = [
  Mutation(fn.__name__, report, fn, finds)
  for report, fn, finds in (
    # a round: the mask
    (round_report, breaking.doubled, "not masked"),
    (round_report, breaking.narrow, "only its low bits are masked"),
    (round_report, breaking.shifted, "not masked"),
    (round_report, breaking.one_for_all, "not masked"),
    (round_report, breaking.in_floats, r"boundary_breaking\.py:\d+: .*not masked"),
    (round_report, breaking.taken_off, r"its mask is in \[sent"),
    (round_report, breaking.public_keys, "not masked"),
    (round_report, breaking.one_own_mask_for_all, r"one key serves \[0\], \[1\], \[2\]"),
    (round_report, breaking.own_mask_for_noise, "one key serves"),
    # a round: what is sent besides
    (round_report, breaking.site_metric, r"algorithms\.py:\d+: sent\[1\]: not masked"),
    (round_report, breaking.statistics, r"algorithms\.py:\d+: .*'m'\]: not masked"),
    (round_report, breaking.largest_change, r"boundary_breaking\.py:\d+: sent.out_of_range: not"),
    (round_report, breaking.both, r"its mask is in \[sent"),
    (round_report, breaking.noise_key, "key of the site's noise"),
    (round_report, breaking.mask_key, "site's own mask key"),
    (round_report, breaking.if_the_loss_is_low, r"boundary_breaking\.py:\d+: .*not masked"),
    (round_report, breaking.printed, r"boundary_breaking\.py:\d+: debug_print in the site"),
    (round_report, breaking.called_back, r"breaking\.py:\d+: debug_callback in the site"),
    # a round: at another site, in another sum
    (round_report, hiding.open_at_the_last_site, r"boundary_hiding\.py:\d+: .*not masked"),
    (round_report, hiding.open_at_a_site_that_is_not_here, "not masked"),
    (round_report, hiding.no_pairs_at_the_last_site, r"\(of site 2 of the sum\): .*it knows"),
    (round_report, hiding.open_in_round_seven, r"boundary_hiding\.py:\d+: .*not masked"),
    (round_report, hiding.open_in_evaluations, "not masked"),
    (round_report, hiding.printed_in_round_seven, "debug_print in the site function: not"),
    (round_report, hiding.one_stream_in_round_seven, "not masked"),
    (round_report, hiding.stream_of_the_first_leaf_in_round_zero, "not masked"),
    # a round: what is no argument, and what no list has
    (round_report, hiding.closed_over, r"it tells an array \[8\] that the function closes over"),
    (round_report, hiding.closed_over_in_a_loop, r"it tells an array \[8\] that the function"),
    (hiding.shared_report, hiding.shared, "it tells shared"),
    (round_report, hiding.foreign_code, "ffi_call in the site function: not masked"),
    (round_report, hiding.foreign_code_that_denies_an_effect, "ffi_call in the site function"),
    (round_report, hiding.unlisted_effect, "calling_home in the site function: not masked"),
    # an inference: what is opened
    (secret_report, breaking.share_opened, "opens .*its mask is in"),
    (secret_report, breaking.answer_opened, "opens .*its mask is in"),
    (secret_report, breaking.opened_twice, r"its mask is in \[.*again"),
    (secret_report, breaking.dealt_value_opened, "opens .*its mask is in"),
    (secret_report, breaking.short_masks, "only 1 low bits are masked"),
    (secret_report, breaking.same_masks_in_all_gates, "its mask is in"),
    # an inference: what is published and dealt
    (secret_report, breaking.weights_published, "an input as it is: .*D of .*the model own"),
    (secret_report, breaking.blinds_halved, r"protocol\.py:\d+: .*D of .*not masked"),
    (secret_report, breaking.one_blind_for_all, r"D of .*its mask is in \[.*D of"),
    (secret_report, breaking.same_seed, "not masked"),
    (secret_report, breaking.shares_undivided, "its mask is in"),
    (secret_report, breaking.split_by_the_other_seed, "its mask is in|knows the mask"),
    (secret_report, handed.more_than_the_outputs, "share of output 1: open .*: its mask is in"),
    (secret_report, handed.seeds_whole, "opens .*not masked; it tells the data owner's values"),
    (secret_report, handed.seed_of_the_other_party, r"opens .*its mask is in \[dealer to data"),
    (secret_report, handed.seeds_added, "dealer to .*: tags: not masked; it tells the key"),
    (secret_report, handed.shares_to_the_model_owner, r"its mask is in \[dealer to model owner"),
    (secret_report, handed.share_of_the_model_owner, r"its mask is in \[dealer to data owner"),
  )
]  # fmt: skip


@pytest.mark.parametrize("mutation", MECHANICAL + BY_HAND, ids=lambda m: m.what)
def test_the_analysis_catches(mutation, monkeypatch):
  mutation.apply(monkeypatch)
  report = mutation.report()
  with pytest.raises(boundary.Unmasked, match=mutation.finds):
    report.check()


def test_the_list_is_long_enough():
  assert len(MECHANICAL) >= 35
  assert len(BY_HAND) >= 45
  assert len(GATE) == len(gate_masks())


def test_a_caller_may_declare_arrays_public(monkeypatch):
  """What anybody may know is no secret: an array that is closed over, or one that is shared."""
  hiding.closed_over(monkeypatch)
  found = round_report(public=[hiding.OWN_IMAGES.copy()])
  found.check()
  assert "public" in {c.status for c in found.crossings}
  with pytest.raises(boundary.Unmasked, match="closes over"):
    round_report(public=[hiding.OWN_IMAGES + 1]).check()
  monkeypatch.undo()
  hiding.shared(monkeypatch)
  hiding.shared_report(public=[hiding.COUNTS]).check()


# ---- what other checks catch

EQUIVALENT = {
  breaking.not_encoded: "the sum is wrong, which tests of sums see; the message is as uniform",
  breaking.no_round_in_the_nonce: "keys are drawn for each sum: no nonce meets one twice",
  breaking.signs_swapped: "all signs of a round change at once, so masks still cancel",
  breaking.weights_added_twice: "the outputs are wrong, which `check` sees; shares stay uniform",
}


@pytest.mark.parametrize("mutation", EQUIVALENT, ids=lambda fn: fn.__name__)
def test_equivalent_mutations_hide_as_much_as_before(mutation, monkeypatch):
  mutation(monkeypatch)
  (secret_report if mutation is breaking.weights_added_twice else round_report)().check()


def test_the_sessions_type_catches_reuse_across_rounds():
  session = summation.masked(SECURE).begin(0, summation.Purpose.TRAINING, np.arange(K))
  session.rows(np.arange(K))
  with pytest.raises(RuntimeError, match="One-time masks serve one sum"):
    session.rows(np.arange(K))
  with pytest.raises(TypeError, match="one-time keys"):
    copy.copy(session)


def test_the_messages_types_catch_correlations_used_twice():
  once = messages.Correlations(0, "publication", "inference", np.zeros(8, np.uint32))
  once.take(0)
  with pytest.raises(ValueError, match="was used"):
    once.take(0)
  with pytest.raises(ValueError, match="for the model owner"):
    messages.Blind(0, "publication", "", np.zeros(8, np.uint32)).take(1)


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_neighbour_catches_a_padding_row_that_is_an_image(is_broken):
  """Two sites that differ only beyond `num_examples` send the same; broken, padding counts."""
  algorithm = algorithms.fedavg(small.recipe())
  params = small.start()
  shared = federated.Global(params, {}, (), jnp.int32(0), small.KEY)
  send = jax.jit(lambda site: algorithm.site(shared, algorithm.init_site(params, {}), site)[0])
  (ids, images, labels, counts, *_) = small.load(np.array([1]))
  other = np.where(np.arange(small.N)[:, None, None, None] < counts[0], images[0], 9)
  count = np.int32(small.N) if is_broken else counts[0]
  sent = [send(Site(ids[0], v, labels[0], count)) for v in (images[0], other.astype(np.float32))]
  assert small.same(*sent) != is_broken
