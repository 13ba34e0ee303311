"""Sites of a run, each with its own exchange in a thread: what tests of the exchange share."""

import threading

import secagg_carried

from primia_jax.secagg import coordinator, exchange, keys
from primia_jax.secagg import messages as msg


class Killed(Exception):
  """The end of a site's process."""


def messages_of(data):
  """The messages that travel as one, also those in a proposal."""
  found = msg.apart(msg.decode(data))
  inner = [one.masked for one in found if isinstance(one, msg.Proposal) and one.masked]
  return found + [message for one in inner for message in messages_of(one)]


class Apart:
  """Exchanges of some sites, what each of them did in a thread, and what the coordinator did.

  Attributes:
    wire: every message, in both directions.
  """

  def __init__(self, num_sites, timeout=300.0):  # a timeout that is spent fails `run`
    self.server, own = keys.identity(), [keys.identity() for _ in range(num_sites)]
    self.timeout, self.wire = timeout, []
    self.ask, self.carriers = secagg_carried.in_process(range(num_sites), max(2 * timeout, 4.0))
    pinned = {i: one.public for i, one in enumerate(own)}
    self.pinned = [exchange.Pinned(one, pinned, self.server.public) for one in own]
    self.exchanges = [self.make(i, self.pinned[i]) for i in range(num_sites)]
    self.results, self.errors, self.reports, self.failure = {}, {}, [], None

  def make(self, site, pinned, run=b"test"):
    return exchange.Exchange(self.carriers[site], site, pinned, run)

  def recorded(self, requests, timeout):
    answers = self.ask(requests, timeout)
    for data in [*requests.values(), *answers.values()]:
      self.wire += messages_of(data) if data else []
    return answers

  def run(self, call):
    """call(site, its exchange) for each site in a thread, to the end of all."""

    def one(i):
      self.carriers[i].hear(2**20)  # the invitation
      try:
        self.results[i] = call(i, self.exchanges[i])
        self.exchanges[i].close()
      except Exception as e:
        self.errors[i] = e
        self.carriers[i].close()  # as the end of a process does

    def coordinate():
      sites = range(len(self.exchanges))
      try:
        coordinator.coordinate(self.recorded, sites, self.server, self.timeout, self.reports.append)
      except Exception as e:
        self.failure = e

    sites = range(len(self.exchanges))
    calls = [*[(one, i) for i in sites], (coordinate,)]
    threads = [threading.Thread(target=f, args=args, daemon=True) for f, *args in calls]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(60)
      assert not thread.is_alive()
    return self
