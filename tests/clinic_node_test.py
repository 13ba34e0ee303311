"""The DICOM node, as a PACS sees it: reports come back, and what is no chest X-ray is named."""

import contextlib
import io
import logging
import pathlib
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("pynetdicom")
pytest.importorskip("highdicom")

import highdicom as hd
import pydicom
from dicom_maker import RAMP, make
from pydicom.uid import generate_uid
from pynetdicom import AE, evt, sop_class

from primia_jax.clinic import asking, node, reports
from primia_jax.data import decode

MODEL = asking.Model("cnn", "4f1c2a", ("normal", "bacterial", "viral"), 8, 1)
DX = sop_class.DigitalXRayImageStorageForPresentation
PROBABILITIES = np.array([0.1, 0.7, 0.2])


def xray(**tags):
  """A chest X-ray as a device makes it, as bytes of a file."""
  image = pydicom.dcmread(io.BytesIO(make()))
  image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = DX
  image.StudyInstanceUID, image.SeriesInstanceUID = generate_uid(), generate_uid()
  image.PatientName, image.PatientID, image.PatientBirthDate = "Doe^Jane", "77", "19700101"
  image.PatientSex, image.StudyID, image.AccessionNumber = "F", "1", "A1"
  image.StudyDate, image.StudyTime, image.ReferringPhysicianName = "20260101", "101010", ""
  image.Modality, image.BodyPartExamined, image.ViewPosition = "DX", "CHEST", "PA"
  for name, value in tags.items():
    setattr(image, name, value)
  out = io.BytesIO()
  image.save_as(out, enforce_file_format=True)
  return out.getvalue()


def ask(image, told):
  told("asking")
  assert image.shape == (8, 8, 1)
  return asking.Answer(1, PROBABILITIES, {}, {}, 0)


@pytest.fixture
def pacs():
  """A store for reports; gives its destination and what has come."""
  came = []

  def store(event):
    report = event.dataset
    report.file_meta = event.file_meta
    came.append(report)
    return 0

  entity = AE("PACS")
  entity.add_supported_context(sop_class.ComprehensiveSRStorage)
  server = entity.start_server(
    ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, store)]
  )
  yield node.Destination("127.0.0.1", server.server_address[1], "PACS"), came
  server.shutdown()


@pytest.fixture
def said():
  return []


@pytest.fixture
def port(pacs, said):
  limits = node.Limits(file=200_000)
  done = lambda *what: said.append(what)
  with node.serve(MODEL, ask, pacs[0], ["PACS", "CT1"], limits=limits, done=done) as port:
    yield port


_SENDER = """
import pathlib, sys
import pydicom
from pynetdicom import AE
file, port, caller, called = sys.argv[1:]
image = pydicom.dcmread(file)
entity = AE(caller)
entity.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
association = entity.associate("127.0.0.1", int(port), ae_title=called)
if not association.is_established:
  sys.exit("turned away")
status = association.send_c_store(image)
print(f"{status.get('Status', -1):04X}", status.get("ErrorComment", ""))
association.release()
"""


def stored(data, port, folder, caller="PACS", called="PRIMIA"):
  """What a process that sends a file is told."""
  path = folder / "image.dcm"
  path.write_bytes(data)
  command = [sys.executable, "-c", _SENDER, str(path), str(port), caller, called]
  done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
  return done.stdout.strip() or done.stderr.strip()


def text_of(report):
  return " ".join(map(str, report.iterall()))


def test_an_image_from_another_process_brings_a_report(pacs, port, said, tmp_path):
  data = xray()
  assert stored(data, port, tmp_path) == "0000"
  (report,), image = pacs[1], pydicom.dcmread(io.BytesIO(data))
  assert said == [("PACS", 0, "")]
  assert report.SOPClassUID == sop_class.ComprehensiveSRStorage
  for tag in ("StudyInstanceUID", "PatientID", "PatientName", "AccessionNumber"):
    assert report[tag].value == image[tag].value
  assert report.SeriesInstanceUID != image.SeriesInstanceUID
  assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
  assert "NOT FOR DIAGNOSIS" in report.SeriesDescription


def test_a_report_is_valid_and_names_model_version_and_purpose(tmp_path):
  header = pydicom.dcmread(io.BytesIO(xray()))
  path = tmp_path / "report.dcm"
  reports.make(header, MODEL, ask(np.zeros((8, 8, 1)), lambda phase: None)).save_as(path)
  found = hd.sr.srread(path)  # which checks it
  assert isinstance(found, hd.sr.ComprehensiveSR)
  (group,) = found.content.get_image_measurement_groups()
  said = {e.name.meaning: e.value.meaning for e in group.get_qualitative_evaluations()}
  assert said == {"Class by the model": "bacterial", "Intended use": asking.WARNING}
  likely = {m.name.meaning: m.value for m in group.get_measurements()}
  assert likely == {
    "Probability of normal": 10, "Probability of bacterial": 70, "Probability of viral": 20,
  }  # fmt: skip
  (source,) = group.source_images
  assert source.referenced_sop_instance_uid == header.SOPInstanceUID
  for text in ("cnn", "4f1c2a", "NOT FOR DIAGNOSIS", "Chest"):
    assert text in text_of(found)


