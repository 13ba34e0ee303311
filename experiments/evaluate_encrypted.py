"""Scores a vendor's secret model on a hospital's secret labelled images: only the score is opened.

  primia-score --checkpoint=runs/first --data=folder:PATH --vendor_dir=V --hospital_dir=H

What is opened is the confusion matrix, whether accuracy reaches a threshold (one bit), or a ROC in
bins; to the hospital, the vendor or both. Nobody sees an image, a label, a prediction or the counts
of one batch. This process simulates both parties and the dealer, so it protects nothing by itself.

  primia-score --connect=HOST:PORT --folder=hospital --model=chest-score --data=folder:PATH

This is a hospital: it scores a model at its owner's server (primia-publish --score, primia-serve).
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import numpy as np
from absl import flags

from primia_jax import metrics
from primia_jax.mpc import pricing, scoring

from . import encrypted, inputs, model_files, registers, running, scored, settings, versions
from .configs.data import Data
from .folders import private, write_private
from .planned import Connect, Infer, check_connect

settings.define_flags(scored.Score)
settings.define_flags(Data)
settings.define_flags(Connect)
FLAGS = flags.FLAGS
FLAGS.set_default("data", "")
flags.adopt_module_key_flags(settings)


def main() -> None:
  s, connect = settings.from_flags(scored.Score), settings.from_flags(Connect)
  check_connect(FLAGS)
  if not connect.connect:
    scored.check(s)
  if not FLAGS.data or FLAGS.site_data:
    raise ValueError(
      f"data={FLAGS.data!r}, site_data={FLAGS.site_data!r}: name the hospital's labelled images "
      "with --data, such as --data=folder:PATH"
    )
  if connect.connect:
    _ask(connect, s)
    return
  model, weights, names, model_config = encrypted.load_model(s.checkpoint)
  model_files.take_form(FLAGS, s.checkpoint, model_config)
  config = settings.from_flags(Data)
  inputs.source(config)
  data, _ = inputs.images_to_test(config, 0, names)
  images = np.asarray(data.images)
  given = Infer(
    checkpoint=s.checkpoint, calibration=s.calibration, calibration_images=s.calibration_images,
    grey_bits=config.grey_bits, ignore=config.ignore,
  )  # fmt: skip
  calibration, source = encrypted.calibration_images(given, model_config, names)

  hospital, vendor = (pathlib.Path(d).expanduser() for d in (s.hospital_dir, s.vendor_dir))
  marks = registers.marks(hospital, images)
  work = scored.task(s, model, data, marks)
  size, _, channels = model_config.image_shape
  print(
    "Encrypted evaluation, simulated: vendor, hospital and dealer run in this one process, which "
    "sees\neverything. In the code they are separate, and each is given only what its role holds.\n"
  )
  print(f"Vendor    {model_config.name} from {s.checkpoint}, {size} x {size} x {channels}")
  print(f"Hospital  {len(images)} labelled images of {data.name}, {s.batch} in a run")
  for what, text in data.notes.items():
    print(f"          {what}: {text}")
  print(f"Opened    {_opened(s)}, to {_receivers(s)}")
  print(f"Calibrating on {source} and choosing the ring ...", flush=True)
  start = time.perf_counter()
  plan = scored.make_plan(s, work, model, weights, calibration)
  planning = time.perf_counter() - start
  if len(images) > (most := scoring.most_images(plan)):
    raise ValueError(
      f"data={config.data} has {len(images)} images, but a ring of {plan.config.num_bits} bits "
      f"with {plan.config.fraction_bits} of fraction counts {most}; use --ring_bits=64"
    )
  left = registers.charge(
    vendor, registers.model_digest(weights), f"{_opened(s)}, to {_receivers(s)}", marks,
    s.query_budget, "" if s.opened_to == "hospital" else "vendor",
  )  # fmt: skip
  print(f"\nThe plan, which all see, for {s.batch} images:\n\n{plan}\n\n{_who_learns_what(s)}\n")
  print(f"Budget    {len(images)} queries charged, one for each image; {left} are left", flush=True)
  result = scored.run(plan, s, work, weights, images)
  result.seconds["calibrate and plan"] = planning
  print(f"\n{_shown(s, work, result)}\n\n{_times(result)}")
  if s.check:
    print(f"\n{_checked(plan, s, work, weights, images, result)}")
  if s.output_dir:
    _write(s, work, result, plan, len(images))


def _ask(connect: Connect, given: scored.Score) -> None:
  """A hospital asks a vendor's server."""
  try:
    from . import scored_multiprocess  # here, because only this needs gRPC
  except ImportError as error:
    raise ValueError(str(error)) from error
  names = {field.name for field in dataclasses.fields(scored.Score)}
  of_vendor = names - set(scored_multiprocess.OWN)
  for name in sorted(of_vendor):
    if FLAGS[name].present:
      raise ValueError(
        f"{name} with connect: the vendor has decided it with primia-publish --score; leave it out"
      )
  folder, received, s = scored_multiprocess.received(connect, given)
  about = received.about
  model_files.set_form(FLAGS, about.image_size, about.channels, about.ct_window, about.grey_bits)
  config = settings.from_flags(Data)
  inputs.source(config)
  what = scored_multiprocess.asked(connect, folder, received, s, config)
  print(
    f"Server    {connect.connect}, model {connect.model}, version {about.version}\n"
    f"          {about.intended_use}\n"
    f"Hospital  {len(what.marks)} labelled images of {what.data.name}, {s.batch} in a run"
  )
  for name, text in what.data.notes.items():
    print(f"          {name}: {text}")
  print(f"Opened    {_opened(s)}, to {_receivers(s)}\n\n{_who_learns_what(s, True)}\n", flush=True)
  answer = scored_multiprocess.run(connect, what)
  result = scored.Result(answer.counts, None, answer.seconds, answer.runs)
  if answer.counts is None:
    print(f"\nOpened to the vendor alone, of {len(what.marks)} images.\n\n{_times(result)}")
  else:
    print(f"\n{_shown(s, what.work, result)}\n\n{_times(result)}")
  print(
    f"\nA run took {len(answer.sizes)} rounds and {pricing.bytes_text(sum(answer.sizes))} each way."
  )
  if s.output_dir:
    _write(s, what.work, result, what.plan, len(what.marks))


