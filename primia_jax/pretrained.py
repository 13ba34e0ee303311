"""Loads torchvision's ResNet-18 and VGG-16 weights from a file, as parameters of
`primia_jax.models`.

PyTorch is not needed: a `.pth` file is a pickle plus raw storages. `_Unpickler` admits only the few
names that occur in a dictionary of tensors, so reading a file runs no code from it.
"""

from __future__ import annotations

import collections
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.types import ModelState, Params

# How many of VGG-16's 13 convolutions each block has; gives their positions in torchvision's
# `features`.
_VGG_DEPTHS = (2, 2, 3, 3, 3)

_STORAGES = {
  "FloatStorage": np.dtype(np.float32),
  "DoubleStorage": np.dtype(np.float64),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(jnp.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


def load_pretrained(
  path: str | pathlib.Path, params: Params, model_state: ModelState, *, new_head: bool = False
) -> tuple[Params, ModelState]:
  """Fills the parameters of a ResNet-18 or VGG-16 from torchvision's weights.

  If the model takes 1 channel and the file's first convolution takes 3, its kernels are summed over
  the channels. The model then answers as the original does to three equal channels.

  Args:
    path: a `.pth`, `.pt` or `.safetensors` file with the state dict.
    params: the model's, from `Model.init`; they define the wanted entries and shapes.
    model_state: the model's. With BatchNorm it is filled with the running statistics.
    new_head: keep the model's own last layer, e.g. for another number of classes.

  Returns:
    (params, model_state) with the same structure and shapes, float32.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not a state dict, or its entries do not fit the model. The message names
      up to ten entries and the cure.
  """
  return convert(read_state_dict(path), params, model_state, new_head=new_head, source=str(path))


def convert(
  state_dict: Mapping[str, np.ndarray],
  params: Params,
  model_state: ModelState,
  *,
  new_head: bool = False,
  source: str = "the state dict",
) -> tuple[Params, ModelState]:
  """`load_pretrained` for a state dict in memory. Error messages call it `source`."""
  rename: Callable[[list[str]], str]
  if "layer1_0" in params:
    rename, head = _resnet_name, "fc"
  elif "conv1_1" in params:
    rename, head = _vgg_names(has_norm="norm1_1" in params), "classifier.6"
  else:
    raise ValueError(
      f"pretrained weights are for resnet18 and vgg16, not for a model with the layers "
      f"{', '.join(params)}"
    )
  used: set[str] = set()
  problems: list[str] = []

  def fill(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    *layers, kind = (entry.key for entry in path[1:])  # path[0]: params or model_state
    name = f"{rename(layers)}.{_LEAVES[kind]}"
    used.add(name)
    if new_head and name.startswith(f"{head}."):
      return leaf
    if name not in state_dict:
      problems.append(f"missing {name}")
      return leaf
    value = _to_our_layout(
      np.asarray(state_dict[name], np.float32),
      kind,
      leaf.shape,
      after_flatten=name == "classifier.0.weight",
    )
    if value.shape != leaf.shape:
      problems.append(
        f"{name} has shape {list(state_dict[name].shape)} and does not fit the model's "
        f"{list(leaf.shape)}"
      )
      return leaf
    return jnp.asarray(value)

  filled = jax.tree_util.tree_map_with_path(fill, (params, model_state))
  problems += [
    f"unexpected {name}"
    for name in state_dict
    if name not in used and not name.endswith("num_batches_tracked")
  ]
  if problems:
    more = f"; and {len(problems) - 10} more like these" if len(problems) > 10 else ""
    raise ValueError(
      f"{source} does not fit the model: {'; '.join(problems[:10])}{more}. {_cure(problems, head)}"
    )
  return filled


def read_state_dict(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a flat dictionary of tensors from a `.pth`, `.pt` or `.safetensors` file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not such a dictionary, is damaged, or contains anything but tensors.
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
    content = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
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
  if not isinstance(content, dict) or not all(
    isinstance(value, np.ndarray) for value in content.values()
  ):
    raise ValueError(
      f"{path} holds more than a flat dictionary of tensors; save model.state_dict() alone"
    )
  return dict(content)


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


def _read_zip(path: pathlib.Path) -> Any:
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
      return _Unpickler(file, storage).load()


def _read_legacy(path: pathlib.Path) -> Any:
  """PyTorch's format before 1.6: five pickles (magic number, version, system, tensors, storage
  keys), then the storages.
  """
  storages: dict[str, np.ndarray] = {}

  def storage(dtype: np.dtype, key: str, size: int) -> np.ndarray:
    return storages.setdefault(key, np.zeros(size, dtype))  # tensors are views of it; filled below

  with open(path, "rb") as file:
    magic, _, system, content, keys = (_Unpickler(file, storage).load() for _ in range(5))
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
  """Unpickles dictionaries of tensors and rejects every other name."""

  def __init__(self, file: IO[bytes], storage: Callable[[np.dtype, str, int], np.ndarray]):
    super().__init__(file)
    self._storage = storage

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return _rebuild_tensor
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda data, requires_grad, hooks: data
    if module == "torch" and name in _STORAGES:
      return _STORAGES[name]
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


_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


def _resnet_name(layers: list[str]) -> str:
  """conv1, norm1, layer1_0/conv1, layer2_0/downsample_conv, head -> conv1, bn1, layer1.0.conv1,
  ..., fc.
  """
  layer = layers[-1].replace("norm", "bn") if layers[-1].startswith("norm") else layers[-1]
  layer = {"head": "fc", "downsample_conv": "downsample.0", "downsample_norm": "downsample.1"}.get(
    layer, layer
  )
  return ".".join([*(block.replace("_", ".") for block in layers[:-1]), layer])


def _vgg_names(has_norm: bool) -> Callable[[list[str]], str]:
  """conv1_1, norm1_1, ..., hidden1, hidden2, head -> features.0, features.1, ..., classifier.0, .3,
  .6.
  """
  names = {"hidden1": "classifier.0", "hidden2": "classifier.3", "head": "classifier.6"}
  position = 0
  for block, depth in enumerate(_VGG_DEPTHS, start=1):
    for i in range(1, depth + 1):
      names[f"conv{block}_{i}"], names[f"norm{block}_{i}"] = (
        f"features.{position}",
        f"features.{position + 1}",
      )
      position += 3 if has_norm else 2  # convolution, (norm,) ReLU
    position += 1  # pool
  return lambda layers: names[layers[-1]]


def _to_our_layout(
  value: np.ndarray, kind: str, shape: tuple[int, ...], after_flatten: bool
) -> np.ndarray:
  """Converts [O, C, kh, kw] to [kh, kw, C, O], [O, I] to [I, O], flattened [C, 7, 7] to [7, 7, C],
  and 3 input channels to 1.
  """
  if kind != "kernel":
    return value
  if value.ndim == 4:
    value = value.transpose(2, 3, 1, 0)
    return value.sum(2, keepdims=True) if value.shape[2] == 3 and shape[2] == 1 else value
  if after_flatten and value.shape[1] == shape[0]:
    value = value.reshape(len(value), -1, 7, 7).transpose(0, 2, 3, 1).reshape(value.shape)
  return value.T


def _cure(problems: list[str], head: str) -> str:
  if all(f"{head}." in problem for problem in problems):
    return "For another number of classes, pass new_head=True to keep the model's own last layer"
  if any("running_" in problem and "shape" not in problem for problem in problems):
    return (
      "The file and the model differ in normalisation: for a file with BatchNorm, build the model "
      'with norm="batch"'
    )
  return (
    'Build the model as torchvision does: width=1, stem="7x7", head="dense", and norm as in the '
    "file"
  )
