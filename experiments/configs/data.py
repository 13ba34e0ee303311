"""Which images, and how they are dealt to hospitals."""

from __future__ import annotations

import dataclasses
import math

from primia_jax.data import patient_ids

from ..settings import choose, fractions, names, require, setting

_MAX_SIZE = 8192  # pixels; larger images fit in no memory


@dataclasses.dataclass(frozen=True)
class Data:
  """Which images, in which form."""

  data: str = setting(
    "phantom", "images: phantom (synthetic), folder:PATH (a folder or tar), npz:PATH, or tfds:NAME"
  )
  site_data: str = setting(
    "",
    "a source for each site in place of data, in the same form and separated by commas; with "
    "placement=processes each process then opens its own source only, and patients of two sources "
    "count as different. Empty deals the images of data to the sites, and each process opens all",
  )
  image_size: int = setting(64, "height and width in pixels to which images are resized")
  channels: int = setting(1, "1 (grey) or 3 (RGB)")
  label_names: str = setting(
    "", "classes in order, separated by commas; empty takes what the source says"
  )
  data_dir: str = setting("", "tfds: folder of the prepared data sets; empty takes TFDS's default")
  manual_dir: str = setting(
    "", "tfds: folder of the original images, for the builders that come with primia_jax"
  )
  patient_column: str = setting(
    "",
    "column that holds each image's patient: npz: array SPLIT_NAME; tfds: feature NAME; folder: "
    "`folder`, where each patient has one. Empty takes what the source names: SPLIT_groups of npz, "
    "group of tfds, PatientID of DICOM files, numbers in Kermany's file names",
  )
  patient_pattern: str = setting(
    "",
    "folder or tfds: regular expression with one group, searched in each image's path, that finds "
    r"its patient, such as (person\d+)_; folders may be part of it. With this or patient_column, "
    "evaluate's intervals resample patients",
  )

  def __post_init__(self):
    choose("channels", self.channels, (1, 3))
    if self.site_data:
      for source in self.sources:
        dataclasses.replace(self, data=source, site_data="")  # which checks it
      return
    kind = self.data.partition(":")[0]
    if self.patient_column and self.patient_pattern:
      raise ValueError(
        f"patient_column={self.patient_column!r} and patient_pattern={self.patient_pattern!r} both "
        "say whose an image is; use one of them"
      )
    if kind == "phantom" and (self.patient_column or self.patient_pattern):
      raise ValueError(
        f"patient_column={self.patient_column!r} and patient_pattern={self.patient_pattern!r}: the "
        "phantom has one image a patient; leave them out"
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

  @property
  def sources(self) -> tuple[str, ...]:
    """Of each site; empty where the images of one source are dealt."""
    return names(self.site_data)


@dataclasses.dataclass(frozen=True)
class Hospitals:
  """How images are dealt to sites."""

  num_sites: int = setting(3, "hospitals that train together")
  phantom_images: int = setting(800, "data=phantom: training images of all sites together")
  partition: str = setting(
    "auto",
    "how images are dealt to sites: iid, unequal, dirichlet (non-IID), column:NAME (such as "
    "column:folder), or auto: the phantom's own sites, else dirichlet; a patient's images are "
    "never split",
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
    "share of each site's patients held out to choose the best round; unused with validation=none",
  )
  test_fraction: float = setting(
    0.2, "share of patients held out for testing where the data have no test split"
  )
  sites_in_memory: int = setting(
    0, "load at most this many sites' images at a time; 0 keeps all in memory"
  )

  def __post_init__(self):
    require(self.num_sites > 0, "num_sites", self.num_sites, "must be positive")
    require(self.phantom_images > 0, "phantom_images", self.phantom_images, "must be positive")
    require(self.sites_in_memory >= 0, "sites_in_memory", self.sites_in_memory, "is negative")
    value = self.dirichlet_alpha
    require(0 < value < math.inf, "dirichlet_alpha", value, "must be positive and finite")
    kind, _, column = self.partition.partition(":")
    kinds = ("column",) if column else ("auto", "iid", "unequal", "dirichlet")
    if kind not in kinds:
      raise ValueError(
        f"partition={self.partition!r}; use auto, iid, unequal, dirichlet or column:NAME"
      )
    for name in ("validation_fraction", "test_fraction"):
      value = getattr(self, name)
      require(0 < value < 1, name, value, "must lie between 0 and 1")
    for share in fractions(self.site_fractions) or ():
      cure = "must hold numbers between 0 and 1, such as 0.5,0.3,0.2"
      require(0 < share <= 1, "site_fractions", self.site_fractions, cure)
