"""Ways to break a round where a look at one site, at one round or at the arguments finds nothing;
see boundary_mutations_test."""

import boundary_breaking as breaking
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from boundary_breaking import SECURE, K, Patch, with_send

from primia_jax import boundary, federated, prng, secagg, summation

# ---- another site, another round


def _open_where(patch: Patch, applies) -> None:
  """The message is sent without masks where `applies` (row) says so."""

  def change(m, row, sent):
    bare = secagg.encode(m, SECURE)
    return jax.tree.map(lambda a, v: jnp.where(applies(row), a, v), bare, sent)

  with_send(patch, change)


def open_at_the_last_site(patch: Patch) -> None:
  _open_where(patch, lambda row: row[0].site == K - 1)


def open_at_a_site_that_is_not_here(patch: Patch) -> None:
  _open_where(patch, lambda row: row[0].site == 7)


def no_pairs_at_the_last_site(patch: Patch) -> None:
  def change(m, row, sent):
    keys, is_last = row[0], (row[0].site == K - 1).astype(jnp.int32)
    keys = keys._replace(peers=keys.peers * (1 - is_last) + keys.site * is_last)
    return secagg.mask(secagg.encode(m, SECURE), keys, (row[2][0], row[2][1]), SECURE)

  with_send(patch, change)


def open_in_round_seven(patch: Patch) -> None:
  _open_where(patch, lambda row: row[2][0] == 7)


def open_in_evaluations(patch: Patch) -> None:
  _open_where(patch, lambda row: row[2][1] == int(summation.Purpose.EVALUATION))


def printed_in_round_seven(patch: Patch) -> None:
  def change(m, row, sent):
    say = lambda: jax.debug.print("{}", m.metrics.loss)
    jax.lax.cond(row[2][0] == 7, say, lambda: None)
    return sent

  with_send(patch, change)


def _with_nonce(patch: Patch, change) -> None:
  mask_sum = prng.mask_sum
  patch.setattr(
    prng,
    "mask_sum",
    lambda keys, signs, nonce, shape, *rest: mask_sum(
      keys, signs, change(nonce, shape), shape, *rest
    ),
  )


def one_stream_in_round_seven(patch: Patch) -> None:
  zeros = jnp.zeros_like
  _with_nonce(patch, lambda nonce, shape: jnp.where(nonce[0] == 7, zeros(nonce), nonce))


def stream_of_the_first_leaf_in_round_zero(patch: Patch) -> None:
  """The second leaf has in all rounds the stream that the first one has in round 0."""
  of_round_zero = lambda nonce: jnp.stack([jnp.uint32(0), nonce[1], jnp.uint32(0)])
  _with_nonce(patch, lambda nonce, shape: of_round_zero(nonce) if len(shape) == 2 else nonce)


# ---- what is no argument

OWN_IMAGES = np.linspace(0, 1, 8, dtype=np.float32)  # that a site holds, and nobody declares


def closed_over(patch: Patch) -> None:
  with_send(patch, lambda m, row, sent: (sent, jnp.mean(OWN_IMAGES)))


def closed_over_in_a_loop(patch: Patch) -> None:
  add = jax.jit(lambda v: v + jnp.mean(OWN_IMAGES))

  def change(m, row, sent):
    return sent, jax.lax.fori_loop(0, 2, lambda i, v: add(v), jnp.float32(0))

  with_send(patch, change)


COUNTS = np.array([3.0, 1.0], np.float32)


def shared_report(public=()) -> boundary.Report:
  """A site's counts are given to a masked sum as what all sites share."""
  stacked = lambda a: jax.ShapeDtypeStruct((K, *a.shape), a.dtype)
  sites = federated.Sites(np.arange(K), lambda ids: jax.tree.map(stacked, breaking.SITE))
  purpose = summation.Purpose.COUNTING
  site_fn = lambda shared, state, site: (shared, state)

  def form(placement):
    summed = summation.masked(SECURE)
    return federated.over_sites(site_fn, summed, placement, purpose)(COUNTS, 0, sites)

  return boundary.audit(form, public=public)


def shared(patch: Patch) -> None:
  with_send(patch, lambda counts, row, sent: (sent, counts))


# ---- what no list has


def _beside(patch: Patch, tell) -> None:
  with_send(patch, lambda m, row, sent: (tell(m.metrics.loss), sent)[1])


def foreign_code(patch: Patch) -> None:
  shape = jax.ShapeDtypeStruct((), np.float32)
  _beside(patch, jax.ffi.ffi_call("primia_elsewhere", shape, has_side_effect=True))


def foreign_code_that_denies_an_effect(patch: Patch) -> None:
  _beside(patch, jax.ffi.ffi_call("elsewhere", jax.ShapeDtypeStruct((), np.float32)))


def unlisted_effect(patch: Patch) -> None:
  primitive = jax.extend.core.Primitive("calling_home")
  primitive.def_effectful_abstract_eval(lambda x: (x, {"home"}))
  _beside(patch, primitive.bind)
