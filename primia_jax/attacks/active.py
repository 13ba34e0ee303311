"""What a server can take that chooses what it sends: parameters, or a module before the model.

The upper bound of what training can leak. Each attack plants a layer whose gradient holds single
images, and reads them from an honest sum (`round` runs one, under any summation):

- `imprint` (Fowl et al. 2022, "Robbing the Fed"): all units of a layer measure the same, such as
  the mean brightness, and differ by their threshold. Two neighbours' gradients differ by the images
  between their thresholds; where that is one, the quotient of `linear.invert` is it exactly. All
  sites get the same, so masks do not help: the sum over sites is a larger batch.
- `for_site` gives each site units of its own in a prepended module, and kills the others'. The sum
  then holds each site's gradient apart, and names its site (Zhao et al. 2023, "Loki", arXiv
  2303.12233, whose convolution kernels differ by site; Shi et al. 2024, "MediLeak", arXiv
  2407.09972, prepends such a module to medical models).
- `dead` (Pasquini et al. 2022, "Eluding secure aggregation"): all sites but the victim get a layer
  whose ReLU never opens, so that their gradients up to there are zero, and the sum is the victim's.

What stops them: a site that builds its model from its own settings has no module before it; sites
that compare what they got see that it differs; and `detection` looks at the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.federated import Algorithm, Global, Message, Site, Sites, over_sites
from primia_jax.sites import Placement
from primia_jax.summation import Purpose, Summation
from primia_jax.types import ApplyFn, Array, Params, PyTree

_CLOSED = -1e6  # the bias of a unit that no image opens


class Found(NamedTuple):
  """What the bins of an imprint layer held.

  Attributes:
    images: [K, D]. A bin with one image holds exactly it; one with several a weighted mean of them.
    has: [K] bool, whether anything was in the bin.
  """

  images: Array
  has: Array


def thresholds(measured: np.ndarray, num_bins: int) -> np.ndarray:
  """[K] float32: quantiles of a measurement [M] of public images, from its least value up."""
  if num_bins < 1 or len(measured) < 1:
    raise ValueError(f"num_bins={num_bins} of {len(measured)} measurements; both must be 1 or more")
  return np.quantile(measured, np.arange(num_bins) / num_bins).astype(np.float32)


def imprint(measurement: Array, bins: Array) -> dict[str, Array]:
  """A dense layer of K units that open where measurement . x exceeds their threshold.

  The units' outputs must reach the loss alike: a layer after it needs equal rows (`alike`).

  Args:
    measurement: [D] float32, e.g. 1e-4 / D in each place for the mean brightness. A small scale
      keeps the rounding of updated parameters, and the module's effect on the model, small.
    bins: [K] float32, increasing, of the same scale.

  Returns:
    {"kernel": [D, K], "bias": [K]}.
  """
  kernel = jnp.broadcast_to(measurement[:, None], (measurement.size, bins.size))
  return {"kernel": kernel, "bias": -jnp.asarray(bins)}


def alike(width: int, outputs: Array) -> Array:
  """The kernel [K, L] of a layer that takes all K units of an imprint alike, by `outputs` [L]."""
  return jnp.broadcast_to(outputs[None], (width, outputs.size))


def read(kernel: Array, bias: Array, resolved: float = 1e-3) -> Found:
  """The images in the bins of an imprint layer.

  Args:
    kernel, bias: [D, K] and [K], the layer's gradient, or any multiple such as a sum of updates.
    resolved: the least change of a bias between bins that is an image's, as a share of the largest.
  """
  last = lambda a: jnp.concatenate([a[..., 1:], jnp.zeros_like(a[..., :1])], axis=-1)
  of_kernel, of_bias = kernel - last(kernel), bias - last(bias)
  has = jnp.abs(of_bias) > resolved * jnp.max(jnp.abs(of_bias))
  return Found((of_kernel / jnp.where(has, of_bias, 1)[None]).T, has)


def prepend(
  apply_fn: ApplyFn, params: Params, layer: dict[str, Array], gain: float
) -> tuple[ApplyFn, Params]:
  """A model with a module in front: x + gain (sum of the layer's units after ReLU), at all pixels.

  Args:
    apply_fn: of the model; (params, model_state, images, *, train, key) -> (logits, model_state).
    params: of the model.
    layer: of the module, over flattened images; see `imprint` and `for_site`.
    gain: how strongly the units enter each pixel: the module's gradients are as strong, its
      disturbance of the model is as large.

  Returns:
    The new apply function, and {"model": params, "module": {"kernel", "bias", "back"}}.
  """

  def apply(params, model_state, images, *, train=False, key=None):
    module, flat = params["module"], images.reshape(images.shape[0], -1)
    units = jax.nn.relu(flat @ module["kernel"] + module["bias"][None])
    images = (flat + units @ module["back"]).reshape(images.shape)
    return apply_fn(params["model"], model_state, images, train=train, key=key)

  size, width = layer["kernel"].shape
  back = alike(width, jnp.full(size, gain, jnp.float32))
  return apply, {"model": params, "module": {**layer, "back": back}}


def for_site(layer: dict[str, Array], site: int, num_sites: int) -> dict[str, Array]:
  """The layer as site number `site` gets it: a block of units for each site, all but its own
  closed. Only biases differ from site to site.

  Args:
    layer: {"kernel": [D, K], "bias": [K]}, see `imprint`.
    site: from 0.
    num_sites: S.

  Returns:
    {"kernel": [D, S K], "bias": [S K]}. `block` takes a site's part of the sum's gradient.
  """
  width = layer["bias"].size
  bias = jnp.full((num_sites, width), _CLOSED, jnp.float32).at[site].set(layer["bias"])
  return {"kernel": jnp.tile(layer["kernel"], (1, num_sites)), "bias": bias.reshape(-1)}


def block(gradient: Array, site: int, num_sites: int) -> Array:
  """A site's units [..., K] of all sites' [..., S K]."""
  return jnp.split(gradient, num_sites, axis=-1)[site]


def dead(params: Params, layer: str) -> Params:
  """The parameters with all units of one layer closed: kernel 0, bias -1.

  A site that trains from them changes nothing of that layer and of those before, nor the next
  layer's kernel.

  Args:
    params: {layer: {"kernel", "bias"}, ...}.
    layer: one that a ReLU follows.
  """
  closed = {name: jnp.full_like(a, -(name == "bias")) for name, a in params[layer].items()}
  return {**params, layer: closed}


def round(
  algorithm: Algorithm, summation: Summation, placement: Placement
) -> Callable[[Global, Sites, PyTree], Message]:
  """A round of a server that sends each site a model of its own: honest sites, honest sum.

  Args:
    algorithm, summation, placement: as for `federated.federate`.

  Returns:
    (Global with parameters [S, ...], of each site by its number; Sites; states of the sites) -> the
    sum of the sites' messages, which is all that the summation shows the server. It raises a
    ValueError for updates that do not fit the sum's encoding.
  """

  def site_fn(sent: Global, site_state: PyTree, site: Site) -> tuple[Message, PyTree]:
    own = jax.tree.map(lambda a: a[site.id], sent.params)
    return algorithm.site(sent._replace(params=own), site_state, site)

  run = over_sites(site_fn, summation, placement, Purpose.TRAINING)

  def apply(sent: Global, sites: Sites, site_state: PyTree) -> Message:
    message, _, outcome = run(sent, int(sent.round), sites, site_state)
    if int(outcome.out_of_range):
      raise ValueError(
        f"the updates of {int(outcome.out_of_range)} sites do not fit the sum's encoding, and it "
        "must not be read; plant weaker units, or raise the summation's max_abs"
      )
    return message

  return apply
