"""A SuperNode whose clock is off: `flower_shifted.py SECONDS ARGUMENTS`."""

import datetime
import importlib
import sys

from flwr.supercore import date

AHEAD = datetime.timedelta(seconds=float(sys.argv.pop(1)))
right = date.now
date.now = lambda: right() + AHEAD
signing = importlib.import_module("flwr.supernode.node_auth_http_interceptor")
assert signing.now is date.now  # which signs the time of each request

if __name__ == "__main__":
  sys.exit(importlib.import_module("flwr.supernode.cli").flower_supernode())
