"""Settings: each is one flag, one line of config.json, and a name that no other record has."""

import dataclasses
import json
import math
import typing

import pytest
from absl import flags

from experiments import encrypted, settings
from experiments.configs import Train
from experiments.configs.data import Data

CHANGED = settings.replace(
  Train(), seed=7, data="npz:x", norm="group", mixup=0.25, rounds=7, class_weights=False,
  algorithm="fedprox", secagg_bits=30, delta=0.25, validation_fraction=0.25, learning_rate=1e-7,
)  # fmt: skip


def leaves(kind, within=""):
  """(record, setting) of all settings, records within records included."""
  for field in dataclasses.fields(kind):
    of_type = typing.get_type_hints(kind)[field.name]
    if dataclasses.is_dataclass(of_type):
      yield from leaves(of_type, of_type.__name__)
    else:
      yield within, field.name


def read(kind, *arguments):
  values = flags.FlagValues()
  settings.define_flags(kind, values)
  values(["program", *arguments])
  return settings.from_flags(kind, values)


def test_names_are_unique_and_each_setting_has_a_flag_with_its_help():
  names = [name for _, name in leaves(Train)]
  assert len(set(names)) == len(names) > 60
  assert list(settings.flat(Train())) == names
  values = flags.FlagValues()
  settings.define_flags(Train, values)
  assert all(len(values[name].help) > 5 for name in names)
  assert sorted(values) == sorted(names)


def test_two_settings_of_one_name_are_refused():
  @dataclasses.dataclass(frozen=True)
  class Twice:
    data: Data = dataclasses.field(default_factory=Data)
    image_size: int = settings.setting(1, "again")

  with pytest.raises(flags.DuplicateFlagError, match="image_size"):
    settings.define_flags(Twice, flags.FlagValues())


def test_flags_make_the_settings():
  given = ("--rounds=7", "--noclass_weights", "--learning_rate=0.5", "--model=mlp", "--dp=example")
  got = read(Train, *given, "--noise_multiplier=2")
  assert (got.training.rounds, got.training.class_weights) == (7, False)
  assert (got.training.learning_rate, got.model.model) == (0.5, "mlp")
  assert (got.privacy.dp, got.privacy.noise_multiplier) == ("example", 2.0)
  assert read(Train) == Train()
  expected = encrypted.Infer(images="x.png", exact=False, target_error=0.1, check=True)
  flags_given = ("--images=x.png", "--noexact", "--target_error=0.1", "--check")
  assert read(encrypted.Infer, *flags_given) == expected


def test_settings_come_back_from_config_json_and_from_flags(tmp_path):
  path = tmp_path / "config.json"
  settings.save(CHANGED, path)
  record = json.loads(path.read_text())
  assert record["format"] == settings.FORMAT
  assert record["settings"]["training"]["rounds"] == 7  # by record, as people read it
  saved = settings.load(path)
  assert saved == settings.flat(CHANGED)
  assert settings.replace(Train(), **saved) == CHANGED
  written = [f"--{k}={v}" for k, v in saved.items()]
  assert read(Train, *written) == CHANGED
  assert settings.differences(saved, CHANGED) == {}
  assert settings.differences(saved, settings.replace(CHANGED, rounds=8)) == {"rounds": (7, 8)}


def test_a_setting_that_a_run_folder_lacks_is_a_difference(tmp_path):
  """Of a run by a version that had no such setting."""
  saved = settings.flat(Train())
  del saved["secagg_peers"]
  assert settings.differences(saved, Train()) == {"secagg_peers": (None, 0)}


def test_replace_finds_a_setting_in_any_record_and_checks_it_again():
  got = settings.replace(Train(), rounds=2, data="npz:x", seed=3)
  assert (got.training.rounds, got.data.data, got.seed) == (2, "npz:x", 3)
  assert got.hospitals == Train().hospitals
  with pytest.raises(TypeError, match=r"\['round'\] are not settings"):
    settings.replace(Train(), round=2)
  with pytest.raises(ValueError, match="rounds=0"):
    settings.replace(Train(), rounds=0)


def test_another_format_is_refused_by_version_with_the_cure(tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps(settings.flat(Train())))  # as format 1 was: flat, and no format
  with pytest.raises(ValueError, match=r"format 1, .* reads format 2: .* another --run_dir"):
    settings.load(path)
  path.write_text(json.dumps({"format": 3, "settings": {}}))
  with pytest.raises(ValueError, match="has format 3"):
    settings.load(path)
  with pytest.raises(FileNotFoundError, match="--run_dir must name"):
    settings.load(tmp_path / "nowhere.json")


def test_lists_in_a_text():
  assert settings.names(" a, b,,") == ("a", "b")
  assert settings.fractions("0.5, 0.3,0.2") == (0.5, 0.3, 0.2)
  assert settings.fractions("") is None
  with pytest.raises(ValueError, match=r"site_fractions='0\.5,x'; write numbers"):
    settings.fractions("0.5,x")


ABSURD = [
  ("momentum", 2.0), ("server_momentum", 1.5), ("server_learning_rate", 0.0), ("dropout", 1.0),
  ("label_smoothing", 1.0), ("width", 0.0), ("dirichlet_alpha", 0.0), ("secagg_max_abs", 0.0),
  ("secagg_bits", 65), ("l2_clip_norm", 0.0), ("dp_average", 1.0), ("dp_augmentations", 0),
  ("image_size", 100_000), ("seed", 2**32), ("delta", 1.0), ("test_fraction", 1.0),
  ("dropout_rate", 1.0), ("site_fractions", "nan,0.5,0.5"), ("site_fractions", "-1,1,1"),
  ("site_fractions", "inf,1,1"),
]  # fmt: skip


def wrong_numbers():
  """(setting, value): each with no number, infinite and negative ones; and absurd ones."""
  for name, value in settings.flat(Train()).items():
    if isinstance(value, float):
      yield from ((name, wrong) for wrong in (math.nan, math.inf, -math.inf, -0.5))
    elif isinstance(value, int) and not isinstance(value, bool):
      yield name, -2
  yield from ABSURD


def test_every_number_that_is_none_or_out_of_range_is_refused_by_its_name():
  """The records refuse it, so every binary that reads them does, before any work."""
  cases = list(wrong_numbers())
  assert len(cases) > 120
  for name, value in cases:
    with pytest.raises(ValueError, match=f"^{name}="):
      settings.replace(Train(), **{name: value})


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_augmentations_are_finite(value):
  with pytest.raises(ValueError, match="noise"):
    settings.replace(Train(), augment=f"noise={value}").augment.augmentation()
