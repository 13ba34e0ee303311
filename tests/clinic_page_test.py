"""The page: what a browser of this machine may do, and in a headless one, what a person sees."""

import contextlib
import http.client
import io
import json
import shutil
import socket
import threading
import urllib.parse

import numpy as np
import pytest
from PIL import Image

from primia_jax.clinic import asking, page

MODEL = asking.Model("cnn </script>", "4f1c2a", ("normal", "bacterial", "viral"), 16, 1)
LEARNED = (("you", "the class"), ("the model's owner", "how many images you asked about"))
ANSWER = asking.Answer(
  1, np.array([0.05, 0.8, 0.15]), {"prepare": 0.25, "online": 1.5}, {"sent": 1_500_000}, 53
)


def png(size=32):
  out = io.BytesIO()
  Image.fromarray(np.tile(np.arange(size, dtype=np.uint8) * 7, (size, 1))).save(out, "PNG")
  return out.getvalue()


def ask(image, told):
  assert image.shape == (16, 16, 1)
  for phase in ("both sides prepare", "both sides compute"):
    told(phase)
  return ANSWER


@pytest.fixture
def address():
  with page.serve(MODEL, ask, LEARNED) as address:
    yield urllib.parse.urlsplit(address)


def request(address, method, path, body=None, **headers):
  connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=20)
  given = {name.replace("_", "-"): value for name, value in headers.items()}
  connection.request(method, path, body, given)
  reply = connection.getresponse()
  return reply, reply.read()


def question(address, data, **headers):
  given = {
    "Origin": f"http://127.0.0.1:{address.port}", "Content_Type": "application/octet-stream",
    **headers,
  }  # fmt: skip
  reply, body = request(address, "POST", f"{address.path}ask", data, **given)
  return reply.status, body


def lines_of(body):
  return [json.loads(line) for line in body.splitlines()]


