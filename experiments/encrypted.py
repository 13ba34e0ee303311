"""What `infer_encrypted` is made of: settings, calibration, the choice of the ring, and the phases run one by one."""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from experiments import inputs, learning, settings
from primia_jax import models, prng
from primia_jax.data.folder import read_images
from primia_jax.mpc import fitting, planning, protocol, secret
from primia_jax.mpc.circuit import Config
from primia_jax.mpc.gates import COMPARISONS
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.types import Array, PyTree

OWNERS = ("model_owner", "data_owner")
OUTPUTS = ("probabilities", "label")
PRNGS = ("chacha20",)
_NETWORKS = {"lan": planning.LAN, "wan": planning.WAN}
_CALIBRATION_BATCH = 8  # images at a time; the ranges do not depend on it
_FRACTION_BITS = range(24, 4, -2)  # the finest that fits is taken where only the ring is given


def _(default: Any, text: str) -> Any:
  return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Infer:
  """The flags of `infer_encrypted`."""

  checkpoint: str = _("", "model owner: folder of the finished training run")
  images: str = _("", "data owner: an image file (PNG, JPEG, TIFF, BMP, DICOM), a folder or a tar of them")
  output: str = _(
    "probabilities",
    "what the data owner learns: probabilities (from the logits, revealed to it alone), or label (only the class, found "
    "under encryption)",
  )
  output_dir: str = _("", "folder for predictions.csv, plan.txt and costs.json; created; empty writes no files")
  check: bool = _(False, "also compute in the clear: compare with float32 and look for values beyond their range")
  comparison: str = _("tables", "how signs are found: tables (little dealt, more rounds) or fss (more dealt, few rounds)")
  ring_bits: int = _(0, "bits of a shared number, 8 to 64; 0 chooses by target_error")
  fraction_bits: int = _(0, "bits after the binary point; 0 chooses: by target_error, or the most that fit ring_bits")
  target_error: float = _(1e-3, "largest error of a logit wanted, on the calibration images")
  exact: bool = _(True, "exact truncation and comparison; --noexact is cheaper, each value off by one unit at most")
  margin: float = _(2.0, "factor by which values may exceed the largest seen in calibration")
  calibration: str = _(
    "run", "model owner: images to calibrate on: run (the training run's validation images), phantom, folder:PATH, "
    "npz:PATH or tfds:NAME"
  )  # fmt: skip
  calibration_images: int = _(32, "how many of them")
  batch: int = _(1, "images in one run of the protocol")
  network: str = _("wan", "link to estimate the time of communication for: lan, wan, or RTT_MS,MBIT such as 40,100")
  prng: str = _("chacha20", "what masks are drawn with: chacha20")


def check(s: Infer) -> None:
  """Refuses what is wrong in the flags alone, before any work.

  Raises:
    ValueError, FileNotFoundError: naming the flag and the cure.
  """
  if not s.checkpoint:
    raise ValueError("checkpoint is empty; name the folder of a training run, such as --checkpoint=runs/first")
  if not s.images:
    raise ValueError("images is empty; name an image, a folder or a tar, such as --images=xray.png")
  if not os.path.exists(s.images):
    raise FileNotFoundError(f"images={s.images}: there is no such file or folder; check the path")
  choices = {"output": OUTPUTS, "comparison": tuple(COMPARISONS), "prng": PRNGS}
  for name, allowed in choices.items():
    if getattr(s, name) not in allowed:
      raise ValueError(f"{name}={getattr(s, name)!r}; use {' or '.join(allowed)}")
  if s.ring_bits and not 8 <= s.ring_bits <= 64:
    raise ValueError(f"ring_bits={s.ring_bits}; use 8 to 64, or 0 to have it chosen by target_error")
  most = (s.ring_bits or 64) // 2 - 1
  if s.fraction_bits and not 0 < s.fraction_bits <= most:
    raise ValueError(f"fraction_bits={s.fraction_bits}; use 1 to {most}, less than half the ring, or 0 to choose")
  for name in ("target_error", "calibration_images", "batch"):
    if not getattr(s, name) > 0:
      raise ValueError(f"{name}={getattr(s, name)} must be positive")
  if not s.margin >= 1:
    raise ValueError(f"margin={s.margin} must be at least 1: ranges that calibration saw must fit")
  kind, _, where = s.calibration.partition(":")
  if s.calibration not in ("run", "phantom") and not (kind in ("folder", "npz", "tfds") and where):
    raise ValueError(f"calibration={s.calibration!r}; use run, phantom, folder:PATH, npz:PATH or tfds:NAME")
  if s.output_dir and os.path.exists(s.output_dir) and not os.path.isdir(s.output_dir):
    raise ValueError(f"output_dir={s.output_dir} is a file; name a folder")
  parse_network(s.network)


