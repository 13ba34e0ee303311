import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated_sites import (
  IDS,
  IMAGES,
  KEY,
  NUM,
  L,
  N,
  S,
  build,
  by_hand,
  distance,
  fedavg,
  load,
  play,
  recipe,
  same,
  secure,
  start,
)

from primia_jax import algorithms, robust, secagg, sites, summation
from primia_jax import federated as fed


@pytest.mark.parametrize("placement", ["loop", "vmap", "chunk=2", "mesh"])
def test_every_placement_trains_the_same_model(placement):
  state, infos = play(fedavg(placement=placement))
  want, want_infos = play(fedavg())
  assert distance((state, infos), (want, want_infos)) < 1e-6


def test_secure_and_clear_sums_agree_within_the_stated_bound():
  (masked, _), (clear, _) = play(fedavg(), 1), play(fedavg("clear"), 1)
  config = secagg.secure_sum(S, num_peers=2)
  weight = NUM.sum() / N
  # The sums of the weighted updates and of the weights are each off by the bound at most.
  largest = max(float(jnp.max(jnp.abs(a))) for a in jax.tree.leaves(clear.params))
  bound = config.error_bound * (1 + largest) / (weight - config.error_bound)
  assert 0 < distance(masked.params, clear.params) <= bound + 2**-22 * largest


def test_the_result_does_not_depend_on_the_masks():
  f = fedavg()
  assert same(play(f), play(f))  # the masks of either run are its own


def test_step_is_pure_and_a_run_can_be_resumed_anywhere():
  f = fedavg()
  whole, _ = play(f, 4)
  half, _ = play(f, 2)
  leaves, structure = jax.tree.flatten(half)
  stored = [(np.asarray(a).tobytes(), a.dtype, a.shape) for a in leaves]  # as a checkpoint would
  restored = structure.unflatten(
    [jnp.asarray(np.frombuffer(b, d).reshape(s)) for b, d, s in stored]
  )
  assert isinstance(restored, fed.State)
  assert same(play(f, 2, state=restored), play(f, 2, state=half))  # the same inputs, twice
  assert same(play(f, 2, state=restored)[0], whole)


def test_randomness_goes_by_site_number_and_not_by_position():
  f = fedavg("clear")
  order = np.array([3, 0, 4, 2, 1])
  assert distance(play(f, ids=order), play(f)) < 1e-6


@pytest.mark.parametrize("piece", [2, 9])
def test_streamed_pieces_equal_all_at_once(piece):
  asked = []

  def watched(ids):
    asked.append(list(ids))
    return load(ids)

  f = fedavg()
  streamed, _ = play(f, 1, load=watched, per_load=piece)
  assert distance(streamed, play(f, 1)[0]) < 1e-6
  assert asked == [list(range(S))[i : i + piece] for i in range(0, S, piece)]


def test_one_site_alone_is_plain_training():
  f = build(algorithms.fedavg(recipe(), keep_optimizer=True), summation.alone(), num_sites=1)
  state, params, opt_state = f.init(start()), start(), None
  for r in range(3):
    state, info = f.step(KEY, state, fed.Sites(np.arange(1), load))
    trained = by_hand(0, params, r, opt_state)
    params, opt_state = trained.params, trained.opt_state
    np.testing.assert_allclose(
      info.loss, trained.metrics.loss / trained.metrics.num_examples, rtol=1e-6
    )
  assert distance(state.params, params) < 1e-6


def test_one_site_alone_may_have_statistics():
  f = build(algorithms.fedavg(recipe()), summation.alone(), num_sites=2)
  state = f.init(start(), {"mean": jnp.zeros(2)})
  state, _ = f.step(KEY, state, fed.Sites(np.arange(1), load))
  assert np.any(np.asarray(state.model_state["mean"]) != 0)
  with pytest.raises(ValueError, match="set up for 1 sites, but 2 take part"):
    f.step(KEY, state, fed.Sites(np.arange(2), load))


@pytest.mark.parametrize("aggregator", ["secure", "clear"])
def test_info_tells_loss_accuracy_and_update_of_the_round(aggregator):
  state, infos = play(fedavg(aggregator), 1)
  trained = [by_hand(i, start(), 0) for i in IDS]
  loss, correct, count = np.sum([np.array(t.metrics) for t in trained], axis=0)
  assert count == 2 * NUM.sum()
  np.testing.assert_allclose(infos[0].loss, loss / count, rtol=1e-5)
  np.testing.assert_allclose(infos[0].accuracy, correct / count, rtol=1e-5)
  change = np.concatenate([np.ravel(a) for a in jax.tree.leaves(state.params)])  # from zero
  np.testing.assert_allclose(infos[0].update_norm, np.linalg.norm(change), rtol=1e-5)
  assert infos[0].out_of_range == 0
  mean = jax.tree.map(lambda *y: np.average(y, axis=0, weights=NUM), *[t.params for t in trained])
  assert distance(state.params, mean) < 1e-5