def test_a_class_alone_has_no_probabilities():
  header = pydicom.dcmread(io.BytesIO(xray()))
  report = reports.make(header, MODEL, asking.Answer(2, None, {}, {}, 0))
  assert "viral" in text_of(report)
  assert "Probability" not in text_of(report)


@pytest.mark.parametrize(
  ("tags", "status", "reason"),
  [
    ({"Modality": "CT"}, "A900", "Modality=CT: must be CR, DX, RG"),
    ({"BodyPartExamined": "HAND"}, "A900", "BodyPartExamined=HAND: no chest X-ray"),
    ({"BodyPartExamined": ""}, "A900", "BodyPartExamined=missing: no chest X-ray"),
    ({"ViewPosition": "LL"}, "A900", "ViewPosition=LL: must be frontal, PA or AP"),
    ({"NumberOfFrames": 3}, "A900", "NumberOfFrames=3: send single images"),
    ({"PixelData": b"\0" * 8}, "C000", ""),
    ({"StudyInstanceUID": None}, "C000", "StudyInstanceUID=missing: a report must"),
  ],
)
def test_what_is_no_chest_xray_is_named(pacs, port, said, tmp_path, tags, status, reason):
  answer = stored(xray(**tags), port, tmp_path)
  assert answer.startswith(f"{status} {reason}"[:69])
  assert said[0][:2] == ("PACS", int(status, 16))
  assert not any(str(value) in said[0][2] for value in tags.values() if value)  # only the sender
  assert not pacs[1]


def test_a_chest_may_be_named_by_its_code():
  header = pydicom.dcmread(io.BytesIO(xray(BodyPartExamined="")))
  region = pydicom.Dataset()
  region.CodeValue = "816094009"
  header.AnatomicRegionSequence = [region]
  node.check_chest(header)


def test_other_titles_and_other_objects_are_turned_away(pacs, port, said, tmp_path):
  assert stored(xray(), port, tmp_path, caller="STRANGER") == "turned away"
  assert stored(xray(), port, tmp_path, called="OTHER") == "turned away"
  assert stored(make(), port, tmp_path) == "turned away"  # no X-ray by its kind
  assert not said
  assert not pacs[1]


def test_an_image_that_is_too_large_ends_the_association(pacs, port, said, tmp_path):
  large = np.zeros((512, 512), np.uint16)
  image = xray(Rows=512, Columns=512, PixelData=large.tobytes())
  stored(image, port, tmp_path)
  assert said == [("PACS", node.NO_RESOURCES, said[0][2])]
  assert "more than 200000 bytes" in said[0][2]
  assert stored(xray(), port, tmp_path) == "0000"  # and the next is taken
  assert len(pacs[1]) == 1


def test_no_answer_and_no_destination_are_a_status_to_come_again(pacs, said, tmp_path):
  def no_answer(image, told):
    raise LookupError("the clinic has no unused correlations")

  done = lambda *what: said.append(what)
  with node.serve(MODEL, no_answer, pacs[0], ["PACS"], done=done) as port:
    assert stored(xray(), port, tmp_path).startswith("A700 no answer: the clinic has no unused")
  nowhere = node.Destination("127.0.0.1", 1, "PACS")
  with node.serve(MODEL, ask, nowhere, ["PACS"], done=done) as port:
    assert stored(xray(), port, tmp_path).startswith("A700 no association with PACS")
  assert "Doe" not in str(said)  # a patient's name is in no log
  assert "77" not in [word for _, _, reason in said for word in reason.split()]


def sent(data, port):
  """The status and comment that a sender in this process gets."""
  image = pydicom.dcmread(io.BytesIO(data))
  entity = AE("PACS")
  entity.add_requested_context(image.SOPClassUID, image.file_meta.TransferSyntaxUID)
  association = entity.associate("127.0.0.1", port, ae_title="PRIMIA")
  status = association.send_c_store(image)
  association.release()
  return f"{status.Status:04X} {status.get('ErrorComment', '')}".strip()


@pytest.mark.parametrize("is_silent", [True, False])
def test_no_value_of_a_malformed_header_is_said_or_warned_of(
  pacs, said, capfd, caplog, monkeypatch, is_silent
):
  """Libraries quote it in exceptions, warnings and logs; without the silence it is heard."""

  def make(header, *rest):
    warnings.warn(f"birth date {header.PatientBirthDate}", stacklevel=1)
    logging.getLogger("pydicom").warning(header.PatientBirthDate)
    raise ValueError(f"birth date {header.PatientBirthDate}")

  monkeypatch.setattr(node.reports, "make", make)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    data = xray(PatientBirthDate="Doe^1970", StudyDate="Doe^1970", PatientAge="Doe is 7")
  caplog.clear()
  if not is_silent:
    monkeypatch.setattr(node, "_silent", contextlib.nullcontext)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    done = lambda *what: said.append(what)
    with node.serve(MODEL, ask, pacs[0], ["PACS"], done=done) as port:
      sent(data, port)
  assert len(said) == 1
  assert "no report can be made of the header of image" in said[0][2]
  assert "(ValueError)" in said[0][2]
  assert "Doe" not in str(said)
  heard = [str(warning.message) for warning in caught], capfd.readouterr(), caplog.text
  assert ("Doe" in str(heard)) != is_silent


