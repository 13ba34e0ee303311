"""C code for CPU, shipped with the package, compiled on first use and cached for the user.

Without a C compiler, the library of the wheel is loaded: it is built for any CPU of its platform,
and takes one and a half times as long. Where the wheel has none, plain JAX is used.

`mask_sum` is the inner loop of `prng`, and `discrete` that of exact noise. XLA's CPU compiler
cannot keep ChaCha20's sixteen words in registers, so plain JAX takes seven times the CPU time on
one core.
`products` sums rounded matrix products without storing one. `wide_products` multiplies 64-bit
integers on CPUs that have no such instruction. `depthwise` convolves each channel for itself.
`barrier` does on CPU what
`lax.optimization_barrier` does elsewhere. Without all this, or with PRIMIA_NATIVE=0 in the
environment, everything works. All random bits and integers are the same; rounded products may
differ.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import tempfile
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import compiling
from primia_jax.types import Array

_MASK_SUM, BARRIER = "primia_mask_sum", "primia_barrier"
_DISCRETE, _PRODUCTS = "primia_discrete", "primia_products"
_WIDE_PRODUCTS, _HAS_WIDE_PRODUCTS = "primia_wide_products", "primia_has_wide_products"
_DEPTHWISE, _DEPTHWISE_KERNEL = "primia_depthwise", "primia_depthwise_kernel"
TARGETS = (
  _MASK_SUM, _DISCRETE, _PRODUCTS, _WIDE_PRODUCTS, _DEPTHWISE, _DEPTHWISE_KERNEL, BARRIER,
)  # fmt: skip
_FLAGS = ("-march=native",)
_LOCK = threading.Lock()


def available() -> bool:
  """Tells whether the C form can be used here. The first call compiles it (about a second) unless
  it is cached.

  If that fails, a RuntimeWarning appears once and plain JAX is used. PRIMIA_NATIVE=0 disables the C
  form.
  """
  if os.environ.get("PRIMIA_NATIVE", "1") == "0":
    return False
  with _LOCK:
    return _load() is not None


def mask_sum(keys: Array, signs: Array, nonce: Array, size: int, dtype) -> Array:
  """`prng.mask_sum`, flat and unchecked. Only for CPU, and only if `available()`."""
  call = jax.ffi.ffi_call(
    _MASK_SUM, jax.ShapeDtypeStruct((size,), dtype), vmap_method="broadcast_all"
  )
  return call(keys, signs, nonce)


def discrete(keys: Array, heads: Array, tails: Array, shift: Array, size: int) -> Array:
  """`privacy.discrete.digits`, flat. Only for CPU, and only if `available()`."""
  call = jax.ffi.ffi_call(
    _DISCRETE, jax.ShapeDtypeStruct((size,), jnp.int32), vmap_method="broadcast_all"
  )
  return call(keys, heads, tails, shift)


def products(x: Array, g: Array, factors: Array) -> Array:
  """`privacy.bookkeeping.rounded_products`. Only for CPU, and only if `available()`."""
  shape = jax.ShapeDtypeStruct((x.shape[-1], g.shape[-1]), jnp.int32)
  return jax.ffi.ffi_call(_PRODUCTS, shape, vmap_method="broadcast_all")(x, g, factors)


def has_wide_products() -> bool:
  """Tells whether `wide_products` can be used here and is faster than XLA: with AVX2 and without
  AVX-512DQ.
  """
  if not available():
    return False
  with _LOCK:
    return bool(_load()[_HAS_WIDE_PRODUCTS]())  # type: ignore[index]


def wide_products(x: Array, w: Array, geometry: Array, shape: tuple[int, ...]) -> Array:
  """The core of `mpc.half_products`, uint64 of a shape; see wide_products.c for the operands. Only
  for CPU, and only if `has_wide_products()`.
  """
  call = jax.ffi.ffi_call(
    _WIDE_PRODUCTS, jax.ShapeDtypeStruct(shape, jnp.uint64), vmap_method="expand_dims"
  )
  return call(x, w, geometry)


def depthwise(
  x: Array, w: Array, shape: tuple[int, ...], geometry: np.ndarray, of_kernel: bool
) -> Array:
  """The core of `depthwise`, float32 of a shape; see depthwise.c for the operands. Only for CPU,
  and only if `available()`.
  """
  target = _DEPTHWISE_KERNEL if of_kernel else _DEPTHWISE
  result = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.ffi.ffi_call(target, result, vmap_method="broadcast_all")(x, w, geometry=geometry)


def barrier(x: Array) -> Array:
  """Returns x, computed once for all its consumers: XLA neither fuses nor repeats work across it.

  XLA:CPU drops optimization barriers before it fuses, and may then recompute a value in each
  consumer. Inside shard_map, and without the C form, this is only `lax.optimization_barrier`.
  """
  if jax.typeof(x).manual_axis_type.varying or not available():
    return lax.optimization_barrier(x)
  call = jax.ffi.ffi_call(
    BARRIER,
    jax.ShapeDtypeStruct(x.shape, x.dtype),
    vmap_method="broadcast_all",
    input_output_aliases={0: 0},
  )
  return lax.platform_dependent(x, cpu=call, default=lax.optimization_barrier)


def once(x: Array) -> Array:
  """Returns x so that all consumers see the same bits, even if computing it rounds floating-point
  numbers.

  Uses `barrier` where it holds. Elsewhere compilers may drop barriers and then fuse multiplication
  and addition in one copy but not in another. There it sorts by position, which no compiler sees
  through. Use it for work that is done once, not in a hot path.
  """
  if jax.default_backend() == "cpu" and available() and not jax.typeof(x).manual_axis_type.varying:
    return barrier(x)
  position = lax.iota(jnp.int32, x.size)
  return lax.sort((position, x.reshape(-1)), num_keys=1)[1].reshape(x.shape)


def settled(x: Array) -> Array:
  """Returns x so that all consumers see the same bits, fast where `barrier` holds.

  On CPU it is `once`, which sorts where there is no C form; elsewhere an optimization barrier,
  which keeps its meaning until after fusion.
  """
  return once(x) if jax.default_backend() == "cpu" else lax.optimization_barrier(x)


@functools.cache
def _load() -> ctypes.CDLL | None:
  try:
    library = _build()
  except compiling.ERRORS as error:
    library, why = compiling.PORTABLE, compiling.reason(error)
    if not library.is_file():
      _warn(why)
      return None
  try:
    loaded = ctypes.cdll.LoadLibrary(str(library))
    for target in TARGETS:
      jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(loaded[target]), platform="cpu")
  except (OSError, RuntimeError) as error:
    _warn(f"{library} cannot be loaded: {error}")
    return None
  return loaded


def _warn(why: str) -> None:
  warnings.warn(
    f"masks and noise are made in plain JAX, which gives the same and takes at least 7 times as "
    f"long ({why}). Install a C compiler or set CC; PRIMIA_NATIVE=0 silences this.",
    RuntimeWarning,
    stacklevel=4,
  )


def _build() -> pathlib.Path:
  """Compiles the sources into the user's cache, under a name that depends on sources, headers,
  compiler and CPU.
  """
  compiler = [*compiling.compiler(), *_FLAGS]
  headers = pathlib.Path(jax.ffi.include_dir())
  # The predefined macros contain the compiler's version and all instruction sets that
  # -march=native found.
  macros = compiling.run([*compiler, "-E", "-dM", "-x", "c", os.devnull])
  read = (headers / "xla" / "ffi" / "api" / "c_api.h", *compiling.HEADERS, *compiling.SOURCES)
  texts = [path.read_bytes() for path in read]
  digest = hashlib.sha256(b"".join((" ".join(compiler).encode(), macros, *texts)))
  cache = (
    pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "primia_jax"
  )
  library = cache / f"native-{digest.hexdigest()[:32]}.so"
  if not library.exists():
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
      built = pathlib.Path(scratch) / library.name
      compiling.build(built, headers, *_FLAGS)
      built.replace(library)  # atomic: several processes may build at once
  return library
