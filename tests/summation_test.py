"""Sums over sites: losses, robust rules, and masks that are never used twice."""

import copy
import functools
import itertools
import pathlib
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from federated_sites import (
  IDS,
  IMAGES,
  KEY,
  NUM,
  S,
  build,
  by_hand,
  distance,
  load,
  recipe,
  same,
  secure,
  start,
)

from primia_jax import algorithms, ring, robust, secagg, sites, summation
from primia_jax import federated as fed
from primia_jax.summation import Purpose

ROOT = pathlib.Path(__file__).parents[1]
BEFORE, DURING, AFTER = (np.isin(IDS, i) for i in (1, 3, 4))  # sites lost at the three stages
NONE = np.zeros(S, bool)
TOLERANT = {"num_peers": 4, "threshold": 3}
LOST = []  # the dropouts of the next sum, so that tests share what is compiled


def losing(summed):
  return summation.losing(summed, lambda round, purpose, ids: LOST[-1] if LOST else None)


@functools.cache
def tolerant(placement="scan", algorithm=None, how="secure"):
  made = algorithm or algorithms.fedavg(recipe(), keep_optimizer=True)
  summed = {"secure": lambda: secure(**TOLERANT), "clear": summation.clear}[how]()
  return build(made, losing(summed), placement)


def drop(f, dropouts, ids=IDS, state=None, load=load):
  LOST.append(dropouts)
  try:
    return f.step(KEY, state or f.init(start()), fed.Sites(ids, load))
  finally:
    LOST.clear()


def test_lost_sites_add_nothing_and_keep_what_they_had():
  f = tolerant("mesh")
  before, _ = drop(f, None)
  after, info = drop(f, secagg.Dropouts(BEFORE, DURING), state=before)
  kept = lambda i: jax.tree.map(lambda a: a[i], before.site_state["optimizer"])
  trained = {i: by_hand(i, before.params, 1, kept(i)) for i in (0, 2, 4)}
  average = lambda *y: np.average(y, axis=0, weights=NUM[[0, 2, 4]])
  mean = jax.tree.map(average, *[t.params for t in trained.values()])
  assert distance(after.params, mean) < 1e-5
  loss = sum(float(t.metrics.loss) for t in trained.values()) / (2 * NUM[[0, 2, 4]].sum())
  np.testing.assert_allclose(info.loss, loss, rtol=1e-5)
  assert info.survivors.tolist() == [0, 2, 4]
  assert info.out_of_range == 0
  leaves = map(jax.tree.leaves, (before.site_state, after.site_state))
  for old, new in zip(*leaves, strict=True):
    changed = np.any(np.asarray(old) != np.asarray(new), axis=tuple(range(1, old.ndim)))
    assert np.flatnonzero(changed).tolist() == [0, 2, 4]


@pytest.mark.parametrize("text", ["loop", "scan", "vmap", "chunk=2", "mesh"])
def test_every_placement_opens_the_same_bits_whoever_is_lost(text):
  placement, config = sites.parse_placement(text), secagg.secure_sum(S, **TOLERANT)
  site_fn = lambda shared, kept, site: (jnp.mean(site.images, axis=0) + shared, ())
  summed = losing(summation.masked(config))
  total = fed.over_sites(site_fn, summed, placement, Purpose.COUNTING)
  encode = lambda a: ring.encode(jnp.mean(a, axis=0) + 1, config.fixed)
  encoded, gone = np.asarray(jax.vmap(encode)(jnp.asarray(IMAGES))), np.isin(IDS, (1, 3))
  all_stages = [gone, NONE, NONE], [NONE, gone, NONE], [NONE, NONE, gone]
  for stages, per_load in itertools.product(all_stages, (None, 2)):
    LOST.append(secagg.Dropouts(*stages))
    opened, _, outcome = total(jnp.float32(1), 2, fed.Sites(IDS, load, sites_per_load=per_load))
    LOST.clear()
    came = ~(stages[0] | stages[1])
    want = ring.decode(jnp.asarray(encoded[came].sum(0, dtype=np.uint32)), config.fixed)
    assert np.array_equal(opened, want)
    assert outcome.out_of_range == 0
    assert outcome.survivors.tolist() == np.flatnonzero(came).tolist()


