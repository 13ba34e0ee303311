"""The carrier lets in whom it knows over TLS 1.3, keeps its limits, and names every end."""

import contextlib
import datetime
import pathlib
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from primia_jax.service import certificates, channel, folders
from primia_jax.service.channel import Limits
from primia_jax.service.errors import PeerLate, PeerLost, Refused, SessionEnded


def identity(root, name, who, days=1.0):
  folder = folders.make(root / name)
  certificates.create(folder, who, days)
  return certificates.Identity(
    (folder / certificates.KEY).read_bytes(), (folder / certificates.CERTIFICATE).read_bytes()
  )


@pytest.fixture(scope="module")
def identities(tmp_path_factory):
  root = tmp_path_factory.mktemp("identities")
  return {
    "server": identity(root, "server", "model-owner"),
    "clinic": identity(root, "clinic", "clinic-a"),
    "stranger": identity(root, "stranger", "clinic-a"),  # calls itself the same
    "expired": identity(root, "expired", "clinic-b", -1.0),
  }


def echo(clinic, receive):
  while (message := receive()) is not None:
    yield clinic.encode() + b" " + message


@contextlib.contextmanager
def listening(identities, session=echo, limits=Limits(timeout=5)):  # noqa: B008
  known = {
    "clinic-a": identities["clinic"].certificate,
    "clinic-b": identities["expired"].certificate,
  }
  ends = []
  told = lambda clinic, error: ends.append((clinic, error))
  with channel.listen("127.0.0.1:0", identities["server"], known, session, limits, told) as port:
    yield f"127.0.0.1:{port}", ends


def ask(address, identities, who="clinic", server="server", limits=Limits(timeout=5)):  # noqa: B008
  certificate = identities[server].certificate
  with channel.connect(address, identities[who], certificate, limits) as (send, receive):
    send(b"hello")
    return receive()


def test_a_known_clinic_is_answered_by_its_name(identities):
  with listening(identities) as (address, ends):
    assert ask(address, identities) == b"clinic-a hello"
  assert ends == []


def test_a_stranger_an_expired_certificate_and_a_false_server_get_nothing(identities, monkeypatch):
  with listening(identities) as (address, ends):
    with pytest.raises(Refused, match="clinic-b is valid from"):  # told before it asks
      ask(address, identities, "expired")
    monkeypatch.setattr(certificates, "check_valid", lambda certificate: None)
    for who, server in (("stranger", "server"), ("expired", "server"), ("clinic", "stranger")):
      with pytest.raises(Refused, match="pinned"):
        ask(address, identities, who, server)
    assert ask(address, identities) == b"clinic-a hello"
  assert ends == []  # none of them reached a session


def signed_by(issuer, name):
  """An identity whose certificate another one has signed, and its issuer's that may do so."""
  builder, key = x509.CertificateBuilder(), ec.generate_private_key(ec.SECP256R1())
  now = datetime.datetime.now(datetime.UTC)
  own = issuer or (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), key)
  certificate = (
    builder.subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
    .issuer_name(own[0])
    .public_key(key.public_key())
    .serial_number(x509.random_serial_number())
    .not_valid_before(now - datetime.timedelta(hours=1))
    .not_valid_after(now + datetime.timedelta(days=1))
    .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    .sign(own[1], hashes.SHA256())
  )
  pem = serialization.Encoding.PEM
  private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
  return certificates.Identity(private, certificate.public_bytes(pem)), (certificate.subject, key)


def test_a_certificate_that_a_pinned_one_has_signed_is_not_known(identities, monkeypatch):
  """A clinic that brought an authority's certificate could let others in; TLS does not mind."""
  authority, issuer = signed_by(None, "clinic-c")
  made, _ = signed_by(issuer, "clinic-a")
  known = {"clinic-c": authority.certificate, "clinic-a": identities["clinic"].certificate}
  ends, names = [], []

  def session(clinic, receive):
    names.append(clinic)
    yield from echo(clinic, receive)

  told = lambda clinic, error: ends.append((clinic, str(error)))
  with channel.listen(
    "127.0.0.1:0", identities["server"], known, session, Limits(timeout=5), told
  ) as port:
    address = f"127.0.0.1:{port}"
    with pytest.raises(Refused, match="not known here"):
      ask(address, {**identities, "made": made}, "made")
    assert ask(address, {**identities, "own": authority}, "own") == b"clinic-c hello"
  assert ends == [("", "this certificate is not known here")]
  assert names == ["clinic-c"]


