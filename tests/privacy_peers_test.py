"""Opacus and jax-privacy as oracles: equal sums of clipped gradients, equal noise, equal epsilon; each where installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import local, models
from primia_jax.privacy import accounting, clipping, mechanism
from primia_jax.types import Batch

KEY = jax.random.key(0)
NORMS = pytest.mark.parametrize("l2_clip_norm", [0.3, 4.0, 1e3])  # all, some and none are clipped
SIZE, CLASSES, UNITS = 12, 3, 11
CASES = pytest.mark.parametrize(
  ("sigma", "rate", "steps", "delta"),
  [(1.1, 256 / 60000, 3525, 1e-5), (1.0, 32 / 1600, 2000, 1 / 1600), (3.0, 4096 / 50000, 2468, 1e-5), (5.0, 1.0, 10, 1e-4)],
)
