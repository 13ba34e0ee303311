import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import compiling, native, prng

INTERFACE = pathlib.Path(__file__).parents[1] / "third_party"  # what wheels are built against
KEY = prng.key_of(bytes(range(32)))
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
NONCE = jnp.zeros(3, jnp.uint32)
UNOPTIMISED = (*native._FLAGS, "-O0")  # where a library is built and not run


@pytest.fixture
def fresh(monkeypatch, tmp_path):
  """Acts like a process without the C form loaded, with an empty cache; returns its folder."""
  monkeypatch.setattr(native, "_load", functools.cache(native._load.__wrapped__))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("PRIMIA_NATIVE", "1")
  return tmp_path / "primia_jax"


@pytest.mark.parametrize(
  ("compiler", "reason"),
  [
    ("no-such-compiler", "there is no C compiler 'no-such-compiler'"),
    ("false", "non-zero exit"),
    pytest.param(None, "primia_jax", marks=needs_compiler),
  ],
)
def test_a_failed_build_warns_once_and_leaves_plain_jax(fresh, monkeypatch, compiler, reason):
  if compiler is not None:
    monkeypatch.setenv("CC", compiler)
  else:
    fresh.write_text("a file where the cache should be")
  with pytest.warns(RuntimeWarning, match=reason):
    assert not native.available()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    got = prng.bits(KEY, NONCE, (300,))
  expected = prng.chacha20(KEY, NONCE, 0, prng.TILE).ravel()[:300]
  np.testing.assert_array_equal(got, expected)


@needs_compiler
def test_a_build_is_cached_for_its_source_and_flags(fresh, monkeypatch):
  monkeypatch.setattr(native, "_FLAGS", UNOPTIMISED)
  built = native._build()
  stamp = built.stat().st_mtime_ns
  assert native._build() == built
  assert built.stat().st_mtime_ns == stamp
  assert [path.name for path in fresh.iterdir()] == [built.name]
  assert fresh.stat().st_mode & 0o077 == 0
  monkeypatch.setattr(native, "_FLAGS", (*UNOPTIMISED, "-DOTHER"))
  assert native._build() != built


@needs_compiler
def test_a_changed_header_is_compiled_anew(fresh, monkeypatch, tmp_path):
  monkeypatch.setattr(native, "_FLAGS", UNOPTIMISED)
  built = native._build()
  for header in compiling.HEADERS:
    (tmp_path / header.name).write_text(header.read_text())
  changed = [tmp_path / header.name for header in compiling.HEADERS]
  changed[-1].write_text(changed[-1].read_text() + "\n// changed\n")
  monkeypatch.setattr(compiling, "HEADERS", tuple(changed))
  assert native._build() != built


def test_all_that_is_compiled_is_shipped():
  project = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())
  shipped = project["tool"]["setuptools"]["package-data"]["primia_jax"]
  package = pathlib.Path(native.__file__).parent
  written = {path for path in package.iterdir() if path.suffix in (".c", ".h")}
  assert written == {*compiling.HEADERS, *compiling.SOURCES}
  assert all(any(path.match(pattern) for pattern in shipped) for path in written)


@needs_compiler
def test_without_a_compiler_the_wheel_s_library_makes_the_same_bits(tmp_path):
  """In a process of its own, since a process registers the C form once."""
  library = tmp_path / "portable.so"
  compiling.build(library, INTERFACE)
  code = f"""
import pathlib, warnings
import jax.numpy as jnp
from primia_jax import compiling, native, prng
from primia_jax.depthwise import depthwise
warnings.simplefilter("error")
compiling.PORTABLE = pathlib.Path({str(library)!r})
assert native.available()
key = prng.key_of(bytes(range(32)))
print(*prng.bits(key, jnp.zeros(3, jnp.uint32), (300,)))
print(*depthwise(jnp.ones((1, 5, 5, 9)), jnp.ones((3, 3, 9))).ravel())
"""
  environment = os.environ | {"CC": "no-such-compiler", "PRIMIA_NATIVE": "1"}
  done = subprocess.run(
    [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  expected = prng.chacha20(KEY, NONCE, 0, prng.TILE).ravel()[:300]
  bits, sums = done.stdout.splitlines()
  np.testing.assert_array_equal(np.array(bits.split(), np.uint32), expected)
  taps = np.array([2, 3, 3, 3, 2])[:, None] * np.array([2, 3, 3, 3, 2])  # inside the image
  np.testing.assert_array_equal(np.array(sums.split(), float), taps.repeat(9))


def test_a_library_that_does_not_load_warns_and_leaves_plain_jax(fresh, monkeypatch, tmp_path):
  (library := tmp_path / "portable.so").write_text("for another machine")
  monkeypatch.setattr(compiling, "PORTABLE", library)
  monkeypatch.setenv("CC", "no-such-compiler")
  with pytest.warns(RuntimeWarning, match=r"portable\.so cannot be loaded"):
    assert not native.available()


def test_wheels_are_built_against_an_interface_that_the_installed_jax_takes():
  def version(folder):
    text = (pathlib.Path(folder) / "xla" / "ffi" / "api" / "c_api.h").read_text()
    return [int(n) for n in re.findall(r"#define XLA_FFI_API_M\w+ (\d+)", text)]

  own, installed = version(INTERFACE), version(jax.ffi.include_dir())
  assert len(own) == 2
  assert own[0] == installed[0]
  assert own[1] <= installed[1]


def test_the_environment_turns_it_off(fresh, monkeypatch):
  monkeypatch.setenv("PRIMIA_NATIVE", "0")
  assert not native.available()
  assert not native.has_wide_products()
  assert not fresh.exists()
