"""Where the sites of a run start from, and what each keeps; they are threads, with momentum."""

import functools
import json
import re
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from experiments_apart import APART, free_port, in_threads, seat_of
from experiments_runs import TINY, contents, found, trainer_of

from experiments import arms, inputs, processes, settings, starts, trainers
from experiments.checkpoints import Best, Checkpoints
from primia_jax import federated, models, secagg
from primia_jax.secagg import exchange, keys, meeting, subkeys, transport


def train_apart(root, rounds=2, arm_folders=None, timeout=20.0):
  """One start of all sites: (arms, errors), by site; each may read a checkpoint of its own."""
  config = APART
  folder, address = root / "run", f"127.0.0.1:{free_port()}"
  folder.mkdir(exist_ok=True)
  model_config = config.model.config(config.data, 3)
  model = models.build(model_config)

  def one(i):
    place, _ = processes.connect(config, folder, seat_of(root, i, address, timeout))
    try:
      images = inputs.site_images(config, i)
      cohort = trainers.Cohort("federated", images.train, images.validation, np.array([i]))
      trainer = trainers.make_trainer(config, model, model_config, [cohort], place)
      arm_folder = (arm_folders or {}).get(i, folder / "federated")
      arm_folder.mkdir(exist_ok=True)
      return arms.train(
        settings.replace(config, rounds=rounds), cohort, trainer, model_config, arm_folder, None
      )
    finally:
      place.exchange.close()

  return in_threads({i: functools.partial(one, i) for i in range(config.hospitals.num_sites)})


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
    _, errors = train_apart(root, rounds=1)
  assert errors == {}
  return root, drawn


def test_what_a_site_keeps_lies_in_its_own_folder_and_nothing_of_it_in_the_run_folder(begun):
  root, _ = begun
  shared = list(contents(root / "run"))
  for i in range(3):
    own = root / "own" / f"site_{i}"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    kept = ocp.StandardCheckpointer().restore((own / "checkpoints" / "1" / "default").absolute())
    momentum = [np.asarray(a) for a in jax.tree.leaves(kept["state"])]
    assert sum(a.size > 100 and np.any(a) for a in momentum)
    secrets = [a.tobytes() for a in momentum if a.size > 100 and np.any(a)]
    for secret in (*secrets, (own / "identity").read_bytes()):
      assert not any(secret in data for data in shared)
  assert not list((root / "run").rglob("*site_*/**/*"))


def test_no_secret_of_noise_or_of_a_mask_is_in_any_folder(begun):
  root, drawn = begun
  assert len(drawn) == 3 * 3 * 3  # sites, sums, secrets
  assert found([keys.words(secret) for secret in drawn], root) == 0


def again(begun, root):
  """The run as it is to be continued, in folders of its own."""
  shutil.copytree(begun[0], root, dirs_exist_ok=True)
  return root / "run" / "federated"


def plant(source, folder, change, round_index=1):
  """Copies the global checkpoint and changes its parameters, and the round that it names."""
  trainer, nobody = trainer_of(TINY), folder / "nobody"
  start = TINY.model.initial(TINY.model.config(TINY.data, 3), jax.random.key(TINY.seed))
  state = trainer.rounds.init(*start)._replace(site_state=())
  before = Checkpoints(source, nobody, 0, False)
  state, best, _ = before.restore(state, Best(*state[:-1], jnp.float32(-2), jnp.int32(0)))
  before.close()
  state = state._replace(params=jax.tree.map(change, state.params), round=jnp.int32(round_index))
  after = Checkpoints(folder, nobody, 0, False)
  after.save(1, state, best)
  after.close()
  return state


