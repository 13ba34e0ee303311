"""A program as plain data: JSON and arrays, without pickle and without code.

Equations are named by their primitive and bound to this JAX's primitive of that name when they are
read. What has no plain form, such as a function among the parameters, is refused by name.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from primia_jax.mpc.lowering.program import Equation, Program, Ref

_PRIMITIVES = {
  p.name: p
  for p in [*vars(lax).values(), *vars(primitives).values()]
  if isinstance(p, core.Primitive)
}
_NAMED = {
  kind.__name__: kind
  for kind in (
    lax.ConvDimensionNumbers,
    lax.GatherDimensionNumbers,
    lax.ScatterDimensionNumbers,
    lax.GatherScatterMode,
    lax.Precision,
    lax.FftType,
    lax.RoundingMethod,
    lax.RandomAlgorithm,
  )
}
# These say where XLA puts a value or how it accumulates it; a program has neither.
UNUSED = {"sharding", "out_sharding", "accuracy", "precision", "mesh"}


class Writer:
  """Collects the arrays of what it writes.

  Attributes:
    arrays: in the order of their numbers.
    strict: refuse what has no plain form; else its type stands for it, which does for a digest.
  """

  def __init__(self, strict: bool = True):
    self.arrays: list[np.ndarray] = []
    self.strict = strict

  def program(self, program: Program, sources: bool = True) -> dict[str, Any]:
    """A program as JSON.

    Args:
      program: any.
      sources: also write where each equation stands in its owner's code.

    Raises:
      ValueError: a parameter or the structure of the outputs has no plain form.
    """
    return {
      "inputs": [self.value(v) for v in program.inputs],
      "avals": [self._aval(v) for v in program.avals],
      "equations": [self._equation(e, sources) for e in program.equations],
      "outputs": [self.value(v) for v in program.outputs],
      "tree": self._tree(program.out_tree),
      "dtypes": [np.dtype(v).name for v in program.out_dtypes],
    }

  def _equation(self, e: Equation, sources: bool) -> list[Any]:
    try:
      params = self._params(e.params)
    except TypeError as error:
      raise ValueError(
        f"{e.name} at {e.source} cannot be written to a file: {error}; plan again where it is used"
      ) from None
    if self.strict and e.name not in _PRIMITIVES:
      raise ValueError(f"{e.name} at {e.source} is not a primitive of JAX and cannot be written")
    avals = [self._aval(v) for v in e.avals]
    where = e.source if sources else ""
    inputs = [self.value(v) for v in e.inputs]
    return [e.name, params, inputs, [v.number for v in e.outputs], avals, e.layer, where]

  def _params(self, params: dict[str, Any]) -> dict[str, Any]:
    return {k: None if k in UNUSED else self.value(v) for k, v in sorted(params.items())}

  def value(self, v: Any) -> Any:
    """A parameter or an input of an equation."""
    match v:
      case Ref():
        return {"ref": v.number}
      case None | bool() | str():
        return v
      case int():
        return int(v)
      case float():
        return {"float": v.hex()}
      case np.dtype():
        return {"dtype": v.name}
      case enum.Enum() if type(v).__name__ in _NAMED:
        return {"enum": type(v).__name__, "name": v.name}
      case np.ndarray() | np.generic() | jax.Array():
        self.arrays.append(np.asarray(v))
        return {"array": len(self.arrays) - 1}
      case core.ClosedJaxpr():
        return self._jaxpr(v)
      case core.Jaxpr():
        return {"open": self._jaxpr(core.ClosedJaxpr(v, ()))}
      case _ if type(v).__name__ in _NAMED:
        fields = _fields(v)
        return {"named": type(v).__name__, "fields": {k: self.value(x) for k, x in fields.items()}}
      case tuple() | list() if type(v) in (tuple, list):
        return {type(v).__name__: [self.value(x) for x in v]}
    if self.strict:
      raise TypeError(f"a {type(v).__name__} has no plain form")
    return {"opaque": type(v).__name__}

  def _jaxpr(self, closed: core.ClosedJaxpr) -> dict[str, Any]:
    """A computation among the parameters, such as the sum of a scatter."""
    numbers = {v: i for i, v in enumerate([*closed.jaxpr.constvars, *closed.jaxpr.invars])}
    atom = lambda v: self.value(np.asarray(v.val)) if isinstance(v, core.Literal) else numbers[v]
    steps = []
    for e in closed.jaxpr.eqns:
      numbers |= {v: len(numbers) + i for i, v in enumerate(e.outvars)}
      steps.append(
        [e.primitive.name, self._params(e.params), [atom(v) for v in e.invars], len(e.outvars)]
      )
    return {
      "steps": steps,
      "consts": [self.value(np.asarray(v)) for v in closed.consts],
      "avals": [self._aval(v.aval) for v in closed.jaxpr.invars],
      "outputs": [atom(v) for v in closed.jaxpr.outvars],
    }

  def _aval(self, v: Any) -> list[Any]:
    name = str(v.dtype) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.extended) else v.dtype.name
    return [list(v.shape), name]

  def _tree(self, tree: Any) -> Any:
    return self._structure(jax.tree.unflatten(tree, [_Leaf(i) for i in range(tree.num_leaves)]))

  def _structure(self, v: Any) -> Any:
    if isinstance(v, _Leaf):
      return v.number
    if type(v) in (tuple, list):
      return {type(v).__name__: [self._structure(x) for x in v]}
    if type(v) is dict and all(isinstance(k, str) for k in v):
      return {"dict": {k: self._structure(x) for k, x in v.items()}}
    if v is None:
      return None
    if self.strict:
      raise ValueError(
        f"outputs in a {type(v).__name__} cannot be written to a file; return arrays in tuples, "
        "lists and dicts with names"
      )
    return {"opaque": type(v).__name__}


@dataclasses.dataclass(frozen=True)
class _Leaf:
  number: int


def _fields(v: Any) -> dict[str, Any]:
  names = getattr(v, "_fields", None) or [f.name for f in dataclasses.fields(v)]
  return {name: getattr(v, name) for name in names}


def read(data: dict[str, Any], arrays: Sequence[np.ndarray]) -> Program:
  """The program that `Writer.program` wrote.

  Raises:
    ValueError: this JAX has no primitive of a name.
  """
  value = lambda v: _value(v, arrays)
  equations = []
  for name, params, inputs, outputs, avals, layer, source in data["equations"]:
    made = {k: value(v) for k, v in params.items()}
    equations.append(
      Equation(
        name,
        _bind(name, made),
        made,
        tuple(map(value, inputs)),
        tuple(map(Ref, outputs)),
        tuple(map(_shaped, avals)),
        layer,
        source,
      )
    )
  return Program(
    tuple(map(value, data["inputs"])),
    tuple(map(_shaped, data["avals"])),
    tuple(equations),
    tuple(map(value, data["outputs"])),
    jax.tree.structure(_built(data["tree"])),
    tuple(map(np.dtype, data["dtypes"])),
  )


def _value(v: Any, arrays: Sequence[np.ndarray]) -> Any:
  match v:
    case {"ref": number}:
      return Ref(number)
    case {"float": text}:
      return float.fromhex(text)
    case {"dtype": name}:
      return np.dtype(name)
    case {"enum": kind, "name": name}:
      return _NAMED[kind][name]  # type: ignore[index]
    case {"array": number}:
      return arrays[number][()]  # a number is a scalar again, which can be a primitive's parameter
    case {"named": kind, "fields": fields}:
      return _NAMED[kind](**{k: _value(x, arrays) for k, x in fields.items()})
    case {"tuple": items}:
      return tuple(_value(x, arrays) for x in items)
    case {"list": items}:
      return [_value(x, arrays) for x in items]
    case {"open": closed}:
      return _traced(closed, arrays).jaxpr
    case {"steps": _}:
      return _traced(v, arrays)
  return v


def _bind(name: str, params: dict[str, Any]) -> Callable[..., list[Any]]:
  if name not in _PRIMITIVES:
    raise ValueError(f"this version of JAX has no primitive {name!r}; plan again with it")
  primitive = _PRIMITIVES[name]

  def bind(*inputs: Any) -> list[Any]:
    out = primitive.bind(*inputs, **params)
    return list(out) if primitive.multiple_results else [out]

  return bind


def _traced(v: dict[str, Any], arrays: Sequence[np.ndarray]) -> core.ClosedJaxpr:
  consts = [_value(x, arrays) for x in v["consts"]]

  def run(*inputs: Any) -> list[Any]:
    env: list[Any] = [*consts, *inputs]
    read_atom = lambda a: env[a] if isinstance(a, int) else _value(a, arrays)
    for name, params, atoms, _ in v["steps"]:
      made = {k: _value(x, arrays) for k, x in params.items()}
      env += _bind(name, made)(*map(read_atom, atoms))
    return [read_atom(a) for a in v["outputs"]]

  return jax.make_jaxpr(run)(*map(_shaped, v["avals"]))


def _shaped(v: list[Any]) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(tuple(v[0]), np.dtype(v[1]))


def _built(v: Any) -> Any:
  match v:
    case {"tuple": items}:
      return tuple(map(_built, items))
    case {"list": items}:
      return list(map(_built, items))
    case {"dict": items}:
      return {k: _built(x) for k, x in items.items()}
  return v