def test_class_weights_reach_every_site():
  f = fedavg("clear")
  step = lambda weights: f.step(KEY, f.init(start()), fed.Sites(IDS, load, weights))
  (plain, _), (ones, _) = step(None), step(jnp.ones(L))
  assert distance(plain.params, ones.params) < 1e-6
  (_, info) = step(jnp.asarray([2.0, 2.0, 2.0]))
  assert info.accuracy <= 1  # examples count once, whatever their weight
  only, _ = step(jnp.asarray([0.0, 3.0, 0.0]))
  assert only.params["b"][1] > 0 > max(only.params["b"][0], only.params["b"][2])


@pytest.mark.parametrize("bad", [1e30, np.nan])
def test_a_round_with_a_number_out_of_range_is_not_applied(bad):
  """Nothing but the round's number changes: it is never used again, so that no mask is used
  twice.
  """
  images = IMAGES.copy()
  images[[1, 3]] = bad
  f = fedavg()
  before, _ = play(f, 1)
  after, infos = play(f, 1, load=functools.partial(load, images=images), state=before)
  assert infos[0].out_of_range == 2
  assert infos[0].update_norm == 0
  assert same(after._replace(round=before.round), before)
  assert after.round == before.round + 1
  assert play(f, 1, state=after)[1][0].out_of_range == 0


def test_sampled_sites_train_and_the_others_keep_their_state():
  f = build(
    algorithms.fedavg(recipe(), keep_optimizer=True), summation.masked(secagg.secure_sum(3))
  )
  before = f.init(start())
  taking_part = np.array([0, 2, 3])
  after, _ = f.step(KEY, before, fed.Sites(taking_part, load))
  for old, new in zip(
    jax.tree.leaves(before.site_state), jax.tree.leaves(after.site_state), strict=True
  ):
    changed = np.any(np.asarray(old) != np.asarray(new), axis=tuple(range(1, old.ndim)))
    assert np.flatnonzero(changed).tolist() == [0, 2, 3]
  want = [by_hand(i, start(), 0).params for i in taking_part]
  mean = jax.tree.map(lambda *y: np.average(y, axis=0, weights=NUM[taking_part]), *want)
  assert distance(after.params, mean) < 1e-5


def test_sample_sites():
  drawn = [fed.sample_sites(KEY, r, 10, 4) for r in range(50)]
  for ids in drawn:
    assert ids.dtype == np.int32
    assert len(set(ids.tolist())) == 4
    assert np.array_equal(ids, np.sort(ids))
    assert 0 <= ids.min() <= ids.max() < 10
  assert len({tuple(ids) for ids in drawn}) > 30
  assert set(np.concatenate(drawn).tolist()) == set(range(10))
  assert np.array_equal(drawn[7], fed.sample_sites(KEY, 7, 10, 4))
  assert np.array_equal(fed.sample_sites(KEY, 3, 6, 6), np.arange(6))
  for num_sampled in (0, 11):
    with pytest.raises(ValueError, match=f"num_sampled={num_sampled}"):
      fed.sample_sites(KEY, 0, 10, num_sampled)


def test_no_two_uses_share_a_key():
  assert len({fed.ORDER, fed.STEPS, fed.SAMPLING}) == 3
  assert len({int(purpose) for purpose in summation.Purpose}) == 3


def test_a_robust_rule_sees_each_message_and_survives_garbage():
  images = IMAGES.copy()
  images[2] *= 1e6
  made = algorithms.fedavg(recipe(), weighting="uniform")
  f = build(made, summation.by_rule("median", robust.median()), "mesh")
  state, infos = play(f, 1, load=functools.partial(load, images=images))
  honest = [by_hand(i, start(), 0).params for i in (0, 1, 3, 4)]
  for leaf, values in zip(
    jax.tree.leaves(state.params), zip(*map(jax.tree.leaves, honest), strict=True), strict=True
  ):
    assert np.all(np.min(values, axis=0) - 1e-6 <= np.asarray(leaf))
    assert np.all(np.asarray(leaf) <= np.max(values, axis=0) + 1e-6)
  mean, _ = play(fedavg("clear"), 1, load=functools.partial(load, images=images))
  assert distance(mean.params, state.params) > 1e3
  assert np.isfinite(infos[0].loss)
  clean, _ = play(f, 1)
  each = [by_hand(i, start(), 0).params for i in IDS]
  assert distance(clean.params, jax.tree.map(lambda *y: np.median(y, axis=0), *each)) < 1e-6


