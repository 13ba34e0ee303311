import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import algorithms, local, prng, ring, robust, secagg, sites
from primia_jax import federated as fed

S, N, D, L = 5, 20, 6, 3
RNG = np.random.default_rng(0)
IMAGES, LABELS = (
  RNG.normal(size=(S, N, D, 1, 1)).astype(np.float32),
  RNG.integers(0, L, (S, N)).astype(np.int32),
)
NUM = np.array([20, 13, 7, 20, 5], np.int32)
IDS = np.arange(S)
KEY, DEALER = jax.random.key(0), jnp.arange(8, dtype=jnp.uint32)
WORK = local.Work(batch_size=4, max_examples=N, min_examples=5, epochs=2)


def load(ids, images=IMAGES):
  return fed.Site(ids.astype(np.int32), images[ids], LABELS[ids], NUM[ids])


def apply_fn(params, model_state, images, train=False, key=None):
  logits = images.reshape(images.shape[0], -1) @ params["w"] + params["b"][None]
  return logits, jax.tree.map(lambda m: 0.9 * m + 0.1 * jnp.mean(images), model_state)


def augment(key, images, targets):
  return images + 0.1 * jax.random.normal(key, images.shape, images.dtype), targets


def recipe(rate=0.1, momentum=0.9, work=WORK):
  loss = local.classification_loss(apply_fn, augment, L)
  optimizer = functools.partial(optax.sgd, momentum=momentum or None)
  return local.Recipe(local.gradients(loss), optimizer, lambda t: rate, work)


def start():
  return {"w": jnp.zeros((D, L), jnp.float32), "b": jnp.zeros(L, jnp.float32)}


@functools.cache
def secure(**kwargs):
  return fed.securely(secagg.secure_sum(S, **({"num_peers": 2} | kwargs)))


@functools.cache
def fedavg(aggregator="secure", placement="scan"):
  """One compiled federated algorithm for many tests."""
  chosen = {"secure": secure, "clear": fed.in_the_clear}[aggregator]()
  return fed.federated(
    algorithms.fedavg(recipe(), keep_optimizer=True), chosen, sites.parse_placement(placement)
  )


def play(f, rounds=2, ids=IDS, loader=None, dealer=DEALER, state=None, model_state=None):
  state, infos = state or f.init(start(), model_state or {}, S), []
  for _ in range(rounds):
    state, info = f.step(KEY, state, ids, loader or fed.Loader(load), dealer)
    infos.append(info)
  return state, infos


def distance(a, b):
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return max(
    float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)), initial=0))
    for x, y in pairs
  )


def same(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


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
  assert same(play(f, dealer=DEALER), play(f, dealer=prng.derive(DEALER, 1)))


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
  streamed, _ = play(f, 1, loader=fed.Loader(watched, piece))
  assert distance(streamed, play(f, 1)[0]) < 1e-6
  assert asked == [list(range(S))[i : i + piece] for i in range(0, S, piece)]


TRAIN = jax.jit(local.train(recipe()))


def by_hand(i, params, round_index, opt_state=None):
  """Site i's training as `local` has it, with the keys of the protocol."""
  made = recipe()
  order = jax.random.fold_in(jax.random.fold_in(KEY, fed.ORDER), i)
  steps = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, fed.STEPS), round_index), i)
  opt_state = made.optimizer(jnp.float32(0)).init(params) if opt_state is None else opt_state
  data = jnp.asarray(IMAGES[i]), jnp.asarray(LABELS[i]), jnp.int32(NUM[i])
  return TRAIN(params, {}, opt_state, *data, jnp.int32(round_index), order, steps)


def test_one_site_alone_is_plain_training():
  f = fed.federated(
    algorithms.fedavg(recipe(), keep_optimizer=True), fed.alone(), sites.parse_placement("scan")
  )
  state, params, opt_state = f.init(start(), {}, 1), start(), None
  for r in range(3):
    state, info = f.step(KEY, state, np.arange(1), fed.Loader(load), DEALER)
    trained = by_hand(0, params, r, opt_state)
    params, opt_state = trained.params, trained.opt_state
    np.testing.assert_allclose(
      info.loss, trained.metrics.loss / trained.metrics.num_examples, rtol=1e-6
    )
  assert distance(state.params, params) < 1e-6


