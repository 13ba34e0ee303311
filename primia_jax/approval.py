"""What a site's operator approved, and the check that it is what the coordinator offers.

A site trains nothing that its operator has not approved: the configuration that all sites share,
the code, the architecture (every parameter's name, dtype and shape), and the parameters to start
from. So a coordinator cannot have a site train a model with a layer that copies images, nor start
one from planted parameters (`attacks.active`). Later global parameters follow from sums that the
site opened itself; `check_parameters` refuses odd ones all the same.

Who learns what: an approval holds nothing secret. It says that parameters are those that were
approved, and not that these are harmless; `attacks.detection.measure` looks at that.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import jax

from primia_jax.attacks import detection

VERSION = 1


class NotApproved(ValueError):
  """The coordinator offers something else than the operator approved; the site does not train."""


class Approval(NamedTuple):
  """What is to be trained.

  Attributes:
    configuration: all settings that the sites share, as JSON in one form; see `shared`.
    code: the version of the code, and a hash of its files.
    model: its name.
    parameters: (name, dtype, shape) of each array of the model, trained or not.
    start: SHA-256 of the parameters before the first round, in hexadecimal.
  """

  configuration: str
  code: str
  model: str
  parameters: tuple[tuple[str, str, tuple[int, ...]], ...]
  start: str


def shared(configuration: dict[str, Any]) -> str:
  """Settings by name as JSON in one form."""
  return json.dumps(configuration, sort_keys=True)


def of(configuration: str, code: str, model: str, params: Any) -> Approval:
  """What is offered or approved.

  Args:
    configuration, code, model: see `Approval`.
    params: the parameters to start from, with the model's state; any tree of arrays.
  """
  return Approval(configuration, code, model, _forms(params), detection.digest(params).hex())


def digest(approval: Approval) -> bytes:
  """SHA-256 of it all, 32 bytes, for transcripts: sites that approved different things cannot take
  part in one sum.
  """
  return hashlib.sha256(b"primia_jax approval v1" + encode(approval)).digest()


def check(approved: Approval, offered: Approval) -> None:
  """Refuses to train anything but what was approved; pass what the site itself has computed from
  what it was sent.

  Raises:
    NotApproved: naming what differs, on both sides.
  """
  if offered.configuration != approved.configuration:
    ours, theirs = json.loads(approved.configuration), json.loads(offered.configuration)
    names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    listed = [f"{n}={theirs.get(n)!r} where {ours.get(n)!r} was approved" for n in names]
    raise _refused(f"another configuration: {'; '.join(listed)}")
  if offered.code != approved.code:
    raise _refused(f"other code: {offered.code} where {approved.code} was approved")
  if offered.model != approved.model:
    raise _refused(f"another model: {offered.model} where {approved.model} was approved")
  _check_forms(approved, offered.parameters)
  if offered.start != approved.start:
    raise _refused(
      f"other starting parameters: {offered.start} where {approved.start} was approved"
    )


def check_parameters(approved: Approval, params: Any) -> None:
  """Refuses parameters of another form than those approved, or that are not finite.

  Raises:
    NotApproved: naming the first that differs, on both sides.
  """
  _check_forms(approved, _forms(params))
  try:
    detection.check_structure(params, params)
  except ValueError as error:
    raise _refused(str(error)) from error


def encode(approval: Approval) -> bytes:
  """The file of an approval."""
  return (json.dumps({"version": VERSION, **approval._asdict()}, indent=1) + "\n").encode()


def decode(data: bytes, where: str = "the approval") -> Approval:
  """The approval in a file.

  Raises:
    ValueError: it is none, or of another version.
  """
  try:
    found = json.loads(data)
    version = found.pop("version")
    forms = tuple((str(n), str(d), tuple(map(int, s))) for n, d, s in found.pop("parameters"))
    made = Approval(parameters=forms, **found)
    json.loads(made.configuration)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{where} is damaged ({error!r}); approve again") from error
  if version != VERSION:
    raise ValueError(f"{where} is of version {version!r}; this code reads version {VERSION}")
  return made


def _forms(params: Any) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  named = (
    (jax.tree_util.keystr(path), leaf.dtype.name, tuple(leaf.shape)) for path, leaf in leaves
  )
  return tuple(sorted(named))


def _check_forms(approved: Approval, sent: tuple[tuple[str, str, tuple[int, ...]], ...]) -> None:
  ours, theirs = ({name: form for name, *form in forms} for forms in (approved.parameters, sent))
  said = lambda form: f"{form[0]}{list(form[1])}" if form else "no such parameter"
  for name in sorted({*ours, *theirs}):
    if ours.get(name) != theirs.get(name):
      raise _refused(
        f"another architecture: {name} is {said(theirs.get(name))} where {said(ours.get(name))} "
        "was approved"
      )


def _refused(what: str) -> NotApproved:
  return NotApproved(
    f"the coordinator offers {what}; this site takes no part. Ask the coordinator, and approve "
    "it with primia-site approve if it is right"
  )