@pytest.fixture
def inputs_of_sums(monkeypatch):
  """What each site gives into each sum, and the sum, by site."""
  seen, finish = {}, transport.finish

  def finished(connection, site, vectors, server):
    seen.setdefault(site.number, []).append([vectors, None])
    joined = finish(connection, site, vectors, server)
    seen[site.number][-1][1] = joined.total
    return joined

  monkeypatch.setattr(transport, "finish", finished)
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
  folder = again(begun, tmp_path)
  planted = plant(folder, tmp_path / "planted", lambda a: np.full_like(a, np.nan))
  for i in (0, 2):
    if protection != "records":
      record_as_read(tmp_path, i, planted)
  if protection in ("transcript", "none"):
    monkeypatch.setattr(meeting, "check", lambda *_: (0, 1, 2))
  if protection == "none":
    monkeypatch.setattr(exchange.Exchange, "bind", lambda self, public: None)
  timeout = 20.0 if protection == "none" else 2.0
  bad = tmp_path / "planted"
  results, errors = train_apart(tmp_path, 2, {0: bad, 2: bad}, timeout)
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
    assert isinstance(errors[0], secagg.RoundFailed)
    assert "message of site 1 in stage advertise is rejected" in errors[0].__notes__[0]
    return
  wrong = {0: "is not the one in its record", 2: "is not the one in its record"}
  told = {1: r"sites \[0, 2\] start from another state"}
  for i, text in (wrong if protection == "records" else told).items():
    assert isinstance(errors[i], secagg.Refused)
    assert re.search(text, str(errors[i]))


@pytest.mark.parametrize(
  ("round_index", "told"), [(0, "not the one in its record"), (1, "no record")]
)
def test_at_the_first_start_no_site_takes_a_checkpoint(begun, tmp_path, round_index, told):
  """One that the host has put there: of a later round, or as if no round had been."""
  bad = tmp_path / "planted"
  plant(begun[0] / "run" / "federated", bad, lambda a: a + 1, round_index)
  _, errors = train_apart(tmp_path, 2, {0: bad, 1: bad, 2: bad}, 2.0)
  assert all(told in str(errors[i]) for i in range(3))


def test_a_site_that_was_lost_rejoins_on_what_all_others_have_recorded(begun, tmp_path):
  """And with it the run goes on; where another one lacks the record, too, it stops."""
  again(begun, tmp_path)
  known = {i: tmp_path / "own" / f"site_{i}" / "states.json" for i in range(3)}
  forget = lambda path: path.write_text(json.dumps({"0": json.loads(path.read_text())["0"]}))
  forget(known[1])
  forget(known[2])
  _, errors = train_apart(tmp_path, timeout=2.0)
  assert all("it has no record of round 1, and sites [0" in str(errors[i]) for i in (1, 2))
  shutil.copy(begun[0] / "own" / "site_1" / "states.json", known[1])
  results, errors = train_apart(tmp_path)
  assert errors == {}
  assert [row["survivors"] for row in results[0].rows] == [3, 3]
  of_sites = [json.loads(path.read_text()) for path in known.values()]
  assert of_sites[0] == of_sites[1] == of_sites[2]
  assert sorted(of_sites[0]) == ["0", "1", "2"]


def test_a_site_keeps_its_state_of_later_rounds_until_they_are_repeated(tmp_path):
  """A start that is then refused must not cost a site its state."""
  shared, round_0 = tmp_path / "run", jnp.int32(0)
  keeps = lambda value: {"m": jnp.full((1, 2), float(value))}
  start = federated.State({"w": jnp.zeros(2)}, {}, (), keeps(0), round_0)
  best = Best(*start[:-1], jnp.float32(-2), round_0)
  after = lambda n, value: (n, start._replace(site_state=keeps(value), round=jnp.int32(n)), best)

  def saved(number, *rounds):
    """A process's checkpoints after it has saved some rounds; what it then restores."""
    checkpoints = Checkpoints(shared, tmp_path / f"own_{number}", number, keeps=True)
    for one in rounds:
      checkpoints.save(*one)
    state, _, _ = checkpoints.restore(start, best)
    checkpoints.close()
    return int(state.round), float(state.site_state["m"][0, 0])

  assert saved(0, after(1, 10)) == (1, 10)
  assert saved(1, after(1, 11), after(2, 12)) == (1, 11)  # site 0 was killed in the second round
  assert saved(1) == (1, 11)
  assert saved(0, after(2, 20)) == (2, 20)
  assert saved(1) == (2, 12)
  assert saved(1, after(2, 21)) == (2, 21)
