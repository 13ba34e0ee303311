"""Reads files of weights without PyTorch.

A `.pth` file is a pickle plus raw storages. `_Unpickler` admits only the few names that occur in a
dictionary of tensors, so reading a file runs no code from it.
"""

from __future__ import annotations

import collections
import pathlib
import pickle
import types
import zipfile
from collections.abc import Callable, Collection
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

_STORAGES = {
  "FloatStorage": np.dtype(np.float32),
  "DoubleStorage": np.dtype(np.float64),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(jnp.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def read_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a flat dictionary of tensors from a `.pth`, `.pt` or `.safetensors` file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not such a dictionary, is damaged, or contains anything but tensors.
  """
  return flat(read_saved(path), path)


def flat(content: Any, path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """The content of a file as a dictionary of tensors; raises ValueError if it is something else."""
  if not isinstance(content, dict) or not all(
    isinstance(value, np.ndarray) for value in content.values()
  ):
    raise ValueError(
      f"{path} holds more than a flat dictionary of tensors; save model.state_dict() alone"
    )
  return dict(content)


def read_saved(path: str | pathlib.Path, records: Collection[str] = ()) -> Any:
  """Reads what `torch.save` wrote: tensors as arrays, in dictionaries, lists and tuples.

  Args:
    path: a `.pth`, `.pt` or `.safetensors` file.
    records: names of classes, as MODULE.NAME, whose objects are read as records of their values
      (`types.SimpleNamespace`); no code of these classes is run.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is damaged, or holds anything else.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f"no weights at {path}; save them there with torch.save(model.state_dict(), {path.name!r})"
    )
  if path.suffix == ".safetensors":
    return _read_safetensors(path)
  if path.suffix not in (".pth", ".pt"):
    raise ValueError(f"{path} is neither .pth, .pt nor .safetensors; save it as one of these")
  try:
    read = _read_zip if zipfile.is_zipfile(path) else _read_legacy
    return read(path, records)
  except (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
  ) as e:
    raise ValueError(
      f"{path} is not a PyTorch state dict, or is damaged ({e}); save it with model.state_dict()"
    ) from e


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    import safetensors
    import safetensors.numpy
  except ImportError as e:
    raise ValueError(
      f"reading {path} needs the safetensors package: pip install 'primia-jax[pretrained]'"
    ) from e
  try:
    return safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as e:
    raise ValueError(f"{path} is not a safetensors file, or is damaged: {e}; save it again") from e


def _read_zip(path: pathlib.Path, records: Collection[str]) -> Any:
  """PyTorch's format since 1.6: ROOT/data.pkl, and a file ROOT/data/KEY for each storage."""
  with zipfile.ZipFile(path) as archive:
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise ValueError(
        f"{path} is a zip file without a data.pkl; save it with torch.save(model.state_dict(), ...)"
      )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
      raise ValueError(
        f"{path} was written on a big-endian machine; save it again on a little-endian one"
      )

    def storage(dtype: np.dtype, key: str, size: int) -> np.ndarray:
      values = np.frombuffer(
        archive.read(f"{root}data/{key}"),
        dtype.newbyteorder("<") if dtype.isbuiltin == 1 else dtype,
      )
      if values.size < size:
        raise ValueError(
          f"{path}: storage {key} holds {values.size} numbers, not {size}; the file is damaged"
        )
      return values

    with archive.open(pickles[0]) as file:
      return _Unpickler(file, storage, records).load()


def _read_legacy(path: pathlib.Path, records: Collection[str]) -> Any:
  """PyTorch's format before 1.6: five pickles (magic number, version, system, tensors, storage
  keys), then the storages.
  """
  storages: dict[str, np.ndarray] = {}

  def storage(dtype: np.dtype, key: str, size: int) -> np.ndarray:
    return storages.setdefault(key, np.zeros(size, dtype))  # tensors are views of it; filled below

  with open(path, "rb") as file:
    magic, _, system, content, keys = (_Unpickler(file, storage, records).load() for _ in range(5))
    if magic != _LEGACY_MAGIC or not system["little_endian"]:
      raise ValueError(
        f"{path} is not a little-endian PyTorch file; save it with "
        "torch.save(model.state_dict(), ...)"
      )
    for key in keys:
      size = int(np.frombuffer(file.read(8), "<i8")[0])
      data = file.read(size * storages[key].itemsize)
      if size != storages[key].size or len(data) != storages[key].nbytes:
        raise ValueError(f"{path}: storage {key} is truncated; the file is damaged")

      storages[key][:] = np.frombuffer(data, storages[key].dtype)
  return content


class _Unpickler(pickle.Unpickler):
  """Unpickles dictionaries of tensors, and the records asked for, and rejects every other name."""

  def __init__(
    self,
    file: IO[bytes],
    storage: Callable[[np.dtype, str, int], np.ndarray],
    records: Collection[str],
  ):
    super().__init__(file)
    self._storage, self._records = storage, records

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _rebuild_tensor
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda data, requires_grad, hooks: data
    if module == "torch" and name in _STORAGES:
      return _STORAGES[name]
    if f"{module}.{name}" in self._records:
      return types.SimpleNamespace
    raise pickle.UnpicklingError(f"{module}.{name} is not part of a dictionary of tensors")

  def persistent_load(self, pid: Any) -> np.ndarray:
    kind, dtype, key, _, size, *_ = pid
    if kind != "storage" or not isinstance(dtype, np.dtype):
      raise pickle.UnpicklingError(f"unknown reference {kind!r}")
    return self._storage(dtype, key, size)


def _rebuild_tensor(
  storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Any:
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if min((offset, *size, *stride)) < 0 or (0 not in size and last >= storage.size):
    raise pickle.UnpicklingError(f"a tensor of size {size} reaches beyond its storage")
  strides = tuple(s * storage.itemsize for s in stride)
  return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)
