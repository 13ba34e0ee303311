"""The DICOM node and Orthanc, a PACS of its own: it sends an X-ray and stores the report."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from clinic_node_test import MODEL, ask, xray

from primia_jax.clinic import asking, node

ORTHANC = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(ORTHANC is None, reason="Orthanc is not installed"),
]


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


class Orthanc:
  """Its process, and its REST interface on loopback."""

  def __init__(self, folder, node_port, dicom_port):
    self.http = f"http://127.0.0.1:{free_port()}"
    config = {
      "Name": "test", "StorageDirectory": str(folder), "IndexDirectory": str(folder),
      "Plugins": [], "HttpPort": int(self.http.rpartition(":")[2]), "DicomPort": dicom_port,
      "DicomAet": "ORTHANC", "DicomCheckCalledAet": True, "RemoteAccessAllowed": False,
      "AuthenticationEnabled": False, "StableAge": 1,
      "DicomModalities": {
        "node": {
          "AET": "PRIMIA", "Host": "127.0.0.1", "Port": node_port, "AllowStore": True,
          "AllowEcho": True,
        }
      },
    }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(config))
    self.process = subprocess.Popen([ORTHANC, str(folder / "orthanc.json")])
    end = time.monotonic() + 60
    while not self.up():
      assert self.process.poll() is None, "Orthanc ended"
      assert time.monotonic() < end, "Orthanc does not answer"
      time.sleep(0.1)

  def up(self):
    try:
      return bool(self("system"))
    except OSError:
      return False

  def __call__(self, path, data=None):
    with urllib.request.urlopen(f"{self.http}/{path}", data, timeout=60) as answer:
      return json.loads(answer.read())

  def send(self, data):
    """Stores a file, and sends it from there to the node."""
    stored = self("instances", data)["ID"]
    return self("modalities/node/store", stored.encode())

  def kinds(self):
    """The modality of each series of each study."""
    of = lambda study: [self(f"series/{s}")["MainDicomTags"]["Modality"] for s in study["Series"]]
    return [sorted(of(self(f"studies/{study}"))) for study in self("studies")]


@pytest.fixture
def said():
  return []


@pytest.fixture
def orthanc(tmp_path, said):
  port, done = free_port(), lambda *what: said.append(what)
  to = node.Destination("127.0.0.1", port, "ORTHANC")
  with node.serve(MODEL, ask, to, ["ORTHANC"], done=done) as at:
    server = Orthanc(tmp_path, at, port)
    try:
      yield server
    finally:
      server.process.terminate()
      server.process.wait(30)


def test_orthanc_has_the_report_in_the_image_s_study(orthanc, said):
  assert orthanc.send(xray())["FailedInstancesCount"] == 0
  assert said == [("ORTHANC", 0, "")]
  assert orthanc.kinds() == [["DX", "SR"]]
  tags = [orthanc(f"instances/{one}/simplified-tags") for one in orthanc("instances")]
  (image,) = (one for one in tags if one["Modality"] == "DX")
  (report,) = (one for one in tags if one["Modality"] == "SR")
  for name in ("PatientName", "PatientID", "AccessionNumber", "StudyInstanceUID"):
    assert report[name] == image[name]
  assert report["VerificationFlag"] == "UNVERIFIED"
  assert image["SOPInstanceUID"] in json.dumps(report)
  for words in ("bacterial", MODEL.version, asking.WARNING):
    assert words in json.dumps(report)


def test_orthanc_is_told_of_what_is_no_chest_xray(orthanc, said):
  with pytest.raises(urllib.error.HTTPError):
    orthanc.send(xray(BodyPartExamined="HAND"))
  assert said[0][:2] == ("ORTHANC", node.WRONG)
  assert "no chest X-ray" in said[0][2]
  assert orthanc.kinds() == [["DX"]]
