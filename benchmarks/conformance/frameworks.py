"""Networks, and modules of the frameworks that users write them in."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import networks
from benchmarks.conformance.case import Case, normal, owned, spread
from benchmarks.conformance.layers import flax
from primia_jax import models
from primia_jax.models.cnn import CNN, LeafCNN
from primia_jax.models.efficientnet import EfficientNetLite
from primia_jax.models.resnet import ResNet18

IMAGE, TOKENS, SEQUENCE = spread(-2, 2, 1, 16, 16, 3), normal(2, 6, 8), normal(2, 5, 8)


def network(name):
  def make():
    module, variables, x = networks.small(networks.NETWORKS[name])
    return module.apply, variables, x

  return make


def shipped(module, name, size, **options):
  """A model of `primia_jax.models`, its statistics those of random images."""

  def make():
    config = models.ModelConfig(name, image_shape=(size, size, 1), **options)
    model = models.build(config)
    params, state = model.init(jax.random.key(0))
    for i in range(20 if state else 0):
      _, state = model.apply(params, state, normal(8, size, size, 1, seed=i), train=True)
    variables = {"params": params} | ({"batch_stats": state} if state else {})
    return module(config).apply, variables, normal(1, size, size, 1)

  return make


class LeNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    for features in (6, 16):
      x = nn.max_pool(nn.relu(nn.Conv(features, (5, 5))(x)), (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    for features in (120, 84):
      x = nn.relu(nn.Dense(features)(x))
    return nn.Dense(10)(x)


class MobileBlock(nn.Module):
  """An inverted residual of MobileNetV3 (arXiv 1905.02244): depthwise, squeeze and excite,
  hard_silu.
  """

  @nn.compact
  def __call__(self, x):
    y = nn.hard_silu(nn.Conv(12, (1, 1))(x))
    y = nn.hard_silu(nn.Conv(12, (3, 3), feature_group_count=12)(y))
    gate = nn.hard_sigmoid(nn.Dense(12)(nn.relu(nn.Dense(4)(y.mean((1, 2))))))
    return x + nn.Conv(x.shape[-1], (1, 1))(y * gate[:, None, None])


class ConvNeXtBlock(nn.Module):
  """arXiv 2201.03545: depthwise 7 x 7, LayerNorm, GELU, LayerScale."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm()(nn.Conv(x.shape[-1], (7, 7), feature_group_count=x.shape[-1])(x))
    y = nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(12)(y)))
    return x + self.param("scale", nn.initializers.constant(0.1), (x.shape[-1],)) * y