def test_streams_of_a_clinic_count_before_it_says_anything(identities):
  """One that opens many and is silent leaves the others their slots."""
  open_now, most = [0], 2

  @contextlib.contextmanager
  def admit(clinic):
    if open_now[0] >= most:
      raise Refused("too many")
    open_now[0] += 1
    try:
      yield
    finally:
      open_now[0] -= 1

  limits = Limits(timeout=20, sessions=4)
  certificate, known = identities["server"].certificate, {"clinic-a": identities["clinic"][1]}
  with channel.listen(
    "127.0.0.1:0", identities["server"], known, echo, limits, admit=admit
  ) as port, contextlib.ExitStack() as stack:  # fmt: skip
    connect = lambda: channel.connect(
      f"127.0.0.1:{port}", identities["clinic"], certificate, limits
    )
    silent = [stack.enter_context(connect()) for _ in range(most)]
    end = time.monotonic() + 20
    while open_now[0] < most and time.monotonic() < end:
      time.sleep(0.02)
    for _ in range(2 * limits.sessions):
      _, receive = stack.enter_context(connect())
      with pytest.raises(Refused, match="too many"):
        receive()
    for send, receive in silent:
      send(b"still there")
      assert receive() == b"clinic-a still there"


@pytest.mark.parametrize(
  ("version", "cert", "good"),
  [("TLSv1_2", True, False), ("TLSv1_3", True, True), ("TLSv1_3", False, False)],
)
def test_only_tls_1_3_with_a_certificate_succeeds(identities, tmp_path, version, cert, good):
  context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
  context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
  context.load_verify_locations(cadata=identities["server"].certificate.decode())
  context.set_alpn_protocols(["h2"])
  if cert:
    (tmp_path / "pem").write_bytes(identities["clinic"].key + identities["clinic"].certificate)
    context.load_cert_chain(tmp_path / "pem")
  with listening(identities) as (address, _):
    host, port = address.split(":")

    greeting = b""
    with contextlib.suppress(OSError):
      raw = socket.create_connection((host, int(port)), 5)
      with context.wrap_socket(raw, server_hostname="model-owner") as one:
        greeting = one.recv(9)  # in TLS 1.3 a refusal comes only now
  assert (greeting[3:4] == b"\x04") == good  # HTTP/2 begins with SETTINGS


def test_nobody_there_is_named(identities):
  with socket.create_server(("127.0.0.1", 0)) as free:
    address = f"127.0.0.1:{free.getsockname()[1]}"
  with pytest.raises(PeerLost, match="nobody listens"):
    ask(address, identities)


def test_a_stalled_side_is_named_in_time(identities):
  def stalled(clinic, receive):
    receive()
    receive()  # the clinic waits, too
    yield b""

  with listening(identities, stalled, Limits(timeout=3)) as (address, ends):
    start = time.monotonic()
    with pytest.raises(PeerLate, match=r"for 1.5 s"):
      ask(address, identities, limits=Limits(timeout=1.5))
    assert time.monotonic() - start < 20
  assert [clinic for clinic, _ in ends] == ["clinic-a"]


def connected(address, identities, timeout=20.0):
  certificate = identities["server"].certificate
  return channel.connect(address, identities["clinic"], certificate, Limits(timeout))


def test_a_message_beyond_the_limit_is_refused(identities):
  with (
    listening(identities, limits=Limits(timeout=5, message=1000)) as (address, _),
    connected(address, identities) as (send, receive),
  ):
    send(bytes(2000))
    with pytest.raises(Refused, match="larger than max"):
      receive()


def test_a_session_beyond_the_limit_is_refused_and_harms_no_other(identities):
  with (
    listening(identities, limits=Limits(timeout=5, sessions=1)) as (address, _),
    connected(address, identities) as (send, receive),
  ):
    send(b"first")
    assert receive() == b"clinic-a first"
    with pytest.raises(Refused):
      ask(address, identities)
    send(b"still there")
    assert receive() == b"clinic-a still there"


def test_a_session_may_idle_for_longer_than_an_inference_may_stall(identities):
  """Pings keep the connection, and neither side takes them for an attack."""

  def patient(clinic, receive):
    while (message := receive(idle=True)) is not None:
      yield message

  with (
    listening(identities, patient, Limits(timeout=2, idle=30)) as (address, _),
    connected(address, identities, 2.0) as (send, receive),
  ):
    for message in (b"first", b"later"):
      send(message)
      assert receive() == message
      time.sleep(4)


