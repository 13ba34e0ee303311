"""The networks that are attacked, for any framework: random weights, and networks that use given
`ops`.

Needs only NumPy. Kernels are OIHW, dense [out, in] on features in the order of CHW. An `ops` has:
conv(x, w, stride, padding), bias(x, b), dense(x, w, b), norm(x, scale, bias) (GroupNorm of 32
groups), relu, sigmoid, add, flat and mean (over the map).
"""

import numpy as np

CLASSES = 6
WIDTHS = (64, 128, 256, 512)


def weights(case, size=32, channels=3, classes=CLASSES, seed=0):
  """[weights] in the order in which `apply` takes them, float32."""
  rng = np.random.default_rng(seed)
  if case == "lenet":  # Zhu et al. 2019: uniform in +-0.5
    draw = lambda *shape: rng.uniform(-0.5, 0.5, shape).astype(np.float32)
    features = 12 * (size // 4) ** 2
    shapes = (12, channels, 5, 5), (12,), (12, 12, 5, 5), (12,), (12, 12, 5, 5), (12,)
    return [draw(*shape) for shape in (*shapes, (classes, features), (classes,))]
  out = []

  def conv(features, channels, taps):
    # keeps variances through a ReLU or, roughly, a sigmoid of standardised values
    gain = np.sqrt(2 / (channels * taps**2))
    out.append((rng.standard_normal((features, channels, taps, taps)) * gain).astype(np.float32))
    out.extend([np.ones(features, np.float32), np.zeros(features, np.float32)])

  conv(64, channels, 3)
  before = 64
  for width in WIDTHS:
    for _ in range(2):
      conv(width, before, 3)
      conv(width, width, 3)
      if before != width:
        conv(width, before, 1)
      before = width
  head = rng.standard_normal((classes, 512)) / np.sqrt(512)
  return [*out, head.astype(np.float32), np.zeros(classes, np.float32)]


def apply(case, ops, params, x):
  """Logits [N, classes]; case is lenet, resnet18_relu or resnet18_sigmoid."""
  return lenet(ops, params, x) if case == "lenet" else resnet18(case, ops, params, x)


def lenet(ops, params, x):
  for i, stride in enumerate((2, 2, 1)):
    x = ops.sigmoid(ops.bias(ops.conv(x, params[2 * i], stride, 2), params[2 * i + 1]))
  return ops.dense(ops.flat(x), *params[6:])


def resnet18(case, ops, params, x):
  """He et al. 2016 with GroupNorm and a 3x3 stem of stride 2, for small images."""
  act = ops.sigmoid if case == "resnet18_sigmoid" else ops.relu
  left = iter(params)

  def conv(x, stride, padding):
    return ops.norm(ops.conv(x, next(left), stride, padding), next(left), next(left))

  x = act(conv(x, 2, 1))
  before = 64
  for stage, width in enumerate(WIDTHS):
    for block in range(2):
      stride = 2 if stage and not block else 1
      y = conv(act(conv(x, stride, 1)), 1, 1)
      x = act(ops.add(y, conv(x, stride, 0) if before != width else x))
      before = width
  return ops.dense(ops.mean(x), next(left), next(left))
