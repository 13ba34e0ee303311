"""The keys of a trial of Flower on one machine: certificates, node keys, and its members' own."""

from __future__ import annotations

import datetime
import ipaddress
import pathlib
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from primia_jax import durable
from primia_jax.secagg import meeting, pinning, roster

from .site_folders import IDENTITY


def introduce(coordinator: pathlib.Path, sites: Sequence[pathlib.Path]) -> None:
  """Makes the identities of a trial's members, and a roster of them that all accept.

  So no key is pinned because it came first: nobody else can take a site's number. At a later start
  all have theirs already.

  Args:
    coordinator: its folder; made where it is missing.
    sites: their own folders, by number.

  Raises:
    FileNotFoundError, Refused: a folder has lost its identity, or is another's.
    ValueError: a roster is damaged.
  """
  coordinator.mkdir(mode=0o700, parents=True, exist_ok=True)
  folders = coordinator, *sites
  held = [pinning.needed(folder) for folder in folders]
  made = next((one for one in held if one is not None), None)
  own = meeting.own_identity if made is None else pinning.own_identity
  identities = [own(folder / IDENTITY) for folder in folders]
  if made is None:
    first, *others = (identity.public for identity in identities)
    members = [roster.Member(i, f"site-{i}", public) for i, public in enumerate(others)]
    made = roster.make("trial", 1, [roster.Member(None, "coordinator", first), *members])
  for folder, identity, known in zip(folders, identities, held, strict=True):
    if known is None:  # as after a crash between two
      pinning.accept(folder, roster.encode(made), identity, roster.digest(made).hex())


def make_certificates(folder: pathlib.Path, days: float = 30.0, begin: float = 0.0) -> None:
  """Writes an authority's certificate, and the SuperLink's key and certificate for loopback, which
  hold from so many days from now and until so many.
  """
  now = datetime.datetime.now(datetime.UTC)
  until = now + datetime.timedelta(days=days)
  since = min(now + datetime.timedelta(days=begin), until) - datetime.timedelta(hours=1)
  named = lambda who: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, who)])
  authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

  def certificate(who: str, of: ec.EllipticCurvePrivateKey, is_authority: bool) -> bytes:
    builder = (
      x509.CertificateBuilder()
      .subject_name(named(who))
      .issuer_name(named("trial authority"))
      .public_key(of.public_key())
      .serial_number(x509.random_serial_number())
      .not_valid_before(since)
      .not_valid_after(until)
      .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
    )
    if not is_authority:
      local = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
      builder = builder.add_extension(x509.SubjectAlternativeName(local), critical=False)
    signed = builder.sign(authority, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)

  private = key.private_bytes(
    serialization.Encoding.PEM,
    serialization.PrivateFormat.TraditionalOpenSSL,
    serialization.NoEncryption(),
  )
  durable.replace(folder / "authority.pem", certificate("trial authority", authority, True))
  durable.replace(folder / "certificate.pem", certificate("trial superlink", key, False))
  durable.replace(folder / "key.pem", private)


def make_node_key(path: pathlib.Path) -> pathlib.Path:
  """Writes a SuperNode's key, as `ssh-keygen -t ecdsa -b 384` does; returns its public half."""
  key = ec.generate_private_key(ec.SECP384R1())
  form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
  durable.replace(path, key.private_bytes(*form, serialization.NoEncryption()))
  of = key.public_key().public_bytes
  public = path.with_name(f"{path.name}.pub")
  public.write_bytes(of(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))
  return public