def _write(s, work, result, plan, num: int) -> None:
  folder = private(pathlib.Path(s.output_dir).expanduser())
  write_private(folder / "plan.txt", f"{plan}\n")
  summary = _summary(s, work, result, plan, num)
  write_private(folder / "score.json", json.dumps(summary, indent=2) + "\n")
  print(f"\nscore.json and plan.txt are in {folder}")


def _opened(s: scored.Score) -> str:
  return {
    "confusion": "the confusion matrix",
    "accuracy": f"one bit: whether accuracy reaches {s.threshold:g}",
    "roc": f"how many images of {s.positive}, and of others, reach each of {s.bins} thresholds",
  }[s.opened]


def _receivers(s: scored.Score) -> str:
  return {"both": "hospital and vendor"}.get(s.opened_to, f"the {s.opened_to} alone")


def _who_learns_what(s: scored.Score, is_multiprocess: bool = False) -> str:
  what = "that bit" if s.opened == "accuracy" else "these counts"
  learns = lambda who: f"{what}; " if s.opened_to in (who, "both") else ""
  marks, word = (
    ", marks that tell whether an image comes again",
    ("Labels, and that each mark is of its image, are the hospital's word."),
  )
  if is_multiprocess:
    marks, word = (
      "",
      ("Labels are the hospital's word; that the plan counts what it says is the vendor's."),
    )
  return (
    "Who learns what, if all follow the protocol and the dealer colludes with neither party:\n"
    f"  hospital  {learns('hospital')}the plan; nothing else about the weights\n"
    f"  vendor    {learns('vendor')}the number of images{marks};\n"
    "            nothing else about images or labels\n"
    "  dealer    the plan; neither weights nor images nor labels nor the result\n"
    f"{word}"
  )