def test_a_site_lost_before_or_during_is_the_same_sum_and_after_it_is_in_it():
  f = tolerant()
  lost = [drop(f, d) for d in (secagg.Dropouts(DURING, NONE), secagg.Dropouts(NONE, DURING))]
  assert same(lost[0][0], lost[1][0])
  state, info = drop(f, secagg.Dropouts(NONE, NONE, DURING))
  assert same(state, drop(f, None)[0])
  assert len(info.survivors) == S
  assert distance(state.params, lost[0][0].params) > 1e-4


def test_in_the_clear_and_without_masks_a_lost_site_is_absent():
  dropouts = secagg.Dropouts(BEFORE, DURING)
  images = IMAGES.copy()
  images[[1, 3]] = np.nan  # of the lost, so of no account
  without = functools.partial(load, images=images)
  masked, info = drop(tolerant(), dropouts)
  clear, _ = drop(tolerant(how="clear"), dropouts, load=without)
  made = algorithms.fedavg(recipe(), keep_optimizer=True)
  bare = build(made, losing(secure(masked=False, **TOLERANT)))
  assert distance(masked.params, clear.params) < 1e-5
  assert same(drop(bare, dropouts, load=without), (masked, info))
  for least, lost in ((1, secagg.Dropouts(IDS < 2, IDS >= 2)), (4, dropouts)):
    f = build(made, losing(summation.clear(min_survivors=least)))
    with pytest.raises(secagg.RoundAborted, match=f"messages came, and {least} must"):
      drop(f, lost)


def test_a_robust_rule_sees_the_messages_that_came():
  made = algorithms.fedavg(recipe(), weighting="uniform")
  f = build(made, losing(summation.by_rule("median", robust.median())))
  state, info = drop(f, secagg.Dropouts(BEFORE, DURING))
  each = [by_hand(i, start(), 0).params for i in (0, 2, 4)]
  assert distance(state.params, jax.tree.map(lambda *y: np.median(y, axis=0), *each)) < 1e-6
  assert info.survivors.tolist() == [0, 2, 4]


def test_control_variates_move_by_the_survivors_share():
  f = tolerant(algorithm=algorithms.scaffold(recipe(momentum=0.0), S))
  state, _ = drop(f, secagg.Dropouts(BEFORE, DURING))
  leaves = map(jax.tree.leaves, (state.server_state, state.site_state))
  for mean, own in zip(*leaves, strict=True):  # the invariant of SCAFFOLD
    np.testing.assert_allclose(mean, np.asarray(own).sum(0) / S, atol=1e-6)
    assert not np.any(np.asarray(own)[[1, 3]])


def test_dropouts_among_sampled_sites():
  made = algorithms.fedavg(recipe(), keep_optimizer=True)
  f = build(made, losing(summation.masked(secagg.secure_sum(4, threshold=3))))
  before, ids = f.init(start()), np.array([4, 0, 3, 2])
  after, info = drop(f, secagg.Dropouts(np.zeros(4, bool), ids == 3), ids, before)
  want = [by_hand(i, start(), 0).params for i in (4, 0, 2)]
  average = lambda *y: np.average(y, axis=0, weights=NUM[[4, 0, 2]])
  assert distance(after.params, jax.tree.map(average, *want)) < 1e-5
  leaves = map(jax.tree.leaves, (before.site_state, after.site_state))
  for old, new in zip(*leaves, strict=True):
    changed = np.any(np.asarray(old) != np.asarray(new), axis=tuple(range(1, old.ndim)))
    assert np.flatnonzero(changed).tolist() == [0, 2, 4]
  assert sorted(info.survivors.tolist()) == [0, 2, 4]


