"""How a program begins and ends, also one that needs no JAX: help, bad flags and failed work."""

from __future__ import annotations

import logging as python_logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from . import helping, presets, refusals

FLAGS = flags.FLAGS


def start(
  main: Callable[..., None],
  prepare: Callable[[], None] = lambda: None,
  commands: Sequence[str] = (),
) -> None:
  """Runs a binary: `--help` explains it, and bad settings and failed runs end it with their reason,
  not with a traceback.

  Args:
    main: the binary's work.
    prepare: what goes before it, once flags are read.
    commands: the first argument is one of these words, which `main` is given.
  """

  def parsed(arguments: list[str]) -> list[str]:
    if asked := helping.asked(arguments):
      print(helping.text(main.__module__, is_full=asked == "helpfull"))
      sys.exit(0)
    try:
      chosen = [refusals.command(arguments, commands)] if commands else []
      rest = arguments[:1] + arguments[1 + len(chosen) :]
      return [*refusals.parse(presets.expanded(rest)), *chosen]
    except ValueError as error:
      sys.exit(f"error: {error}")

  def guarded(arguments: list[str]) -> None:
    if not FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)
      silence_pydicom()
      # orbax logs a traceback of what it raises, and that is said below
      logging.get_absl_handler().addFilter(_has_no_traceback)
    prepare()
    try:
      main(*arguments[1:])
    except KeyboardInterrupt:
      sys.exit("\nstopped; start again with the same flags to continue from what was saved last")
    except refusals.REFUSALS as error:
      logging.debug("traceback:", exc_info=True)  # shown with --verbosity=1
      sys.unraisablehook = lambda _: None  # threads that were still writing may fail as well
      sys.exit(f"error: {refusals.said(error)}")

  app.run(guarded, flags_parser=parsed)


def silence_pydicom() -> None:
  """Keeps from the terminal what pydicom notes without a file's name: oddities of files that it
  reads, and tracebacks of those that it cannot, which `dicom` refuses by name.
  """
  python_logging.getLogger("pydicom").propagate = False
  warnings.filterwarnings("ignore", module="pydicom")


def _has_no_traceback(record: Any) -> bool:
  return not record.exc_info