def test_unsound_pairs_are_refused():
  median = summation.by_rule("median", robust.median())
  plain = recipe(momentum=0.0)
  for algorithm in (
    algorithms.fedavg(plain),
    algorithms.scaffold(plain, S),
    algorithms.fednova(plain),
  ):
    with pytest.raises(ValueError, match="'median' treats all sites alike"):
      build(algorithm, median)
  statistics = {"batch_norm": jnp.zeros(3)}
  for summed in (summation.clear(), secure(masked=False), median):
    f = build(algorithms.fedavg(plain, weighting="uniform"), summed)
    with pytest.raises(ValueError, match="BatchNorm"):
      f.init(start(), statistics)
    own = build(algorithms.fedbn(plain, lambda path: False, weighting="uniform"), summed)
    assert own.init(start(), statistics).round == 0  # FedBN keeps them at the site
  assert fedavg().init(start(), statistics).round == 0


def test_statistics_are_refused_in_every_step_and_not_only_at_the_start():
  """A state made under masks would otherwise leave each site in the clear."""
  made = algorithms.fedavg(recipe())
  state = build(made, secure()).init(start(), {"mean": jnp.zeros(2)})
  with pytest.raises(ValueError, match="BatchNorm"):
    build(made, summation.clear()).step(KEY, state, fed.Sites(IDS, load))


@pytest.mark.parametrize(
  ("ids", "told"),
  [
    ([0, 1, 2, 3], "set up for 5 sites, but 4 take part"),
    ([0, 1, 2, 3, 3], "all different"),
    ([0, 1, 2, 3, -1], "sites 0 to 4"),
    ([0, 1, 2, 3, 5], "sites 0 to 4"),
  ],
)
def test_impossible_sites_are_refused(ids, told):
  f = fedavg()
  with pytest.raises(ValueError, match=told):
    f.step(KEY, f.init(start()), fed.Sites(np.array(ids), load))


def test_loaders_that_break_their_word_are_refused():
  f = fedavg()
  state = f.init(start())
  with pytest.raises(ValueError, match="sites_per_load=0"):
    f.step(KEY, state, fed.Sites(IDS, load, sites_per_load=0))
  with pytest.raises(ValueError, match="asked for sites"):
    f.step(KEY, state, fed.Sites(IDS, lambda ids: load(ids[::-1])))
  with pytest.raises(ValueError, match=r"leave Site\.secret None"):
    f.step(KEY, state, fed.Sites(IDS, lambda ids: load(ids)._replace(secret=np.zeros((S, 8)))))


@pytest.mark.optimised
@pytest.mark.parametrize(("placement", "num_sites"), [("scan", 5), ("mesh", 4), ("mesh", 5)])
def test_a_run_compiles_in_its_first_round_and_never_again(placement, num_sites):
  summed = summation.masked(secagg.secure_sum(num_sites))
  f = build(algorithms.fedavg(recipe(), keep_optimizer=True), summed, placement, num_sites)
  ids, compiled = np.arange(num_sites), []
  listen = lambda event, seconds, **kwargs: (
    compiled.append(kwargs) if "backend_compile" in event else None
  )
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    counts, state = [], f.init(start())
    for _ in range(4):
      state, _ = f.step(KEY, state, fed.Sites(ids, load))
      counts.append(len(compiled))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert counts[0] > 0
  assert counts[-1] == counts[0]


@pytest.mark.optimised
def test_only_the_masked_message_crosses_devices():
  """The whole of a site's round on a mesh: local training, encoding and masks, and one all-reduce
  of the ring sums.
  """
  summed = summation.masked(secagg.secure_sum(4))
  algorithm = algorithms.fedavg(recipe(), keep_optimizer=True)

  def one(server, inputs):
    site, row, kept = inputs
    message, kept = algorithm.site(server, kept, site)
    return summed.send(message, row), kept

  ids, placement = np.arange(4, dtype=np.int32), sites.parse_placement("mesh")
  kept = jax.tree.map(lambda a: np.broadcast_to(a, (4, *a.shape)), algorithm.init_site(start(), {}))
  rows = summed.begin(0, summation.Purpose.TRAINING, ids).rows(ids)
  server = placement.replicate(fed.Global(start(), {}, (), jnp.int32(0), KEY))
  inputs = tuple(map(placement.put, (load(ids), rows, kept)))
  text = placement.sum_over_sites(one).lower(server, inputs).compile().as_text()
  moved = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
  assert {kind for _, kind in moved} == {"all-reduce"}
  shapes = sorted(shape for shape, _ in moved for shape in re.findall(r"\w+\[[\d,]*\]", shape))
  assert shapes == sorted(
    ["u32[6,3]", "u32[3]", *["u32[]"] * 5]
  )  # w, b; weight, 3 metrics, out of range


def test_a_wide_ring_under_x64():
  with jax.enable_x64(True):
    f = build(
      algorithms.fedavg(recipe(), keep_optimizer=True),
      summation.masked(secagg.secure_sum(S, num_bits=64)),
    )
    state, infos = play(f)
    assert infos[-1].out_of_range == 0
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {np.dtype("float32")}
  assert distance(state.params, play(fedavg("clear"))[0].params) < 1e-6
