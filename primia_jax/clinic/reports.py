"""Structured reports (DICOM SR, template 1500) of a model's answer about one image."""

from __future__ import annotations

from typing import Any

import highdicom as hd
from highdicom import sr
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from primia_jax.clinic.asking import WARNING, Answer, Model

_SCHEME = "99PRIMIA"  # a private coding scheme: the classes are the model's own words
_MANUFACTURER = "primia_jax"
_LONGEST = 48  # characters; with the words around it, what a code's meaning may have (64)


def check(model: Model) -> None:
  """Refuses a model whose names a report has no room for.

  Raises:
    ValueError: naming what is too long.
  """
  for text in (model.name, model.version, model.software, *model.label_names):
    if not 0 < len(text) <= _LONGEST:
      raise ValueError(f"{text!r} has {len(text)} characters; a DICOM report holds 1 to {_LONGEST}")


def make(source: Dataset, model: Model, answer: Answer) -> Dataset:
  """A report about an image, for the study that it belongs to.

  It names the model, its version, the class, the probabilities where they are known, and that it is
  not for diagnosis. It is not verified by anybody, and marked as preliminary.

  Args:
    source: the image, with its header.
    model: what answered.
    answer: its answer.
  """
  parameters = [WARNING, "computed under encryption; the model's owner has not seen the image"]
  algorithm = sr.AlgorithmIdentification(
    name=model.name, version=model.version, parameters=parameters,
    manufacturer=_MANUFACTURER,
  )  # fmt: skip
  said = model.label_names[answer.label]
  group = sr.MeasurementsAndQualitativeEvaluations(
    tracking_identifier=sr.TrackingIdentifier(uid.generate_uid(prefix=None), "image"),
    algorithm_id=algorithm,
    finding_type=codes.SCT.ClinicalFinding,
    finding_sites=[sr.FindingSite(codes.SCT.Chest)],
    measurements=_measurements(model, answer) or None,
    qualitative_evaluations=[
      sr.QualitativeEvaluation(
        _code("class", "Class by the model"), _code(f"class-{answer.label}", said)
      ),
      sr.QualitativeEvaluation(_code("use", "Intended use"), _code("not-for-diagnosis", WARNING)),
    ],
    source_images=[sr.SourceImageForMeasurementGroup.from_source_image(source)],
  )
  device = sr.ObserverContext(
    observer_type=codes.DCM.Device,
    observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
      uid=uid.generate_uid(prefix=None), name=model.name, manufacturer_name=_MANUFACTURER,
      model_name=model.name, serial_number=model.version,
    ),
  )  # fmt: skip
  content = sr.MeasurementReport(
    observation_context=sr.ObservationContext(observer_device_context=device),
    procedure_reported=_code("inference", "Encrypted inference"),
    imaging_measurements=[group],
    title=codes.DCM.ImagingMeasurementReport,
  )
  report = sr.ComprehensiveSR(
    evidence=[source],
    content=content[0],
    series_instance_uid=uid.generate_uid(prefix=None),
    series_number=9000,
    sop_instance_uid=uid.generate_uid(prefix=None),
    instance_number=1,
    manufacturer=_MANUFACTURER,
    is_complete=True,
    is_final=False,
    is_verified=False,
    series_description=f"{WARNING.partition(':')[0]}: {model.name}",
    manufacturer_model_name=model.name,
    software_versions=model.software,
  )
  return report


def _measurements(model: Model, answer: Answer) -> list[Any]:
  if answer.probabilities is None:
    return []
  return [
    sr.Measurement(
      name=_code(f"probability-{i}", f"Probability of {name}"),
      value=round(100 * float(p), 2),
      unit=codes.UCUM.Percent,
    )
    for i, (name, p) in enumerate(zip(model.label_names, answer.probabilities, strict=True))
  ]


def _code(value: str, meaning: str) -> hd.sr.CodedConcept:
  return sr.CodedConcept(value=value[:16], scheme_designator=_SCHEME, meaning=meaning)