def test_one_site_alone_may_have_statistics():
  f = fed.federated(algorithms.fedavg(recipe()), fed.alone(), sites.parse_placement("scan"))
  state = f.init(start(), {"mean": jnp.zeros(2)}, 1)
  state, _ = f.step(KEY, state, np.arange(1), fed.Loader(load), DEALER)
  assert np.any(np.asarray(state.model_state["mean"]) != 0)
  with pytest.raises(ValueError, match="set up for 1 sites, but 2 take part"):
    f.step(KEY, state, np.arange(2), fed.Loader(load), DEALER)


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
  step = lambda weights: f.step(KEY, f.init(start(), {}, S), IDS, fed.Loader(load), DEALER, weights)
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
  after, infos = play(f, 1, loader=fed.Loader(functools.partial(load, images=images)), state=before)
  assert infos[0].out_of_range == 2
  assert infos[0].update_norm == 0
  assert same(after._replace(round=before.round), before)
  assert after.round == before.round + 1
  assert play(f, 1, state=after)[1][0].out_of_range == 0


def test_sampled_sites_train_and_the_others_keep_their_state():
  f = fed.federated(
    algorithms.fedavg(recipe(), keep_optimizer=True),
    fed.securely(secagg.secure_sum(3)),
    sites.parse_placement("scan"),
  )
  before = f.init(start(), {}, S)
  taking_part = np.array([0, 2, 3])
  after, _ = f.step(KEY, before, taking_part, fed.Loader(load), DEALER)
  for old, new in zip(jax.tree.leaves(before.sites), jax.tree.leaves(after.sites), strict=True):
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
  assert len({fed.ORDER, fed.STEPS, fed.GRAPH, fed.SAMPLING}) == 4
  assert len({fed.TRAINING, fed.EVALUATION, fed.COUNTING}) == 3


def test_a_robust_rule_sees_each_message_and_survives_garbage():
  images = IMAGES.copy()
  images[2] *= 1e6
  made = algorithms.fedavg(recipe(), weighting="uniform")
  f = fed.federated(made, fed.by_rule("median", robust.median()), sites.parse_placement("mesh"))
  state, infos = play(f, 1, loader=fed.Loader(functools.partial(load, images=images)))
  honest = [by_hand(i, start(), 0).params for i in (0, 1, 3, 4)]
  for leaf, values in zip(
    jax.tree.leaves(state.params), zip(*map(jax.tree.leaves, honest), strict=True), strict=True
  ):
    assert np.all(np.min(values, axis=0) - 1e-6 <= np.asarray(leaf))
    assert np.all(np.asarray(leaf) <= np.max(values, axis=0) + 1e-6)
  mean, _ = play(fedavg("clear"), 1, loader=fed.Loader(functools.partial(load, images=images)))
  assert distance(mean.params, state.params) > 1e3
  assert np.isfinite(infos[0].loss)
  clean, _ = play(f, 1)
  each = [by_hand(i, start(), 0).params for i in IDS]
  assert distance(clean.params, jax.tree.map(lambda *y: np.median(y, axis=0), *each)) < 1e-6


def test_unsound_pairs_are_refused():
  median, scan = fed.by_rule("median", robust.median()), sites.parse_placement("scan")
  plain = recipe(momentum=0.0)
  for algorithm in (
    algorithms.fedavg(plain),
    algorithms.scaffold(plain, S),
    algorithms.fednova(plain),
  ):
    with pytest.raises(ValueError, match="'median' treats all sites alike"):
      fed.federated(algorithm, median, scan)
  statistics = {"batch_norm": jnp.zeros(3)}
  for aggregator in (fed.in_the_clear(), secure(masked=False), median):
    f = fed.federated(algorithms.fedavg(plain, weighting="uniform"), aggregator, scan)
    with pytest.raises(ValueError, match="BatchNorm"):
      f.init(start(), statistics, S)
    own = fed.federated(
      algorithms.fedbn(plain, lambda path: False, weighting="uniform"), aggregator, scan
    )
    assert own.init(start(), statistics, S).round == 0  # FedBN keeps them at the site
  assert fedavg().init(start(), statistics, S).round == 0