class Transformer(nn.Module):
  """A block: LayerNorm, attention of two heads, GELU."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2)(y, y)
    return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class Mixer(nn.Module):
  """A block of MLP-Mixer (arXiv 2105.01601)."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm()(x).swapaxes(1, 2)
    x = x + nn.Dense(6)(nn.gelu(nn.Dense(12)(y))).swapaxes(1, 2)
    return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class Autoencoder(nn.Module):
  @nn.compact
  def __call__(self, x):
    shape = x.shape
    x = nn.relu(nn.Conv(8, (3, 3), 2)(x))
    x = nn.Dense(6)(x.reshape(shape[0], -1))
    x = nn.relu(nn.Dense(shape[1] * shape[2])(x)).reshape(shape[0], shape[1] // 2, -1, 4)
    return nn.sigmoid(nn.ConvTranspose(shape[-1], (2, 2), (2, 2))(x))


class Recurrent(nn.Module):
  cell: type

  @nn.compact
  def __call__(self, x):
    cell = self.cell(6)
    like = lambda v: jnp.zeros(v.shape, x.dtype)
    start = jax.tree.map(like, cell.initialize_carry(jax.random.key(0), x[:, 0].shape))
    return nn.RNN(cell)(x, initial_carry=start)


LINEN = owned(
  "networks",
  {name: network(name) for name in networks.NETWORKS}
  | {
    "LeNet": flax(LeNet(), IMAGE),
    "MobileNetV3 block": flax(MobileBlock(), IMAGE[:, :8, :8]),
    "ConvNeXt block": flax(ConvNeXtBlock(), IMAGE[:, :8, :8]),
    "transformer block": flax(Transformer(), TOKENS),
    "MLP-Mixer block": flax(Mixer(), TOKENS),
    "autoencoder": flax(Autoencoder(), IMAGE[:, :8, :8]),
    "GRU, 5 steps": flax(Recurrent(nn.GRUCell), SEQUENCE),
    "SimpleCell, 5 steps": flax(Recurrent(nn.SimpleCell), SEQUENCE),
    "primia_jax cnn, group norm": shipped(lambda c: CNN(c, "group"), "cnn", 16),
    "primia_jax cnn, batch norm": shipped(lambda c: CNN(c, "batch"), "cnn", 16, norm="batch"),
    "primia_jax leaf_cnn": shipped(lambda c: LeafCNN(c.num_classes), "leaf_cnn", 14),
    "primia_jax resnet18, batch norm": shipped(
      lambda c: ResNet18(c, "batch"), "resnet18", 32, norm="batch", width=0.125
    ),
    "primia_jax efficientnet_lite0, fixed statistics": shipped(
      lambda c: EfficientNetLite(c, "affine"), "efficientnet_lite0", 32, norm="affine", width=0.125
    ),
  },
)


def of_nnx(build, x):
  """An NNX module: its graph is public, its state the weights."""

  def make():
    graph, state = nnx.split(build(nnx.Rngs(0)))
    return lambda w, x: nnx.merge(graph, w)(x), state, x

  return make


def _nnx_norms(rngs):
  return nnx.Sequential(
    nnx.Conv(3, 6, (3, 3), rngs=rngs),
    nnx.BatchNorm(6, use_running_average=True, rngs=rngs),
    nnx.relu,
    nnx.Conv(6, 4, (3, 3), strides=2, rngs=rngs),
    nnx.GroupNorm(4, num_groups=2, rngs=rngs),
    nnx.leaky_relu,
  )


def _nnx_dropout(rngs):
  dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
  return nnx.Sequential(nnx.Linear(8, 6, rngs=rngs), dropout, nnx.relu, nnx.Linear(6, 3, rngs=rngs))


class _NNXAttention(nnx.Module):
  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

  def __call__(self, x):
    return self.attention(x)


class _NNXRecurrent(nnx.Module):
  def __init__(self, cell, rngs):
    self.rnn = nnx.RNN(cell(8, 6, rngs=rngs))

  def __call__(self, x):
    start = self.rnn.cell.initialize_carry(x[:, 0].shape, nnx.Rngs(0))
    return self.rnn(x, initial_carry=jax.tree.map(lambda v: v.astype(x.dtype), start))


NNX = owned(
  "NNX",
  {
    "convolutions, BatchNorm, GroupNorm": of_nnx(_nnx_norms, IMAGE[:, :8, :8]),
    "Dropout, switched off": of_nnx(_nnx_dropout, TOKENS),
    "MultiHeadAttention": of_nnx(_NNXAttention, TOKENS),
    "RNN of LSTMCell": of_nnx(functools.partial(_NNXRecurrent, nnx.LSTMCell), SEQUENCE),
    "RNN of GRUCell": of_nnx(functools.partial(_NNXRecurrent, nnx.GRUCell), SEQUENCE),
  },
)


def of_haiku(forward, x):
  """A Haiku function, transformed; forward(hk, x, train) gives its outputs."""

  def make():
    import haiku as hk

    net = hk.without_apply_rng(hk.transform_with_state(functools.partial(forward, hk)))
    variables = net.init(jax.random.key(0), x, True)
    return lambda w, x: net.apply(*w, x, False)[0], variables, x

  return make


def _haiku_norms(hk, x, train):
  x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Conv2D(6, 3)(x), is_training=train))
  x = hk.MaxPool(2, 2, "VALID")(x)
  return hk.Linear(3)(hk.LayerNorm(-1, True, True)(x).mean((1, 2)))


def _haiku_attention(hk, x, train):
  scale = hk.initializers.VarianceScaling(1.0)
  return hk.MultiHeadAttention(2, 4, w_init=scale, model_size=8)(x, x, x)


def _haiku_lstm(hk, x, train):
  core = hk.LSTM(6)
  start = jax.tree.map(lambda v: v.astype(x.dtype), core.initial_state(x.shape[0]))
  return hk.dynamic_unroll(core, x.swapaxes(0, 1), start)[0]


HAIKU = owned(
  "Haiku",
  {
    "MLP": of_haiku(lambda hk, x, train: hk.nets.MLP([8, 6, 3])(x), TOKENS),
    "Conv2D, BatchNorm, LayerNorm": of_haiku(_haiku_norms, IMAGE[:, :8, :8]),
    "MultiHeadAttention": of_haiku(_haiku_attention, TOKENS),
    "LSTM": of_haiku(_haiku_lstm, SEQUENCE),
  },
)


def of_equinox(build, x):
  """An Equinox module, whose arrays are the weights; build(eqx, key) makes it."""

  def make():
    import equinox as eqx

    weights, rest = eqx.partition(build(eqx.nn, jax.random.key(0)), eqx.is_array)
    return lambda w, x: jax.vmap(eqx.combine(w, rest))(x), weights, x

  return make


def _equinox_norms(enn, key):
  layers = (enn.Conv2d(3, 6, 3, key=key), enn.GroupNorm(2, 6), enn.Lambda(jax.nn.leaky_relu))
  return enn.Sequential([*layers, enn.MaxPool2d(2, 2), enn.Conv2d(6, 4, 3, key=key)])


EQUINOX = owned(
  "Equinox",
  {
    "MLP": of_equinox(lambda enn, key: enn.MLP(8, 3, 6, 2, key=key), TOKENS[:, 0]),
    "Conv2d, GroupNorm, MaxPool2d": of_equinox(
      _equinox_norms, np.moveaxis(IMAGE[:, :8, :8], -1, 1)
    ),
    "PReLU": of_equinox(lambda enn, key: enn.MLP(8, 3, 6, 2, enn.PReLU(), key=key), TOKENS[:, 0]),
  },
)

CASES: list[Case] = [*LINEN, *NNX, *HAIKU, *EQUINOX]
