"""Certificates for mutual TLS: each is signed by itself, and pinned by the other side.

There is no authority. A model owner keeps the certificates of its clinics, by name; a clinic keeps
that of its model owner. They are exchanged once, by a way that both trust. Keys are ECDSA P-256,
which with the ciphers that `channel` permits leaves TLS 1.3 only.
"""

from __future__ import annotations

import datetime
import hashlib
import pathlib
import re
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from primia_jax import durable
from primia_jax.service.errors import Refused

KEY, CERTIFICATE = "key.pem", "certificate.pem"
CLINICS = "clinics"  # a model owner's folder of those that it lets in, NAME.pem
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
RESERVED = (  # what roles keep of a publication, beside a folder for each clinic
  "blind", "checked", "correlations", "dealing", "held", "plan", "publication", "receipt", "scores",
  "secret", "seeds", "tag", "used",
)  # fmt: skip


class Identity(NamedTuple):
  """A private key and the certificate that goes with it, PEM; the key is not printed."""

  key: bytes
  certificate: bytes

  def __repr__(self) -> str:
    return f"Identity({name(self.certificate)})"


def create(folder: pathlib.Path, who: str, days: float = 365.0) -> pathlib.Path:
  """Writes a new key (mode 0600) and its certificate, and returns the certificate's path.

  Args:
    folder: where `KEY` and `CERTIFICATE` go.
    who: the holder: letters, digits and hyphens.
    days: for which it is valid from now on; none or fewer makes an expired one, for tests.

  Raises:
    FileExistsError: there is one already.
    ValueError: the name is not of that form.
  """
  check_name(who)
  key = ec.generate_private_key(ec.SECP256R1())
  subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, who)])
  end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
  start = min(end, datetime.datetime.now(datetime.UTC)) - datetime.timedelta(hours=1)
  certificate = (
    x509.CertificateBuilder()
    .subject_name(subject)
    .issuer_name(subject)
    .public_key(key.public_key())
    .serial_number(x509.random_serial_number())
    .not_valid_before(start)
    .not_valid_after(end)
    .add_extension(x509.SubjectAlternativeName([x509.DNSName(who)]), critical=False)
    .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    .sign(key, hashes.SHA256())
  )
  pem = key.private_bytes(
    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
  )
  durable.create(folder / KEY, pem)
  durable.create(folder / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
  durable.sync_folder(folder)
  return folder / CERTIFICATE


def check_name(who: str, what: str = "who") -> None:
  """Raises ValueError, which names `what`, unless an institution and a folder can have the name."""
  check_form(who, what)
  if who in RESERVED:
    raise ValueError(f"{what}={who!r} is the name of a file of a publication; use another")


def check_form(name: str, what: str) -> None:
  """Raises ValueError, which names `what`, unless a name is of the form that folders have."""
  if not NAME.fullmatch(name):
    raise ValueError(f"{what}={name!r}; use up to 63 letters a to z, digits and hyphens")


def clinics(folder: pathlib.Path) -> dict[str, bytes]:
  """The certificates that a server lets in, PEM, by the clinic's name.

  Raises:
    ValueError: a file's name is none that a clinic can have.
  """
  found = {}
  for path in sorted((folder / CLINICS).glob("*.pem")):
    check_name(path.stem, str(path))
    found[path.stem] = path.read_bytes()
  return found


def end(certificate: bytes) -> datetime.datetime:
  """When it expires."""
  return _parsed(certificate).not_valid_after_utc


def load(folder: pathlib.Path) -> Identity:
  """The identity in a folder.

  Raises:
    FileNotFoundError: there is none.
    Refused: the certificate has expired.
  """
  found = Identity((folder / KEY).read_bytes(), (folder / CERTIFICATE).read_bytes())
  check_valid(found.certificate)
  return found


def name(certificate: bytes) -> str:
  """Whose certificate it is."""
  subject = _parsed(certificate).subject
  return str(subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value)


def fingerprint(certificate: bytes) -> str:
  """SHA-256 of the certificate, in hexadecimal."""
  der = _parsed(certificate).public_bytes(serialization.Encoding.DER)
  return hashlib.sha256(der).hexdigest()


def check_valid(certificate: bytes) -> None:
  """Raises Refused if a certificate has expired or is not valid yet."""
  found, now = _parsed(certificate), datetime.datetime.now(datetime.UTC)
  if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
    raise Refused(
      f"the certificate of {name(certificate)} is valid from {found.not_valid_before_utc} to "
      f"{found.not_valid_after_utc} only; make a new one and give it to the other side"
    )


def _parsed(certificate: bytes) -> x509.Certificate:
  return x509.load_pem_x509_certificate(certificate)
