"""A server's health and numbers, for its own operator: on loopback only.

Numbers are in Prometheus' text form at `http://127.0.0.1:PORT/metrics`; health is gRPC's own
service (`grpc.health.v1.Health`), without TLS, since nothing but this machine reaches it. Both know
names of clinics and models, and counts; neither knows an image, a share, an output or a key.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

from primia_jax.service import channel, folders  # before grpc, which it sets up
from primia_jax.service.journal import Journal

try:
  import grpc
  import prometheus_client
  from grpc_health.v1 import health, health_pb2, health_pb2_grpc
except ImportError as e:
  raise ImportError("monitoring needs more packages: pip install 'primia-jax[service]'") from e

LOOPBACK = "127.0.0.1"
assert channel  # imported for what it does


@contextlib.contextmanager
def metrics(
  port: int,
  journal: Journal,
  clinics: Sequence[str],
  stocks: Sequence[tuple[str, str, pathlib.Path]],
) -> Iterator[int]:
  """Serves a server's numbers on loopback for as long as the context lasts; gives the port.

  Args:
    port: 0 takes any free one.
    journal: where events are counted.
    clinics: by name.
    stocks: for whom the dealer dealt, for which model, and the folder of these correlations.

  Raises:
    OSError: the port is taken.
  """
  registry = prometheus_client.CollectorRegistry()
  events = prometheus_client.Counter(
    "primia_events", "Events by kind: session, query, answer, refusal, end.",
    ["event", "clinic", "model"], registry=registry,
  )  # fmt: skip
  answered = prometheus_client.Histogram(
    "primia_answer_seconds", "Seconds from the query to the output.", ["model"], registry=registry
  )
  sent = prometheus_client.Counter(
    "primia_sent_bytes", "Bytes sent to clinics in answered inferences.", ["model"],
    registry=registry,
  )  # fmt: skip

  def gauge(name: str, text: str, labels: Sequence[str] = ()) -> prometheus_client.Gauge:
    return prometheus_client.Gauge(name, text, labels, registry=registry)

  gauge("primia_sessions", "Open sessions.").set_function(lambda: journal.sessions)
  left = gauge("primia_budget_images", "Images that a clinic may ask about now.", ["clinic"])
  unused = gauge("primia_correlations", "Unused inferences.", ["clinic", "model"])
  for clinic in clinics:
    left.labels(clinic).set_function(functools.partial(journal.left, clinic))
  for who, model, folder in stocks:
    unused.labels(who, model).set_function(_unused(folder))

  def count(event: str, fields: dict) -> None:
    events.labels(event, fields.get("clinic", ""), fields.get("model", "")).inc()
    if event == "answer":
      answered.labels(fields["model"]).observe(fields["seconds"])
      sent.labels(fields["model"]).inc(fields["bytes"])

  journal.listeners.append(count)
  server, thread = prometheus_client.start_http_server(port, LOOPBACK, registry)
  try:
    yield server.server_port
  finally:
    journal.listeners.remove(count)
    server.shutdown()
    server.server_close()
    thread.join()


def _unused(folder: pathlib.Path) -> Callable[[], int]:
  return lambda: len(folders.unused(folder))


@contextlib.contextmanager
def healthy(port: int) -> Iterator[tuple[int, Callable[[], None]]]:
  """Serves gRPC's health on loopback: gives the port, and what says that the server is stopping.

  Args:
    port: 0 takes any free one.
  """
  states, status = health.HealthServicer(), health_pb2.HealthCheckResponse
  states.set("", status.SERVING)
  server = grpc.server(futures.ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
  health_pb2_grpc.add_HealthServicer_to_server(states, server)
  found = server.add_insecure_port(f"{LOOPBACK}:{port}")
  server.start()
  try:
    yield found, lambda: states.set("", status.NOT_SERVING)
  finally:
    server.stop(None).wait()
