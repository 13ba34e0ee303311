"""Makes an institution's certificate, and exchanges certificates with the other side.

  primia-certificate --folder=hospital --name=hospital-a
  primia-certificate --folder=vendor --clinic=hospital-a.pem

The first makes a folder that only its user can read, with a private key, which never leaves it, and
a certificate, which goes to the other side. The second lets a clinic in: the model owner pins the
clinic's certificate. A clinic pins the server's with the publication, which holds it. Without a
name or a clinic it lists what the folder holds: compare the fingerprints by telephone.
"""

import dataclasses
import pathlib

from absl import flags

from primia_jax import durable
from primia_jax.service import certificates, folders, publications
from primia_jax.service.errors import Refused

from . import running, settings
from .folders import role_folder


@dataclasses.dataclass(frozen=True)
class Certificate:
  """Whose, and whom to trust."""

  folder: str = settings.setting("", "this institution's own folder, made with mode 0700 if needed")
  name: str = settings.setting("", "of the institution: letters a to z, digits and hyphens")
  days: int = settings.setting(365, "for which the certificate is valid")
  renew: bool = settings.setting(
    False, "replace key and certificate by new ones; the other side must pin the new certificate"
  )
  clinic: str = settings.setting("", "model owner: file with the certificate of a clinic to let in")


settings.define_flags(Certificate)
flags.adopt_module_key_flags(settings)


def main() -> None:
  s = settings.from_flags(Certificate)
  if not 0 < s.days <= 3650:
    raise ValueError(f"days={s.days}; use 1 to 3650")
  if s.name and s.clinic:
    raise ValueError(f"name={s.name} with clinic={s.clinic}: do one after the other")
  if s.renew and not s.name:
    raise ValueError("renew without name; say whose certificate it is, with --name")
  if s.name:
    certificates.check_name(s.name, "name")
    folder = role_folder(s.folder, make=True)
    _make(folder, s)
  else:
    folder = role_folder(s.folder)
  if s.clinic:
    _admit(folder, s.clinic)
  _list(folder)


def _make(folder: pathlib.Path, s: Certificate) -> None:
  there = [folder / name for name in (certificates.KEY, certificates.CERTIFICATE)]
  if s.renew:
    for path in there:
      path.unlink(missing_ok=True)
  elif held := [path.name for path in there if path.exists()]:
    raise ValueError(
      f"folder={s.folder} holds {' and '.join(held)}; to replace them, and have the other side pin "
      "the new certificate, add --renew"
    )
  path = certificates.create(folder, s.name, s.days)
  print(f"Give {path} to the other side; the key beside it stays here.\n")


def _admit(folder: pathlib.Path, clinic: str) -> None:
  path = pathlib.Path(clinic).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"clinic={clinic}: there is no such file; name a certificate")
  pem = path.read_bytes()
  try:
    name = certificates.name(pem)
    certificates.check_name(name)
  except (ValueError, IndexError) as error:
    raise ValueError(
      f"clinic={clinic} is no certificate of primia-certificate; name its .pem file"
    ) from error
  certificates.check_valid(pem)
  durable.replace(folders.make(folder / certificates.CLINICS) / f"{name}.pem", pem)
  print(f"{name} may ask from the next start of the server on.\n")


def _list(folder: pathlib.Path) -> None:
  own = folder / certificates.CERTIFICATE
  clinics = sorted((folder / certificates.CLINICS).glob("*.pem"))
  servers = sorted((folder / publications.MODELS).glob(f"*/{publications.SERVER}"))
  for what, paths in (("own", [own]), ("clinic", clinics), ("server", servers)):
    for path in filter(pathlib.Path.is_file, paths):
      pem = path.read_bytes()
      try:
        certificates.check_valid(pem)
        state = f"until {certificates.end(pem):%Y-%m-%d}"
      except Refused:
        state = "EXPIRED"
      where = f" of {path.parent.name}" if what == "server" else ""
      print(f"{what:7} {certificates.name(pem)}{where}, {state}")
      print(f"        SHA-256 {certificates.fingerprint(pem)}")


if __name__ == "__main__":
  running.start(main)
