"""The work of the encrypted benchmark, for any framework: inputs, random weights, and networks that
use given `ops`.

Needs only NumPy and Python 3.7. Images and activations are NCHW in the weights' order of axes
(OIHW; dense [out, in]); an `ops` may store them differently. It has: conv(x, w, b, stride,
padding), dense(x, w, b), relu, add, flat, mean, a max_pool(x, window, stride, padding) and
layer(name), a context.
"""

import numpy as np

IMAGES = {"lenet28": (1, 28, 28), "resnet18_64": (3, 64, 64), "resnet18_224": (3, 224, 224)}
WIDTHS = (64, 128, 256, 512)


def inputs(case, batch=1, size=2**20):
  """The arguments besides the weights, float32: an image batch, the two factors of a product, or a
  ReLU's vector.
  """
  if case == "matmul":
    return [_normal(0, (1024, 1024)), _normal(1, (1024, 1024))]
  return [_normal(0, (batch, *IMAGES[case]) if case in IMAGES else (size,))]


def weights(case):
  """{layer: (w, b)}, float32, of a scale that keeps activations near one, as folded normalisation
  would.
  """
  if case == "lenet28":  # the LeNet of the literature on encrypted inference
    rng = np.random.default_rng(1)
    shapes = {
      "conv1": (20, 1, 5, 5),
      "conv2": (50, 20, 5, 5),
      "dense1": (500, 800),
      "dense2": (10, 500),
    }
    bias = lambda shape: (rng.standard_normal(shape[0]) * 0.05).astype(np.float32)
    return {name: (_he(rng, shape), bias(shape)) for name, shape in shapes.items()}
  rng = np.random.default_rng(2)

  def conv(features, channels, taps, gain=1.0):
    w = _he(rng, (features, channels, taps, taps)) * np.float32(gain)
    return w, (rng.standard_normal(features) * 0.02).astype(np.float32)

  out, channels = {"stem": conv(64, 3, 7)}, 64
  for stage, width in enumerate(WIDTHS):
    for block in range(2):
      name = f"block{stage}{block}"
      out[name + "a"] = conv(width, channels, 3)
      out[name + "b"] = conv(width, width, 3, 0.3)
      if channels != width:
        out[name + "d"] = conv(width, channels, 1)
      channels = width
  out["head"] = ((_he(rng, (1000, 512)) * 0.5).astype(np.float32), np.zeros(1000, np.float32))
  return out


def apply(case, ops, params, x):
  """Logits [N, classes]."""
  return (lenet if case == "lenet28" else resnet18)(ops, params, x)


def lenet(ops, params, x):
  for name in ("conv1", "conv2"):
    with ops.layer(name):
      x = ops.max_pool(ops.relu(ops.conv(x, *params[name], 1, 0)), 2, 2, 0)
  with ops.layer("dense1"):
    x = ops.relu(ops.dense(ops.flat(x), *params["dense1"]))
  with ops.layer("dense2"):
    return ops.dense(x, *params["dense2"])


def resnet18(ops, params, x):
  with ops.layer("stem"):
    x = ops.max_pool(ops.relu(ops.conv(x, *params["stem"], 2, 3)), 3, 2, 1)
  for stage in range(len(WIDTHS)):
    for block in range(2):
      name = f"block{stage}{block}"
      stride = 2 if stage and not block else 1
      with ops.layer(name + "a"):
        y = ops.relu(ops.conv(x, *params[name + "a"], stride, 1))
      with ops.layer(name + "b"):
        y = ops.conv(y, *params[name + "b"], 1, 1)
        if name + "d" in params:
          x = ops.conv(x, *params[name + "d"], stride, 0)
        x = ops.relu(ops.add(y, x))
  with ops.layer("head"):
    return ops.dense(ops.mean(x), *params["head"])


def _normal(seed, shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _he(rng, shape):
  return (rng.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))).astype(np.float32)
