"""The subkeys of `Site.secret`, all in one place, so that no two uses derive the same key.

The secrets of a masked sum are others; `secagg.subkeys` lists them.
`prng.derive` gives different keys for different words, and for different numbers of words. The four
functions below are all that derives from a site's secret itself: each use has a first word of its
own. What a function returns is a secret for that use alone. The mechanisms derive from it once
more; their first words are the constants. They differ from each other and from the words above, so
that a mechanism may also be given a site's secret directly, as tests and other libraries do.

Who learns what: whoever knows a subkey learns nothing of the secret or of other subkeys, under the
assumption that ChaCha20 is a pseudorandom function.
"""

from __future__ import annotations

from primia_jax import prng
from primia_jax.types import Array

# First words under a site's secret.
_SAMPLING = 1
_STEP = 2
_UPDATE = 0x53495445  # "SITE"
_COUNTS = 0x434E5453  # "CNTS"
# First words under a subkey.
POISSON = 0x53414D50  # "SAMP": `sampling.poisson`
GAUSSIAN = 0x4E4F4953  # "NOIS": `noise.integers_like`, then the step
CORRELATED = 0x434F5252  # "CORR": `correlated.next_noise`, then the level; then `GAUSSIAN`

_NO_SECRET = (
  "private training needs a secret at each site, and so does its noise: give Site.secret, from "
  "prng.random_key()"
)


def of_sampling(secret: Array | None) -> Array:
  """For the units of all steps; `sampling.poisson` tells steps apart."""
  return prng.derive(_known(secret), _SAMPLING)


def of_step(secret: Array | None, step: Array) -> Array:
  """For the noise of one step's gradient; `step` is a uint32 scalar."""
  return prng.derive(_known(secret), _STEP, step)


def of_update(secret: Array | None, round_index: Array) -> Array:
  """For the noise of one round's update of a whole site, and of its clip's bit."""
  return prng.derive(_known(secret), _UPDATE, round_index)


def of_counts(secret: Array | None) -> Array:
  """For the noise of a site's class counts."""
  return prng.derive(_known(secret), _COUNTS)


def _known(secret: Array | None) -> Array:
  if secret is None:
    raise ValueError(_NO_SECRET)
  return secret