def test_dropouts_that_cannot_be_borne_are_refused():
  made = algorithms.fedavg(recipe(), keep_optimizer=True)
  with pytest.raises(ValueError, match="their masks cannot be recovered"):
    drop(build(made, losing(secure())), secagg.Dropouts(NONE, DURING))
  with pytest.raises(secagg.RoundAborted, match="round aborted: 2 of the 5 holders"):
    drop(tolerant(), secagg.Dropouts(BEFORE, DURING, AFTER))
  with pytest.raises(ValueError, match="lost twice"):
    drop(tolerant(), secagg.Dropouts(BEFORE, BEFORE))
  with pytest.raises(ValueError, match=r"must be bool\[5\]"):
    drop(tolerant(), secagg.Dropouts(BEFORE[:4], NONE))


# One-time masks.


def watch_masks(summed, seen):
  """The same summation, which records every key that masks a message in any of its sums."""

  def begin(*args, **kwargs):
    session = summed.begin(*args, **kwargs)
    row, *_ = session._rows[0]
    keys = [row.keys.reshape(-1, 8), row.noise.reshape(-1, 8)]
    keys += [] if row.self_mask is None else [row.self_mask.reshape(-1, 8)]
    # A pair's key stands at both of its ends; each is counted once for a sum.
    seen.extend({key.tobytes() for group in keys for key in np.asarray(group)})
    return session

  return summed._replace(begin=begin)


def copies_of(state):
  """A state as a restart would find it."""
  yield state
  yield copy.deepcopy(state)
  yield pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))
  yield jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, state))


@pytest.mark.parametrize("tolerates", [False, True])
def test_no_two_masks_are_equal_however_a_run_is_repeated(tolerates):
  """Two messages under one mask differ by what the plain ones differ by, which anybody can see."""
  seen, made = [], algorithms.fedavg(recipe(), keep_optimizer=True)
  summed = watch_masks(secure(**(TOLERANT if tolerates else {})), seen)
  first, second = build(made, summed), build(made, summed)  # two runs share a summation
  state = first.init(start())
  for again in copies_of(state):
    first.step(KEY, again, fed.Sites(IDS, load))  # the same round, from the same state
  second.step(KEY, state, fed.Sites(IDS, load))
  summed.begin(0, Purpose.EVALUATION, IDS)
  num_sums, pairs = 6, S if not tolerates else S * (S - 1) // 2  # a circle of two peers, or all
  assert len(seen) == num_sums * (pairs + S + (S if tolerates else 0))
  assert len(set(seen)) == len(seen)


def test_the_difference_of_two_masked_messages_says_nothing():
  """The attack: one site sends twice in one round. With one mask for both it would succeed."""
  config = secagg.secure_sum(S)
  summed, site = summation.masked(config), 2
  first, second = jnp.full((64,), 3.0), jnp.full((64,), 1.0)
  rows = [summed.begin(0, Purpose.TRAINING, IDS).rows(IDS) for _ in range(2)]
  row = lambda r: jax.tree.map(lambda a: a[site], r)
  difference = lambda a, b: np.asarray(
    summed.send(first, row(a)).message - summed.send(second, row(b)).message
  )
  plain = np.asarray(ring.encode(first, config.fixed) - ring.encode(second, config.fixed))
  assert np.array_equal(difference(rows[0], rows[0]), plain)  # the protection taken out
  assert not np.any(difference(*rows) == plain)


def test_a_session_serves_one_sum():
  summed = secure(**TOLERANT)
  session = summed.begin(0, Purpose.TRAINING, IDS)
  rows = session.rows(IDS)
  with pytest.raises(RuntimeError, match="begin a session for each"):
    session.rows(IDS)
  send = jax.vmap(lambda row: summed.send(jnp.ones(2), row))
  total = jax.tree.map(lambda a: jnp.sum(a, axis=0, dtype=a.dtype), send(rows))
  message, outcome = summed.end(session, total)
  np.testing.assert_allclose(message, S)
  assert outcome.survivors.tolist() == list(range(S))
  with pytest.raises(RuntimeError, match="its sum was opened"):
    summed.end(session, total)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_session_cannot_be_copied(duplicate):
  session = secure().begin(0, Purpose.TRAINING, IDS)
  with pytest.raises(TypeError, match="one-time keys"):
    duplicate(session)


