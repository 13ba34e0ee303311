"""A number stands for one seed and for both parties' parts; a digest sees every change."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from primia_jax.mpc import committing, saving
from primia_jax.mpc.committing import Committed
from primia_jax.mpc.messages import Correlations
from primia_jax.mpc.protocol import Part

SEED = bytes(range(32))


def part(value=0):
  sent = {3: {"u": np.arange(6, dtype=np.uint32).reshape(2, 3)}, 11: {"b": np.zeros(0, np.uint8)}}
  sent[3]["u"][1, 2] ^= value
  return Part(np.arange(8, dtype=np.uint32), sent, {5: {"c": np.ones(2, np.uint8)}}), np.arange(
    8, dtype=np.uint32
  )


def test_the_formulas_are_those_of_the_docstring():
  name = "publication"
  wanted = hashlib.sha256(b"primia_jax seed\npublication\n" + SEED).hexdigest()
  assert committing.commitment(name, SEED) == wanted
  committed = Committed(wanted, ("aa", "bb"))
  text = f"primia_jax inference\npublication\n{wanted}\naa\nbb"
  assert committing.number(name, committed) == hashlib.sha256(text.encode()).hexdigest()


@given(st.integers(1, 2**32 - 1))
def test_a_digest_sees_each_value(change):
  assert committing.digest(part(change)) != committing.digest(part())


def test_a_digest_sees_names_types_and_shapes():
  base, other = np.arange(4, dtype=np.uint32), {}
  for name, tree in {
    "shape": {"a": base.reshape(2, 2)},
    "type": {"a": base.view(np.int32)},
    "name": {"b": base},
    "place": {"a": {"a": base}},
    "split": {"a": base[:2], "b": base[2:]},
    "same": {"a": base},
  }.items():
    other[name] = committing.digest(tree)
  assert len(set(other.values())) == len(other)
  assert other["same"] == committing.digest({"a": base.copy()})


def made(publication="p", secret=None, **change):
  secret = part() if secret is None else secret
  committed = Committed(committing.commitment("p", SEED), (committing.digest(part()), "0" * 64))
  number = committing.number("p", committed)
  return Correlations(0, publication, number, secret, committed._replace(**change))


def test_a_part_is_checked_before_it_is_used_and_stays_usable(tmp_path):
  one = made()
  one.check_committed()
  saving.write(tmp_path / "one", one)
  again = saving.read(tmp_path / "one")
  again.check_committed()
  assert again.committed == one.committed
  again.take(0)
  with pytest.raises(ValueError, match="commits to nothing"):
    again.check_committed()


@pytest.mark.parametrize(
  "other",
  [
    lambda: made(secret=part(1)),
    lambda: made(publication="q"),
    lambda: made(seed="1" * 64),
    lambda: made(parts=(committing.digest(part()), "1" * 64)),
  ],
)
def test_what_the_number_does_not_stand_for_is_refused(other):
  with pytest.raises(ValueError, match="committed to other correlations"):
    other().check_committed()


def test_keys_of_one_seed_are_all_different():
  keys = [committing.key(seed, purpose) for seed in (SEED, SEED[::-1]) for purpose in ("a", "b")]
  assert len({np.asarray(key).tobytes() for key in keys}) == 4
