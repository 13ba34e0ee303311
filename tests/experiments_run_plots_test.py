"""Pictures from folders of runs, as the programs leave them; made here by hand."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import run_plots, settings
from experiments.configs import Train

NAMES = ["normal", "bacterial", "viral"]
READER = [[5, 0, 1], [1, 4, 2], [0, 1, 6]]


def run_folder(root, name, mcc=0.7, epsilon=0.0, reader=True, **changes):
  """A finished federated run of 20 test images."""
  folder = root / name
  (folder / "federated").mkdir(parents=True)
  rng = np.random.default_rng(0)
  labels = np.arange(20) % 3
  probabilities = rng.dirichlet(np.ones(3), 20) * 0.5 + 0.5 * np.eye(3)[labels]
  np.savez(folder / "predictions.npz", labels=labels, federated=probabilities)
  rows = [{"round": n, "arm": "federated", "val_loss": 1 / n, "epsilon": epsilon * n / 2}
          for n in (1, 2)]  # fmt: skip
  rows = rows if epsilon else [{k: v for k, v in row.items() if k != "epsilon"} for row in rows]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "federated" / "rounds.jsonl").write_text(text)
  counts = np.zeros((3, 3), int)
  np.add.at(counts, (labels, probabilities.argmax(1)), 1)
  result = {
    "title": "Federated training, 3 sites", "data": "made images", "num_examples": 20,
    "label_names": NAMES, "main_arm": "federated",
    "arms": {"federated": {"mcc": {"value": mcc, "low": mcc - 0.1, "high": mcc + 0.1},
                           "confusion_matrix": counts.tolist()}},
    "references": {"radiologist": {"confusion_matrix": READER, "mcc": 0.6}} if reader else {},
    "privacy": {"epsilon": "at most"} if epsilon else None,
    "config": {"model": "cnn", "target_epsilon": 0.0},
  } | changes  # fmt: skip
  (folder / "metrics.json").write_text(json.dumps(result))
  settings.save(Train(), folder / "config.json")
  return folder


def costs(root, name, model="monet, 48 px", **changes):
  folder = root / name
  folder.mkdir()
  told = {
    "model": model, "images_in_a_run": 1, "config": {"num_bits": 32},
    "phases": [{"phase": "deal", "seconds": 9.0, "rounds": 0, "bytes": 10**9},
               {"phase": "online", "seconds": 0.5, "rounds": 100, "bytes": 10**7}],
  } | changes  # fmt: skip
  (folder / "costs.json").write_text(json.dumps(told))
  return folder


def drawn(kind, runs, folder):
  pictures = run_plots.of(kind, runs)
  run_plots.drawn(folder, pictures)
  for picture in pictures:
    assert Image.open(folder / picture.name).size[0] > 300
  return [picture.name for picture in pictures]


def test_pictures_of_one_run(tmp_path):
  run = run_folder(tmp_path, "a")
  assert drawn("curves", [run], tmp_path) == ["curves_federated.png"]
  assert drawn("roc", [run], tmp_path) == ["roc_federated.png"]
  names = ["confusion_federated.png", "confusion_radiologist.png"]
  assert drawn("confusion", [run], tmp_path) == names
  alone = run_folder(tmp_path, "b", reader=False)
  assert drawn("roc", [alone], tmp_path) == ["roc_federated.png"]
  assert len(run_plots.confusion(alone)) == 1


def test_epsilon_is_what_was_spent(tmp_path):
  runs = [
    run_folder(tmp_path, "one", 0.5, 1.0), run_folder(tmp_path, "six", 0.6, 6.0),
    run_folder(tmp_path, "plain", 0.7),
  ]  # fmt: skip
  scores = [run_plots._score(run, json.loads((run / "metrics.json").read_text())) for run in runs]
  assert [one.epsilon for one in scores] == [1.0, 6.0, 0.0]
  assert scores[0] == run_plots.Score("federated, cnn", 1.0, 0.5, 0.4, 0.6)
  target = {"config": {"model": "cnn", "target_epsilon": 3.0}}
  aimed = run_folder(tmp_path, "three", 0.5, 2.9, **target)
  assert run_plots._score(aimed, json.loads((aimed / "metrics.json").read_text())).epsilon == 2.9
  assert drawn("epsilon", [*runs, aimed], tmp_path) == ["epsilon.png"]


def test_latency_adds_computing_bytes_and_rounds(tmp_path):
  runs = [costs(tmp_path, "a"), costs(tmp_path, "b", "cnn, 32 px", images_in_a_run=4)]
  timed = run_plots._timed(runs[0])
  assert timed == run_plots.Timed("monet, 48 px, 2^32", 0.5, 100, 10**7)
  assert run_plots._timed(runs[1]).name == "cnn, 32 px, 2^32, 4 images"
  wan = run_plots.LINKS["a country: 40 ms, 100 Mbit/s"]
  assert wan.seconds(timed.rounds, timed.num_bytes) == pytest.approx(4.0 + 0.8)
  assert drawn("latency", runs, tmp_path) == ["latency.png"]


@pytest.mark.parametrize(
  ("kind", "changes", "told"),
  [
    ("epsilon", {}, "none of the runs .* was private"),
    ("epsilon", {"epsilon": 6.0, "privacy": {"NOT PRIVATE": "dp_seed"}}, "is NOT PRIVATE"),
    ("confusion", {"arms": {"federated": {"confusion_matrix": "suppressed (<10)"}}}, "suppresses"),
  ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, kind, changes, told):
  run = run_folder(tmp_path, "a", **changes)
  with pytest.raises(ValueError, match=told):
    run_plots.of(kind, [run])


def test_a_run_without_predictions_has_no_roc_curve(tmp_path):
  run = run_folder(tmp_path, "a")
  (run / "predictions.npz").unlink()
  with pytest.raises(FileNotFoundError, match=r"has no predictions\.npz"):
    run_plots.of("roc", [run])


def test_runs_of_other_images_and_other_folders_are_refused(tmp_path):
  runs = [run_folder(tmp_path, "a", epsilon=1.0), run_folder(tmp_path, "b", data="others")]
  with pytest.raises(ValueError, match=r"different test images \(20 of made images, 20 of others"):
    run_plots.of("epsilon", runs)
  (runs[0] / "config.json").unlink()
  with pytest.raises(ValueError, match="is an evaluation, which does not say whether its model"):
    run_plots.of("epsilon", [runs[0]])
  with pytest.raises(FileNotFoundError, match=r"no costs\.json"):
    run_plots.of("latency", [runs[0]])
  old = costs(tmp_path, "old")
  (old / "costs.json").write_text("{}")
  with pytest.raises(ValueError, match="run it again"):
    run_plots.of("latency", [old])
  masks = tmp_path / "masks"
  masks.mkdir()
  (masks / "metrics.json").write_text("{}")
  with pytest.raises(ValueError, match="only curves are drawn"):
    run_plots.of("roc", [masks])
