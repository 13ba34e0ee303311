"""Imports run downwards only; read with `ast`, so that an import inside a function counts too."""

import ast
import itertools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE, EXPERIMENTS = ROOT / "primia_jax", ROOT / "experiments"
# What each module may import from the package. A new module must be entered here.
LEAF = {"types"}
LAYERS = {
  "types": set(),
  "compiling": set(),
  "durable": set(),
  "native": {"types", "compiling"},
  "ring": {"types"},
  "sites": {"types"},
  "tapped": {"types"},
  "patches": {"types"},
  "conv": {"types", "patches", "tapped"},
  "depthwise": {"types", "native", "patches", "conv"},
  "prng": {"types", "native"},
  "local": {"types"},
  "robust": {"types"},
  "secagg": {"types", "ring", "prng", "native", "durable"},
  "summation": {"types", "ring", "secagg"},
  "privacy": {"types", "native", "ring", "prng", "local", "tapped", "durable"},
  "federated": {"types", "prng", "sites", "summation"},
  "algorithms": {"types", "local", "federated"},
  "step_average": {"types", "local", "federated", "algorithms"},
  "site_privacy": {"types", "ring", "secagg", "privacy", "summation", "federated"},
  "evaluation": {"types", "local", "privacy", "sites", "summation", "federated", "metrics"},
  "score_noise": {"types", "privacy", "metrics"},
  "multilabel": {"types", "local", "evaluation"},
  "mpc": {"types", "ring", "prng", "native", "durable"},
  "boundary": {"types", "native", "prng", "sites", "secagg", "summation", "federated", "mpc"},
  "service": {"types", "durable", "mpc"},
  "segmentation": {"types", "evaluation", "metrics"},
  "clinic": {"data"},
  "flower": {"types", "durable", "secagg"},
  "metrics": LEAF,
  "disclosure": set(),
  "subgroups": {"types", "metrics", "disclosure"},
  "approval": {"attacks"},
  "intersection": set(),
  "state_dicts": set(),
  "primia_files": {"state_dicts", "models"},
  "pretrained": LEAF | {"models", "primia_files"},
  "scattering": {"types", "conv"},
  "models": LEAF | {"conv", "depthwise", "scattering", "tapped"},
  "data": LEAF,
  "attacks": {
    "types",
    "durable",
    "prng",
    "ring",
    "local",
    "sites",
    "privacy",
    "conv",
    "models",
    "federated",
    "metrics",
    "mpc",
    "summation",
    "secagg",
    "site_privacy",
  },
}
# Who alone may import a package, however it is imported; an empty set stands for nobody in
# primia_jax.
ALONE = {
  "flax": {"models"},
  "tensorflow_datasets": {"data.tfds"},
  "nibabel": {"data.volumes"},
  "yaml": {"data.medimeta"},
  "pydicom": {"data.dicom", "data.dicom_pixels", "data.dicom_frames", "clinic"},
  "imagecodecs": {"data.dicom_frames"},
  "safetensors": {"state_dicts"},
  "PIL": {"data"},
  "sklearn": {"metrics"},
  "absl": set(),
  "experiments": set(),
  "benchmarks": set(),
  "tensorflow": set(),
  "torch": set(),
  "torchvision": set(),
  "opacus": set(),
  "jax_privacy": set(),
  "matplotlib": set(),
  "orbax": set(),
  "tensorboardX": set(),
  "tqdm": set(),
  "dp_accounting": {"privacy.accounting"},
  "cryptography": {"secagg.keys", "service.certificates"},
  "flwr": {"flower.bridging", "flower.coordinating"},
  "nacl": {"intersection"},
  "grpc": {"service.channel", "service.monitoring", "service.sharing"},
  "grpc_health": {"service.monitoring"},
  "prometheus_client": {"service.monitoring"},
  "pynetdicom": {"clinic.node"},
  "highdicom": {"clinic.reports"},
  "xxhash": {"service.frames"},
}


def name_of(path: pathlib.Path) -> str:
  return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {
  name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"
}


def imported(source: str, module: str, package: str = "primia_jax") -> list[str]:
  """Every module that a source text imports, written out in full; `from a import b` gives a.b."""
  names = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      above = [package, *module.split(".")][: -node.level] if node.level else []
      names += [
        ".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names
      ]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
      "import_module",
      "__import__",
    ):
      known = isinstance(node.args[0], ast.Constant) or package == "experiments"
      assert known, f"{module} imports a name that cannot be read"
      names.append(getattr(node.args[0], "value", ""))
  return names


def breaches(source: str, module: str) -> list[str]:
  layer, found = module.split(".")[0], []
  for name in imported(source, module):
    top, *rest = name.split(".")
    if top == "primia_jax":
      target = rest[0] if rest else ""
      if target not in LAYERS[layer] | {layer}:
        found.append(f"{module} imports {name}")
    elif top in ALONE and not {layer, module} & ALONE[top]:
      found.append(f"{module} imports {name}")
    if any(part.startswith("_") and not part.startswith("__") for part in name.split(".")):
      found.append(f"{module} imports the private {name}")
  return found


