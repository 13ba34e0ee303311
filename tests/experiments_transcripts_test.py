"""The transcript of a run: what is in its files, who can read them, and what a report says."""

import jax
import numpy as np
import pytest
from experiments_runs import PRIVATE, TINY, assert_equal, train

from experiments import lines, markdown, settings, transcripts
from primia_jax.attacks import views

RECORDED = settings.replace(TINY, rounds=2, record_transcript=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A run that was stopped in its second round and started again."""
  folder = tmp_path_factory.mktemp("recorded") / "federated"
  with pytest.raises(KeyboardInterrupt):
    train(RECORDED, folder, stop_after=2)
  train(RECORDED, folder)
  return folder


def test_each_round_has_a_file_that_its_owner_alone_reads(folder):
  paths = transcripts.paths(folder)
  assert [*paths] == [1, 2]
  assert {path.stat().st_mode & 0o777 for path in paths.values()} == {0o600}
  assert (folder / transcripts.FOLDER).stat().st_mode & 0o777 == 0o700


def test_a_round_is_read_as_it_was(folder):
  first, second = (transcripts.read(path) for path in transcripts.paths(folder).values())
  assert (first.number, second.number) == (1, 2)
  assert first.ids.tolist() == [0, 1, 2]
  assert_equal(first.after, second.before)
  initial = RECORDED.model.initial(RECORDED.model.config(RECORDED.data, 3), jax.random.key(0))
  assert_equal(tuple(first.before), initial)
  sums = jax.tree.map(lambda a: a.sum(0), first.messages.update[0])
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5)
  jax.tree.map(close, sums, first.total.update[0])
  assert np.isclose(first.messages.weight.max(), 1)
  assert first.class_weights.shape == (3,)
  each = views.server_each(second)
  assert jax.tree.leaves(each.updates)[0].shape[0] == 3


def test_a_recorded_arm_says_so_in_every_line_and_in_the_report(folder):
  rows = lines.rows(folder / "rounds.jsonl")
  assert [row["NOT PRIVATE"] for row in rows] == ["record_transcript"] * 2
  said = transcripts.why(RECORDED, folder)
  assert str(folder / "transcript") in said
  assert "noise" not in said
  assert "noise that the ledger" in transcripts.why(PRIVATE, folder)
  result = {"privacy": None, "config": {markdown.NOT_PRIVATE: said}, "images": {"A": "b"}}
  assert markdown.warnings(result)[0] == ("NOT PRIVATE", said)


def test_without_a_transcript_the_cure_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="train with --record_transcript"):
    transcripts.paths(tmp_path)
  path = tmp_path / "round_0001.npz"
  path.write_bytes(b"no zip")
  with pytest.raises(ValueError, match=r"round_0001.npz is damaged .* record the run again"):
    transcripts.read(path)