def test_a_question_gets_phases_and_the_answer(address):
  status, body = question(address, png())
  seen, *phases, last = lines_of(body)
  assert status == 200
  assert len(seen["seen"]) == 4 * -(-16 * 16 // 3)
  assert phases == [{"phase": "both sides prepare"}, {"phase": "both sides compute"}]
  assert last["answer"] == {
    "label": 1, "probabilities": [0.05, 0.8, 0.15], "seconds": {"prepare": 0.25, "online": 1.5},
    "bytes": {"sent": 1_500_000}, "rounds": 53,
  }  # fmt: skip


def test_the_page_is_one_file_that_loads_nothing(address):
  reply, body = request(address, "GET", address.path)
  text = body.decode()
  assert reply.status == 200
  policy = reply.headers["Content-Security-Policy"]
  assert policy.startswith("default-src 'none'; script-src 'nonce-")
  assert "{{" not in text
  assert "://" not in text
  assert "cnn \\u003c/script>" in text  # a model's name is no markup
  assert text.count("</script>") == 2
  assert asking.WARNING in text
  nonce = policy.partition("nonce-")[2].partition("'")[0]
  other, _ = request(address, "GET", address.path)
  assert nonce in text
  assert nonce not in other.headers["Content-Security-Policy"]
  for name, value in (
    ("Cache-Control", "no-store"), ("X-Frame-Options", "DENY"), ("Referrer-Policy", "no-referrer"),
  ):  # fmt: skip
    assert reply.headers[name] == value
  assert "Access-Control-Allow-Origin" not in reply.headers


def test_another_site_in_the_same_browser_can_ask_nothing(address):
  """A form or fetch of a foreign page has its own Origin, or none that is ours."""
  port = address.port
  for origin in (
    "http://evil.example",
    f"http://127.0.0.1:{port + 1}",
    "null",
    f"https://127.0.0.1:{port}",
  ):
    assert question(address, png(), Origin=origin)[0] == 403
  reply, _ = request(
    address, "POST", f"{address.path}ask", png(), Content_Type="application/octet-stream"
  )
  assert reply.status == 403  # no Origin at all
  assert question(address, png(), Content_Type="text/plain")[0] == 415
  reply, _ = request(address, "OPTIONS", f"{address.path}ask", Origin="http://evil.example")
  assert reply.status == 501


def test_without_the_token_there_is_nothing(address):
  own = {"Origin": f"http://127.0.0.1:{address.port}", "Content_Type": "application/octet-stream"}
  for path in ("/", "/ask", f"{address.path[:-3]}/", f"{address.path}other", "//ask", "/%00"):
    assert request(address, "GET", path)[0].status == 404
    assert request(address, "POST", path, png(), **own)[0].status == 404
  with page.serve(MODEL, ask, LEARNED) as other:
    assert urllib.parse.urlsplit(other).path != address.path


def test_a_foreign_name_for_this_machine_is_turned_away(address):
  """DNS rebinding: the page of evil.example, whose name now means 127.0.0.1."""
  for host in ("evil.example", f"evil.example:{address.port}", "127.0.0.1"):
    reply, body = request(address, "GET", address.path, Host=host)
    assert reply.status == 421
    assert b"cnn" not in body
  assert request(address, "GET", address.path, Host=f"localhost:{address.port}")[0].status == 200


def test_it_listens_on_this_machine_alone(address):
  others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
  for host in others - {"127.0.0.1"}:
    with pytest.raises(OSError), socket.create_connection((host, address.port), timeout=2):  # noqa: PT011
      pass


def test_files_that_are_none_are_refused_by_name(address):
  assert lines_of(question(address, b"no image")[1])[-1]["error"].startswith("the file")
  assert "error" in lines_of(question(address, png()[:60])[1])[-1]
  headers = {"Content_Length": str(asking.LONGEST + 1)}
  status, body = question(address, b"", **headers)
  assert (status, b"64 MiB" in body) == (413, True)
  assert question(address, b"", Content_Length="-1")[0] == 411
  assert question(address, b"", Content_Length="\xb2")[0] == 411


def test_one_question_at_a_time():
  begun, go_on = threading.Event(), threading.Event()

  def slow(image, told):
    begun.set()
    go_on.wait(20)
    return ANSWER

  with page.serve(MODEL, slow, LEARNED) as text:
    address = urllib.parse.urlsplit(text)
    first = []
    thread = threading.Thread(target=lambda: first.append(question(address, png())))
    thread.start()
    begun.wait(20)
    assert question(address, png())[0] == 409
    go_on.set()
    thread.join()
    assert first[0][0] == 200
    assert question(address, png())[0] == 200


def test_errors_are_told_and_bugs_are_for_the_terminal(capsys):
  def lost(image, told):
    raise LookupError("the clinic has no unused correlations")

  def bug(image, told):
    raise TypeError("a secret detail")

  for fn, said in ((lost, "no unused correlations"), (bug, "the terminal says which")):
    with page.serve(MODEL, fn, LEARNED) as text:
      _, body = question(urllib.parse.urlsplit(text), png())
      assert said in lines_of(body)[-1]["error"]
      assert b"secret detail" not in body
      assert urllib.parse.urlsplit(text).path.strip("/") not in capsys.readouterr().out
  with page.serve(MODEL, ask, LEARNED) as text:
    question(urllib.parse.urlsplit(text), png())
    assert capsys.readouterr() == ("", "")  # a line would hold the token


# ---- in a browser


@contextlib.contextmanager
def browser_page(**options):
  """A page of a headless Chromium."""
  found = shutil.which("chromium") or shutil.which("google-chrome")
  playwright = pytest.importorskip("playwright.sync_api")
  if not found:
    pytest.skip("no Chromium is installed")
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
    try:
      yield browser.new_page(viewport={"width": 900, "height": 1100}, **options)
    finally:
      browser.close()


@pytest.mark.slow
def test_a_person_drops_an_image_and_sees_the_answer(address, tmp_path):
  path = tmp_path / "xray.png"
  path.write_bytes(png())
  foreign, errors = [], []
  with browser_page() as tab:
    tab.on("request", lambda r: foreign.append(r.url) if str(address.port) not in r.url else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    tab.goto(address.geturl())
    assert tab.locator("#answer").is_hidden()
    tab.set_input_files("#file", path)
    tab.wait_for_selector("#answer:not([hidden])")
    assert tab.locator("#label").inner_text() == "bacterial"
    assert tab.locator("#phases li").all_inner_texts() == [
      "both sides prepare",
      "both sides compute",
    ]
    assert "80.0 %" in tab.locator("#classes").inner_text()
    assert "how many images you asked about" in tab.locator("#who").inner_text()
    assert "1.75 s" in tab.locator("#took").inner_text()
    assert "1.5 MB" in tab.locator("#took").inner_text()
    assert asking.WARNING in tab.locator("#warning").inner_text()
    assert tab.evaluate("document.getElementById('seen').width") == 16
    # the same by dropping, and what is no image
    path.write_bytes(b"no image")
    drop = """text => {
      const files = new DataTransfer();
      files.items.add(new File([text], "notes.txt"));
      dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
    }"""
    tab.evaluate(drop, "no image")
    tab.wait_for_selector("#failed:not([hidden])")
    assert "the file" in tab.locator("#error").inner_text()
    assert tab.locator("#answer").is_hidden()
  assert not foreign
  assert not errors


@pytest.mark.slow
def test_a_foreign_page_that_knows_the_address_asks_in_vain():
  """Without a preflight, the request itself arrives; a page of no origin sends it."""
  asked = []

  def watch(image, told):
    asked.append(image)
    return ANSWER

  with page.serve(MODEL, watch, LEARNED) as text, browser_page() as tab:
    url, tried = (
      f"{text}ask",
      """([url, mode, kind]) => fetch(url, {method: "POST", mode,
      body: "x", headers: {"Content-Type": kind}}).then(() => "sent", () => "refused")""",
    )
    assert tab.evaluate(tried, [url, "cors", "application/octet-stream"]) == "refused"
    assert tab.evaluate(tried, [url, "no-cors", "text/plain"]) in ("sent", "refused")
    assert not asked
    tab.goto(text)
    own = """data => fetch("ask", {method: "POST", body: new Uint8Array(data),
      headers: {"Content-Type": "application/octet-stream"}}).then(reply => reply.text())"""
    assert "answer" in tab.evaluate(own, list(png()))  # the page itself may
    assert len(asked) == 1
