"""Reading .pth without PyTorch, fitting weights to models, and equal logits against PyTorch where
it is installed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from primia_jax.models import ModelConfig, build
from primia_jax.pretrained import convert, load_pretrained
from primia_jax.state_dicts import read_state_dict
from tests.torch_files import FakeTensor, saving


@pytest.fixture
def save(monkeypatch):
  return saving(monkeypatch)


def torchvision_resnet18_shapes(classes=5):
  """Names and shapes of torchvision.models.resnet18().state_dict()."""
  shapes = {"conv1.weight": (64, 3, 7, 7)}

  def norm(name, features):
    shapes.update(
      {f"{name}.{k}": (features,) for k in ("weight", "bias", "running_mean", "running_var")}
    )
    shapes[f"{name}.num_batches_tracked"] = ()

  norm("bn1", 64)
  before = 64
  for stage, features in enumerate((64, 128, 256, 512), start=1):
    for i in range(2):
      for j in (1, 2):
        shapes[f"layer{stage}.{i}.conv{j}.weight"] = (features, before, 3, 3)
        norm(f"layer{stage}.{i}.bn{j}", features)
        if j == 1 and before != features:
          shapes[f"layer{stage}.{i}.downsample.0.weight"] = (features, before, 1, 1)
          norm(f"layer{stage}.{i}.downsample.1", features)
        before = features
  return {**shapes, "fc.weight": (classes, 512), "fc.bias": (classes,)}


@functools.cache
def resnet_weights():
  rng = np.random.default_rng(0)
  return {
    k: rng.normal(size=shape).astype(np.float32)
    for k, shape in torchvision_resnet18_shapes().items()
  }


def templates(**changes):
  config = ModelConfig(
    **{"name": "resnet18", "num_classes": 5, "image_shape": (32, 32, 3), "norm": "batch", **changes}
  )
  shapes = jax.eval_shape(build(config).init, jax.random.key(0))
  return jax.tree.map(lambda s: jnp.full(s.shape, 7.0, s.dtype), shapes)


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_both_pth_formats(save, tmp_path, legacy):
  base = np.arange(24, dtype=np.float32)
  view = base[2:].reshape(2, 11)[:, ::2].T  # strided, transposed, with an offset
  half = np.array([1.5, -2.0], np.float16)
  content = {
    "view": FakeTensor(view, base, offset=2),
    "whole": FakeTensor(base.reshape(4, 6), base),
    "half": FakeTensor(half, kind="HalfStorage"),
    "count": FakeTensor(np.array(3), kind="LongStorage"),
  }
  save(content, tmp_path / "a.pth", legacy)
  tensors = read_state_dict(tmp_path / "a.pth")
  assert list(tensors) == list(content)
  for name, expected in (
    ("view", view),
    ("whole", base.reshape(4, 6)),
    ("half", half),
    ("count", np.array(3)),
  ):
    assert tensors[name].dtype == expected.dtype
    np.testing.assert_array_equal(tensors[name], expected)


def test_reads_safetensors(tmp_path):
  weights = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
  safetensors.numpy.save_file(weights, tmp_path / "a.safetensors")
  np.testing.assert_array_equal(
    read_state_dict(tmp_path / "a.safetensors")["a.weight"], weights["a.weight"]
  )


class Evil:
  def __reduce__(self):
    return print, ("code ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_refused(save, tmp_path, capsys, legacy):
  save({"a": Evil()}, tmp_path / "a.pth", legacy)
  with pytest.raises(ValueError, match=r"print is not part of a dictionary of tensors"):
    read_state_dict(tmp_path / "a.pth")
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_are_refused(save, tmp_path, legacy):
  path = tmp_path / "a.pth"
  save({"a": np.ones(8, np.float32)}, path, legacy, cut=4)
  with pytest.raises(ValueError, match=r"a\.pth.*(damaged|truncated)"):
    read_state_dict(path)
  base = np.ones(8, np.float32)
  save({"a": FakeTensor(base, base, offset=1)}, path, legacy)
  with pytest.raises(ValueError, match="reaches beyond its storage"):
    read_state_dict(path)
  save({"model": {"a": np.ones(2).tolist()}}, path, legacy)
  with pytest.raises(ValueError, match="more than a flat dictionary of tensors"):
    read_state_dict(path)
  path.write_bytes(b"not weights")
  with pytest.raises(ValueError, match="not a PyTorch state dict"):
    read_state_dict(path)


def test_wrong_paths_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"none\.pth"):
    read_state_dict(tmp_path / "none.pth")
  (tmp_path / "a.bin").write_bytes(b"")
  with pytest.raises(ValueError, match=r"a\.bin is neither"):
    read_state_dict(tmp_path / "a.bin")
  (tmp_path / "a.safetensors").write_bytes(b"xx")
  with pytest.raises(ValueError, match=r"a\.safetensors is not a safetensors file"):
    read_state_dict(tmp_path / "a.safetensors")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_entry_of_resnet18_finds_its_place(save, tmp_path, suffix):
  weights, path = resnet_weights(), tmp_path / f"resnet18{suffix}"
  if suffix == ".pth":
    save(weights, path)
  else:
    safetensors.numpy.save_file(weights, path)
  params, state = load_pretrained(path, *templates())
  filled = sum(leaf.size for leaf in jax.tree.leaves((params, state)))
  assert filled == sum(v.size for k, v in weights.items() if "num_batches" not in k)
  assert jax.tree.structure((params, state)) == jax.tree.structure(templates())
  block = params["layer2_0"]
  np.testing.assert_array_equal(
    block["conv1"]["kernel"], weights["layer2.0.conv1.weight"].transpose(2, 3, 1, 0)
  )
  np.testing.assert_array_equal(
    block["downsample_norm"]["scale"], weights["layer2.0.downsample.1.weight"]
  )
  np.testing.assert_array_equal(state["norm1"]["var"], weights["bn1.running_var"])
  np.testing.assert_array_equal(params["head"]["kernel"], weights["fc.weight"].T)


def test_one_channel_takes_the_sum_of_three():
  params, _ = convert(resnet_weights(), *templates(image_shape=(32, 32, 1)))
  expected = resnet_weights()["conv1.weight"].sum(1)
  np.testing.assert_allclose(
    params["conv1"]["kernel"][:, :, 0], expected.transpose(1, 2, 0), rtol=1e-6
  )


def test_another_number_of_classes_needs_a_new_head():
  with pytest.raises(ValueError, match=r"fc\.weight has shape \[5, 512\].*pass new_head=True"):
    convert(resnet_weights(), *templates(num_classes=3))
  params, _ = convert(resnet_weights(), *templates(num_classes=3), new_head=True)
  assert (params["head"]["kernel"] == 7.0).all()
  assert (params["conv1"]["kernel"] != 7.0).all()


@pytest.mark.parametrize(
  ("edit", "changes", "message"),
  [
    ({"bn1.bias": None}, {}, "missing bn1.bias"),
    ({"extra": np.zeros(2)}, {}, "unexpected extra"),
    (
      {},
      {"norm": "group"},
      'unexpected bn1.running_mean.*and 30 more.*build the model with norm="batch"',
    ),
    (
      {},
      {"width": 0.5},
      r"conv1\.weight has shape \[64, 3, 7, 7\].*[Bb]uild the model as torchvision does",
    ),
  ],
)
def test_entries_that_do_not_fit_are_named(edit, changes, message):
  weights = {k: v for k, v in {**resnet_weights(), **edit}.items() if v is not None}
  with pytest.raises(ValueError, match=message):
    convert(weights, *templates(**changes), source="weights.pth")


def test_other_models_are_refused():
  with pytest.raises(ValueError, match="for resnet18, vgg16 and EfficientNet-Lite"):
    convert({}, *templates(name="cnn", norm="group"))


def torch_resnet18(torch, classes):
  """torchvision's ResNet-18 in a few lines, with the same names."""
  nn = torch.nn

  class BasicBlock(nn.Module):
    def __init__(self, before, features, stride):
      super().__init__()
      self.conv1 = nn.Conv2d(before, features, 3, stride, 1, bias=False)
      self.bn1 = nn.BatchNorm2d(features)
      self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
      self.bn2 = nn.BatchNorm2d(features)
      self.downsample = None
      if stride != 1 or before != features:
        self.downsample = nn.Sequential(
          nn.Conv2d(before, features, 1, stride, bias=False), nn.BatchNorm2d(features)
        )

    def forward(self, x):
      y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
      return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

  class ResNet(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
      self.maxpool = nn.MaxPool2d(3, 2, 1)
      before = 64
      for stage, features in enumerate((64, 128, 256, 512), start=1):
        blocks = [
          BasicBlock(before, features, 1 if stage == 1 else 2),
          BasicBlock(features, features, 1),
        ]
        setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        before = features
      self.fc = nn.Linear(512, classes)

    def forward(self, x):
      x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
      x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
      return self.fc(x.mean((2, 3)))

  return ResNet()


def torch_vgg16(torch, classes, batch_norm):
  """torchvision's VGG-16 in a few lines, with the same names."""
  nn = torch.nn
  layers, before = [], 3
  for features, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
    for _ in range(depth):
      norm = [nn.BatchNorm2d(features)] if batch_norm else []
      layers += [nn.Conv2d(before, features, 3, padding=1), *norm, nn.ReLU()]
      before = features
    layers.append(nn.MaxPool2d(2, 2))
  hidden = [
    nn.Linear(25088, 4096),
    nn.ReLU(),
    nn.Dropout(),
    nn.Linear(4096, 4096),
    nn.ReLU(),
    nn.Dropout(),
  ]
  model = nn.Module()
  model.features, model.classifier = (
    nn.Sequential(*layers),
    nn.Sequential(*hidden, nn.Linear(4096, classes)),
  )
  pool = nn.AdaptiveAvgPool2d(7)
  model.forward = lambda x: model.classifier(torch.flatten(pool(model.features(x)), 1))
  return model


@pytest.mark.parametrize(
  ("name", "norm", "size", "legacy"),
  [
    ("resnet18", "batch", (64, 64), False),
    ("resnet18", "batch", (65, 97), True),
    ("vgg16", "none", (224, 224), False),
    ("vgg16", "batch", (96, 320), False),
  ],
)
def test_logits_equal_pytorch(tmp_path, name, norm, size, legacy):
  torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed: logits not compared with it"
  )
  torch.manual_seed(0)
  model = torch_resnet18(torch, 5) if name == "resnet18" else torch_vgg16(torch, 5, norm == "batch")
  rng = np.random.default_rng(1)
  with torch.no_grad():
    for module in model.modules():
      if isinstance(module, torch.nn.BatchNorm2d):
        for tensor in (module.weight, module.running_var):
          tensor.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, tensor.shape)))
        for tensor in (module.bias, module.running_mean):
          tensor.copy_(torch.from_numpy(rng.normal(0, 0.2, tensor.shape)))
  torch.save(model.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
  images = rng.normal(size=(2, *size, 3)).astype(np.float32)
  with torch.no_grad():
    expected = (
      model.train(False).forward(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    )

  ours = build(ModelConfig(name, 5, (*size, 3), norm=norm))
  template = jax.eval_shape(ours.init, jax.random.key(0))
  params, state = load_pretrained(tmp_path / "w.pth", *template)
  logits, _ = jax.jit(ours.apply)(params, state, jnp.asarray(images))
  assert float(np.abs(expected).max()) > 1e-3
  np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)
