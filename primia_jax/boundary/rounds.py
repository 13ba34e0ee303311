"""What leaves a site in one sum over sites: `federated.over_sites`, traced and not run.

The audit gives `over_sites` a placement that runs nothing. It begins the sum as always, traces the
function of one site with `make_jaxpr`, follows the data and stops. What crosses is what the
summation's `send` returns, and whatever a site's function gives to a collective or to the host.

Secret are the site's data, its state and its keys, and any array of two or more elements that its
function closes over or that is shared by anything but a `Global`, unless the caller declares it
public. Public are what the server sends (`Global`) and, of a `secagg.Row`, the numbers of the site
and its peers. A message is masked if each mask key of the row hides it alone: with P peers, P of
them and the server must collude to open it.

Each site of the sum is followed, with its own numbers and keys. The numbers of round and purpose
are symbols, so the findings hold for any. Where the code chooses by one of these numbers, all
branches count, also those that no followed site or round takes. No two keys of the rows may be
equal.

Not seen: what `begin` and `end` do on the host (their messages are in `boundary.messages`); the
algorithm's `server`, which gets the opened sum only; noise, since noise is no mask; how much a sum
tells; sizes, times and who takes part; the data that a loader gives, such as a padding row that is
a real image; single numbers that a site's function closes over, e.g. a mean that the host computed
from the site's images; other numbers of sites, where a site's number enters keys or signs by
arithmetic; whether a `Global` or what the caller declares is public. Sums between processes
(`summation.over`) are masked on the host and cannot be traced: audit the same coding under
`summation.masked`, whose masks are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from primia_jax import federated, secagg
from primia_jax.boundary import flow, known, report, sources
from primia_jax.boundary.values import PUBLIC, Symbol, Value, Word, mixed, secret
from primia_jax.federated import Algorithm, Sites
from primia_jax.sites import Placement
from primia_jax.summation import Summation
from primia_jax.types import ModelState, Params, PyTree, Site


class _Traced(Exception):
  """Ends a step once its site function is traced."""


def audit(
  run: Callable[[Placement], Any], name: str = "", public: Sequence[Any] = ()
) -> report.Report:
  """Audits the first sum over sites that `run` forms with the placement it is given.

  Args:
    run: placement -> anything; e.g. `lambda placement: federate(..., placement, 3).step(...)`.
      Arrays of sites, model and states may be ShapeDtypeStructs; a `State.round` must be a number.
    name: for the report, whose crossings are those of the first site.
    public: arrays that anybody may know, e.g. of public images. Any other array of two or more
      elements that the site function closes over, and is not given, counts as the site's own.

  Raises:
    ValueError: `run` formed no sum; or whatever `run` raises.
  """
  found: list[report.Report] = []

  def lift(site_fn: Callable) -> Callable:
    def traced(shared: PyTree, inputs: PyTree) -> Any:
      found.append(_follow(site_fn, shared, inputs, name, public))
      raise _Traced

    return traced

  same = lambda tree: tree
  try:
    run(Placement("audit", lift, same, same, lambda ids: np.arange(len(ids))))
  except _Traced:
    return found[0]
  raise ValueError("run formed no sum over sites; let it call `step` or what `over_sites` returns")


def audit_round(
  algorithm: Algorithm,
  summation: Summation,
  params: Params,
  model_state: ModelState,
  site: Site,
  num_sites: int,
  *,
  class_weights: Any = None,
  public: Sequence[Any] = (),
) -> report.Report:
  """Audits a training round of `federate(algorithm, summation, ..., num_sites)`.

  Args:
    algorithm, summation, num_sites: as `federate` takes them.
    params, model_state: of the model; shapes suffice.
    site: one site's data; shapes suffice. `secret` is None, as from a loader.
    class_weights: see `federated.Sites`.
    public: see `audit`.
  """
  shapes = lambda tree: jax.tree.map(
    lambda a: jax.ShapeDtypeStruct((num_sites, *a.shape), a.dtype), tree
  )
  site_state = shapes(jax.eval_shape(algorithm.init_site, params, model_state))
  server_state = jax.eval_shape(algorithm.init_server, params)
  begun: Any = np.int32(0)
  state = federated.State(params, model_state, server_state, site_state, begun)
  sites = Sites(np.arange(num_sites), lambda ids: shapes(site), class_weights)
  key = jax.eval_shape(lambda: jax.random.key(0))
  run = lambda placement: federated.federate(algorithm, summation, placement, num_sites).step(
    key, state, sites
  )
  return audit(run, f"{algorithm.name}, {summation.name}", public)


def _follow(
  site_fn: Callable, shared: PyTree, inputs: PyTree, name: str, public: Sequence[Any]
) -> report.Report:
  own = jax.tree.map(lambda a: _row(a, 0), inputs)
  traced = jax.make_jaxpr(site_fn, return_shape=True)(shared, own)
  first, *others = (
    _at(traced, shared, inputs, name, position, public) for position in range(len(inputs[0].id))
  )
  said = list(first.violations)
  for position, other in enumerate(others, start=1):
    known = {(v.what, v.line) for v in said}
    said += [
      v._replace(what=f"{v.what} (of site {position} of the sum)")
      for v in other.violations
      if (v.what, v.line) not in known
    ]
  return first._replace(violations=(*said, *_equal_keys(inputs[1])))


def _at(
  traced: tuple[Any, Any],
  shared: PyTree,
  inputs: PyTree,
  name: str,
  position: int,
  public: Sequence[Any],
) -> report.Report:
  """What the site at this position sends."""
  (closed, shapes), rows = traced, inputs[1]
  site, row, state = jax.tree.map(lambda a: _row(a, position), inputs)
  names = _key_names(rows, position)
  labels = [
    *_shared_labels(shared, public),
    *_site_labels(site),
    *_row_labels(row, names),
    *_secrets("state", state),
  ]
  walk = flow.start(closed=public)
  outputs = flow.follow(walk, closed, labels)
  summed, stacked = shapes
  # a robust rule takes every site's message as it is, stacked beside the states that stay
  crosses = summed if jax.tree.leaves(summed) else stacked[0]
  paths = [p for p, _ in jax.tree_util.tree_flatten_with_path(crosses)[0]]
  number = int(shared.round) if isinstance(shared, federated.Global) else 0
  sent = [
    report.Sent(f"sent{jax.tree_util.keystr(path)}", value, aval, number)
    for path, value, aval in zip(paths, outputs, closed.out_avals, strict=False)
  ]
  sent += [
    report.Sent(f"{m.how} in the site function", mixed([m.value], m.eqn), m.aval, number, m.eqn)
    for m in walk.met
  ]
  hides = [
    (f"whoever knows all keys but the {key}", lambda stream, key=key: stream.key == (key,))
    for key in _mask_keys(row, names)
  ]
  found = report.judge(name, sent, hides)
  twice = [m for m in walk.met if m.repeats and m.value.parts]
  more = [
    report.Violation(f"{m.how} in the site function", sources.line(m.eqn), "in a loop")
    for m in twice
  ]
  return found._replace(violations=(*found.violations, *more))


# ---- labels of the inputs


def _row(a: Any, position: int) -> Any:
  if isinstance(a, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
  return np.asarray(a)[position]


def _numbers(array: Any) -> Value:
  """Public numbers of the site that is followed."""
  return Value((), known.constant(array), varies=True)


def _symbols(*names: str) -> np.ndarray:
  """Public numbers of the sum that is followed."""
  words = np.empty(len(names), object)
  words[:] = [Symbol(name) for name in names]
  return words


def _shared_labels(shared: PyTree, public: Sequence[Any]) -> list[Value]:
  if not isinstance(shared, federated.Global):
    label = lambda v, hidden: PUBLIC if flow.is_among(v, public) else hidden
    return list(map(label, jax.tree.leaves(shared), _secrets("shared", shared)))
  labels = {field: jax.tree.map(lambda _: PUBLIC, v) for field, v in shared._asdict().items()}
  labels["round"] = Value((), _symbols("round").reshape(()))
  is_label = lambda v: isinstance(v, Value)
  return jax.tree.leaves(federated.Global(**labels), is_leaf=is_label)


def _secrets(name: str, tree: PyTree) -> list[Value]:
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [secret([f"{name}{jax.tree_util.keystr(path)}"]) for path, _ in paths]


def _site_labels(site: Site) -> list[Value]:
  labels = {field: secret([f"site.{field}"]) for field in site._fields}
  labels |= {"id": PUBLIC, "secret": flow.key(("site.secret",))}
  return [labels[field] for field, v in site._asdict().items() if v is not None]


def _row_labels(row: PyTree, names: dict[bytes, str]) -> list[Value]:
  labels: list[Value] = []
  for leaf in jax.tree.leaves(row, is_leaf=_is_row):
    if not _is_row(leaf):  # the numbers of round and purpose, or whether the site counts
      labels.append(Value((), _symbols("round", "purpose")) if np.ndim(leaf) else PUBLIC)
      continue
    labels += [_numbers(leaf.site), _numbers(leaf.peers)]
    labels += [_keys(v, names) for v in (leaf.keys, leaf.self_mask, leaf.noise) if v is not None]
  return labels


def _is_row(v: Any) -> bool:
  return isinstance(v, secagg.Row)


def _keys(array: Any, names: dict[bytes, str]) -> Value:
  array = np.asarray(array, np.uint32)
  words = np.empty((array.size // 8, 8), object)
  for i, one in enumerate(array.reshape(-1, 8)):
    words[i] = [Word((names[one.tobytes()],), w) for w in range(8)]
  return flow.keys(words.reshape(array.shape))


def _key_names(rows: PyTree, position: int) -> dict[bytes, str]:
  """A name for each key of the site's row, the same for equal keys."""
  names: dict[bytes, str] = {}
  for stacked in filter(_is_row, jax.tree.leaves(rows, is_leaf=_is_row)):
    row = jax.tree.map(lambda a: np.asarray(a)[position], stacked)
    if row.self_mask is not None:
      names.setdefault(row.self_mask.tobytes(), "site's own mask key")
    for peer, one in zip(row.peers, row.keys, strict=True):
      names.setdefault(one.tobytes(), f"pair key with site {peer}")
    names.setdefault(row.noise.tobytes(), "key of the site's noise")
  return names