def test_a_session_beyond_its_time_ends(identities):
  with (
    listening(identities, limits=Limits(timeout=5, session=1.5)) as (address, ends),
    connected(address, identities) as (send, receive),
  ):
    send(b"first")
    assert receive() == b"clinic-a first"
    for _ in range(2):  # and it stays so, at once
      with pytest.raises(SessionEnded):
        receive()
  assert [str(error) for _, error in ends] == ["the session took longer than 1.5 s"]


def test_a_clinic_that_takes_no_message_is_named_in_time(identities):
  """It is alive and answers pings, but does not read."""

  def flood(clinic, receive):
    receive()
    while True:
      yield bytes(2**20)

  with (
    listening(identities, flood, Limits(timeout=1)) as (address, ends),
    connected(address, identities) as (send, _),
  ):
    send(b"hello")
    start = time.monotonic()
    while not ends and time.monotonic() - start < 20:
      time.sleep(0.05)
  assert [str(error) for _, error in ends] == ["the other side took no message for 1 s"]


def test_a_clinic_that_goes_while_it_is_sent_a_message_is_named(identities):
  def flood(clinic, receive):
    while True:
      yield bytes(2**20)

  with (
    listening(identities, flood) as (address, ends),
    connected(address, identities, 0.5) as (_, receive),
  ):
    receive()
  assert [type(error) for _, error in ends] == [PeerLost]


def test_a_fault_of_the_server_tells_the_clinic_nothing(identities):
  def faulty(clinic, receive):
    receive()
    raise RuntimeError("the secret is 42")
    yield b""

  with listening(identities, faulty) as (address, ends), pytest.raises(PeerLost) as found:
    ask(address, identities)
  assert "42" not in str(found.value)
  assert "42" not in str(ends[0][1])


def test_eight_clinics_at_once_are_not_mixed_up(identities):
  answers = {}

  def one(i):
    with connected(address, identities) as (send, receive):
      for j in range(20):
        send(f"{i} {j}".encode())
        answers[i, j] = receive()

  with listening(identities, limits=Limits(timeout=20)) as (address, _):
    threads = [threading.Thread(target=one, args=(i,)) for i in range(8)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(60)
  assert answers == {(i, j): f"clinic-a {i} {j}".encode() for i in range(8) for j in range(20)}


@pytest.mark.parametrize("module", ["channel", "sharing"])
@pytest.mark.parametrize(
  ("before", "good"),
  [
    ("", True),
    ("import grpc; ", False),
    ("os.environ[name] = 'ECDHE-ECDSA-AES128-GCM-SHA256'; ", True),
  ],
)
def test_no_older_tls_is_permitted_by_either_side(module, before, good):
  """Whether gRPC is loaded first, or the user's own setting stands in the environment."""
  code = (
    f"import os; name = 'GRPC_SSL_CIPHER_SUITES'; {before}"
    f"import primia_jax.service.{module}; print(os.environ[name])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
    env={"PYTHONPATH": str(pathlib.Path(__file__).parents[1]), "PATH": ""},
  )  # fmt: skip
  assert (done.returncode == 0) == good, done.stderr
  if good:
    assert done.stdout.strip() == "ECDHE-RSA-AES128-GCM-SHA256"
  else:
    assert "before grpc" in done.stderr


def test_certificates_are_private_named_and_not_overwritten(tmp_path):
  folder = folders.make(tmp_path / "mine")
  path = certificates.create(folder, "clinic-a", 2)
  assert stat.S_IMODE((folder / certificates.KEY).stat().st_mode) == 0o600
  assert certificates.name(path.read_bytes()) == "clinic-a"
  assert "PRIVATE" not in repr(certificates.load(folder))
  with pytest.raises(FileExistsError):
    certificates.create(folder, "clinic-a")
  with pytest.raises(ValueError, match="who="):
    certificates.create(folders.make(tmp_path / "other"), "Clinic A")


def test_a_folder_that_others_can_read_is_refused(tmp_path):
  folder = folders.make(tmp_path / "a" / "b")
  assert stat.S_IMODE(folder.stat().st_mode) == 0o700
  folder.chmod(0o750)
  with pytest.raises(PermissionError, match="chmod"):
    folders.make(folder)
