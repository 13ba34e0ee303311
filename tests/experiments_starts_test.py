"""Where the sites of a run start from, and what each keeps; they are threads, with momentum."""

import json
import re
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from experiments_apart import APART, arm_of, train_apart
from experiments_runs import TINY, contents, found, trainer_of

from experiments import processes, starts
from experiments.checkpoints import Best, Checkpoints
from primia_jax import federated, secagg
from primia_jax.secagg import exchange, keys, meeting, opening, protocol, subkeys


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """A run of one round, which tests copy and continue: its folder and all secrets that it drew."""
  root, drawn, draw = tmp_path_factory.mktemp("begun"), [], subkeys.draw

  def drawing(entropy):
    secrets = draw(entropy)
    drawn.extend((secrets.mask.private, secrets.seed, secrets.noise))
    return secrets

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(subkeys, "draw", drawing)
    _, errors, _ = train_apart(root, rounds=1)
  assert errors == {}
  return root, drawn


def test_what_a_site_keeps_lies_in_its_own_folder_and_in_no_other(begun):
  root, _ = begun
  folders = [root / "own" / f"site_{i}" for i in range(3)]
  assert {path.name for path in (root / "own").iterdir()} == {
    "coordinator", *(folder.name for folder in folders)
  }  # fmt: skip
  for own in folders:
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    step = own / "run" / "federated" / "checkpoints" / "1" / "default"
    kept = ocp.StandardCheckpointer().restore(step.absolute())
    momentum = [np.asarray(a) for a in jax.tree.leaves(kept["state"]["site_state"])]
    secrets = [a.tobytes() for a in momentum if a.size > 100 and np.any(a)]
    assert secrets
    others = [data for other in folders if other != own for data in contents(other)]
    for secret in (*secrets, (own / "identity").read_bytes()):
      assert not any(secret in data for data in others)


def test_no_secret_of_noise_or_of_a_mask_is_in_any_folder(begun):
  root, drawn = begun
  assert len(drawn) == 3 * (3 + 1) * 3  # sites, sums and one whose keys are ready, secrets
  assert found([keys.words(secret) for secret in drawn], root) == 0


def again(begun, root):
  """The run as it is to be continued, in folders of its own."""
  shutil.copytree(begun[0], root, dirs_exist_ok=True)
  for own in (root / "own").glob("site_*"):
    own.chmod(0o700)


def plant(root, site, change, round_index=1):
  """Changes the parameters in a site's checkpoint, and the round that it names."""
  folder, trainer = arm_of(root, site), trainer_of(TINY)
  start = TINY.model.initial(TINY.model.config(TINY.data, 3), jax.random.key(TINY.seed))
  state = trainer.rounds.init(*start)
  row = lambda tree: jax.tree.map(lambda a: a[:1], tree)
  state = state._replace(site_state=row(state.site_state))
  checkpoints = Checkpoints(folder, 2)
  state, best, _ = checkpoints.restore(state, Best(*state[:-1], jnp.float32(-2), jnp.int32(0)))
  state = state._replace(params=jax.tree.map(change, state.params), round=jnp.int32(round_index))
  checkpoints.save(1, state, best)
  checkpoints.close()
  return state


@pytest.fixture
def inputs_of_sums(monkeypatch):
  """What each site gives into each sum, and the sum, by site."""
  seen, masked, told = {}, protocol.mask_input, opening.total

  def masking(site, vectors):
    seen.setdefault(site.number, []).append([vectors, None])
    return masked(site, vectors)

  def taking(site, *evidence):
    seen[site.number][-1][1] = told(site, *evidence)
    return seen[site.number][-1][1]

  monkeypatch.setattr(protocol, "mask_input", masking)
  monkeypatch.setattr(opening, "total", taking)
  return seen


def record_as_read(root, site, planted):
  """Makes a site's record say what it is given, as that of a colluding site may."""
  path = root / "own" / f"site_{site}" / "states.json"
  made = starts.digest(planted, processes.settings_of(APART)).hex()
  path.write_text(json.dumps(json.loads(path.read_text()) | {"1": [made, [0, 1, 2]]}))


@pytest.mark.parametrize("protection", ["records", "signatures", "transcript", "none"])
def test_two_planted_checkpoints_do_not_single_out_a_site_s_update(
  begun, tmp_path, monkeypatch, inputs_of_sums, protection
):
  """Sites 0 and 2 get a state whose updates are NaN, and NaN is summed as zero. Without protection
  the sum is site 1's update, bit for bit. With records that agree with it, as if both colluded,
  site 1 sees that they start from another state, and without a look is in another sum than they.
  """
  again(begun, tmp_path)
  for i in (0, 2):
    planted = plant(tmp_path, i, lambda a: np.full_like(a, np.nan))
    if protection != "records":
      record_as_read(tmp_path, i, planted)
  if protection in ("transcript", "none"):
    monkeypatch.setattr(meeting, "check", lambda *_: (0, 1, 2))
  if protection == "none":
    monkeypatch.setattr(exchange.Exchange, "bind", lambda self, public: None)
  results, errors, _ = train_apart(tmp_path, 2)
  assert results == {}
  if protection == "none":
    (_, _), (given, total) = inputs_of_sums[1]  # of class counts and of training
    update = slice(0, len(jax.tree.leaves(planted.params)))
    assert sum(np.any(v) for v in given[update]) > 1
    for v, summed in zip(given[update], total[update], strict=True):
      np.testing.assert_array_equal(v, summed)
    return
  assert inputs_of_sums == {}
  if protection == "transcript":
    assert isinstance(errors["coordinator"], secagg.RoundFailed)
    notes = errors["coordinator"].__notes__[0]
    assert "message of site 1 in stage advertise is rejected" in notes
    return
  wrong = {0: "is not the one in its record", 2: "is not the one in its record"}
  told = {1: r"sites \[0, 2\] start from another state"}
  for i, text in (wrong if protection == "records" else told).items():
    assert isinstance(errors[i], secagg.Refused)
    assert re.search(text, str(errors[i]))


