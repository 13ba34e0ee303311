"""Differential privacy of whole sites: bounded updates, and noise by each site alone or by all together under masks.

Two ways to noise a round's sum. `bounded` with a noise multiplier: each site's update is private by itself, whoever
sees it (local noise: K sites make the sum's variance K times what it need be). `noised`: each site adds a share of
integer noise before masking, so that only the opened sum is private, with the noise of a trusted server and none to
trust (`privacy.distributed`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from primia_jax import prng, ring, secagg
from primia_jax.federated import Aggregator, Algorithm, Global, Site
from primia_jax.privacy import distributed, noise
from primia_jax.privacy.adaptive import clip_update
from primia_jax.privacy.distributed import DistributedNoise
from primia_jax.types import Array, Metrics, ModelState, Params, PyTree

_UPDATE_NOISE = 0x53495445  # "SITE": no other use of a site's secret derives this subkey
_ROTATION = 0  # seed of the public rotations, one for each round; updates cannot depend on what is fixed beforehand


def bounded(algorithm: Algorithm, l2_clip_norm: float, noise_multiplier: float = 0.0) -> Algorithm:
  """The same algorithm, whose sites send an update of bounded norm and nothing else that depends on their images.

  Who learns what: with a noise multiplier z, whoever sees a site's message learns what a Gaussian mechanism of that
  multiplier tells of its update, once a round, under the assumption that `Site.secret` is fresh and known to the site
  alone. Without, nothing is hidden yet: see `noised`. Training loss and accuracy are never sent.

  Args:
    algorithm: of the FedAvg family, with uniform weighting.
    l2_clip_norm: the largest norm of an update, all parameters together.
    noise_multiplier: z; each site adds noise of standard deviation z l2_clip_norm to each number.

  Raises:
    ValueError: for an algorithm that weighs its messages, or sends more than one update.
  """
  if not algorithm.uniform:
    raise ValueError(f"{algorithm.name} weighs sites by their images, which the sum would tell; use uniform weighting")
  if not 0 < l2_clip_norm < float("inf") or noise_multiplier < 0:
    raise ValueError(
      f"l2_clip_norm={l2_clip_norm} must be positive and noise_multiplier={noise_multiplier} not negative"
    )

  def site(server: Global, kept: PyTree, site: Site) -> tuple[PyTree, PyTree]:
    message, kept = algorithm.site(server, kept, site)
    update, _ = clip_update(message["update"], l2_clip_norm)
    if noise_multiplier:
      if site.secret is None:
        raise ValueError("noise needs a secret at each site: give Site.secret, from prng.random_key()")
      key = prng.derive(site.secret, _UPDATE_NOISE, server.round.astype(jnp.uint32))
      noises = noise.gaussian_like(key, 0, update, noise_multiplier * l2_clip_norm)
      update = jax.tree.map(jnp.add, update, noises)
    return {**message, "update": update, "metrics": jax.tree.map(jnp.zeros_like, message["metrics"])}, kept

  return algorithm._replace(name=f"{algorithm.name}, bounded", site=site)


def noised(config: DistributedNoise, secure: secagg.SecureSum, params: Params, model_state: ModelState) -> Aggregator:
  """Secure aggregation of the messages of `bounded`, each with its share of the noise, in Z_2^k of `config`.

  Who learns what: whoever sees the opened sums learns of one site what `distributed.epsilon` says, under the
  assumptions named there; no round with fewer than `config.min_survivors` sites is opened.

  Args:
    config: of the noise; its `dim` is that of the update.
    secure: its `num_bits`, sites and threshold must be those of `config`.
    params, model_state: of the model, for their shapes; a model with statistics (BatchNorm) is refused.

  Raises:
    ValueError: where the two do not fit.
  """
  if jax.tree.leaves(model_state):
    raise ValueError("the model's statistics (BatchNorm) cannot be bounded by the clipping norm; use norm=group")
  if secure.threshold is None or not secure.masked:
    raise ValueError("distributed noise needs masks, and a threshold: give secagg.secure_sum a threshold")
  if (secure.fixed.num_bits, secure.num_sites) != (config.num_bits, config.num_sites):
    raise ValueError(
      f"masks of {secure.fixed.num_bits} bits for {secure.num_sites} sites do not fit noise of {config.num_bits} bits "
      f"for {config.num_sites} sites"
    )
  dtype = ring.storage(config.num_bits)
  rotation_key = lambda round_index: jax.random.fold_in(jax.random.key(_ROTATION), round_index)

  def encode(message: PyTree, site_id: Array, links: secagg.Links, nonce: tuple[Array, int]) -> secagg.Masked:
    assert links.own is not None  # there is a threshold
    own = prng.derive(links.own, secagg.NOISE)
    words = [jnp.asarray(n, jnp.uint32) for n in nonce]
    encoded = distributed.encode(message["update"], rotation_key(nonce[0]), own, words, config)
    return secagg.Masked((encoded, jnp.ones((), dtype)), jnp.zeros((), dtype))

  def protect(message: PyTree, site_id: Array, links: secagg.Links, nonce: tuple[Array, int]) -> secagg.Masked:
    return secagg.mask(encode(message, site_id, links, nonce), site_id, links, nonce, secure)

  def open_total(opened: tuple[secagg.Masked, Array]) -> tuple[PyTree, Array]:
    total, round_index = opened
    update, count = total.message
    update = distributed.decode(update, rotation_key(round_index), config, like=(params, model_state))
    zero = jnp.zeros((), jnp.float32)
    weight = ring.reduce(count, config.num_bits).astype(jnp.float32)
    return {"update": update, "weight": weight, "metrics": Metrics(zero, zero, zero)}, total.out_of_range

  return Aggregator(
    name="secure aggregation with distributed noise",
    protect=protect,
    open=open_total,
    num_sites=secure.num_sites,
    num_peers=secure.num_peers,
    secure=True,
    threshold=secure.threshold,
    unmask=lambda total, residue, nonce: (secagg.unmask(total, residue, nonce, secure), nonce[0]),
    min_survivors=config.min_survivors,
    encode=encode,
    num_bits=config.num_bits,
  )
