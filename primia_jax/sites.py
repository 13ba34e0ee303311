"""The axis "site": one function of one site, run over all sites by a loop, scan, vmap or mesh.

A trust boundary runs between sites. `Placement.sum_over_sites` is the only way out of a site: it
sums a site function's first output over sites, and on a mesh that sum (`psum`) is all that
crosses devices or processes. Automatic sharding never runs across the boundary, because XLA may
gather every site's inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from primia_jax.types import PyTree

AXIS = "site"
# (shared, site) -> (to be summed over sites, to be stacked over sites)
SiteFn = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
Run = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]


class Placement(NamedTuple):
  """Where the site axis runs.

  Attributes:
    name: as users write it.
    sum_over_sites: lifts a `SiteFn` to (shared, sites) -> (sum over sites of `summed`, `stacked`
      with a leading site axis), where every leaf of `sites` has a leading axis [K]. Integers are
      summed with wrap-around in their own dtype, so sums in Z_2^k agree bit for bit under every
      placement.
    put: places host arrays [K, ...] where their sites run. A process passes its own rows only.
    replicate: places arrays that every site knows, such as the global model.
    rows: numbers [K] of a round's sites -> the positions, among these, of the sites that this
      process runs.
    is_own_process: each site has a process, and this one runs one site or none.
  """

  name: str
  sum_over_sites: Callable[[SiteFn], Run]
  put: Callable[[PyTree], PyTree]
  replicate: Callable[[PyTree], PyTree]
  rows: Callable[[np.ndarray], np.ndarray]
  is_own_process: bool = False


def loop() -> Placement:
  """A Python loop with one jitted call a site."""
  return _on_one_device("loop", _loop)


def scan() -> Placement:
  """A `lax.scan` over sites: one site's memory, and the fastest form on a CPU."""
  return _on_one_device("scan", lambda site_fn: jax.jit(functools.partial(_scan, site_fn)))


def vmapped() -> Placement:
  """All sites side by side: the fastest form on an accelerator that holds them all."""
  return _on_one_device("vmap", lambda site_fn: jax.jit(functools.partial(_vmap, site_fn)))


def chunked(size: int) -> Placement:
  """A scan over chunks of `size` vmapped sites; the last chunk may be smaller.

  Raises:
    ValueError: for a size below 1.
  """
  if size < 1:
    raise ValueError(f"size={size} of a chunk must be at least 1")
  lift = lambda site_fn: jax.jit(functools.partial(_chunk, site_fn, size))
  return _on_one_device(f"chunk={size}", lift)


def on_mesh(mesh: Mesh | None = None, inner: Literal["scan", "vmap"] | None = None) -> Placement:
  """`shard_map` over devices, each of which runs its share of the sites.

  Each device sees the rows of its own sites only. The sum is replicated. Stacked values stay with
  their site. If K is no multiple of the number of devices (possible in one process only), they are
  gathered, since arrays cannot be sharded unevenly.

  Args:
    mesh: with the one axis "site"; None takes all devices of all processes.
    inner: what a device does with its several sites; None scans on a CPU and vmaps elsewhere.

  Raises:
    ValueError: for another axis or inner; and from `rows`, where several processes would run
      unequal numbers of sites.
  """
  mesh = Mesh(np.asarray(jax.devices()), (AXIS,)) if mesh is None else mesh
  if mesh.axis_names != (AXIS,):
    raise ValueError(f"the mesh has the axes {mesh.axis_names}; give it the one axis {AXIS!r}")
  if inner is None:
    inner = "scan" if mesh.devices.flat[0].platform == "cpu" else "vmap"
  if inner not in ("scan", "vmap"):
    raise ValueError(f"inner={inner!r}; use 'scan' or 'vmap'")
  return Placement(
    "mesh",
    lambda site_fn: jax.jit(_mesh(site_fn, mesh, _scan if inner == "scan" else _vmap)),
    functools.partial(_put_on, mesh),
    functools.partial(_replicate_on, mesh),
    functools.partial(_rows_of, mesh),
  )


def own_process(number: int) -> Placement:
  """The placement of a process that runs one site of several, and holds nothing of the others.

  The sum over sites is then this site's own value. Only a summation that talks to the other
  processes (`summation.over`) forms the sum. In a round without this site the process runs nothing.

  Args:
    number: of this process's site.
  """

  def lift(site_fn: SiteFn) -> Run:
    first = lambda sites: jax.tree.map(lambda a: a[0], sites)

    def run(shared: PyTree, sites: PyTree) -> tuple[PyTree, PyTree]:
      summed, stacked = site_fn(shared, first(sites))
      return summed, jax.tree.map(lambda a: a[None], stacked)

    return jax.jit(run)

  rows = lambda ids: np.flatnonzero(np.asarray(ids) == number)
  return _on_one_device("processes", lift)._replace(rows=rows, is_own_process=True)


