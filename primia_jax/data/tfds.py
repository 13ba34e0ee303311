"""TensorFlow Datasets without TensorFlow: two builders, and a reader for any data set that is
prepared on disk.

Importing this module imports `tensorflow_datasets`, which takes a second. Import it only where it
is needed.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from google.protobuf import json_format

from primia_jax.data import decode, folder, layouts, patient_ids
from primia_jax.data.dataset import Dataset

MEDNIST_LABELS = ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")

_CHUNK = 1024  # records read at once
_JPEG = b"\xff\xd8\xff"


class _FolderBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """JPEG images in a folder for each class, from the first of `SOURCES` found in `manual_dir`."""

  VERSION = tfds.core.Version("1.0.0")
  # Outside its catalogue TFDS finds neither path itself; for the second it would also need a
  # package that it does not declare.
  pkg_dir_path = pathlib.Path(__file__).parent
  code_path = pathlib.Path(__file__)
  SOURCES: tuple[str, ...] = ()
  LABELS: tuple[str, ...] = ()
  DESCRIPTION = CITATION = HOMEPAGE = LICENSE = ""

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(names=self.LABELS),
          "group": tfds.features.Text(),
          "path": tfds.features.Text(),
        }
      ),
      supervised_keys=("image", "label"),
      homepage=self.HOMEPAGE,
      license=self.LICENSE,
      citation=self.CITATION,
    )

  def _split_generators(self, dl_manager):
    found = [
      dl_manager.manual_dir / source
      for source in self.SOURCES
      if (dl_manager.manual_dir / source).exists()
    ]
    if not found:
      raise FileNotFoundError(
        f"{dl_manager.manual_dir} holds none of {self.SOURCES}; put the tar or the unpacked folder "
        "there"
      )
    listing = folder.list_folder(found[0], label_names=self.LABELS)
    return {
      "train" if split == "all" else split: self._generate_examples(listing, split)
      for split in np.unique(listing.splits).tolist()
    }

  def _generate_examples(self, listing: folder.Listing, split: str):
    for i in np.flatnonzero(listing.splits == split):
      path = str(listing.paths[i])
      image = listing.files.read(path)
      if not image.startswith(_JPEG):
        raise ValueError(
          f"{listing.files.root}/{path} is not a JPEG image; copy it again or remove it"
        )
      # Passes the bytes unchanged: an array would be encoded again, by TensorFlow.
      yield (
        path,
        {
          "image": image,
          "label": int(listing.labels[i]),
          "group": str(listing.groups[i]),
          "path": path,
        },
      )


class KermanyChestXray(_FolderBuilder):
  """Paediatric chest X-rays in `{train,test}/{NORMAL,PNEUMONIA}`. File names tell bacterial from
  viral.
  """

  SOURCES = ("chest_xray_224.tar", "chest_xray.tar", "chest_xray")
  LABELS = folder.KERMANY_LABELS
  DESCRIPTION = "Paediatric chest X-rays: normal, bacterial pneumonia, viral pneumonia."
  HOMEPAGE = "https://data.mendeley.com/datasets/rscbjbr9sj"
  LICENSE = "CC BY 4.0"
  CITATION = (
    "Kermany, Zhang, Goldbaum: Labeled Optical Coherence Tomography (OCT) and Chest X-Ray Images "
    "for Classification. Mendeley Data, 2018, doi:10.17632/rscbjbr9sj"
  )
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f"Put one of {SOURCES} (a tar or the unpacked folder, containing train and test) into "
    f"manual_dir; the source is {HOMEPAGE}"
  )


class MedNist(_FolderBuilder):
  """MedNIST: six kinds of radiological images in a folder each, without splits (all become
  "train").
  """

  SOURCES = ("mednist_64.tar", "MedNIST.tar", "MedNIST")
  LABELS = MEDNIST_LABELS
  DESCRIPTION = "Six kinds of radiological images of 64 x 64 pixels."
  HOMEPAGE = "https://github.com/apolanco3225/Medical-MNIST-Classification"
  LICENSE = "CC BY-SA 4.0"
  CITATION = "B. J. Erickson, Mayo Clinic: MedNIST"
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    f"Put one of {SOURCES} (a tar or the unpacked folder, with a folder for each class) into "
    f"manual_dir; the source is {HOMEPAGE}"
  )


BUILDERS = {builder.name: builder for builder in (KermanyChestXray, MedNist)}


def prepare(
  name: str, *, manual_dir: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None
) -> pathlib.Path:
  """Prepares one of our data sets in TFDS's format, unless it is already there.

  Args:
    name: "kermany_chest_xray" or "med_nist".
    manual_dir: the folder that contains the tar or the unpacked folder.
    data_dir: where TFDS keeps its data sets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.

  Returns:
    The folder of the prepared data set.

  Raises:
    ValueError: the name is another, or `folder.read_folder` raises it.
    FileNotFoundError: `manual_dir` does not hold the images.
  """
  if name not in BUILDERS:
    raise ValueError(f"there is no builder {name!r}; known builders are {sorted(BUILDERS)}")
  if not pathlib.Path(manual_dir).is_dir():
    raise FileNotFoundError(
      f"there is no folder {manual_dir}; {BUILDERS[name].MANUAL_DOWNLOAD_INSTRUCTIONS}"
    )
  builder = BUILDERS[name](data_dir=_data_dir(data_dir), file_format="array_record")
  builder.download_and_prepare(
    download_config=tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False),
    file_format="array_record",
  )
  return pathlib.Path(builder.data_path)


def read_tfds(
  name: str,
  *,
  size: int,
  channels: int,
  label_names: Sequence[str] | None = None,
  lazy: bool = False,
  data_dir: str | os.PathLike[str] | None = None,
  manual_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Dataset]:
  """Reads a TFDS data set that was prepared on disk as array_record; needs neither TensorFlow nor a
  network.

  There must be one image feature and one class label. A text or number feature "group" gives each
  image's patient (unknown where it is empty or equals a feature "path"); without it, each image is
  its own group and patients are unknown. Every other text or number becomes a column.

  Args:
    name: `NAME`, `NAME/CONFIG`, either with `:VERSION` (by default the newest), or the path of a
      prepared folder.
    size: height and width, in pixels; see `decode.decode`.
    channels: 1 (grey) or 3 (RGB).
    label_names: the classes in order, e.g. a checkpoint's; by default the data set's own.
    lazy: decode on demand instead of now, for images that do not fit in memory.
    data_dir: where TFDS keeps its data sets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    manual_dir: for `BUILDERS` only: prepare the data set from there if it is not yet.

  Returns:
    A `Dataset` for each split, named as TFDS names it, "val" and "valid" as "validation".

  Raises:
    FileNotFoundError: the data set is not there.
    ValueError: it has no image or label feature or several, another file format, a corrupt image
      or record, or an unknown class.
  """
  decode.check_form(size, channels)
  if manual_dir is not None:
    prepare(name, manual_dir=manual_dir, data_dir=data_dir)
  path = find(name, data_dir)
  with _readable(path):
    builder = tfds.builder_from_directory(path)
  file_format = builder.info.file_format
  if file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise ValueError(
      f"{path} is stored as {file_format and file_format.value}, which only TensorFlow reads; "
      'prepare it again with download_and_prepare(file_format="array_record")'
    )
  image_key = _only_feature(path, builder.info.features, tfds.features.Image)
  label_key = _only_feature(path, builder.info.features, tfds.features.ClassLabel)
  own_names = tuple(builder.info.features[label_key].names)
  kinds = tuple(label_names) if label_names is not None else own_names
  to_label = folder.label_indices(own_names, kinds, [f"{path}"] * len(own_names)).tolist()
  datasets = {}
  for split in builder.info.splits:
    with _readable(path):
      source = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
      columns = _columns(source, image_key)
    num = len(source)
    images = decode.EncodedImages(
      np.arange(num),
      partial(_read, path, source, image_key),
      f"{path}, {split} split, record",
      size,
      channels,
    )
    own = np.char.add(f"{split}/", np.arange(num).astype(str))
    groups, has_patient = patient_ids.groups(columns.pop("group", np.full(num, "")), own)
    if "path" in columns:  # which our builders write where a patient is unknown
      has_patient &= groups.astype(str) != columns["path"]
    datasets[layouts.SPLITS.get(split, split)] = Dataset(
      images=images if lazy else images[np.arange(num)],
      labels=np.array(to_label, np.int32)[columns.pop(label_key)],
      label_names=kinds,
      groups=groups,
      has_patient=has_patient,
      columns=columns,
      name=builder.info.name,
      is_numbered=builder.info.name == KermanyChestXray.name,
    )
  return datasets


def _data_dir(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
  return pathlib.Path(
    data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
  ).expanduser()


def find(name: str, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns the folder of a prepared data set. (`tfds.builder` would also look on the network.)

  Raises:
    FileNotFoundError: it is not prepared.
  """
  if (pathlib.Path(name) / "dataset_info.json").is_file():
    return pathlib.Path(name)
  base, _, version = name.partition(":")
  root = _data_dir(data_dir) / base
  found = [
    one.parent
    for one in root.glob(f"{version or '*'}/dataset_info.json")
    if _version(one.parent.name)
  ]
  if not found:
    ours = (
      f"give manual_dir, the folder with one of {BUILDERS[base].SOURCES}"
      if base in BUILDERS
      else "prepare it there"
    )
    raise FileNotFoundError(
      f"no TFDS data set {name!r} is prepared in {_data_dir(data_dir)}; {ours}, or give data_dir"
    )
  return max(found, key=lambda one: _version(one.name))