def parse_network(text: str) -> planning.Network:
  """Reads "lan", "wan" or "RTT_MS,MBIT".

  Raises:
    ValueError: it is none of these.
  """
  if text in _NETWORKS:
    return _NETWORKS[text]
  try:
    milliseconds, megabits = (float(part) for part in text.split(","))
  except ValueError:
    milliseconds, megabits = -1.0, 0.0
  if not (0 <= milliseconds < math.inf and 0 < megabits < math.inf):
    raise ValueError(f"network={text!r}; use lan, wan, or RTT_MS,MBIT such as 40,100 (40 ms, 100 Mbit/s)")
  return planning.Network(milliseconds / 1e3, megabits * 1e6)


# ---- before anything is dealt


def calibration_images(s: Infer, config: models.ModelConfig, label_names: tuple[str, ...]) -> tuple[np.ndarray, str]:
  """The model owner's images to calibrate on, uint8 [N, H, W, C] spread over the source, and what they are.

  Raises:
    ValueError, FileNotFoundError: the source is wrong or not there.
  """
  size, _, channels = config.image_shape
  kind, _, path = s.calibration.partition(":")
  if kind == "run":
    saved = settings.load(pathlib.Path(s.checkpoint) / "config.json")
    known = {field.name for field in dataclasses.fields(settings.Train)}
    run = settings.Train(**{name: value for name, value in saved.items() if name in known} | {"sites_in_memory": 1})
    try:
      part = inputs.site_images(run).validation
    except (FileNotFoundError, ValueError) as error:
      raise ValueError(f"{error} (the data of the training run; name other images with --calibration)") from error
    images, index = part.dataset.images, np.concatenate(part.sites)
    source = f"validation images of the run ({run.data})"
  else:
    if kind == "folder":  # labelled or not
      _, images = read_images(os.path.expanduser(path), size=size, channels=channels, lazy=True)
    else:
      data = settings.Data(data=s.calibration, image_size=size, channels=channels)
      images = inputs.images_to_test(data, label_names=label_names).images
    index, source = np.arange(len(images)), f"images of {s.calibration}"
  chosen = index[np.linspace(0, len(index) - 1, min(s.calibration_images, len(index))).astype(int)]
  return np.asarray(images[chosen]), f"{len(chosen)} {source}"


def functions(model: models.Model) -> dict[str, Callable[[PyTree, Array], Array]]:
  """What can be computed under encryption, (weights, normalised images) -> output, by the name of the output."""
  logits = lambda weights, images: model.apply(*weights, images, train=False)[0]
  return {"probabilities": logits, "label": lambda weights, images: jnp.argmax(logits(weights, images), axis=-1)}