@pytest.mark.parametrize(
  ("ids", "told"),
  [
    ([0, 1, 2, 3], "set up for 5 sites, but 4 take part"),
    ([0, 1, 2, 3, 3], "all different"),
    ([0, 1, 2, 3, -1], "none negative"),
    ([0, 1, 2, 3, 5], "holds 5 sites"),
  ],
)
def test_impossible_sites_are_refused(ids, told):
  f = fedavg()
  with pytest.raises(ValueError, match=told):
    f.step(KEY, f.init(start(), {}, S), np.array(ids), fed.Loader(load), DEALER)


def test_loaders_that_break_their_word_are_refused():
  f = fedavg()
  state = f.init(start(), {}, S)
  with pytest.raises(ValueError, match="piece=0"):
    f.step(KEY, state, IDS, fed.Loader(load, 0), DEALER)
  with pytest.raises(ValueError, match="asked for sites"):
    f.step(KEY, state, IDS, fed.Loader(lambda ids: load(ids[::-1])), DEALER)


@pytest.mark.parametrize(("placement", "num_sites"), [("scan", 5), ("mesh", 4)])
def test_a_run_compiles_in_its_first_round_and_never_again(placement, num_sites):
  aggregator = fed.securely(secagg.secure_sum(num_sites))
  algorithm = algorithms.fedavg(recipe(), keep_optimizer=True)
  f = fed.federated(algorithm, aggregator, sites.parse_placement(placement))
  ids, compiled = np.arange(num_sites), []
  listen = lambda event, seconds, **kwargs: (
    compiled.append(kwargs) if "backend_compile" in event else None
  )
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    counts, state = [], f.init(start(), {}, num_sites)
    for _ in range(4):
      state, _ = f.step(KEY, state, ids, fed.Loader(load), DEALER)
      counts.append(len(compiled))
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert counts[0] > 0
  assert counts[-1] == counts[0]


def test_only_the_masked_message_crosses_devices():
  """The whole of a site's round on a mesh: local training, encoding and masks, and one all-reduce
  of the ring sums.
  """
  config, algorithm = secagg.secure_sum(4), algorithms.fedavg(recipe(), keep_optimizer=True)

  def one(server, inputs):
    site, linked, kept = inputs
    message, kept = algorithm.site(server, kept, site)
    return secagg.protect(message, site.id, linked, (server.round, fed.TRAINING), config), kept

  ids, placement = np.arange(4, dtype=np.int32), sites.parse_placement("mesh")
  kept = jax.tree.map(lambda a: np.broadcast_to(a, (4, *a.shape)), algorithm.init_site(start(), {}))
  linked = fed.link(fed.securely(config), placement)(KEY, np.int32(0), ids, DEALER).links
  server = sites.replicate(fed.Global(start(), {}, (), jnp.int32(0), KEY), placement)
  inputs = sites.put(load(ids), placement), linked, sites.put(kept, placement)
  text = sites.sum_over_sites(one, placement).lower(server, inputs).compile().as_text()
  moved = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
  assert {kind for _, kind in moved} == {"all-reduce"}
  shapes = sorted(shape for shape, _ in moved for shape in re.findall(r"\w+\[[\d,]*\]", shape))
  assert shapes == sorted(
    ["u32[6,3]", "u32[3]", *["u32[]"] * 5]
  )  # w, b; weight, 3 metrics, out of range


def test_a_wide_ring_under_x64():
  with jax.enable_x64(True):
    f = fed.federated(
      algorithms.fedavg(recipe(), keep_optimizer=True),
      fed.securely(secagg.secure_sum(S, num_bits=64)),
      sites.parse_placement("scan"),
    )
    state, infos = play(f)
    assert infos[-1].out_of_range == 0
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {np.dtype("float32")}
  assert distance(state.params, play(fedavg("clear"))[0].params) < 1e-6


BEFORE, DURING, AFTER = (np.isin(IDS, i) for i in (1, 3, 4))  # sites lost at the three stages
TOLERANT = {"num_peers": 4, "threshold": 3}


@functools.cache
def tolerant(placement="scan", algorithm=None):
  made = algorithm or algorithms.fedavg(recipe(), keep_optimizer=True)
  return fed.federated(made, secure(**TOLERANT), sites.parse_placement(placement))


