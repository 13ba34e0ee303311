"""Programs run in this process, each with its flags as if it were alone in one of its own."""

import contextlib
import importlib
import io
import sys
from typing import NamedTuple

import pytest
from absl import app, flags

from experiments import running


class Done(NamedTuple):
  """What a user sees of a program that has ended."""

  returncode: int
  stdout: str
  stderr: str


@contextlib.contextmanager
def loader():
  """name -> the main function of experiments.name, which is imported anew; only its flags are
  defined besides those from before.
  """

  def of_programs():
    return [name for name in flags.FLAGS if name not in before]

  def load(name):
    for flag in of_programs():
      delattr(flags.FLAGS, flag)
    sys.modules.pop(f"experiments.{name}", None)
    return importlib.import_module(f"experiments.{name}").main

  before = set(flags.FLAGS)
  try:
    yield load
  finally:
    for flag in of_programs():
      delattr(flags.FLAGS, flag)


def ended(main, arguments, patch):
  """What a program gives to `sys.exit`, or an error, of which its user would see a traceback."""
  patch.setattr(sys, "argv", ["program", *arguments])
  patch.setattr(app._register_and_parse_flags_with_usage, "done", False)
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  commands = getattr(sys.modules[main.__module__], "COMMANDS", ())
  try:
    running.start(main, commands=commands)
  except SystemExit as end:
    return end.code
  except Exception as error:
    return error
  return None


def call(name, *arguments):
  """Runs experiments.name to its end, which costs no process, no imports and few compilations.

  An error that would show a traceback is raised.
  """
  out, err = io.StringIO(), io.StringIO()
  with pytest.MonkeyPatch.context() as patch, loader() as load:
    patch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = ended(load(name), [str(argument) for argument in arguments], patch)
  if isinstance(code, Exception):
    raise code
  if isinstance(code, str):  # as `sys.exit` has it
    print(code, file=err)
    code = 1
  return Done(code or 0, out.getvalue(), err.getvalue())