def make_plan(s: Infer, model: models.Model, weights: PyTree, calibration: np.ndarray) -> planning.Plan:
  """Calibrates, chooses ring and fraction bits where they are left open, and plans.

  Args:
    s: the flags.
    model: the model.
    weights: (parameters, state) of the model owner.
    calibration: uint8 [N, H, W, C].

  Raises:
    ValueError: no ring reaches the target, or the ring asked for is too small.
  """
  examples = [(weights, normalised(part)) for part in batches(calibration, min(len(calibration), _CALIBRATION_BATCH))]
  fns = functions(model)
  base = Config(exact=s.exact, comparison=s.comparison, margin=s.margin)
  if not s.ring_bits and not s.fraction_bits:
    config = fitting.fit(fns["probabilities"], OWNERS, examples, s.target_error, base).config
    candidates = [(config.num_bits, config.fraction_bits)]
  else:
    rings, fractions = [s.ring_bits] if s.ring_bits else [32, 64], [s.fraction_bits] if s.fraction_bits else _FRACTION_BITS
    candidates = [(ring, bits) for ring in rings for bits in fractions if bits < ring // 2]
  fn = fns[s.output]
  ranges = planning.calibrate(fn, OWNERS, examples)
  images = jax.ShapeDtypeStruct((s.batch, *calibration.shape[1:]), jnp.float32)
  why = None
  for ring, bits in candidates:
    try:
      weight_bits = min(base.weight_bits, ring)
      config = dataclasses.replace(base, num_bits=ring, fraction_bits=bits, weight_bits=weight_bits)
      return planning.plan(fn, OWNERS, (weights, images), config, ranges)
    except ValueError as error:
      why = error
  raise ValueError(
    f"ring_bits={s.ring_bits}, fraction_bits={s.fraction_bits}: the model does not fit ({why}); 0 has both chosen"
  )


def normalised(images: np.ndarray) -> Array:
  """uint8 images as the model takes them; public arithmetic that their owner does in the clear."""
  return learning.normalise(jnp.asarray(images))


def batches(images: Any, size: int) -> Iterator[np.ndarray]:
  """Cuts images into batches of one size; the last is filled up with repetitions, which the caller drops."""
  for start in range(0, len(images), size):
    yield images[np.resize(np.arange(start, min(start + size, len(images))), size)]


# ---- the phases


class Clock:
  """Times what is done by phase, and shows it as a progress bar.

  Attributes:
    seconds: by phase, and by (phase, detail).
  """

  def __init__(self, total: int):
    self.seconds: dict[Any, float] = collections.defaultdict(float)
    self._bar = tqdm.tqdm(total=total, bar_format="{desc:<44} {bar:20} {n_fmt}/{total_fmt}  [{elapsed} gone]")

  def __call__(self, phase: str, fn: Callable[[], Any], detail: Any = None, layer: str = "", done: bool = True) -> Any:
    self._bar.set_description_str(f"{phase:<8} {layer[-35:]}")
    start = time.perf_counter()
    out = jax.block_until_ready(fn())
    took = time.perf_counter() - start
    self.seconds[phase] += took
    if detail is not None:
      self.seconds[phase, detail] += took
    self._bar.update(done)
    return out

  def __enter__(self) -> Clock:
    return self

  def __exit__(self, *error: Any) -> None:
    self._bar.set_description_str("stopped" if error[0] else "done")
    self._bar.close()


class Result(NamedTuple):
  """What came of it.

  Attributes:
    outputs: [N, L] logits or [N] classes, as the data owner learns them.
    seconds: by phase; compilation apart under "compile".
    online: seconds by the number of the operation that ends each step, all runs of the protocol together.
    runs: of the protocol.
  """

  outputs: np.ndarray
  seconds: dict[str, float]
  online: dict[int, float]
  runs: int


def infer(plan: planning.Plan, weights: PyTree, images: Any, batch: int) -> Result:
  """Runs model owner, dealer, data owner and both parties' protocol, phase by phase.

  Each phase is given what its role holds and nothing else: shapes stand for the other party's arguments.

  Args:
    plan: of (weights, [batch, H, W, C] normalised images).
    weights: (parameters, state).
    images: [N, H, W, C] uint8.
    batch: images in one run of the protocol.
  """
  shapes = lambda tree: jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), v.dtype), tree)
  image_shapes = jax.ShapeDtypeStruct((batch, *images.shape[1:]), jnp.float32)
  num_steps = len(secret.simulate_steps(plan, {}))
  num_runs = math.ceil(len(images) / batch)
  outputs = []
  with Clock(3 + num_runs * (num_steps + 4)) as clock:
    # once per model
    model_key = prng.random_key()  # the dealer's; the model owner receives it, the data owner does not
    own = clock("encode", lambda: secret.encode(plan, (weights, image_shapes), MODEL_OWNER), layer="weights")
    published = clock("publish", lambda: secret.publish(plan, (weights, image_shapes), model_key, MODEL_OWNER))
    blind = clock("deal", lambda: secret.blinds(plan, model_key), layer="the model's blinds")
    deal = jax.jit(lambda key, blind: secret.deal(plan, key, blind))
    prepares = [jax.jit(lambda *a, party=party: secret.prepare(plan, party, *a)) for party in (MODEL_OWNER, DATA_OWNER)]
    operands, steps = dict(own), []
    for number, part in enumerate(batches(images, batch)):
      first = number == 0
      theirs = clock(
        "encode", lambda: secret.encode(plan, (shapes(weights), normalised(part)), DATA_OWNER), layer="images"  # noqa: B023
      )
      key = prng.random_key()  # the dealer's, of this run alone
      if first:
        deal = clock("compile", lambda: deal.lower(key, blind).compile(), layer="deal", done=False)  # noqa: B023
      dealt = clock("deal", lambda: deal(key, blind))  # noqa: B023
      held = [(protocol.part(dealt, MODEL_OWNER), own, {}), (protocol.part(dealt, DATA_OWNER), theirs, published)]
      if first:
        compile_ = lambda: [f.lower(*a).compile() for f, a in zip(prepares, held, strict=True)]  # noqa: B023
        prepares = clock("compile", compile_, layer="prepare", done=False)
      parties = clock("prepare", lambda: [f(*a) for f, a in zip(prepares, held, strict=True)])  # noqa: B023
      ready = secret.stack(*parties)
      operands.update(theirs)  # in place: the steps read this dictionary, and compiled ones are used again
      steps = steps or secret.simulate_steps(plan, operands)
      env: protocol.Env = {}
      for step in steps:
        layer = plan.circuit.operations[step.last - 1].layer
        advance = lambda step=step, env=env: step.fn(ready, env)  # noqa: B023
        if first:
          clock("compile", advance, layer=layer, done=False)
        env = clock("online", advance, detail=step.last - 1, layer=layer)
      shares = secret.outputs(plan, env)
      answer = clock("online", lambda: secret.reveal(plan, shares), layer="output, to the data owner")  # noqa: B023
      outputs.append(np.asarray(answer))
  seconds = {phase: value for phase, value in clock.seconds.items() if isinstance(phase, str)}
  online = {phase[1]: value for phase, value in clock.seconds.items() if isinstance(phase, tuple)}
  return Result(np.concatenate(outputs)[: len(images)], seconds, online, num_runs)


