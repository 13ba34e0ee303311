"""A carrier of the messages of sums between threads, and no network."""

import queue
import time

from primia_jax.secagg import carrier


def in_process(sites, timeout):
  """A carrier between threads: the coordinator's end, and each site's.

  Args:
    sites: their numbers.
    timeout: seconds for which a site waits for a request.
  """
  ends = {i: _End(timeout) for i in sites}

  def ask(requests, timeout):
    numbers = {i: ends[i].post(request) for i, request in requests.items()}
    end, answers = time.monotonic() + timeout, {}
    for i, number in numbers.items():
      answer = ends[i].collect(number, end)
      if answer is not None:
        answers[i] = answer
    return answers

  return ask, {i: carrier.Carrier(one.hear, one.say, one.close) for i, one in ends.items()}


class _End:
  """The queues between the coordinator and one site; requests are numbered."""

  def __init__(self, timeout):
    self.timeout, self.asked, self.heard, self.is_closed = timeout, 0, 0, False
    self.requests = queue.Queue()
    self.answers = queue.Queue()

  def post(self, request):
    self.asked += 1
    self.requests.put((self.asked, request))
    return self.asked

  def collect(self, number, end):
    while not (self.is_closed and self.answers.empty()):
      try:
        found, answer = self.answers.get(timeout=max(0.0, end - time.monotonic()))
      except queue.Empty:
        return None
      if found == number or answer is None:
        return answer
    return None

  def hear(self, limit):
    if self.is_closed:
      raise ConnectionError("this site has left the run")
    try:
      self.heard, request = self.requests.get(timeout=self.timeout)
    except queue.Empty:
      raise TimeoutError(f"the coordinator has sent nothing for {self.timeout:g} seconds") from None
    if len(request) > limit:
      raise ValueError(f"malformed message: {len(request)} bytes; the limit is {limit}")
    return request

  def say(self, answer):
    self.answers.put((self.heard, answer))

  def close(self):
    self.is_closed = True
    self.answers.put((0, None))
