"""Masks of lung tumours: federated and pooled training beside the best threshold of grey values.

python -m benchmarks.lungs --seeds=0,1,2

The 48 x 48 patches of ../shared/data come ten from a patient, in order, which decides who is whose;
patients are dealt to three sites, and none is in two. The threshold is the best on training
patches.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks import measuring
from primia_jax import segmentation

_DATA = flags.DEFINE_string("data", "../shared/data/msd_lung_48.npz", "The patches.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the runs.")
_FLAGS = flags.DEFINE_list("train_flags", [], "Further flags of the runs, such as --rounds=10.")
_OUT = flags.DEFINE_string("out", "", "Folder that keeps the runs; by default none does.")
_OF_A_PATIENT = 10


def with_patients(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The file's arrays, and the patient of each patch."""
  arrays = dict(np.load(path))
  for split in ("train", "test"):
    numbers = np.arange(len(arrays[f"{split}_images"])) // _OF_A_PATIENT
    arrays[f"{split}_groups"] = np.char.add(f"{split} ", numbers.astype(str))
  return arrays


def threshold(arrays: dict[str, np.ndarray]) -> float:
  """Test patients' mean Dice by the threshold that is best on training patches with tumours."""
  masks = {split: arrays[f"{split}_masks"][..., 0] for split in ("train", "test")}
  has = masks["train"].any((1, 2))
  t, is_bright = segmentation.best_threshold(arrays["train_images"][has], masks["train"][has])
  brighter = arrays["test_images"][..., 0] >= t
  found = (brighter if is_bright else ~brighter).astype(np.uint8)
  return float(segmentation.case_dice(masks["test"], found, 2, arrays["test_groups"]).mean())


def main(_):
  pooled, federated, seconds = [], [], []
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(_OUT.value or scratch)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = with_patients(pathlib.Path(_DATA.value))
    np.savez(folder / "lungs.npz", **arrays)
    for seed in map(int, _SEEDS.value):
      command = [sys.executable, "-m", "experiments.train_federated", "--preset=lung_tumours"]
      command += [f"--data=npz:{folder / 'lungs.npz'}", f"--seed={seed}", "--baselines=pooled"]
      command += [f"--run_dir={folder / str(seed)}", *_FLAGS.value]
      start = time.perf_counter()
      subprocess.run(command, check=True, stdout=sys.stderr)
      seconds.append(time.perf_counter() - start)
      arms = json.loads((folder / str(seed) / "metrics.json").read_text())["arms"]
      pooled.append(arms["pooled"]["dice"]["value"])
      federated.append(arms["federated"]["dice"]["value"])
  least = threshold(arrays)
  mean = statistics.mean
  measuring.say("lungs: Dice of the best threshold", [least], "", None)
  measuring.say("lungs: Dice of pooled training", pooled, "", None, value=mean(pooled))
  more = [v - least for v in pooled]
  measuring.say("lungs: pooled minus threshold", more, "", 0.1, value=mean(more), at_least=True)
  measuring.say("lungs: Dice of federated training", federated, "", None, value=mean(federated))
  behind = [p - f for p, f in zip(pooled, federated, strict=True)]
  measuring.say("lungs: pooled minus federated", behind, "", 0.02, value=mean(behind))
  measuring.say("lungs: both arms", seconds, "s", None)


if __name__ == "__main__":
  app.run(main)