def _version(text: str) -> tuple[int, ...]:
  return tuple(map(int, text.split("."))) if re.fullmatch(r"\d+\.\d+\.\d+", text) else ()


def _only_feature(path: pathlib.Path, features: Any, kind: type) -> str:
  """Returns the name of the only feature of a kind."""
  found = [name for name, feature in features.items() if isinstance(feature, kind)]
  if len(found) != 1:
    raise ValueError(
      f"{path} has {len(found)} features of the kind {kind.__name__} among {sorted(features)}; one "
      "is needed: choose a data set of labelled images"
    )
  return found[0]


def _columns(source: Any, image_key: str) -> dict[str, np.ndarray]:
  """Reads all features that are a single number or text, for all records; [N] each."""
  rows: dict[str, list] = {}
  for start in range(0, len(source), _CHUNK):
    for record in source.__getitems__(list(range(start, min(start + _CHUNK, len(source))))):
      for key, value in record.items():
        if key != image_key and np.ndim(value) == 0 and not isinstance(value, dict):
          rows.setdefault(key, []).append(value.decode() if isinstance(value, bytes) else value)
  return {key: np.array(values) for key, values in rows.items()}


def _read(path: pathlib.Path, source: Any, image_key: str, index: int) -> bytes:
  with _readable(path):
    return source[index][image_key]


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
  """Adds the data set's path to errors of TFDS, protobuf and array_record about its files."""
  try:
    yield
  except (RuntimeError, ValueError, OSError, KeyError, json_format.ParseError) as error:
    raise ValueError(
      f"{path} cannot be read ({error}); copy it again, or remove it and prepare it again"
    ) from error