def _mask_keys(row: PyTree, names: dict[bytes, str]) -> list[str]:
  """The keys that must each hide the message."""
  out: list[str] = []
  for one in filter(_is_row, jax.tree.leaves(row, is_leaf=_is_row)):
    pairs = [k for peer, k in zip(one.peers, one.keys, strict=True) if peer != one.site]
    out += [names[k.tobytes()] for k in pairs]
    if one.self_mask is not None:
      out.append(names[one.self_mask.tobytes()])
  return list(dict.fromkeys(out))


def _equal_keys(rows: PyTree) -> list[report.Violation]:
  """Keys of one sum that serve more than once: a pair's is at its two ends, all others at one."""
  ends: dict[bytes, list[frozenset[int]]] = {}
  for row in filter(_is_row, jax.tree.leaves(rows, is_leaf=_is_row)):
    peers, sites = np.asarray(row.peers), np.asarray(row.site)
    for (k, p), peer in np.ndenumerate(peers):
      if peer != sites[k]:
        pair = frozenset((int(sites[k]), int(peer)))
        ends.setdefault(np.asarray(row.keys)[k, p].tobytes(), []).append(pair)
    for alone in (row.self_mask, row.noise):
      for k, one in enumerate(() if alone is None else np.asarray(alone)):
        ends.setdefault(one.tobytes(), []).append(frozenset((int(sites[k]),)))
  why = "one key serves {}"
  return [
    report.Violation("the sum's keys", "", why.format(", ".join(map(str, map(sorted, of)))))
    for of in ends.values()
    if len(of) > (2 if len(of[0]) == 2 else 1) or len(set(of)) > 1
  ]