class Difference(NamedTuple):
  """How encrypted outputs compare with the clear.

  Attributes:
    largest: difference of a logit from float32; None where only the class is known.
    same: images of the same class.
    bitwise: whether the outputs equal the integer model's bit for bit; None where the plan is not exact.
  """

  largest: float | None
  same: int
  bitwise: bool | None


def compare(plan: planning.Plan, model: models.Model, weights: PyTree, images: Any, batch: int, outputs: np.ndarray):
  """Compares with float32 in the clear, and with the integer model, whose ranges it checks.

  Raises:
    ValueError: a value leaves the range planned for it; the message says in which images and layer.
  """
  logits_fn = jax.jit(functions(model)["probabilities"])
  logits, integers = [], []
  for start, part in zip(range(0, len(images), batch), batches(images, batch), strict=True):
    try:
      integers.append(np.asarray(secret.check(plan, (weights, normalised(part)))))
    except ValueError as error:
      raise ValueError(f"images {start} to {min(start + batch, len(images)) - 1}: {error}") from error
    logits.append(np.asarray(logits_fn(weights, normalised(part))))
  wanted, exact = (np.concatenate(parts)[: len(images)] for parts in (logits, integers))
  bitwise = bool(np.array_equal(exact, outputs)) if plan.config.exact else None
  if outputs.ndim == 1:
    return Difference(None, int(np.sum(outputs == wanted.argmax(1))), bitwise)
  return Difference(float(np.abs(outputs - wanted).max()), int(np.sum(outputs.argmax(1) == wanted.argmax(1))), bitwise)


# ---- what it cost


class Layer(NamedTuple):
  """Consecutive steps of one layer: seconds and bytes of one run of the protocol."""

  name: str
  steps: tuple[str, ...]
  seconds: float
  dealt: int
  sent: int
  rounds: int


def layers(plan: planning.Plan, rows: Sequence[planning.Row], result: Result) -> list[Layer]:
  """The rows of a plan by layer, with the mean time measured; what a step computes alone counts to its end's layer."""
  named = [row if row.operation >= 0 else row._replace(layer="output") for row in rows]
  seconds = {number: value / result.runs for number, value in result.online.items()}
  last = len(plan.circuit.operations) - 1
  out: list[Layer] = []
  for row in named:
    took = seconds.pop(row.operation, 0.0) if row.operation >= 0 else seconds.pop(last, 0.0)
    if out and out[-1].name == row.layer:
      old = out.pop()
      out.append(Layer(old.name, (*old.steps, row.what), old.seconds + took, old.dealt + row.dealt,
                       old.sent + row.sent, old.rounds + row.rounds))  # fmt: skip
    else:
      out.append(Layer(row.layer, (row.what,), took, row.dealt, row.sent, row.rounds))
  return out


def published_bytes(plan: planning.Plan) -> int:
  """Bytes of D = W - B, which the data owner receives once per model."""
  owned = [o for o in plan.circuit.operands if o.map is not None and o.owner == MODEL_OWNER]
  return sum(math.prod(o.shape) for o in owned) * plan.config.dtype.itemsize
