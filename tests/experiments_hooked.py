"""Runs a program and writes down which files it opens: `experiments_hooked.py LOG MODULE FLAGS`."""

import os
import runpy
import sys

_EVENTS = ("open", "os.listdir", "os.scandir")


def main():
  log, module, *arguments = sys.argv[1:]
  out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

  def hook(event, given):
    if event in _EVENTS and given and isinstance(given[0], str | bytes | os.PathLike):
      os.write(out, os.fsencode(os.path.abspath(os.fsdecode(given[0]))) + b"\n")

  sys.addaudithook(hook)
  sys.argv = [module, *arguments]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