def fastest() -> Placement:
  """A mesh where there are several devices; else a scan on CPU and vmap on accelerators."""
  if jax.device_count() > 1:
    return on_mesh()
  return scan() if jax.default_backend() == "cpu" else vmapped()


def parse_placement(text: str) -> Placement:
  """Reads `loop`, `scan`, `vmap`, `chunk=C`, `mesh` or `auto` (the fastest here).

  >>> parse_placement("chunk=8").name
  'chunk=8'
  """
  how, _, argument = text.partition("=")
  if how == "chunk":
    if not argument.isdigit() or int(argument) < 1:
      raise ValueError(
        f"placement={text!r}: write chunk=C with the number of sites in a chunk, such as chunk=8"
      )
    return chunked(int(argument))
  made = {"auto": fastest, "loop": loop, "scan": scan, "vmap": vmapped, "mesh": on_mesh}
  if argument or how not in made:
    raise ValueError(
      f"unknown placement={text!r}; use auto, loop, scan, vmap, chunk=C or mesh; binaries also "
      "take flower"
    )
  return made[how]()


def _on_one_device(name: str, lift: Callable[[SiteFn], Run]) -> Placement:
  arrays = lambda tree: jax.tree.map(jnp.asarray, tree)
  return Placement(name, lift, arrays, arrays, lambda ids: np.arange(len(ids)))


def _add(a: PyTree, b: PyTree) -> PyTree:
  return jax.tree.map(jnp.add, a, b)


def _sum(tree: PyTree) -> PyTree:
  if jax.default_backend() == "cpu":
    # A reduction over a leading axis is up to 100 times slower there than adding rows.
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), tree)
    return jax.lax.scan(lambda total, row: (_add(total, row), None), zeros, tree)[0]
  return jax.tree.map(lambda a: jnp.sum(a, axis=0, dtype=a.dtype), tree)


def _zeros(site_fn: SiteFn, shared: PyTree, sites: PyTree) -> tuple[PyTree, PyTree]:
  one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), sites)
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(site_fn, shared, one))


def _loop(site_fn: SiteFn) -> Run:
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


def _mesh(site_fn: SiteFn, mesh: Mesh, inner: Callable) -> Run:
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
    lifted = jax.shard_map(device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    total, stacked = lifted(shared, sites)
    if padding:  # gathered as `_put_on` places such rows, so that the next round fits this program
      everywhere = NamedSharding(mesh, PartitionSpec())
      gather = lambda a: jax.lax.with_sharding_constraint(a[:num_sites], everywhere)
      stacked = jax.tree.map(gather, stacked)
    return total, stacked

  return run


def _put_on(mesh: Mesh, tree: PyTree) -> PyTree:
  sharding = NamedSharding(mesh, PartitionSpec(AXIS))
  if jax.process_count() > 1:
    is_placed = lambda a: isinstance(a, jax.Array) and not a.is_fully_addressable
    place = lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a))
    return jax.tree.map(lambda a: a if is_placed(a) else place(a), tree)
  # Shards must be equal; where they would not be, every device has all rows, and `_mesh` pads.
  divides = lambda a: a.shape[0] % mesh.size == 0
  leaves, structure = jax.tree.flatten(tree)
  placed = iter(jax.device_put([a for a in leaves if divides(a)], sharding))  # in one dispatch
  everywhere = NamedSharding(mesh, PartitionSpec())
  rows = [next(placed) if divides(a) else jax.device_put(a, everywhere) for a in leaves]
  return jax.tree.unflatten(structure, rows)


def _replicate_on(mesh: Mesh, tree: PyTree) -> PyTree:
  sharding = NamedSharding(mesh, PartitionSpec())

  def place(a: Any) -> jax.Array:
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(place(jax.random.key_data(a)), impl=jax.random.key_impl(a))
    if jax.process_count() == 1 or (isinstance(a, jax.Array) and not a.is_fully_addressable):
      return jax.device_put(a, sharding)
    return jax.make_array_from_process_local_data(sharding, np.asarray(a))

  return jax.tree.map(place, tree)


def _rows_of(mesh: Mesh, ids: np.ndarray) -> np.ndarray:
  num_sites = len(ids)
  if jax.process_count() == 1:
    return np.arange(num_sites)
  if num_sites % mesh.size:
    raise ValueError(
      f"{num_sites} sites in a round on {mesh.size} devices; every device must have equally many"
    )
  is_mine = [device.process_index == jax.process_index() for device in mesh.devices.flat]
  return np.flatnonzero(np.repeat(is_mine, num_sites // mesh.size))
