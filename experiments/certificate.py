"""Makes an institution's certificate, and exchanges certificates with the other side.

  primia-certificate --folder=hospital --name=hospital-a
  primia-certificate --folder=vendor --clinic=hospital-a.pem
  primia-certificate --folder=vendor --helper=helper-d.pem

The first makes a folder that only its user can read, with a private key, which never leaves it, and
a certificate, which goes to the other side. The second lets a clinic in: the model owner, or its
helper, pins the clinic's certificate. A clinic pins the server's with the publication or card,
which holds it. The third makes an institution the model owner's helper (primia-publish
--client=sharing). Without any of these it lists what the folder holds: compare the fingerprints by
telephone.
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
  name: str = settings.setting("", "the institution's name: letters a to z, digits and hyphens")
  days: int = settings.setting(365, "days for which the certificate is valid")
  renew: bool = settings.setting(
    False, "replace key and certificate by new ones; the other side must pin the new certificate"
  )
  clinic: str = settings.setting(
    "", "model owner or helper: file with the certificate of a clinic to let in"
  )
  helper: str = settings.setting(
    "", "model owner: file with the certificate of its helper, in place of any before"
  )


settings.define_flags(Certificate)
flags.adopt_module_key_flags(settings)


def main() -> None:
  s = settings.from_flags(Certificate)
  if not 0 < s.days <= 3650:
    raise ValueError(f"days={s.days}; use 1 to 3650")
  given = [f"{k}={getattr(s, k)}" for k in ("name", "clinic", "helper") if getattr(s, k)]
  if len(given) > 1:
    raise ValueError(f"{' with '.join(given)}: do one after the other")
  if s.renew and not s.name:
    raise ValueError("renew without name; say whose certificate it is, with --name")
  if s.name:
    certificates.check_name(s.name, "name")
    folder = role_folder(s.folder, make=True)
    _make(folder, s)
  else:
    folder = role_folder(s.folder)
  if s.clinic:
    name, pem = _read("clinic", s.clinic)
    helper = folder / f"{publications.HELPER}.pem"
    if helper.is_file() and certificates.name(helper.read_bytes()) == name:
      raise ValueError(
        f"clinic={s.clinic}: {name} is the helper here, and a helper may not be a clinic, too"
      )
    durable.replace(folders.make(folder / certificates.CLINICS) / f"{name}.pem", pem)
    print(f"{name} may ask from the next start of the server on.\n")
  if s.helper:
    name, pem = _read("helper", s.helper)
    publications.check_helper(folder, pem)
    durable.replace(folder / f"{publications.HELPER}.pem", pem)
    print(f"{name} is the helper from the next start of the server on.\n")
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


def _read(flag: str, value: str) -> tuple[str, bytes]:
  """The name in a certificate, and the certificate, from the file that a flag names."""
  path = pathlib.Path(value).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"{flag}={value}: there is no such file; name a certificate")
  pem = path.read_bytes()
  try:
    name = certificates.name(pem)
    certificates.check_name(name)
  except (ValueError, IndexError) as error:
    raise ValueError(
      f"{flag}={value} is not a certificate of primia-certificate; name its .pem file"
    ) from error
  certificates.check_valid(pem)
  return name, pem


def _list(folder: pathlib.Path) -> None:
  own = folder / certificates.CERTIFICATE
  clinics = sorted((folder / certificates.CLINICS).glob("*.pem"))
  servers = sorted((folder / publications.MODELS).glob(f"*/{publications.SERVER}"))
  helper = folder / f"{publications.HELPER}.pem"
  listed = ("own", [own]), ("clinic", clinics), ("helper", [helper]), ("server", servers)
  for what, paths in listed:
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
