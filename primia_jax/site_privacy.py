"""Differential privacy of whole sites: bounded updates, and noise by each site or by all together.

There are two ways to add noise to a round's sum. `bounded` with a noise multiplier makes each
site's update private against every observer; this noise is local, so K sites give the sum K
times the variance that it needs. With `distributed_noise` each site adds a share of integer noise
before masking. Then only the opened sum is private, with as little noise as a trusted server would
add, and no party must be trusted with it (`privacy.distributed`). The clip of updates is fixed, or
follows a quantile of their norms (`privacy.adaptive`).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from primia_jax import ring, secagg
from primia_jax.federated import Algorithm, Global, Message
from primia_jax.privacy import adaptive, distributed, grid, subkeys
from primia_jax.privacy.adaptive import Clip, clip_update
from primia_jax.privacy.distributed import DistributedNoise
from primia_jax.privacy.plan import SiteLevel
from primia_jax.summation import Coding
from primia_jax.types import Array, Metrics, ModelState, Params, PyTree, Site

_OF_BIT = 1  # third word of the bit's noise, beside round and purpose; the update's has none
# Seed of the public rotations, one for each round: updates cannot depend on what is fixed before.
_ROTATION = 0


def bounded(algorithm: Algorithm, clip: float | Clip, noise_multiplier: float = 0.0) -> Algorithm:
  """The same algorithm, whose sites send an update of bounded norm and nothing else that depends on
  their images.

  With a clip that moves, sites send their update divided by the round's clip, and a bit: whether
  its norm was within. The server multiplies by the clip, which it keeps in its state and moves.

  Who learns what: with a noise multiplier z, whoever sees a site's message learns what a Gaussian
  mechanism of that multiplier tells of its update, once a round, under the assumption that
  `Site.secret` is fresh and known to the site alone. Without, nothing is hidden yet: see `noised`.
  Training loss and accuracy are never sent. For any moving clip that a server sends, the update
  sent back has a norm of at most 1, and the bit is 1/2 or -1/2.

  Args:
    algorithm: of the FedAvg family, with uniform weighting.
    clip: the largest norm of an update, all parameters together; or how it moves.
    noise_multiplier: z; each site rounds its update and adds noise of standard deviation z times
      the clip to each number.
      Where the clip moves, z is that of update and bit together: the bit's noise has standard
      deviation `clip.count_stddev` at each site, and the update's
      `adaptive.update_noise_multiplier`.

  Raises:
    ValueError: for an algorithm that weighs its messages, or sends more than one update, or if the
      bit alone costs more than z.
  """
  if not algorithm.uniform:
    raise ValueError(
      f"{algorithm.name} weighs sites by their images, which the sum would reveal; use "
      "uniform weighting"
    )
  l2_clip_norm = clip.l2_clip_norm if isinstance(clip, Clip) else clip
  if not 0 < l2_clip_norm < float("inf") or noise_multiplier < 0:
    raise ValueError(
      f"l2_clip_norm={l2_clip_norm} must be positive and noise_multiplier={noise_multiplier} not "
      f"negative"
    )
  if isinstance(clip, Clip) and clip.target_quantile is not None:
    return _moving(algorithm, clip, noise_multiplier)

  def site(server: Global, site_state: PyTree, site: Site) -> tuple[Message, PyTree]:
    message, site_state = algorithm.site(server, site_state, site)
    update, _ = clip_update(message.update, l2_clip_norm)
    if noise_multiplier:
      update = _noised(update, l2_clip_norm, noise_multiplier, site, server.round, 0)
    return message._replace(update=update, metrics=_silent(message.metrics)), site_state

  return algorithm._replace(name=f"{algorithm.name}, bounded", site=site)


def private(algorithm: Algorithm, plan: SiteLevel) -> Algorithm:
  """The algorithm with the clip and the noise that a plan is charged for; see `bounded`.

  Where sites make noise together, `distributed_noise` of `plan.noise` adds it.
  """
  return bounded(algorithm, plan.clip, 0.0 if plan.noise else plan.noise_multiplier)


def _moving(algorithm: Algorithm, clip: Clip, noise_multiplier: float) -> Algorithm:
  """`bounded` by a clip that moves (Andrew et al. 2021, algorithm 1)."""
  of_bit = clip.count_stddev
  assert of_bit is not None  # `Clip` made sure
  of_update = adaptive.update_noise_multiplier(noise_multiplier, clip) if noise_multiplier else 0.0
  inner = lambda server: server._replace(server_state=server.server_state["inner"])

  def init_server(params: Params) -> PyTree:
    return {"inner": algorithm.init_server(params), "clip": adaptive.init(clip)}

  def site(server: Global, site_state: PyTree, site: Site) -> tuple[Message, PyTree]:
    message, site_state = algorithm.site(inner(server), site_state, site)
    norm = server.server_state["clip"].l2_clip_norm
    # Divided first and clipped last: the bound holds for any clip that the server sends, 0 and NaN
    # included.
    divided = jax.tree.map(lambda u: u / norm.astype(u.dtype), message.update)
    update, was_within = clip_update(divided, 1.0)
    bit = adaptive.centred(was_within)
    if noise_multiplier:
      update = _noised(update, 1.0, of_update, site, server.round, 0)
      bit = _noised(bit, 0.5, 2 * of_bit, site, server.round, 1)
    return Message(update, message.weight, _silent(message.metrics), bit), site_state

  def server(server: Global, total: Message) -> tuple[Params, ModelState, PyTree, Metrics]:
    state = server.server_state["clip"]
    multiplied = jax.tree.map(lambda u: u * state.l2_clip_norm.astype(u.dtype), total.update)
    inner_total = total._replace(update=multiplied, more=())
    params, model_state, own, metrics = algorithm.server(inner(server), inner_total)
    after = adaptive.update(clip, state, total.more, total.weight)
    return params, model_state, {"inner": own, "clip": after}, metrics

  def tells(state: PyTree) -> dict[str, Array]:
    return algorithm.tells(state["inner"]) | {"l2_clip_norm": state["clip"].l2_clip_norm}

  return algorithm._replace(
    name=f"{algorithm.name}, bounded by a clip that moves",
    init_server=init_server,
    site=site,
    server=server,
    personal=lambda server, site_state: algorithm.personal(inner(server), site_state),
    uniform=False,  # a robust rule would not give the mean of the bits
    tells=tells,
  )


def _silent(metrics: Metrics) -> Metrics:
  return jax.tree.map(jnp.zeros_like, metrics)


def _noised(
  tree: PyTree, clip: float, noise_multiplier: float, site: Site, round_index: Array, number: int
) -> PyTree:
  """A vector of norm at most `clip`, rounded and under noise (`grid.release`)."""
  key = subkeys.of_update(site.secret, round_index.astype(jnp.uint32))
  return grid.release(tree, clip, grid.choose(grid.size(tree), noise_multiplier), key, number)


def distributed_noise(
  config: DistributedNoise,
  secure: secagg.SecureSum,
  params: Params,
  model_state: ModelState,
  clip: Clip | None = None,
) -> Coding:
  """The coding of `bounded` messages with each site's share of the noise, in Z_2^k of `config`.

  `summation.masked(secure, coding)` and `over` take it.

  Who learns what: whoever sees the opened sums learns of one site what `distributed.epsilon` says,
  under the assumptions named there; no round with fewer than `config.min_survivors` sites is
  opened. Where the clip moves, the sum of bits is opened too, under noise of its own
  (`adaptive.bit_noise`), and the divergences of both add up.

  Args:
    config: of the noise; its `dim` is that of the update, its l2_clip_norm that of `bounded`, or 1
      for one that moves.
    secure: its `num_bits`, sites and threshold must be those of `config`.
    params, model_state: of the model, for their shapes; a model with statistics (BatchNorm) is
      refused.
    clip: that of `bounded`, where it moves; else None.

  Raises:
    ValueError: where these do not fit.
  """
  if jax.tree.leaves(model_state):
    raise ValueError(
      "the model's statistics (BatchNorm) cannot be bounded by the clipping norm; use norm=group"
    )
  if secure.threshold is None or not secure.masked:
    raise ValueError(
      "distributed noise needs masks, and a threshold: give secagg.secure_sum a threshold"
    )
  if (secure.fixed.num_bits, secure.num_sites) != (config.num_bits, config.num_sites):
    raise ValueError(
      f"masks of {secure.fixed.num_bits} bits for {secure.num_sites} sites do not fit noise of "
      f"{config.num_bits} bits "
      f"for {config.num_sites} sites"
    )
  of_bit = (
    adaptive.bit_noise(config, clip)
    if clip is not None and clip.target_quantile is not None
    else None
  )
  dtype = ring.storage(config.num_bits)
  rotation_key = lambda words: jax.random.fold_in(jax.random.key(_ROTATION), words[0])

  def encode(message: Message, row: secagg.Row, words: Array) -> secagg.Masked:
    if len(jax.tree.leaves(message.more)) != (of_bit is not None):
      raise ValueError(
        "one clip moves and the other is fixed; give `bounded` and `distributed_noise` the same "
        "Clip"
      )
    rotation, nonce = rotation_key(words), [words[0], words[1]]
    update = distributed.encode(message.update, rotation, row.noise, nonce, config)
    more: PyTree = ()
    if of_bit is not None:
      more = distributed.encode(message.more, rotation, row.noise, [*nonce, _OF_BIT], of_bit)
    nothing: Any = ()  # metrics are never sent
    sent = Message(update, jnp.ones((), dtype), nothing, more)
    return secagg.Masked(sent, jnp.zeros((), dtype))

  def decode(total: secagg.Masked, words: Array) -> Message:
    message, rotation, zero = total.message, rotation_key(words), jnp.zeros((), jnp.float32)
    update = distributed.decode(message.update, rotation, config, (params, model_state))
    weight = ring.reduce(message.weight, config.num_bits).astype(jnp.float32)
    more = () if of_bit is None else distributed.decode(message.more, rotation, of_bit, zero)
    return Message(update, weight, Metrics(zero, zero, zero), more)

  name = "secure aggregation with distributed noise"
  return Coding(name, encode, decode, config.min_survivors)
