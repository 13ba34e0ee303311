"""A page for the clinic's own machine: drop an image, see the phases pass, and the answer.

It listens on 127.0.0.1 alone. Its address holds a token of 256 bits that is drawn at each start,
so another user of the machine, or a page of another site in the same browser, finds nothing. A
question must also come from this page (Origin), and every request must name this host, so that no
foreign name that resolves to 127.0.0.1 reaches it. The page loads nothing from anywhere, and the
browser is told so (Content-Security-Policy). Nothing is kept; the token is in no log.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import http.server
import json
import pathlib
import secrets
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from primia_jax.clinic import asking
from primia_jax.clinic.asking import Ask, Model

_HTML = pathlib.Path(__file__).parent / "page.html"
_SECONDS = 30.0  # that a browser may be silent
_POLICY = (
  "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
  "img-src data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


@contextlib.contextmanager
def serve(
  model: Model,
  ask: Ask,
  learned: Sequence[tuple[str, str]],
  port: int = 0,
  warning: str = asking.WARNING,
) -> Iterator[str]:
  """Serves the page for as long as the context lasts; gives its address, with the token.

  Args:
    model: what is asked.
    ask: asks; one image at a time.
    learned: who learns what, as (who, what), to be shown with each answer.
    port: 0 takes any free one.
    warning: what stands above everything.

  Raises:
    OSError: the port is taken.
  """
  token, one = secrets.token_urlsafe(32), threading.Lock()

  class Handler(http.server.BaseHTTPRequestHandler):
    timeout = _SECONDS
    server_version, sys_version = "primia_jax", ""

    def do_GET(self) -> None:
      if self._is_known("/"):
        nonce = secrets.token_urlsafe(16)
        self._send(200, _html(model, learned, warning, nonce), "text/html; charset=utf-8", nonce)

    def do_POST(self) -> None:
      if not self._is_known("/ask"):
        return
      if self.headers.get("Origin") not in self._origins():
        self._send(403, b"a question must come from this page\n")
        return
      if self.headers.get("Content-Type") != "application/octet-stream":
        self._send(415, b"send the file as application/octet-stream\n")
        return
      length = self.headers.get("Content-Length", "")
      if not (length.isascii() and length.isdigit()):
        self._send(411, b"the length of the file is missing\n")
      elif int(length) > asking.LONGEST:
        said = f"the file has more than {asking.LONGEST >> 20} MiB; send single images\n"
        self._send(413, said.encode())
      elif not one.acquire(blocking=False):
        self._send(409, b"another image is being asked about; wait for its answer\n")
      else:
        try:
          self._answer(self.rfile.read(int(length)))
        finally:
          one.release()

    def _answer(self, data: bytes) -> None:
      self._begin(200, "application/x-ndjson")
      self.end_headers()

      def tell(**line: Any) -> None:
        self.wfile.write(json.dumps(line).encode() + b"\n")
        self.wfile.flush()

      try:
        image = asking.image(model, data, "the file")
        tell(seen=base64.b64encode(image.tobytes()).decode())
        tell(answer=_said(ask(image, lambda phase: tell(phase=phase))))
      except ConnectionError:
        return  # the page was closed; whatever was used up stays so
      except (ValueError, LookupError, RuntimeError, OSError) as error:
        tell(error=str(error))
      except Exception as error:  # an error in the code: where it is, is for the terminal
        where = "".join(traceback.format_tb(error.__traceback__))  # its text might quote the image
        print(f"{where}{type(error).__name__}", file=sys.stderr)
        tell(error="an error in the program; the terminal says which")

    def _is_known(self, end: str) -> bool:
      hosts = [origin.removeprefix("http://") for origin in self._origins()]
      if self.headers.get("Host") not in hosts:
        self._send(421, b"another host is meant\n")
      elif not hmac.compare_digest(self.path.encode(), f"/{token}{end}".encode()):
        self._send(404, b"there is nothing here; use the whole address that the program printed\n")
      else:
        return True
      return False

    def _origins(self) -> tuple[str, str]:
      number = self.server.server_address[1]  # type: ignore[index]
      return f"http://127.0.0.1:{number}", f"http://localhost:{number}"

    def _send(self, status: int, body: bytes, kind: str = "text/plain", nonce: str = "") -> None:
      self._begin(status, kind, nonce)
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def _begin(self, status: int, kind: str, nonce: str = "") -> None:
      self.close_connection = True
      self.send_response(status)
      self.send_header("Content-Type", kind)
      self.send_header("Content-Security-Policy", _POLICY.format(nonce=nonce or "none"))
      for name, value in (
        ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"),
        ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"), ("Connection", "close"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
      ):  # fmt: skip
        self.send_header(name, value)

    def log_message(self, format: str, *args: Any) -> None:
      """Nothing: a line would hold the token."""

  server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
  server.daemon_threads = True
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_address[1]}/{token}/"
  finally:
    server.shutdown()
    server.server_close()
    thread.join()


def _html(model: Model, learned: Sequence[tuple[str, str]], warning: str, nonce: str) -> bytes:
  facts = {
    "name": model.name,
    "version": model.version,
    "classes": model.label_names,
    "size": model.size,
    "channels": model.channels,
    "learned": learned,
    "warning": warning,
    "longest": asking.LONGEST,
  }
  # "<" would end the script; in a JSON string it may be written so.
  text = json.dumps(facts).replace("<", "\\u003c")
  return _HTML.read_text("utf-8").replace("{{nonce}}", nonce).replace("{{facts}}", text).encode()


def _said(answer: asking.Answer) -> dict[str, Any]:
  likely = answer.probabilities
  return {
    "label": int(answer.label),
    "probabilities": None if likely is None else [float(p) for p in likely],
    "seconds": {name: float(value) for name, value in answer.seconds.items()},
    "bytes": {name: int(value) for name, value in answer.num_bytes.items()},
    "rounds": int(answer.rounds),
  }