def test_every_module_has_its_place():
  assert {module.split(".")[0] for module in MODULES} == set(LAYERS)


def test_no_file_is_too_long_to_be_read_at_once():
  folders = PACKAGE, EXPERIMENTS, pathlib.Path(__file__).parent, PACKAGE.parent / "benchmarks"
  lengths = {path: len(path.read_text().splitlines()) for f in folders for path in f.rglob("*.py")}
  assert [path.name for path, length in lengths.items() if length > 400] == []


def test_experiments_have_layers_and_no_binary_imports_a_binary():
  name_of = lambda path: ".".join(path.relative_to(EXPERIMENTS).with_suffix("").parts)
  sources = {name_of(path): path.read_text() for path in EXPERIMENTS.rglob("*.py")}

  def imports(name: str) -> set[str]:
    names = imported(sources[name], name, "experiments")
    names = [one.removeprefix("experiments.") for one in names if one.startswith("experiments.")]
    names += [one.rpartition(".")[0] for one in names]
    return {*names, *(f"{one}.__init__" for one in names)} & set(sources)

  below = {name: imports(name) for name in sources}
  for middle, name in itertools.product(below, below):  # and what these import, and so on
    below[name] |= below[middle] if middle in below[name] else set()
  binaries = {name for name, source in sources.items() if "\nif __name__ ==" in source}
  assert len(binaries) > 15
  assert {name: both for name in sources if (both := below[name] & (binaries - {name}))} == {}
  order = "settings", "configs.__init__", "folders", "inputs", "processes", "arms", "running"
  for place, name in enumerate(order):
    assert below[name].isdisjoint(order[place + 1 :]), name
    assert name in below["train_federated"]


def test_the_layers_have_no_cycle():
  done: set[str] = set()
  while ready := {layer for layer, below in LAYERS.items() if layer not in done and below <= done}:
    done |= ready
  assert done == set(LAYERS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards_only(module):
  assert breaches(MODULES[module].read_text(), module) == []


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("ring", "from primia_jax import secagg"),
    ("local", "def f():\n  import primia_jax.sites"),
    ("secagg", "from . import federated"),
    ("summation", "from primia_jax import federated"),
    ("federated", "from primia_jax import secagg"),
    ("federated", "from primia_jax.privacy import plan"),
    ("metrics", "from primia_jax.models import build"),
    ("data.folder", "from ..metrics import accuracy"),
    ("data.folder", "from primia_jax import local"),
    ("local", "from flax import linen as nn"),
    ("federated", "from absl import flags"),
    ("data.npz", "import tensorflow_datasets as tfds"),
    ("data.tfds", "import tensorflow as tf"),
    ("algorithms", "import importlib\nimportlib.import_module('flax.linen')"),
    ("sites", "from jax._src import core"),
    ("sites", "from experiments import train_federated"),
  ],
)
def test_the_check_sees_what_is_forbidden(module, source):
  assert breaches(source, module)


def test_packages_only_pass_names_on():
  for path in PACKAGE.glob("*/**/__init__.py"):
    body = ast.parse(path.read_text()).body
    assert all(
      isinstance(node, (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign)) for node in body
    )


def test_each_public_name_has_one_path_and_loads_nothing_until_it_is_used():
  code = """
import sys
before = set(sys.modules)
import primia_jax
known = sys.stdlib_module_names
loaded = {name for name in set(sys.modules) - before if name.split(".")[0] not in known}
assert loaded == {"primia_jax"}, f"loaded too early: {loaded}"
names = [name for names in primia_jax._NAMES.values() for name in names]
assert sorted(names) == sorted(set(names)) == sorted(primia_jax.__all__)
assert 20 <= len(names) <= 30
for name in names:
  assert callable(getattr(primia_jax, name)), name
for name in primia_jax._PACKAGES:
  assert getattr(primia_jax, name).__name__ == f"primia_jax.{name}"
try:
  primia_jax.nothing
except AttributeError as error:
  assert "nothing" in str(error)
else:
  raise AssertionError("a name that does not exist was found")
"""
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_no_public_name_has_a_second_path():
  top, *packages = PACKAGE / "__init__.py", *PACKAGE.glob("*/**/__init__.py")
  public = lambda path: {
    name
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    for name in ast.literal_eval(node.value)
  }
  assert {path.parent.name: both for path in packages if (both := public(path) & public(top))} == {}


def test_the_sites_of_a_federation_never_meet_files_or_flags():
  """The federated part takes arrays and functions only, so that it serves any data and any
  model.
  """
  for module in ("ring", "sites", "secagg.masking", "local", "federated", "algorithms", "robust"):
    tops = {name.split(".")[0] for name in imported(MODULES[module].read_text(), module)}
    allowed = {
      "__future__",
      "collections",
      "dataclasses",
      "fractions",
      "functools",
      "math",
      "typing",
    }
    assert tops <= allowed | {"jax", "numpy", "optax", "primia_jax"}
