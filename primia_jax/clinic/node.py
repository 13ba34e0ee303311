"""A DICOM node: a PACS sends an X-ray, and gets back a structured report of a model's answer.

C-STORE succeeds once the report has been stored at its destination, so that a crash loses nothing:
the PACS sends again what was not confirmed. A query is spent only if the destination takes reports,
and a report that it then refuses is kept, in memory: the image that comes again gets this one, and
costs no second query. What is refused gets a status and a reason, which also goes to the log. The
model's owner never has the image, and the node keeps none.

The log holds no value of a header but UIDs. Texts of exceptions and warnings of the libraries that
read headers may quote one, so they go nowhere (`_silent`); the sender alone is told which value of
its own image was refused.

A node is for a clinic's own network. AE titles are names and no proof: whoever reaches the port can
use one. Images come in the clear, so bind it to an address that only the PACS reaches. Everybody on
the list of titles may spend queries.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset
from pynetdicom import AE, evt

from primia_jax.clinic import asking, reports
from primia_jax.clinic.asking import Answer, Ask, Model

IMAGES = (
  uid.ComputedRadiographyImageStorage,
  uid.DigitalXRayImageStorageForPresentation,
  uid.DigitalXRayImageStorageForProcessing,
)
SYNTAXES = [
  uid.UID(name)
  for name in (
    "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70",
    "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
  )
]  # fmt: skip
_MODALITIES, _PARTS = ("CR", "DX", "RG"), ("CHEST", "THORAX", "LUNG")
_CHEST_CODES = ("816094009", "51185008", "39607008", "T-D3000")
_LATERAL = ("LL", "RL", "LATERAL", "LAT", "LLO", "RLO")

DONE = 0x0000
NO_RESOURCES = 0xA700  # come again: no answer, or no place for the report
WRONG = 0xA900  # no image for this model; do not come again
UNREADABLE = 0xC000


class Refused(ValueError):
  """Why an image gets no report.

  Attributes:
    status: of C-STORE.
    comment: for the sender, who knows its own image; the text is for the log.
  """

  def __init__(self, status: int, reason: str, comment: str = ""):
    super().__init__(reason)
    self.status, self.comment = status, comment or reason


class Destination(NamedTuple):
  """Where reports go: the PACS."""

  host: str
  port: int
  title: str


class Limits(NamedTuple):
  """What a node takes.

  Attributes:
    file: bytes of one image as it comes.
    associations: at once; images are answered one after the other.
    seconds: that a peer may be silent.
    waiting: reports that are kept for a destination that refused them; then the oldest goes.
  """

  file: int = asking.LONGEST
  associations: int = 8
  seconds: float = 60.0
  waiting: int = 64


def check_chest(header: Dataset) -> None:
  """Refuses what its own header does not call a frontal X-ray of a chest.

  Raises:
    Refused: naming the tag and what it must be; for the sender, its value, too.
  """

  def refuse(tag: str, value: Any, must: str) -> None:
    raise Refused(WRONG, f"{tag}: {must}", f"{tag}={value or 'missing'}: {must}")

  for tag in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
    if not header.get(tag):
      raise Refused(UNREADABLE, f"{tag}=missing: a report must name its image")
  if header.get("SOPClassUID") not in IMAGES:
    refuse("SOPClassUID", header.get("SOPClassUID"), "send CR or DX images")
  modality = str(header.get("Modality") or "")
  if modality not in _MODALITIES:
    refuse("Modality", modality, f"must be {', '.join(_MODALITIES)}")
  part = str(header.get("BodyPartExamined") or "").upper()
  regions = [str(item.get("CodeValue")) for item in header.get("AnatomicRegionSequence") or ()]
  if part not in _PARTS and (part or not set(regions) & set(_CHEST_CODES)):
    refuse("BodyPartExamined", part, "no chest X-ray")
  view = str(header.get("ViewPosition") or "").upper()
  if view in _LATERAL:
    refuse("ViewPosition", view, "must be frontal, PA or AP")
  if int(header.get("NumberOfFrames") or 1) > 1:
    refuse("NumberOfFrames", header.NumberOfFrames, "send single images")


def read(data: bytes, model: Model) -> tuple[Dataset, np.ndarray]:
  """The header and the image of one DICOM file, of which a report can be made.

  Args:
    data: the file, with its preamble.
    model: what will be asked.

  Raises:
    Refused: it is none; the message says why.
  """
  try:
    header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
    check_chest(header)
  except Refused:
    raise
  except Exception as error:  # whatever pydicom raises for a stranger's bytes
    raise _failed("the header cannot be read", error) from None
  try:
    pixels = asking.image(model, data, "the image")
  except Exception as error:
    said = str(error) if isinstance(error, ValueError) else ""
    raise _failed(f"the pixels of {_named(header)} cannot be read", error, said) from None
  try:  # before a query is spent
    reports.make(header, model, Answer(0, None, {}, {}, 0))
  except Exception as error:  # its text may quote the header
    raise _failed(f"no report can be made of the header of {_named(header)}", error) from None
  return header, pixels


def _failed(what: str, error: Exception, comment: str = "") -> Refused:
  return Refused(UNREADABLE, f"{what} ({type(error).__name__})", comment)


def _named(header: Dataset) -> str:
  """An image by its UID, if it is one."""
  name = str(header.get("SOPInstanceUID") or "")
  return f"image {name}" if re.fullmatch("[0-9.]{1,64}", name) else "an image"


def _mark(header: Dataset, pixels: np.ndarray) -> bytes:
  """Of an image that may come again: the same pixels for the same study, series and patient."""
  tags = "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "PatientName"
  facts = [str(header.get(tag)) for tag in tags] + [str(pixels.shape)]
  return hashlib.sha256("\0".join(facts).encode() + np.ascontiguousarray(pixels).data).digest()


def report_of(data: bytes, model: Model, ask: Ask) -> Dataset:
  """The report about one DICOM file.

  Args:
    data: the file, with its preamble.
    model: what is asked.
    ask: asks.

  Raises:
    Refused: there is none; the message says why.
  """
  header, pixels = read(data, model)
  return _report(header, pixels, model, ask)


def _report(header: Dataset, pixels: np.ndarray, model: Model, ask: Ask) -> Dataset:
  try:
    answer = ask(pixels, lambda phase: None)
  except (LookupError, RuntimeError) as error:  # such as the service's own, in its words
    raise Refused(NO_RESOURCES, f"no answer: {error}") from error
  except (ValueError, OSError) as error:  # whose text might quote pixels
    raise Refused(NO_RESOURCES, f"no answer ({type(error).__name__})") from None
  return reports.make(header, model, answer)


def check_destination(to: Destination, title: str, seconds: float = 60.0) -> None:
  """Raises Refused unless a destination is there and takes structured reports."""
  with _association(_client(title, seconds), to):
    pass


def send(report: Dataset, to: Destination, title: str, seconds: float = 60.0) -> None:
  """Stores a report at its destination.

  Raises:
    Refused: it does not take it.
  """
  with _association(_client(title, seconds), to) as association:
    status = association.send_c_store(report)
  if status.get("Status") != DONE:
    code = status.get("Status")
    said = "nothing" if code is None else f"status {code:04X}"
    raise Refused(
      NO_RESOURCES, f"{to.title} at {to.host}:{to.port} answered the report with {said}"
    )


def _client(title: str, seconds: float) -> AE:
  client = AE(title)
  client.network_timeout = client.acse_timeout = client.dimse_timeout = seconds
  client.add_requested_context(uid.ComprehensiveSRStorage, SYNTAXES[:2])
  return client


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """Keeps what the libraries say of headers from standard error, in all of this process."""
  loggers = [logging.getLogger(name) for name in ("pydicom", "pynetdicom", "highdicom")]
  levels = [logger.level for logger in loggers]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for logger in loggers:
      logger.setLevel(logging.CRITICAL + 1)
    try:
      yield
    finally:
      for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@contextlib.contextmanager
def _association(client: AE, to: Destination) -> Iterator[Any]:
  association = client.associate(to.host, to.port, ae_title=to.title)
  if not association.is_established:
    raise Refused(NO_RESOURCES, f"no association with {to.title} at {to.host}:{to.port}")
  if not association.accepted_contexts:
    association.abort()
    raise Refused(NO_RESOURCES, f"{to.title} at {to.host}:{to.port} takes no structured reports")
  try:
    yield association
  finally:
    association.release()


@contextlib.contextmanager
def serve(
  model: Model,
  ask: Ask,
  reports_to: Destination,
  allowed: Sequence[str],
  title: str = "PRIMIA",
  host: str = "127.0.0.1",
  port: int = 0,
  limits: Limits = Limits(),  # noqa: B008
  done: Callable[[str, int, str], None] = lambda caller, status, reason: None,
) -> Iterator[int]:
  """Receives images for as long as the context lasts; gives the port.

  Args:
    model: what is asked.
    ask: asks; one image at a time.
    reports_to: where reports go.
    allowed: AE titles that may send; all others are turned away.
    title: the node's own; one that calls another is turned away.
    host, port: where it listens; port 0 takes any free one.
    limits: what it takes.
    done: is told of each image: who sent it, the status, and the reason, which is empty for a
      report that was stored. Neither holds anything of patient or image but the image's UID.

  Raises:
    ValueError: a title is none, the list is empty, or a report has no room for the model's names.
    OSError: the port is taken.
  """
  reports.check(model)
  for name in (title, reports_to.title, *allowed):
    if not 0 < len(name.strip()) <= 16 or not name.isascii():
      raise ValueError(f"AE title {name!r}; use 1 to 16 ASCII characters")
  if not allowed:
    raise ValueError("no AE title is allowed; name those that may send images")
  one, received, waiting = threading.Lock(), dict[int, int](), dict[bytes, Dataset]()

  def report_on(data: bytes) -> None:
    header, pixels = read(data, model)
    mark = _mark(header, pixels)
    with one:
      if mark not in waiting:
        check_destination(reports_to, title, limits.seconds)  # before a query is spent
        report = _report(header, pixels, model, ask)
        while len(waiting) >= limits.waiting:
          del waiting[next(iter(waiting))]
        waiting[mark] = report
      report = waiting[mark]
    send(report, reports_to, title, limits.seconds)
    with one:
      waiting.pop(mark, None)

  def store(event: Any) -> int | Dataset:
    received[id(event.assoc)] = 0
    caller = event.assoc.requestor.ae_title
    try:
      try:
        report_on(event.encoded_dataset())
      except Refused:
        raise
      except Exception as error:  # whose text may quote the header
        raise _failed("the node failed", error) from None
    except Refused as refused:
      done(caller, refused.status, str(refused))
      status = Dataset()
      status.Status = refused.status
      status.ErrorComment = refused.comment[:64]  # all that DICOM has room for
      return status
    done(caller, DONE, "")
    return DONE

  def count(event: Any) -> None:
    """Ends an association that sends more than an image may have, before it fills the memory."""
    if not hasattr(event.pdu, "presentation_data_value_items"):
      return
    items = event.pdu.presentation_data_value_items
    key = id(event.assoc)
    received[key] = received.get(key, 0) + sum(len(v.presentation_data_value) for v in items)
    if received[key] > limits.file:
      done(
        event.assoc.requestor.ae_title, NO_RESOURCES,
        f"an image has more than {limits.file} bytes; the association was ended",
      )  # fmt: skip
      received[key] = -(2**62)  # said once, however much comes before the end
      threading.Thread(target=event.assoc.abort, daemon=True).start()

  entity = AE(title)
  entity.require_called_aet, entity.require_calling_aet = True, list(allowed)
  entity.maximum_associations = limits.associations
  entity.network_timeout = entity.acse_timeout = entity.dimse_timeout = limits.seconds
  entity.add_supported_context("1.2.840.10008.1.1")  # C-ECHO
  for image in IMAGES:
    entity.add_supported_context(image, SYNTAXES)
  forget = lambda event: received.pop(id(event.assoc), None)
  handlers: list[Any] = [
    (evt.EVT_C_STORE, store), (evt.EVT_PDU_RECV, count),
    (evt.EVT_CONN_CLOSE, forget),
  ]  # fmt: skip
  with _silent():
    server = entity.start_server((host, port), block=False, evt_handlers=handlers)
    assert server is not None  # since it does not block
    try:
      yield server.server_address[1]
    finally:
      server.shutdown()