class Destination:
  """A store that refuses the first reports; counts queries and keeps what came."""

  def __init__(self, refusals):
    self.queries, self.came, self.refusals = 0, [], refusals

  def ask(self, image, told):
    self.queries += 1
    return ask(image, told)

  def send(self, report, to, title, seconds):
    self.came.append(report)
    if len(self.came) <= self.refusals:
      raise node.Refused(node.NO_RESOURCES, "full")


@pytest.mark.parametrize("waiting", [64, 1])
def test_an_image_that_comes_again_gets_the_same_report_without_a_query(pacs, monkeypatch, waiting):
  one, limits = Destination(2), node.Limits(waiting=waiting)
  monkeypatch.setattr(node, "send", one.send)
  data, other = xray(), xray(PatientID="78")
  with node.serve(MODEL, one.ask, pacs[0], ["PACS"], limits=limits) as port:
    assert sent(data, port).startswith("A700 full")
    assert sent(other, port).startswith("A700 full")
    assert sent(data, port) == "0000"
    assert sent(other, port) == "0000"
    uids = [report.SOPInstanceUID for report in one.came]
    if waiting == 1:  # the older report was given up
      assert one.queries == 4
      return
    assert (one.queries, uids[:2]) == (2, uids[2:])
    assert len(set(uids)) == 2
    assert sent(data, port) == "0000"  # what was stored is a new question
    assert one.queries == 3


def test_no_query_is_spent_where_the_report_has_no_place():
  one, nowhere = Destination(0), node.Destination("127.0.0.1", 1, "PACS")
  with node.serve(MODEL, one.ask, nowhere, ["PACS"]) as port:
    for _ in range(2):
      assert sent(xray(), port).startswith("A700 no association with PACS")
  assert one.queries == 0


@pytest.mark.parametrize(
  ("more", "reason"),
  [
    ({"allowed": []}, "no AE title is allowed"),
    ({"allowed": ["A" * 17]}, "1 to 16 ASCII"),
    ({"title": ""}, "1 to 16 ASCII"),
    ({"model": MODEL._replace(label_names=("x" * 49,))}, "49 characters"),
  ],
)
def test_a_wrong_node_does_not_start(more, reason):
  given = {"model": MODEL, "ask": ask, "allowed": ["PACS"], **more}
  nowhere = node.Destination("127.0.0.1", 1, "PACS")
  with pytest.raises(ValueError, match=reason), node.serve(reports_to=nowhere, **given):
    raise AssertionError("it started")


def test_pixels_are_those_of_the_data_package(pacs, tmp_path):
  """What is asked about is what `evaluate` and `infer_encrypted` take from the same file."""
  seen, data = [], xray()

  def watch(image, told):
    seen.append(image)
    return ask(image, told)

  node.report_of(data, MODEL, watch)
  np.testing.assert_array_equal(seen[0], decode.decode(data, "x", size=8, channels=1))
  assert RAMP.shape == (16, 16)


@pytest.mark.skipif(not shutil.which("storescu"), reason="dcmtk's storescu is not installed")
def test_storescu_of_dcmtk_sends_and_is_turned_away(pacs, port, tmp_path):
  path = pathlib.Path(tmp_path / "image.dcm")
  path.write_bytes(xray())
  send = lambda *more: subprocess.run(
    ["storescu", "-v", "-aec", "PRIMIA", *more, "127.0.0.1", str(port), str(path)],
    capture_output=True, text=True, check=False, timeout=60,
  )  # fmt: skip
  done = send("-aet", "CT1")
  assert done.returncode == 0, done.stderr
  assert "Success" in done.stdout + done.stderr
  assert len(pacs[1]) == 1
  assert send("-aet", "STRANGER").returncode != 0
  path.write_bytes(xray(BodyPartExamined="HAND"))
  refused = send("-aet", "CT1")
  assert "DataSetDoesNotMatchSOPClass" in refused.stdout + refused.stderr
  assert len(pacs[1]) == 1


@pytest.mark.skipif(not shutil.which("dsrdump"), reason="dcmtk's dsrdump is not installed")
def test_dcmtk_reads_a_report(tmp_path):
  path = tmp_path / "report.dcm"
  header = pydicom.dcmread(io.BytesIO(xray()))
  reports.make(header, MODEL, ask(np.zeros((8, 8, 1)), lambda phase: None)).save_as(path)
  done = subprocess.run(["dsrdump", str(path)], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "NOT FOR DIAGNOSIS" in done.stdout
  assert "E: " not in done.stderr
