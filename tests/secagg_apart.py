"""Sites of a run, each with its own exchange in a thread: what tests of the exchange share."""

import threading

from primia_jax.secagg import exchange, keys, transport


class Killed(Exception):
  """The end of a site's process."""


class Apart:
  """Exchanges of some sites, and what each of them did in a thread."""

  def __init__(self, num_sites, timeout=300.0):  # a timeout that is spent fails `run`
    server, own = keys.identity(), [keys.identity() for _ in range(num_sites)]
    listener = transport.listen()
    host = transport.Host(listener, num_sites, timeout, server)
    pinned = {i: one.public for i, one in enumerate(own)}
    make = lambda i: exchange.Exchange(
      listener.getsockname(),
      i,
      exchange.Pinned(own[i], pinned, server.public),
      b"test",
      timeout,
      None if i else host,
    )
    self.exchanges = [make(i) for i in range(num_sites)]
    self.results, self.errors = {}, {}

  def run(self, call):
    """call(site, its exchange) for each site in a thread, to the end of all."""

    def one(i):
      try:
        self.results[i] = call(i, self.exchanges[i])
      except Exception as e:
        self.errors[i] = e
        self.exchanges[i].close()  # as the end of a process does

    threads = [
      threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(self.exchanges))
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(60)
      assert not thread.is_alive()
    for e in self.exchanges:
      e.close()
    return self
