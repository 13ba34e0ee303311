"""The axis "site": one function of one site, run over all by a loop, scan, vmap, chunks or a mesh,
or each apart.

A trust boundary runs between sites. `sum_over_sites` is the only way out of a site: what a site
function returns first is summed over sites, and on a mesh that sum (`psum`) is all that crosses
devices or processes. Automatic sharding is never used across the boundary, since XLA is free to
gather every site's inputs. Apart, each site has a process that holds its row and no other; what
crosses then is the business of an `Exchange`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from primia_jax.types import PyTree

AXIS = "site"
# (shared, site) -> (to be summed over sites, to be stacked over sites)
SiteFn = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class Exchange(Protocol):
  """How processes that know nothing of each other but messages form sums, such as
  `secagg.exchange.Exchange`.

  Attributes:
    sites: numbers of the sites that are in the last sum, or, before the first, that are to be in
      it.
  """

  sites: tuple[int, ...]

  def begin(self, shapes: PyTree, terms: Any) -> Any:
    """Joins the others for a sum of ring elements of these shapes, before this process works out
    its own.
    """

  def finish(self, begun: Any, elements: PyTree) -> PyTree:
    """Gives this process's ring elements to the sum that it has begun, and returns the sum."""

  def close(self) -> None:
    """Leaves the others."""


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where the site axis runs.

  Attributes:
    how: `loop` (Python, one jitted call a site), `scan`, `vmap`, `chunk` (a scan over chunks of
      vmapped sites) or `mesh` (`shard_map` over devices, with a scan or vmap inside each), or
      `apart` (each site in a process that has its own row only).
    chunk: sites in a chunk, for `chunk`.
    mesh: a mesh with the one axis "site", for `mesh`; None takes all devices (of all processes).
    inner: what a mesh does with the several sites of a device.
    index: apart: the row of this process's site.
    exchange: apart: what sums over the processes.
  """

  how: Literal["loop", "scan", "vmap", "chunk", "mesh", "apart"] = "scan"
  chunk: int = 1
  mesh: Mesh | None = None
  inner: Literal["scan", "vmap"] = "scan"
  index: int = 0
  exchange: Exchange | None = None

  def __post_init__(self):
    if self.how not in ("loop", "scan", "vmap", "chunk", "mesh", "apart"):
      raise ValueError(
        f"unknown placement {self.how!r}; use loop, scan, vmap, chunk=C, mesh or apart"
      )
    if (self.how == "apart") != (self.exchange is not None):
      raise ValueError(
        f"placement {self.how!r} with exchange={self.exchange}; sites apart need one, and no "
        f"others do"
      )
    if self.chunk < 1:
      raise ValueError(f"chunk={self.chunk} must be at least 1")


def parse_placement(text: str) -> Placement:
  """Reads `loop`, `scan`, `vmap`, `chunk=C`, `mesh` or `auto` (the fastest on this backend).

  >>> parse_placement("chunk=8").chunk
  8
  """
  how, _, argument = text.partition("=")
  if how == "chunk":
    if not argument.isdigit() or int(argument) < 1:
      raise ValueError(
        f"placement {text!r}: write chunk=C with the number of sites in a chunk, such as chunk=8"
      )
    return Placement("chunk", chunk=int(argument))
  if argument or how not in ("auto", "loop", "scan", "vmap", "mesh"):
    raise ValueError(
      f"unknown placement {text!r}; use auto, loop, scan, vmap, chunk=C or mesh, and binaries also "
      f"processes"
    )
  if how == "auto":
    return default_placement()
  return mesh_placement() if how == "mesh" else Placement(how)  # type: ignore[arg-type]


def default_placement() -> Placement:
  """The fastest placement here: a mesh where there are several devices, else a scan on CPU and vmap
  on accelerators.
  """
  if jax.device_count() > 1:
    return mesh_placement()
  return Placement("scan" if jax.default_backend() == "cpu" else "vmap")


def mesh_placement(devices: Any = None) -> Placement:
  """A mesh over `devices` (default: all, of all processes)."""
  devices = np.asarray(jax.devices() if devices is None else devices)
  inner: Literal["scan", "vmap"] = "scan" if devices[0].platform == "cpu" else "vmap"
  return Placement("mesh", mesh=Mesh(devices, (AXIS,)), inner=inner)


def sum_over_sites(
  site_fn: SiteFn, placement: Placement
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
  """Lifts a function of one site to all sites.

  Args:
    site_fn: (shared, site) -> (summed, stacked). Integers are summed with wrap-around in their own
      dtype, so that sums in Z_2^k agree bit for bit under every placement.
    placement: where the site axis runs.

  Returns:
    (shared, sites) -> (sum over sites of `summed`, `stacked` with a leading site axis), where every
    leaf of `sites` has a leading axis [K]. On a mesh each device sees the rows of its own sites
    only; the sum is replicated, the stacked values stay where their site is (but where K is no
    multiple of the devices, which one process may simulate, they are gathered, since arrays cannot
    be sharded unevenly). Apart, the sum is over this process's row alone: for the `Exchange`, and
    for nobody else.
  """
  if placement.how == "loop":
    return _loop(site_fn)
  if placement.how == "mesh":
    return jax.jit(_mesh(site_fn, placement))
  if placement.how == "vmap":
    return jax.jit(functools.partial(_vmap, site_fn))
  if placement.how == "chunk":
    return jax.jit(functools.partial(_chunk, site_fn, placement.chunk))
  return jax.jit(functools.partial(_scan, site_fn))


def put(tree: PyTree, placement: Placement) -> PyTree:
  """Places host arrays [K, ...] (in a mesh of several processes: this process's rows) where their
  sites run.
  """
  if placement.how != "mesh":
    return jax.tree.map(jnp.asarray, tree)
  sharding = NamedSharding(_mesh_of(placement), PartitionSpec(AXIS))
  if jax.process_count() > 1:
    is_placed = lambda a: isinstance(a, jax.Array) and not a.is_fully_addressable
    place = lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a))
    return jax.tree.map(lambda a: a if is_placed(a) else place(a), tree)
  num_devices = _mesh_of(placement).size
  divides = lambda a: (
    a.shape[0] % num_devices == 0
  )  # shards must be equal; the padding of `_mesh` comes later
  return jax.tree.map(lambda a: jax.device_put(a, sharding) if divides(a) else jnp.asarray(a), tree)


def local_rows(tree: PyTree, placement: Placement) -> PyTree:
  """Returns the rows [K, ...] of the sites that this process runs: all, but apart or in a mesh of
  several processes.

  Raises:
    ValueError: where the sites of a round cannot be dealt out evenly to the processes' devices.
  """
  if placement.how == "apart":
    return jax.tree.map(lambda a: np.asarray(a)[placement.index : placement.index + 1], tree)
  if placement.how != "mesh" or jax.process_count() == 1:
    return tree
  mesh = _mesh_of(placement)
  num_sites = jax.tree.leaves(tree)[0].shape[0]
  if num_sites % mesh.size:
    raise ValueError(
      f"{num_sites} sites in a round on {mesh.size} devices; every device must have equally many"
    )
  mine = [
    i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()
  ]
  each = num_sites // mesh.size
  rows = np.concatenate([np.arange(i * each, (i + 1) * each) for i in mine])
  return jax.tree.map(lambda a: np.asarray(a)[rows], tree)


def replicate(tree: PyTree, placement: Placement) -> PyTree:
  """Places arrays that every site knows, such as the global model."""
  if placement.how != "mesh":
    return jax.tree.map(jnp.asarray, tree)
  sharding = NamedSharding(_mesh_of(placement), PartitionSpec())

  def place(a):
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(place(jax.random.key_data(a)), impl=jax.random.key_impl(a))
    if jax.process_count() == 1 or (isinstance(a, jax.Array) and not a.is_fully_addressable):
      return jax.device_put(a, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(a))

  return jax.tree.map(place, tree)


def _add(a: PyTree, b: PyTree) -> PyTree:
  return jax.tree.map(jnp.add, a, b)


def _sum(tree: PyTree) -> PyTree:
  if (
    jax.default_backend() == "cpu"
  ):  # whose reduction over a leading axis is up to 100 times slower than adding rows
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), tree)
    return jax.lax.scan(lambda total, row: (_add(total, row), None), zeros, tree)[0]
  return jax.tree.map(lambda a: jnp.sum(a, axis=0, dtype=a.dtype), tree)


def _zeros(site_fn: SiteFn, shared: PyTree, sites: PyTree) -> tuple[PyTree, PyTree]:
  one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), sites)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(site_fn, shared, one))


def _loop(site_fn: SiteFn) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
  @functools.partial(jax.jit, donate_argnums=0)
  def step(total: PyTree, shared: PyTree, sites: PyTree, i: jax.Array) -> tuple[PyTree, PyTree]:
    summed, stacked = site_fn(shared, jax.tree.map(lambda a: a[i], sites))
    return _add(total, summed), stacked

  zeros = jax.jit(lambda shared, sites: _zeros(site_fn, shared, sites)[0])

  def run(shared: PyTree, sites: PyTree) -> tuple[PyTree, PyTree]:
    sites = jax.tree.map(jnp.asarray, sites)  # once, and not at every site
    total, stacked = zeros(shared, sites), []
    for i in range(jax.tree.leaves(sites)[0].shape[0]):
      total, kept = step(total, shared, sites, np.int32(i))
      stacked.append(kept)
    return total, jax.tree.map(lambda *rows: jnp.stack(rows), *stacked)

  return run


def _vmap(site_fn: SiteFn, shared: PyTree, sites: PyTree) -> tuple[PyTree, PyTree]:
  summed, stacked = jax.vmap(site_fn, in_axes=(None, 0))(shared, sites)
  return _sum(summed), stacked


def _scan(site_fn: SiteFn, shared: PyTree, sites: PyTree) -> tuple[PyTree, PyTree]:
  def body(total: PyTree, site: PyTree) -> tuple[PyTree, PyTree]:
    summed, stacked = site_fn(shared, site)
    return _add(total, summed), stacked

  return jax.lax.scan(body, _zeros(site_fn, shared, sites)[0], sites)


def _chunk(site_fn: SiteFn, size: int, shared: PyTree, sites: PyTree) -> tuple[PyTree, PyTree]:
  num_sites = jax.tree.leaves(sites)[0].shape[0]
  whole = num_sites // size * size
  parts = []
  if whole:
    chunks = jax.tree.map(lambda a: a[:whole].reshape(whole // size, size, *a.shape[1:]), sites)
    total, stacked = _scan(functools.partial(_vmap, site_fn), shared, chunks)
    parts.append((total, jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), stacked)))
  if whole < num_sites:
    parts.append(_vmap(site_fn, shared, jax.tree.map(lambda a: a[whole:], sites)))
  if len(parts) == 1:
    return parts[0]
  (total, stacked), (rest, kept) = parts
  return _add(total, rest), jax.tree.map(lambda a, b: jnp.concatenate([a, b]), stacked, kept)


def _mesh_of(placement: Placement) -> Mesh:
  mesh = placement.mesh if placement.mesh is not None else mesh_placement().mesh
  assert mesh is not None
  return mesh


def _mesh(
  site_fn: SiteFn, placement: Placement
) -> Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]:
  mesh = _mesh_of(placement)
  inner = _scan if placement.inner == "scan" else _vmap

  def guarded(shared: PyTree, real_and_site: tuple[jax.Array, PyTree]) -> tuple[PyTree, PyTree]:
    real, site = real_and_site
    zeros = _zeros(site_fn, shared, jax.tree.map(lambda a: a[None], site))
    return jax.lax.cond(real, lambda: site_fn(shared, site), lambda: zeros)

  def run(shared: PyTree, sites: PyTree) -> tuple[PyTree, PyTree]:
    num_sites = jax.tree.leaves(sites)[0].shape[0]
    padding = -num_sites % mesh.size
    fn: SiteFn = site_fn
    if padding:  # devices hold equally many sites; the empty ones do nothing and add nothing
      pad = lambda a: jnp.concatenate([a, jnp.zeros((padding, *a.shape[1:]), a.dtype)])
      sites = (jnp.arange(num_sites + padding) < num_sites, jax.tree.map(pad, sites))
      fn = guarded

    def device(shared: PyTree, sites: PyTree) -> tuple[PyTree, PyTree]:
      total, stacked = inner(fn, shared, sites)
      return jax.lax.psum(total, AXIS), stacked

    specs = (PartitionSpec(), PartitionSpec(AXIS))
    total, stacked = jax.shard_map(
      device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False
    )(shared, sites)
    return total, jax.tree.map(lambda a: a[:num_sites], stacked)

  return run
