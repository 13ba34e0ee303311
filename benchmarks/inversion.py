"""Gradient inversion of a single MedNIST image, 32 px, beside breaching: time, PSNR and
identification.

  python -m benchmarks.inversion --case=lenet --breaching_python=ENV/bin/python
  python -m benchmarks.inversion --case=resnet18_relu --breaching_python=ENV/bin/python
  python -m benchmarks.inversion --case=lenet --tune

Both sides attack the gradient of the same untrained network (`peers/attacked.py`) for the same
images, with Geiping et al.'s attack (cosine distance, total variation, signed Adam, a box), as
many steps and the same weight of total variation, unless --peer_tv says otherwise. Their starting
noise differs. --tune tries weights on images that are not reported. ENV (Python 3.11):
`pip install torch==2.13.0 torchvision==0.28.0 breaching==0.1.2 lpips`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import attacked, measuring
from primia_jax.attacks import inversion, priors, scores, updates

_CASE = flags.DEFINE_enum(
  "case", "lenet", ["lenet", "resnet18_relu", "resnet18_sigmoid"], "The attacked network."
)
_DATA = flags.DEFINE_string("data", "../shared/data/mednist_64.tar", "Folder or tar of MedNIST.")
_IMAGES = flags.DEFINE_integer(
  "images", None, "Images attacked; by default 8, of a ResNet 3, to tune 4.", lower_bound=1
)
_STEPS = flags.DEFINE_integer(
  "steps", None, "Of an attack; by default 1,000, of a ResNet 200.", lower_bound=8
)
_TV = flags.DEFINE_float("tv", None, "Weight of total variation; by default the tuned one.")
_PEER_TV = flags.DEFINE_float("peer_tv", None, "breaching's own weight (its default is 0.2).")
_RESTARTS = flags.DEFINE_integer("restarts", 8, "Restarts side by side; 1 for none.", lower_bound=1)
_TUNE = flags.DEFINE_bool("tune", False, "Only try weights, on images that are not reported.")
_LIMIT = flags.DEFINE_float("limit", 400.0, "Seconds after which no further image is attacked.")
_BREACHING = flags.DEFINE_string(
  "breaching_python", None, "Interpreter of an environment with breaching."
)

CANDIDATES, TUNING = 500, 4
# by --tune, of 100 steps and two images with ReLU; not tuned with a sigmoid
TUNED = {"lenet": 1e-1, "resnet18_relu": 1.0, "resnet18_sigmoid": 1.0}
WEIGHTS = (1e-3, 1e-2, 1e-1, 1.0)
SHAPE = (1, 32, 32, 3)


def attack(case: str, steps: int, num_restarts: int):
  """(key, image [1, H, W, C], label [1], weight of total variation) -> Found; jitted."""
  params, _, loss_fn = attacked.network(case)
  simulate = updates.gradient(loss_fn)
  # breaching's step size is 0.1 in standardised units
  settings = inversion.Settings(steps=steps, rate=0.1 * attacked.STD)

  def run(params, key, image, label, weight):
    made = inversion.inversion(
      simulate,
      inversion.pixels(SHAPE),
      settings,
      lambda _, images: weight * priors.total_variation(images),
    )
    seen = updates.Seen(params, {}, None, label)
    seen = seen._replace(update=simulate(seen, image))
    return inversion.run(made, key, seen, num_restarts)

  compiled = jax.jit(run)
  return lambda *args: compiled(params, *args)


def tune(case: str, steps: int, num_images: int, images: np.ndarray, labels: np.ndarray):
  run = attack(case, steps, 1)
  for weight in WEIGHTS:
    psnr = []
    for i in range(-num_images, 0):
      found = run(jax.random.key(i % 1000), images[i][None], labels[i][None], jnp.float32(weight))
      psnr.append(float(scores.psnr(inversion.selected(found), images[i][None])[0]))
    measuring.say(f"{case}, tuning, total variation {weight}: PSNR", psnr, "dB", None)


def quality(name: str, found: np.ndarray, truth: np.ndarray, among: np.ndarray, **more) -> float:
  """Prints PSNR, SSIM and identification of `found` [M, H, W, C]; returns the mean PSNR."""
  mean = float(np.mean(scores.psnr(found, truth)))
  measuring.say(f"{name}: PSNR", scores.psnr(found, truth).tolist(), "dB", None, value=mean, **more)
  ssim = scores.ssim(found, truth)
  measuring.say(f"{name}: SSIM", ssim.tolist(), "SSIM", None, value=float(ssim.mean()), **more)
  named = scores.identify(found, among, np.arange(len(found)))
  measuring.say(
    f"{name}: identification among {len(among)}",
    named.found.astype(float).tolist(),
    "rate",
    None,
    value=named.rate,
    interval=[round(x, 4) for x in named.interval],
    chance=named.chance,
    **more,
  )
  return mean


def main(_):
  case, is_small = _CASE.value, _CASE.value == "lenet"
  steps = _STEPS.value or (1000 if is_small else 200)
  wanted = _IMAGES.value or (8 if is_small else 3)
  weight = TUNED[case] if _TV.value is None else _TV.value
  images, labels = attacked.images(_DATA.value, "all", 32, 3)
  if _TUNE.value:
    tune(case, steps, _IMAGES.value or TUNING, images, labels)
    return
  turns = [-1, *range(wanted)]  # the warm-up attacks an image that is not reported
  found: dict[str, list] = {"one": [], "several": []}

  def ours(name: str, num_restarts: int):
    run, rounds = attack(case, steps, num_restarts), iter(turns)

    def one_round():
      i = next(rounds)
      got = run(jax.random.key(i + 1), images[i][None], labels[i][None], jnp.float32(weight))
      found[name].append((i, got))
      return got

    return measuring.timed(one_round)

  contestants = {"one": ours("one", 1)}
  if _RESTARTS.value > 1:
    contestants["several"] = ours("several", _RESTARTS.value)
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    source = pathlib.Path(folder) / "images.npz"
    at = images[np.array(turns)].transpose(0, 3, 1, 2)
    np.savez(source, images=at, labels=labels[np.array(turns)])
    if _BREACHING.value:
      theirs = weight * attacked.STD if _PEER_TV.value is None else _PEER_TV.value
      # as many threads as JAX has cores, also under `taskset`
      arguments = (case, source, folder, steps, theirs, len(os.sched_getaffinity(0)))
      script, patience = "inversion_breaching.py", max(150.0, _LIMIT.value)
      made = measuring.peer(_BREACHING.value, script, len(turns), *arguments, patience=patience)
      peer = stack.enter_context(made)
      contestants["breaching"] = peer.rounds
    else:
      measuring.skip(f"{case}: breaching", "no --breaching_python given")
    costs = measuring.alternate(contestants, wanted, _LIMIT.value)
    done = len(costs["one"])
    if _BREACHING.value:
      their_images = np.stack(
        [np.load(f"{folder}/{i + 1}.npy").transpose(1, 2, 0) for i in range(done)]
      )
  what = f"{case}, {steps} steps, total variation {weight}"
  truth, among = images[:done], images[:CANDIDATES]
  scale = 1e3 / steps
  measuring.report(f"{what}: ours", costs["one"], unit="ms/step", scale=scale)
  single = [got for i, got in found["one"] if i >= 0]
  mine = quality(
    f"{what}: ours", np.stack([inversion.selected(f)[0] for f in single]), truth, among
  )
  if _RESTARTS.value > 1:
    told = f"{what}: {_RESTARTS.value} restarts"
    measuring.report(told, costs["several"], unit="ms/step", scale=scale)
    most = 4 if is_small else None
    measuring.report_ratio(f"{told}, over one", costs["several"], costs["one"], target=most)
    several = [got for i, got in found["several"] if i >= 0]
    chosen = np.stack([inversion.selected(f)[0] for f in several])
    quality(f"{told}, selected by the attacker", chosen, truth, among)
    tops = [
      f.images[int(scores.psnr(f.images, x[None, None]).argmax()), 0]
      for f, x in zip(several, truth, strict=True)
    ]
    quality(f"{told}, best by the truth", np.stack(tops), truth, among)
  if _BREACHING.value:
    told = f"{what}: breaching, total variation {theirs}"
    measuring.report(told, costs["breaching"], unit="ms/step", scale=scale, peer=peer.versions)
    least = 0.05 if is_small else 1 / 3
    measuring.report_ratio(
      f"{what}: ours over breaching", costs["one"], costs["breaching"], target=least
    )
    other = quality(told, their_images, truth, among)
    gap = [mine - other]
    measuring.say(f"{what}: mean PSNR, ours less breaching's", gap, "dB", 0.0, at_least=True)


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