def _shown(s: scored.Score, work: scored.Task, result: scored.Result) -> str:
  to = f"Opened to {_receivers(s)}"
  if result.counts is None:
    return f"{to}: accuracy {'reaches' if result.bit else 'is below'} {s.threshold:g}"
  width = max(len("true"), *map(len, work.rows))
  cells = [max(5, len(name)) for name in work.columns]
  lines = [" " * width + "".join(f"  {n:>{c}}" for n, c in zip(work.columns, cells, strict=True))]
  if s.opened == "roc":  # a row for each threshold
    lines = [f"{'probability':>11}  " + "  ".join(f"{name:>{width}}" for name in work.rows)]
    for name, column in zip(work.columns, result.counts.T, strict=True):
      lines.append(f"{name:>11}  " + "  ".join(f"{n:>{width}}" for n in column))
    lines += [
      "",
      f"area under the curve, by straight lines between bins: {_area(result.counts):.3f}",
    ]
    return f"{to}: images whose probability of {s.positive} is at least\n\n" + "\n".join(lines)
  for name, row in zip(work.rows, result.counts, strict=True):
    lines.append(
      f"{name:<{width}}" + "".join(f"  {n:>{c}}" for n, c in zip(row, cells, strict=True))
    )
  if work.rows == work.columns:
    accuracy, mcc = metrics.accuracy(result.counts), metrics.mcc(result.counts)
    lines += ["", f"accuracy {float(accuracy):.3f}   MCC {float(mcc):.3f}"]
  return f"{to}: rows true, columns predicted\n\n" + "\n".join(lines)


def _area(counts: np.ndarray) -> float:
  """Under the ROC curve of [2, T + 1] counts, whose last column holds all images."""
  rates = counts / counts[:, -1:]
  false, true = (np.concatenate([[0.0], row[-2::-1], [1.0]]) for row in rates)
  return float(np.trapezoid(true, false))


def _times(result: scored.Result) -> str:
  rows = [f"  {phase:<24} {seconds:8.2f} s" for phase, seconds in result.seconds.items()]
  total = sum(result.seconds.values())
  head = f"Time of {result.runs} runs of the protocol; the first batch also compiles"
  return "\n".join([head, *rows, f"  {'total':<24} {total:8.2f} s"])


def _checked(plan, s, work, weights, images, result) -> str:
  integers, plain = scored.in_the_clear(plan, s, work, weights, images)
  if result.counts is None:
    least = scored.least_right(s, len(images))
    same, alike = (bool(v.sum() >= least) == result.bit for v in (integers, plain))
    apart = "" if alike else "; --target_error makes the logits finer"
  else:
    same = np.array_equal(integers, result.counts)
    alike = np.array_equal(plain, result.counts)
    apart = f": {int(np.abs(plain - result.counts).sum())} counts differ" * (not alike)
  return (
    "Checked in the clear: every value stays within its planned range.\n"
    f"  the same as the integer model: {'yes' if same else 'NO, which is an error in the code'}\n"
    f"  the same as float32, to the last count: {'yes' if alike else 'no'}{apart}"
  )


def _summary(s, work, result, plan, num: int) -> dict[str, Any]:
  return {
    "opened": s.opened,
    "opened_to": s.opened_to,
    "threshold": s.threshold if s.opened == "accuracy" else None,
    "rows": list(work.rows),
    "columns": list(work.columns),
    "counts": None if result.counts is None else result.counts.tolist(),
    "reached": result.bit,
    "images": num,
    "images_in_a_run": s.batch,
    "runs": result.runs,
    "bytes_and_rounds_of_a_run": pricing.total(plan.circuit)._asdict(),
    "seconds": result.seconds,
    "config": dataclasses.asdict(plan.config),
    "versions": versions.found(),
  }


if __name__ == "__main__":
  running.start(main, keeps_small=True)
