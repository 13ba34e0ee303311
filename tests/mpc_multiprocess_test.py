"""A party alone runs the same protocol as both together: same bits, same bytes, and only its own
values.
"""

import jax
import numpy as np
import pytest
from mpc_reference import OWNERS, normal

from primia_jax import mpc
from primia_jax.mpc import keeping, multiprocess, pricing, segments
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER

W, X = normal(0, 6, 5), normal(1, 3, 6)
PARTIES = (MODEL_OWNER, DATA_OWNER)


def fn(w, x):
  """A layer, and a product with the image, so that the data owner sends a question."""
  return jax.nn.relu(x @ w) * x[:, :5]


def layer(w, x):
  return jax.nn.relu(x @ w)


def branches(w, x):
  """Two chains of gates that do not wait for each other; no two gates of one kind are ready
  together.
  """
  y = jax.nn.relu(x @ w)
  return y * x[:, :5], y.max(axis=1)


def planned(config, fn=fn):
  return mpc.plan(fn, OWNERS, (W, X), config, mpc.calibrate(fn, OWNERS, [(W, X)]))


def sides(plan):
  """The data owner, and both parties' sides of one inference."""
  model_owner = mpc.ModelOwner(plan, W)
  dealer = mpc.Dealer(plan, model_owner.tag)
  data_owner = mpc.DataOwner(plan, model_owner.publish(dealer.blind()))
  first, second = dealer.deal()
  asked, question = data_owner.ask(data_owner.prepare(second), X)
  return data_owner, model_owner.answer(model_owner.prepare(first), question), asked


@pytest.fixture(scope="module")
def plan():
  return planned(mpc.Config(32, 10, 14))


@pytest.fixture(scope="module")
def both(plan):
  return [multiprocess.online(plan, party) for party in PARTIES]


def test_two_parties_apart_have_the_bits_of_one_process(plan, both):
  data_owner, answered, asked = sides(plan)
  got = multiprocess.simulate(both[0].start(answered), both[1].start(asked))
  want = mpc.online(plan)(answered, asked)
  assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))
  exact = mpc.check(plan, (W, X))
  np.testing.assert_array_equal(data_owner.reveal(got), exact)
  np.testing.assert_allclose(exact, fn(W, X), atol=0.1)


@pytest.mark.parametrize(
  "config",
  [
    (64, 16, 18, False),
    pytest.param((32, 10, 14, False, "fss"), marks=pytest.mark.slow),
    pytest.param((64, 16, 18, True, "fss"), marks=pytest.mark.slow),
  ],
)
def test_so_they_have_in_every_ring_and_with_every_comparison(config):
  plan = planned(mpc.Config(*config), layer)
  _, answered, asked = sides(plan)
  parties = [
    multiprocess.online(plan, p).start(s) for p, s in zip(PARTIES, (answered, asked), strict=True)
  ]
  want = mpc.online(plan)(answered, asked)
  got = multiprocess.simulate(*parties)
  assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_messages_are_those_of_the_plan(plan, both):
  assert both[0].sizes == both[1].sizes == multiprocess.sizes(plan)
  assert sum(both[0].sizes) == sum(row.sent for row in pricing.rows(plan.circuit))
  assert len(both[0].sizes) == pricing.rounds(plan.circuit)
  assert "share messages" not in str(plan)
  _, answered, asked = sides(plan)
  for online, side, last in zip(both, (answered, asked), (both[0].sizes[-1], 0), strict=True):
    party = online.start(side)
    sent = [len(next(party))]
    for size in online.sizes[:-1]:
      sent.append(len(party.send(bytes(size))))
    assert sent == [*online.sizes[:-1], last]


def test_openings_that_do_not_wait_for_each_other_share_a_message():
  plan = planned(mpc.Config(32, 10, 14), branches)
  rows = pricing.rows(plan.circuit)
  sizes = multiprocess.sizes(plan)
  assert (len(sizes), sum(row.rounds for row in rows)) == (15, 19)
  assert pricing.rounds(plan.circuit) == 15
  assert "share messages: 15 rounds instead of 19" in str(plan)
  assert sum(sizes) == sum(row.sent for row in rows)


def test_a_wrong_message_or_side_is_refused(plan, both):
  _, answered, asked = sides(plan)
  with pytest.raises(ValueError, match="the model owner's side, not the data owner's"):
    next(both[1].start(answered))
  party = both[1].start(asked)
  next(party)
  with pytest.raises(ValueError, match="bytes instead of"):
    party.send(bytes(both[1].sizes[0] + 1))
  with pytest.raises(ValueError, match="another plan"):
    both[1].start(asked._replace(ready={}))


def test_a_program_that_was_kept_is_not_traced_again_and_has_the_same_bits(
  plan, both, tmp_path, monkeypatch
):
  ask = lambda: multiprocess.online(plan, DATA_OWNER, kept=tmp_path)
  _, answered, asked = sides(plan)
  want = multiprocess.simulate(both[0].start(answered), both[1].start(asked))

  def agrees(online):
    got = multiprocess.simulate(both[0].start(answered), online.start(asked))
    return online.sizes == both[1].sizes and all(map(np.array_equal, got, want))

  assert agrees(ask())
  (file,) = tmp_path.iterdir()
  assert file.stat().st_mode & 0o777 == 0o600
  with monkeypatch.context() as patch:
    patch.setattr(multiprocess, "_traced", None)
    assert agrees(ask())
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(TypeError):  # a damaged file counts as none
      ask()
  file.unlink()
  file.mkdir()
  with pytest.warns(UserWarning, match="cannot be kept"):
    again = ask()
  assert agrees(again)


def test_a_kept_program_is_of_one_plan_party_and_version(plan, tmp_path, monkeypatch):
  other = planned(mpc.Config(32, 9, 14))
  path = lambda *of: keeping.path(tmp_path, *of)
  paths = [path(plan, 1, True), path(plan, 0, True), path(plan, 1, False), path(other, 1, True)]
  with monkeypatch.context() as patch:
    patch.setattr(keeping, "_code", lambda: "changed")
    paths.append(path(plan, 1, True))
  assert len(set(paths)) == 5
  assert path(plan, 1, True) == paths[0]


def test_a_value_given_as_shares_has_no_party():
  plan = mpc.plan(lambda x: x * x, ("shared",), (X,), mpc.Config(32, 10, 14))
  with pytest.raises(ValueError, match="shared"):
    multiprocess.online(plan, MODEL_OWNER)


def test_equal_segments_are_compiled_once():
  """Three equal layers have the programs of one, but for those at the ends."""
  aval = jax.ShapeDtypeStruct((3,), np.uint32)

  def programs(num):
    def f(a, b):
      for _ in range(num):
        a = jax.lax.ppermute(a * b, "party", [(0, 1), (1, 0)]) + a
      return [a]

    traced = jax.make_jaxpr(f, axis_env=[("party", 2)])(aval, aval)
    return {id(part.run) for part in segments.cut(traced, 0)[0]}

  assert len(programs(6)) == len(programs(3)) <= 4