def drop(f, dropouts, ids=IDS, state=None, loader=None):
  return f.step(
    KEY, state or f.init(start(), {}, S), ids, loader or fed.Loader(load), DEALER, dropouts=dropouts
  )


def test_lost_sites_add_nothing_and_keep_what_they_had():
  f = tolerant("mesh")
  before, _ = drop(f, None)
  after, info = drop(f, secagg.Dropouts(BEFORE, DURING), state=before)
  kept = lambda i: jax.tree.map(lambda a: a[i], before.sites["optimizer"])
  trained = {i: by_hand(i, before.params, 1, kept(i)) for i in (0, 2, 4)}
  mean = jax.tree.map(
    lambda *y: np.average(y, axis=0, weights=NUM[[0, 2, 4]]), *[t.params for t in trained.values()]
  )
  assert distance(after.params, mean) < 1e-5
  loss = sum(float(t.metrics.loss) for t in trained.values()) / (2 * NUM[[0, 2, 4]].sum())
  np.testing.assert_allclose(info.loss, loss, rtol=1e-5)
  assert (info.survivors, info.out_of_range) == (3, 0)
  for old, new in zip(jax.tree.leaves(before.sites), jax.tree.leaves(after.sites), strict=True):
    changed = np.any(np.asarray(old) != np.asarray(new), axis=tuple(range(1, old.ndim)))
    assert np.flatnonzero(changed).tolist() == [0, 2, 4]


@pytest.mark.parametrize("text", ["loop", "scan", "vmap", "chunk=2", "mesh"])
def test_every_placement_opens_the_same_bits_whoever_is_lost(text):
  placement, aggregator = sites.parse_placement(text), secure(**TOLERANT)

  def site_fn(shared, kept, site):
    return jnp.mean(site.images, axis=0) + shared, ()

  total = fed.total_over_sites(site_fn, aggregator, placement, fed.COUNTING)
  make_links = fed.link(aggregator, placement, fed.COUNTING)
  config = secagg.secure_sum(S, **TOLERANT)
  encoded = jax.vmap(lambda a: ring.encode(jnp.mean(a, axis=0) + 1, config.fixed))(
    jnp.asarray(IMAGES)
  )
  none, gone = np.zeros(S, bool), np.isin(IDS, (1, 3))
  for stages, piece in itertools.product(
    ([gone, none, none], [none, gone, none], [none, none, gone]), (None, 2)
  ):
    linked = make_links(KEY, np.int32(2), IDS, DEALER, secagg.Dropouts(*stages))
    opened, _, out_of_range = total(
      jnp.float32(1), np.int32(2), IDS, linked, (), fed.Loader(load, piece)
    )
    came = ~(stages[0] | stages[1])
    want = ring.decode(jnp.asarray(np.asarray(encoded)[came].sum(0, dtype=np.uint32)), config.fixed)
    assert np.array_equal(opened, want)
    assert out_of_range == 0
    assert linked.survivors.tolist() == np.flatnonzero(came).tolist()


def test_a_site_lost_before_or_during_is_the_same_sum_and_after_it_is_in_it():
  f = tolerant()
  none = np.zeros(S, bool)
  lost = [drop(f, d)[0] for d in (secagg.Dropouts(DURING, none), secagg.Dropouts(none, DURING))]
  assert same(*lost)
  state, info = drop(f, secagg.Dropouts(none, none, DURING))
  assert same(state, drop(f, None)[0])
  assert info.survivors == S
  assert distance(state.params, lost[0].params) > 1e-4


def test_in_the_clear_and_without_masks_a_lost_site_is_absent():
  dropouts = secagg.Dropouts(BEFORE, DURING)
  images = IMAGES.copy()
  images[[1, 3]] = np.nan  # of the lost, so of no account
  loader = fed.Loader(functools.partial(load, images=images))
  masked, info = drop(tolerant(), dropouts)
  clear, _ = drop(fedavg("clear"), dropouts, loader=loader)
  bare = fed.federated(
    algorithms.fedavg(recipe(), keep_optimizer=True),
    secure(masked=False, **TOLERANT),
    sites.parse_placement("scan"),
  )
  assert distance(masked.params, clear.params) < 1e-5
  assert same(drop(bare, dropouts, loader=loader), (masked, info))
  for least, lost in ((1, secagg.Dropouts(IDS < 2, IDS >= 2)), (4, dropouts)):
    clear = fed.in_the_clear()._replace(min_survivors=least)
    f = fed.federated(
      algorithms.fedavg(recipe(), keep_optimizer=True), clear, sites.parse_placement("scan")
    )
    with pytest.raises(secagg.RoundAborted, match=f"messages came, and {least} must"):
      drop(f, lost)