def test_rows_are_those_of_the_positions_and_rounds_are_numbers():
  clear = summation.losing(summation.clear(), lambda *_: secagg.Dropouts(NONE, DURING))
  rows = clear.begin(0, Purpose.TRAINING, IDS).rows(IDS[::-1])
  assert rows.tolist() == [True, False, True, True, True]  # site 3 is lost
  for round in (-1, 2**31):
    with pytest.raises(ValueError, match=f"round={round}"):
      summation.clear().begin(round, Purpose.TRAINING, IDS)


TRACING = [
  lambda step: jax.jit(step)(jnp.float32(1)),
  lambda step: jax.vmap(step)(jnp.ones(2)),
  lambda step: jax.grad(lambda x: step(x)["b"].sum())(jnp.float32(1)),
  lambda step: jax.jit(lambda: step(jnp.float32(1)))(),  # everything closed over
]


@pytest.mark.parametrize("trace", TRACING)
@pytest.mark.parametrize("placement", ["scan", "loop"])
def test_no_sum_under_a_trace_where_its_masks_would_serve_again(trace, placement):
  """A compiled step would send every message of every call under the masks of one session."""
  seen = []
  f = build(algorithms.fedavg(recipe()), watch_masks(secure(**TOLERANT), seen), placement)
  state = f.init(start())

  def step(x):
    params = jax.tree.map(lambda p: p * x, state.params)
    return f.step(KEY, state._replace(params=params), fed.Sites(IDS, load))[0].params

  with pytest.raises(ValueError, match="would use its masks and noise again"):
    trace(step)
  assert not seen  # not even begun


def test_a_site_function_that_closes_over_a_traced_value_is_refused():
  def total(x):
    site_fn = lambda shared, site_state, site: (x * jnp.ones(2), ())
    run = fed.over_sites(site_fn, summation.clear(), sites.loop(), Purpose.COUNTING)
    return run((), 0, fed.Sites(IDS, load))[0]

  with pytest.raises(ValueError, match="would use its masks and noise again"):
    jax.vmap(total)(jnp.ones(3))


FORKING = """
import os
import numpy as np
from primia_jax import federated, secagg, summation

ids = np.arange(5, dtype=np.int32)
masked = summation.masked(secagg.secure_sum(5, threshold=3))
session = summation.clear().begin(0, summation.Purpose.TRAINING, ids)
child = os.fork()
try:
  session.rows(ids)
  told = "used"
except RuntimeError as error:
  told = str(error)
row, *_ = masked.begin(0, summation.Purpose.TRAINING, ids).rows(ids)
secrets = federated.fresh_secrets(0, summation.Purpose.TRAINING, ids)
drawn = [np.reshape(keys, (-1, 8)) for keys in (row.keys, row.self_mask, row.noise, secrets)]
drawn = {key.tobytes().hex() for key in np.concatenate(drawn)}  # a pair's stands at both ends
line = ("child" if child == 0 else "parent", told, *drawn)
os.write(1, ("|".join(line) + chr(10)).encode())
if child:
  os.waitpid(child, 0)
"""


def test_a_forked_process_uses_no_mask_of_its_parent_and_draws_other_keys():
  """In an interpreter of its own, which forks before JAX has any threads."""
  run = [sys.executable, "-W", "ignore", "-c", FORKING]
  out = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
  told = {who: rest for who, *rest in (line.split("|") for line in out.stdout.splitlines())}
  assert "before this process was forked" in told["child"][0]
  assert told["parent"][0] == "used"  # the process that began the session goes on
  keys = [*told["child"][1:], *told["parent"][1:]]
  assert len(set(keys)) == len(keys) == 2 * (S * (S - 1) // 2 + 3 * S)


def test_no_two_noise_secrets_are_equal():
  """Every sum draws the secrets of its sites' noise and batches afresh."""
  seen = []

  def site_fn(shared, kept, site):
    return jnp.ones(()), site.secret

  total = fed.over_sites(site_fn, summation.clear(), sites.scan(), Purpose.COUNTING)
  for per_load in (None, 2, None):
    _, secrets, _ = total((), 0, fed.Sites(IDS, load, sites_per_load=per_load))
    seen += [row.tobytes() for row in np.asarray(secrets)]
  assert len(set(seen)) == 3 * S
