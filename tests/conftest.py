"""The strictest JAX configuration for every test, and the fixture that finds the real data."""

import os
import pathlib

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", False)


@pytest.fixture
def x64():
  """64-bit types for one test; a whole module asks for them by `pytestmark =
  pytest.mark.usefixtures("x64")`.
  """
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
  """The folder of real data sets; a test that asks for it is skipped, visibly, where there is
  none.
  """
  root = pathlib.Path(
    os.environ.get("PRIMIA_DATA_DIR", pathlib.Path(__file__).parents[2] / "shared" / "data")
  )
  if not root.is_dir():
    pytest.skip(f"no real data at {root}; set PRIMIA_DATA_DIR")
  return root
