"""A hospital's program as `primia-train --site=N`, which writes down what each message cost it.

`hospitals` starts it. Each line of `times.jsonl` in the site's folder is of one answer: the seconds
of the site's work since the one before, without waiting, and of these the seconds since the request
came.
"""

import json
import pathlib
import time

from primia_jax.flower import channel

FILE = "times.jsonl"
_SERVE = channel.serve


def timed(folder: pathlib.Path, timeout: float) -> channel.Channel:
  """`channel.serve`, with a line for each answer."""
  end, path = _SERVE(folder, timeout), folder / FILE
  path.unlink(missing_ok=True)
  before = heard = time.monotonic()
  waited = 0.0

  def hear(limit: int) -> bytes:
    nonlocal waited, heard
    begun = time.monotonic()
    request = end.hear(limit)
    heard = time.monotonic()
    waited += heard - begun
    return request

  def say(answer: bytes) -> None:
    nonlocal before, waited
    now = time.monotonic()
    line = {"worked": now - before - waited, "answered": now - heard, "bytes": len(answer)}
    end.say(answer)
    with path.open("a") as file:
      file.write(json.dumps(line) + "\n")
    before, waited = time.monotonic(), 0.0

  return end._replace(hear=hear, say=say)


if __name__ == "__main__":
  from experiments import running, train_federated  # here, because it defines flags

  channel.serve = timed
  running.start(train_federated.main)
