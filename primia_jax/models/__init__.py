"""The shipped models; the only part of the package that imports flax.

A model is a pair of pure functions. `init` makes parameters (trained) and model state (BatchNorm
statistics, `{}` without BatchNorm); `apply` turns images into logits. `build` makes the pair from a
`ModelConfig`:

  cnn       four convolution blocks and a global mean pool; any image size; fast on two cores
  leaf_cnn  conv 32, conv 64, max-pool, dense 128: the usual CNN in federated-learning benchmarks
            (LEAF, arXiv 1812.01097)
  mlp       one hidden layer of 32 units
  resnet18  He et al., arXiv 1512.03385, in torchvision's layout
  vgg16     Simonyan and Zisserman, arXiv 1409.1556, in torchvision's layout
  efficientnet_lite0, 1, 2
            Tan and Le, arXiv 1905.11946, with ReLU6 and depthwise convolutions, for published
            weights (`primia_jax.pretrained`)

Two more, from Tramer and Boneh (arXiv 2011.11660), are for training under differential privacy.
They work on fixed wavelet features, which need no training and no noise (`primia_jax.scattering`;
see `features`):

  scatter_linear  one dense layer: a convex problem, in which many noisy steps average out
  scatter_cnn     two convolutions with tanh, a pool between them, and a dense layer

And two give each pixel a class (`primia_jax.segmentation`):

  unet   Ronneberger et al., arXiv 1505.04597, 2.1 M parameters
  monet  dilated residual blocks after Knolle et al. 2021, 0.4 M parameters
"""

from primia_jax.models.classifier import Model, build, has_taps, is_norm_parameter, num_parameters
from primia_jax.models.config import (
  FEATURE_NORM,
  FEATURES,
  HEADS,
  IMAGENET_MEAN,
  IMAGENET_STD,
  LITES,
  MEAN,
  MIN_SIZE,
  NORMS,
  OPTIONS,
  POOLS,
  SEGMENTERS,
  STD,
  STEMS,
  ModelConfig,
)
from primia_jax.models.freezing import Frozen, freeze, parts
from primia_jax.models.layers import Norm, normalise
from primia_jax.models.scatter import features
from primia_jax.models.standardising import FeatureStatistics, statistics_of, with_statistics

__all__ = [
  "FEATURES",
  "FEATURE_NORM",
  "HEADS",
  "IMAGENET_MEAN",
  "IMAGENET_STD",
  "LITES",
  "MEAN",
  "MIN_SIZE",
  "NORMS",
  "OPTIONS",
  "POOLS",
  "SEGMENTERS",
  "STD",
  "STEMS",
  "FeatureStatistics",
  "Frozen",
  "Model",
  "ModelConfig",
  "Norm",
  "build",
  "features",
  "freeze",
  "has_taps",
  "is_norm_parameter",
  "normalise",
  "num_parameters",
  "parts",
  "statistics_of",
  "with_statistics",
]
