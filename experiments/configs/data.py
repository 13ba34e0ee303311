"""Which images, and how they are dealt to hospitals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from primia_jax.data import dicom, labels_csv, layouts, medimeta, patient_ids, volumes

from ..settings import choose, fractions, names, require, setting

NO_IMAGES = "none"  # as a site's source
_MAX_SIZE = 8192  # pixels; larger images fit in no memory


@dataclasses.dataclass(frozen=True)
class Data:
  """Which images, in which form."""

  data: str = setting(
    "phantom",
    "images: phantom (synthetic), folder:PATH (a folder or tar), csv:PATH (a table of files and "
    "labels), npz:PATH, msd:PATH (volumes with masks, as the Decathlon's), medimeta:PATH (a data "
    "set of MedIMeta), or tfds:NAME",
  )
  site_data: str = setting(
    "",
    "a source for each site in place of data, in the same form and separated by commas; with "
    "placement=flower each process then opens its own source only, and patients of two sources "
    "count as different. Empty deals the images of data to the sites, and each process opens all",
  )
  image_size: int = setting(32, "height and width in pixels to which images are resized")
  channels: int = setting(1, "1 (grey) or 3 (RGB)")
  ct_window: str = setting(
    "",
    "folder of CT images as DICOM, or msd: the Hounsfield units shown from black to white, as "
    f"CENTRE,WIDTH such as 40,400, or {', '.join(dicom.CT_WINDOWS)}; other images are then "
    "refused. Empty takes percentiles 1 to 99 of each grey DICOM image or volume",
  )
  label_names: str = setting(
    "", "classes in order, separated by commas; empty takes what the source says"
  )
  layout: str = setting(
    "",
    "folder: what the folders mean, from the root to the image, of site, split, class, patient and "
    "* (nothing), such as site/class or split/class/patient; empty recognises [SITE/][SPLIT/]CLASS",
  )
  ignore: str = setting(
    "",
    "folder: files and folders to leave out, as patterns separated by commas, such as *.csv,masks; "
    "one with a slash is a path below the root",
  )
  csv_columns: str = setting(
    "",
    "csv: names of the columns that are not called file, label, split or site, such as "
    "file=Image Index,label=Finding; see patient_column for patients",
  )
  multi_label: bool = setting(
    False,
    "csv: an image has any number of labels, such as A|B in one column (NIH ChestX-ray14); an "
    "empty cell or No Finding means no label",
  )
  label_columns: str = setting(
    "", "csv: labels with a column each of 0 and 1, separated by commas; implies multi_label"
  )
  grey_bits: int = setting(
    0,
    "bits that 16-bit grey PNG and TIFF use, such as 12; 0 takes the fewest of 8, 10, 12, 14 and "
    "16 that hold the largest value of the source",
  )
  slices: str = setting(
    "",
    "msd: labelled takes only slices that hold a class besides the background, whose scores say "
    "nothing of false alarms elsewhere; empty takes all",
  )
  task: str = setting("", "medimeta: the task, such as disease; empty takes the only one")
  splits: str = setting(
    "",
    "medimeta: original takes the splits of the data set that it was made of; empty MedIMeta's own",
  )
  skip_bad_files: bool = setting(
    False, "go on without images that cannot be read; the report lists them"
  )
  allow_overlap: bool = setting(
    False,
    "go on where patients or equal images are in training and testing; the report counts them",
  )
  data_dir: str = setting("", "tfds: folder of the prepared data sets; empty takes TFDS's default")
  manual_dir: str = setting(
    "", "tfds: folder of the original images, for the builders that come with primia_jax"
  )
  patient_column: str = setting(
    "",
    "column that holds each image's patient: csv: any; npz: array SPLIT_NAME; tfds: feature NAME; "
    "folder: `folder`, where each patient has one. Empty takes what the source names: column "
    "patient of csv, SPLIT_groups of npz, group of tfds, PatientID of DICOM files, numbers in "
    "Kermany's file names",
  )
  patient_pattern: str = setting(
    "",
    "folder or tfds: regular expression with one group, searched in each image's path, that finds "
    r"its patient, such as (person\d+)_; folders may be part of it. With this or patient_column, "
    "evaluate's intervals resample patients",
  )

  def __post_init__(self):
    choose("channels", self.channels, (1, 3))
    choose("grey_bits", self.grey_bits, (0, *range(8, 17)))
    kinds = {source.partition(":")[0] for source in self.sources or (self.data,)} - {NO_IMAGES}
    if self.multi_label and not kinds <= {"csv"} and self.data:
      raise ValueError(
        f"multi_label=True with data={self.site_data or self.data}: several labels an image come "
        "with csv:PATH only"
      )
    for name, (kind, read) in self._of_kinds().items():
      value = getattr(self, name)
      if value and kinds and kind not in kinds:
        given = f"site_data={self.site_data!r}" if self.site_data else f"data={self.data!r}"
        raise ValueError(f"{name}={value!r} belongs to {kind}:PATH, not to {given}; leave it out")
      if value:
        read(value)
    if self.label_names:
      self._check_label_names()
    if self.site_data:
      for source in self.sources:
        self.of(source)  # which checks it
      return
    kind = self.data.partition(":")[0]
    if kind == "msd" and (self.patient_column or self.patient_pattern):
      raise ValueError(
        f"patient_column={self.patient_column!r} and patient_pattern={self.patient_pattern!r}: "
        "each volume of msd:PATH is one patient; leave them out"
      )
    if self.hounsfield and kind not in ("folder", "csv", "msd", NO_IMAGES):
      raise ValueError(
        f"ct_window={self.ct_window!r}: data={self.data} holds no DICOM files; leave out ct_window"
      )
    if self.patient_column and self.patient_pattern:
      raise ValueError(
        f"patient_column={self.patient_column!r} and patient_pattern={self.patient_pattern!r} both "
        "say whose an image is; use one of them"
      )
    named = self.patient_column or self.patient_pattern
    if named and self.layout and "patient" in layouts.levels(self.layout):
      raise ValueError(
        f"layout={self.layout!r} and {named!r} both say whose an image is; take patient out of "
        "layout, or leave patient_column and patient_pattern out"
      )
    if kind == "phantom" and (self.patient_column or self.patient_pattern):
      raise ValueError(
        f"patient_column={self.patient_column!r} and patient_pattern={self.patient_pattern!r}: the "
        "phantom has one image a patient; leave them out"
      )
    if kind == "phantom" and self.channels != 1:
      raise ValueError(
        f"data=phantom with channels={self.channels}: the phantom is grey, channels=1; use that, "
        "or name other images with --data"
      )
    if self.patient_pattern:
      patient_ids.compiled(self.patient_pattern)
      if kind == "npz":
        raise ValueError(
          f"patient_pattern={self.patient_pattern!r}: an npz file holds no file names; use "
          "patient_column"
        )
    cure = f"must lie between 1 and {_MAX_SIZE}"
    require(0 < self.image_size <= _MAX_SIZE, "image_size", self.image_size, cure)

  @staticmethod
  def _of_kinds() -> dict[str, tuple[str, Callable[[str], Any]]]:
    """Settings of one kind of source, and what reads each."""
    return {
      "layout": ("folder", layouts.levels),
      "ignore": ("folder", names),
      "csv_columns": ("csv", _columns),
      "label_columns": ("csv", names),
      "slices": ("msd", _slices),
      "task": ("medimeta", str),
      "splits": ("medimeta", _splits),
    }

  def of(self, source: str) -> Data:
    """The settings for one source, without those of other kinds."""
    kind = source.partition(":")[0]
    others: dict[str, Any] = {name: "" for name, (of, _) in self._of_kinds().items() if of != kind}
    return dataclasses.replace(self, data=source, site_data="", **others)

  @property
  def is_multi(self) -> bool:
    """Whether an image has any number of labels."""
    return self.multi_label or bool(self.label_columns)

  @property
  def columns(self) -> dict[str, str]:
    """Of `csv_columns`: meaning -> name."""
    return _columns(self.csv_columns)

  def _check_label_names(self) -> None:
    given = [name.strip() for name in self.label_names.split(",")]
    if "" in given or len(given) < 2 or len(set(given)) < len(given):
      raise ValueError(
        f"label_names={self.label_names!r}: give at least two classes, each with a name of its own"
      )
    if self.data == "phantom" and not self.site_data:
      raise ValueError(
        f"label_names={self.label_names!r}: the phantom has its own classes; leave it out, or name "
        "other images with --data"
      )

  @property
  def sources(self) -> tuple[str, ...]:
    """Of each site; empty where the images of one source are dealt."""
    return names(self.site_data)

  @property
  def hounsfield(self) -> tuple[float, float] | None:
    """Centre and width of the CT window; None without one."""
    return dicom.window(self.ct_window)


def _splits(text: str) -> None:
  choose("splits", text, [name for name in medimeta.SPLITS if name])


def _slices(text: str) -> None:
  choose("slices", text, volumes.SLICES)


def _columns(text: str) -> dict[str, str]:
  pairs = [[part.strip() for part in one.partition("=")[::2]] for one in names(text)]
  meanings = [meaning for meaning, _ in pairs]
  wrong = set(meanings) - set(labels_csv.MEANINGS) or len(set(meanings)) < len(meanings)
  if wrong or not all(name for _, name in pairs):
    raise ValueError(
      f"csv_columns={text!r}; write NAME=COLUMN, separated by commas, for names of "
      f"{', '.join(labels_csv.MEANINGS)}, such as file=Image Index; patient_column names that of "
      "patients"
    )
  return {meaning: name for meaning, name in pairs}


@dataclasses.dataclass(frozen=True)
class Hospitals:
  """How images are dealt to sites."""

  num_sites: int = setting(3, "hospitals that train together")
  phantom_images: int = setting(600, "data=phantom: training images of all sites together")
  phantom_test_images: int = setting(2000, "data=phantom: test images of all sites together")
  partition: str = setting(
    "auto",
    "how images are dealt to sites: iid, unequal, dirichlet (non-IID), column:NAME (such as "
    "column:folder), or auto: the sites that the source names (a site in layout, a CSV's column "
    "site), else dirichlet; dealing never splits a patient's images, nor equal ones",
  )
  site_fractions: str = setting(
    "",
    "sizes of the sites, such as 0.5,0.3,0.2; empty: equal for unequal, drawn for dirichlet, and "
    "falling from 3 to 1 for the phantom",
  )
  dirichlet_alpha: float = setting(
    2.0, "dirichlet: 0.1 makes sites with very different classes, 100 nearly equal ones"
  )
  validation_fraction: float = setting(
    0.15,
    "share of each site's patients held out to choose the best round; unused with validation=none, "
    "which also takes 0. The phantom draws others, as large a share of phantom_test_images",
  )
  test_fraction: float = setting(
    0.2, "share of patients held out for testing where the data have no test split"
  )
  most_images: int = setting(
    100_000,
    "placement=flower with site_data: images that a hospital may have to train on, and as many to "
    "validate on. All make room for the largest hospital and weigh updates by size, so that one "
    "which tells more is refused by name",
  )
  sites_in_memory: int = setting(
    0, "load at most this many sites' images at a time; 0 keeps all in memory"
  )

  def __post_init__(self):
    require(self.num_sites > 0, "num_sites", self.num_sites, "must be positive")
    for name in ("phantom_images", "phantom_test_images"):
      require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
    require(self.most_images > 0, "most_images", self.most_images, "must be positive")
    require(self.sites_in_memory >= 0, "sites_in_memory", self.sites_in_memory, "is negative")
    value = self.dirichlet_alpha
    require(0 < value < math.inf, "dirichlet_alpha", value, "must be positive and finite")
    kind, _, column = self.partition.partition(":")
    kinds = ("column",) if column else ("auto", "iid", "unequal", "dirichlet")
    if kind not in kinds:
      raise ValueError(
        f"partition={self.partition!r}; use auto, iid, unequal, dirichlet or column:NAME"
      )
    value = self.validation_fraction
    require(0 <= value < 1, "validation_fraction", value, "must lie in [0, 1)")
    value = self.test_fraction
    require(0 < value < 1, "test_fraction", value, "must lie between 0 and 1")
    for share in fractions(self.site_fractions) or ():
      cure = "must hold numbers between 0 and 1, such as 0.5,0.3,0.2"
      require(0 < share <= 1, "site_fractions", self.site_fractions, cure)