def test_no_site_takes_a_checkpoint_that_it_has_no_record_of(begun, tmp_path):
  """One that somebody has put into the folders of all sites, where their records are lost."""
  again(begun, tmp_path)
  for i in range(3):
    plant(tmp_path, i, lambda a: a + 1)
    (tmp_path / "own" / f"site_{i}" / "states.json").unlink()
  arms_found, errors, _ = train_apart(tmp_path, 1)
  assert errors == {}
  for arm in arms_found.values():  # they began anew
    assert [row["round"] for row in arm.rows] == [1]


@pytest.mark.parametrize("honest", [True, False])
def test_a_site_that_was_lost_takes_the_state_that_the_others_have_signed(
  begun, tmp_path, monkeypatch, honest
):
  """It was lost before the round, and has neither state nor record; a giver that lies is seen."""
  again(begun, tmp_path)
  shutil.rmtree(arm_of(tmp_path, 1))
  (tmp_path / "own" / "site_1" / "states.json").unlink()
  if not honest:
    given = starts.to_bytes
    monkeypatch.setattr(starts, "to_bytes", lambda kept: bytes(4) + given(kept)[4:])
  results, errors, _ = train_apart(tmp_path)
  if not honest:
    said = re.search(
      r"site (\d) gives another state of round 1 than sites \[(\d)\]", str(errors[1])
    )
    assert {*said.groups()} == {"0", "2"}
    return
  assert errors == {}
  for i in range(3):
    assert [row["survivors"] for row in results[i].rows] == ([3] if i == 1 else [3, 3])
  known = [json.loads((tmp_path / f"own/site_{i}/states.json").read_text()) for i in range(3)]
  assert known[0]["2"] == known[1]["2"] == known[2]["2"]
  for a, b in zip(*[jax.tree.leaves(results[i].models) for i in (0, 1)], strict=True):
    np.testing.assert_array_equal(a, b)


def test_what_a_site_gives_another_has_nothing_that_stays_at_it():
  """The receiver keeps its own, and a state is no longer or shorter for what a site has."""
  of = lambda own, value: starts.Kept(
    federated.State({"w": jnp.full(2, value)}, {}, (), own, jnp.int32(3)),
    Best({"w": jnp.full(2, value)}, {}, (), own, jnp.float32(0), jnp.int32(2)),
    "ledger",
  )
  mine, others = {"m": jnp.full((1, 7), 5.25)}, {"m": jnp.full((1, 7), 9.5)}
  given = starts.to_bytes(of(mine, 1.0))
  assert given == starts.to_bytes(of((), 1.0))
  assert np.float32(5.25).tobytes() not in given
  assert starts.digest(of(mine, 1.0).state, b"") == starts.digest(of((), 1.0).state, b"")
  taken = starts.of_bytes(given, of(others, 2.0))
  np.testing.assert_array_equal(taken.state.params["w"], 1.0)
  for part in taken[:2]:
    assert part.site_state is others


def test_where_too_few_have_a_round_all_go_back_to_the_one_before(begun, tmp_path):
  """Two of three were stopped before they recorded round 1: one site's word is not enough."""
  again(begun, tmp_path)
  for i in (1, 2):
    (tmp_path / "own" / f"site_{i}" / "states.json").unlink()
  results, errors, _ = train_apart(tmp_path, 1)
  assert errors == {}
  assert [arm.rows[0]["round"] for arm in results.values()] == [1, 1, 1]


def test_the_newest_round_is_taken_that_enough_sites_hold():
  everybody, three = (0, 1, 2, 3), (0, 1, 2)
  newest = lambda *held: starts._newest({i: {0: everybody} | one for i, one in enumerate(held)}, 2)
  new, old = {8: everybody}, {7: everybody}
  assert newest(new, new, new, new) == 8
  assert newest(new | old, new | old, new | old, old) == 8
  assert newest(new | old, new | old, old, old) == 7  # neither of two lacking sites has its word
  assert newest({9: three}, {9: three}, {9: three}, {3: everybody}) == 9
  assert newest({9: three}, {9: three}, {3: everybody}, {3: everybody}) == 0
  assert newest({9: three}, {9: (0, 1)}, {9: three}, {}) == 0  # they tell of different rounds
  assert newest({}, {}, {}, {}) == 0


def test_a_round_that_is_repeated_replaces_what_was_saved_of_it(tmp_path):
  round_0 = jnp.int32(0)
  keeps = lambda value: {"m": jnp.full((1, 2), float(value))}
  start = federated.State({"w": jnp.zeros(2)}, {}, (), keeps(0), round_0)
  best = Best(*start[:-1], jnp.float32(-2), round_0)
  checkpoints = Checkpoints(tmp_path, 2)
  assert int(checkpoints.restore(start, best)[0].round) == 0
  for n, value in ((1, 10), (2, 20), (3, 30), (2, 21)):
    checkpoints.save(n, start._replace(site_state=keeps(value), round=jnp.int32(n)), best)
  assert checkpoints.rounds == [2]
  checkpoints.close()
  state, _, _ = Checkpoints(tmp_path, 2).restore(start, best)
  assert (int(state.round), float(state.site_state["m"][0, 0])) == (2, 21)
