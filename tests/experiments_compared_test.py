"""What is kept of an encrypted inference that was stopped, and what a comparison says."""

import json
import stat

import numpy as np
import pytest

from experiments import compared, phases, unfinished
from experiments.planned import Infer

IMAGES = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1)
RUNS = [
  unfinished.Run(
    np.full((2, 3), i, np.float32), {("deal", phases.WHOLE): 0.1 * i, ("online", 4): 1.0}
  )
  for i in (1, 2)
]


def answer_and_stop(folder, runs):
  with unfinished.of(folder, "plan", IMAGES) as kept:
    for run in runs:
      kept.add(run)
    raise KeyboardInterrupt


def test_what_was_answered_before_a_stop_is_read_again(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    answer_and_stop(tmp_path, RUNS)
  assert unfinished.is_there(tmp_path)
  for path in (tmp_path / unfinished.FOLDER).glob("*.npz"):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
  with unfinished.of(tmp_path, "plan", IMAGES) as kept:
    assert [run.seconds for run in kept.runs] == [run.seconds for run in RUNS]
    for run, wanted in zip(kept.runs, RUNS, strict=True):
      np.testing.assert_array_equal(run.outputs, wanted.outputs)
      assert run.outputs.dtype == np.float32
  assert not (tmp_path / unfinished.FOLDER).exists()  # nothing remains of one that is finished
  assert not unfinished.is_there(tmp_path)


@pytest.mark.parametrize(("plan", "images"), [("other", IMAGES), ("plan", IMAGES + 1)])
def test_answers_of_other_images_or_another_plan_are_not_taken(tmp_path, plan, images):
  with pytest.raises(KeyboardInterrupt):
    answer_and_stop(tmp_path, RUNS[:1])
  with (
    pytest.raises(ValueError, match="of other images or with other flags"),
    unfinished.of(tmp_path, plan, images),
  ):
    pass
  assert unfinished.is_there(tmp_path)


class Plan:
  class config:
    exact = True


def test_images_whose_class_may_change_are_listed_closest_first(monkeypatch):
  plain = np.array([[0, 1, 9], [5.00, 4.75, 0], [0, 2, 2.125], [1, 0, 0.5]], np.float32)
  encrypted = plain + np.float32([[0, 0, 0], [-0.125, 0.125, 0], [0, 0.125, -0.0625], [0, 0, 0]])
  monkeypatch.setattr(phases.clear, "checker", lambda plan: lambda args: encrypted)
  monkeypatch.setattr(phases, "functions", lambda m: {"probabilities": lambda w, x: plain})
  found = phases.compare(Plan, None, None, np.zeros((4, 1, 1, 1), np.uint8), 4, encrypted)
  assert found.bitwise
  assert (found.same, found.largest, found.margin) == (3, 0.125, 0.125)
  assert found.close == (phases.Close(2, 0.125, 1, 2), phases.Close(1, 0.25, 0, 0))

  asked = compared.Asked(Infer(), ["a", "b", "c", "d"], ("normal", "bacterial", "viral"))
  text = compared.text(asked, found)
  assert "the same class as float32: 3 of 4 images" in text
  assert "best float32 logits are within 0.25, so that a class may change: 2" in text
  assert "c: 0.12 apart, encrypted bacterial, float32 viral" in text
  assert json.loads(json.dumps(compared.record(asked, found)))["close"][0] == {
    "image": "c", "float32_logits_apart": 0.125, "encrypted": "bacterial", "float32": "viral"
  }  # fmt: skip