def test_a_robust_rule_sees_the_messages_that_came():
  made = algorithms.fedavg(recipe(), weighting="uniform")
  f = fed.federated(made, fed.by_rule("median", robust.median()), sites.parse_placement("scan"))
  state, info = drop(f, secagg.Dropouts(BEFORE, DURING))
  each = [by_hand(i, start(), 0).params for i in (0, 2, 4)]
  assert distance(state.params, jax.tree.map(lambda *y: np.median(y, axis=0), *each)) < 1e-6
  assert info.survivors == 3


def test_control_variates_move_by_the_survivors_share():
  made = algorithms.scaffold(recipe(momentum=0.0), S)
  f = tolerant(algorithm=made)
  state, _ = drop(f, secagg.Dropouts(BEFORE, DURING))
  for mean, own in zip(jax.tree.leaves(state.server), jax.tree.leaves(state.sites), strict=True):
    np.testing.assert_allclose(
      mean, np.asarray(own).sum(0) / S, atol=1e-6
    )  # the invariant of SCAFFOLD
    assert not np.any(np.asarray(own)[[1, 3]])


def test_dropouts_among_sampled_sites():
  made, scan = algorithms.fedavg(recipe(), keep_optimizer=True), sites.parse_placement("scan")
  f = fed.federated(made, fed.securely(secagg.secure_sum(4, threshold=3)), scan)
  before, ids = f.init(start(), {}, S), np.array([4, 0, 3, 2])
  after, info = drop(f, secagg.Dropouts(np.zeros(4, bool), ids == 3), ids, before)
  want = [by_hand(i, start(), 0).params for i in (4, 0, 2)]
  assert (
    distance(
      after.params, jax.tree.map(lambda *y: np.average(y, axis=0, weights=NUM[[4, 0, 2]]), *want)
    )
    < 1e-5
  )
  for old, new in zip(jax.tree.leaves(before.sites), jax.tree.leaves(after.sites), strict=True):
    changed = np.any(np.asarray(old) != np.asarray(new), axis=tuple(range(1, old.ndim)))
    assert np.flatnonzero(changed).tolist() == [0, 2, 4]
  assert info.survivors == 3


def test_dropouts_that_cannot_be_borne_are_refused():
  none = np.zeros(S, bool)
  with pytest.raises(ValueError, match="without a threshold can lose no site"):
    drop(fedavg(), secagg.Dropouts(none, DURING))
  with pytest.raises(secagg.RoundAborted, match="round aborted: 2 of the 5 holders"):
    drop(tolerant(), secagg.Dropouts(BEFORE, DURING, AFTER))
  with pytest.raises(ValueError, match="lost twice"):
    drop(tolerant(), secagg.Dropouts(BEFORE, BEFORE))
  with pytest.raises(ValueError, match=r"must be bool\[5\]"):
    drop(tolerant(), secagg.Dropouts(BEFORE[:4], none))


def test_what_is_revealed_for_one_sum_is_never_used_for_another():
  aggregator, scan = secure(**TOLERANT), sites.parse_placement("scan")
  total = fed.total_over_sites(
    lambda shared, kept, site: (jnp.ones(2), ()), aggregator, scan, fed.EVALUATION
  )
  linked = fed.link(aggregator, scan)(KEY, np.int32(0), IDS, DEALER)
  with pytest.raises(ValueError, match="would open the other"):
    total((), np.int32(0), IDS, linked, (), fed.Loader(load))
  own = [
    fed.link(aggregator, scan, p)(KEY, np.int32(r), IDS, DEALER).links.own
    for p in (0, 1, 2)
    for r in (0, 1)
  ]
  assert len({np.asarray(row).tobytes() for rows in own for row in rows}) == 6 * S
