"""The strictest JAX configuration for every test, and the fixture that finds the real data."""

import gc
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest
from jax._src import compiler  # no public option reaches programs that JAX makes by itself

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", False)


_CACHE = "JAX_COMPILATION_CACHE_DIR"
_UNOPTIMISED = "JAX_DISABLE_MOST_OPTIMIZATIONS"

# Tests of these files claim what is exact in Z_2^k, what holds within a tolerance, or that one
# program gives the same bits twice: none of it hangs on how XLA optimises, and to compile is most
# of their work. Tests marked `slow` or `optimised`, and all other files (bits that two programs
# share, roundings, compiled text and memory, how often something compiles), compile as users do.
# The variable above wins where it is set. XLA's newer emitters of fused loops, which take a third
# of the time to compile, are left out there as well, where this XLA can do without.
_EMITTERS = "xla_cpu_use_fusion_emitters"
_UNOPTIMISED_FILES = (
  "algorithms_", "attacks_", "boundary_", "clinic_", "conv_", "data_augment_", "data_warp_",
  "depthwise_", "evaluation_", "experiments_", "federated_", "local_", "metrics_", "models_",
  "mpc_", "multilabel_", "privacy_adaptive_", "privacy_bookkeeping_", "privacy_clipping_",
  "privacy_distributed_", "privacy_noise_", "privacy_plan_", "privacy_privatizers_",
  "privacy_rotation_", "privacy_sampling_", "privacy_strategies_", "privacy_training_", "readme_",
  "report_", "scattering_", "segmentation_", "service_", "site_privacy_",
)  # fmt: skip


_STAGE = getattr(jax.lax, "stage_p", None)  # of `jnp.asarray`, in some versions of JAX
_STAGE_AS_USERS = _STAGE and _STAGE.impl


def _stage(x):
  """A copy of a host array on the device. JAX compiles an identity for each shape, which takes a
  hundred times as long.
  """
  if isinstance(x, jax.Array):
    return x
  return jax.device_put(x.copy() if isinstance(x, np.ndarray) else x)


_compile_options = compiler.get_compile_options


def _compile_options_of_now(*args, **kwargs):
  options = _compile_options(*args, **kwargs)
  if os.environ.get(_UNOPTIMISED) == "1":
    options.env_option_overrides = [*options.env_option_overrides, (_EMITTERS, False)]
  return options


def _knows_emitters() -> bool:
  try:
    jax.jit(lambda x: x).lower(0).compile(compiler_options={_EMITTERS: False})
  except jax.errors.JaxRuntimeError:
    return False
  return True


def pytest_configure(config):
  """Shares compiled programs between the tests and processes of one run, and with no other run."""
  config.chooses = _UNOPTIMISED not in os.environ
  if not os.environ.get(_CACHE):
    config.own_cache = os.environ[_CACHE] = tempfile.mkdtemp(prefix="primia_jax_xla_")
  # Most programs are single operations: to read one takes a fifth of the time to compile it.
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # programs are lowered a quarter faster
  jax.config.update("jax_traceback_in_locations_limit", 0)
  jax.config.update("jax_compilation_cache_dir", os.environ[_CACHE])
  jax.config.update(
    "jax_persistent_cache_min_compile_time_secs",
    float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
  )
  # XLA has read its flags when it has compiled: what is set later reaches new processes only.
  if config.chooses and _knows_emitters():
    config.xla_flags = os.environ.get("XLA_FLAGS", "")
    compiler.get_compile_options = _compile_options_of_now


def pytest_unconfigure(config):
  if hasattr(config, "own_cache"):
    shutil.rmtree(config.own_cache, ignore_errors=True)


def _unoptimised(item) -> bool:
  marked = any(item.get_closest_marker(name) for name in ("slow", "optimised"))
  return not marked and item.path.name.startswith(_UNOPTIMISED_FILES)


def pytest_collection_modifyitems(items):
  """Tests that compile alike come together."""
  items.sort(key=_unoptimised, reverse=True)


def pytest_collection_finish():
  """What modules hold lives as long as the tests: the garbage collector need not visit it."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000)  # what is traced is gone by then


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Before the fixtures of a test: how it, and the processes that it starts, compile."""
  if item.config.chooses and os.environ.get(_UNOPTIMISED) != str(int(_unoptimised(item))):
    os.environ[_UNOPTIMISED] = str(int(_unoptimised(item)))
    if hasattr(item.config, "xla_flags"):
      without = f" --{_EMITTERS}=false" if _unoptimised(item) else ""
      os.environ["XLA_FLAGS"] = item.config.xla_flags + without
    jax.config.update("jax_disable_most_optimizations", _unoptimised(item))
    if _STAGE:
      _STAGE.def_impl(_stage if _unoptimised(item) else _STAGE_AS_USERS)
    jax.clear_caches()


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
