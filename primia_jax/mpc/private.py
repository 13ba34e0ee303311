"""`secret`: a function of a model and an image becomes one whose inputs nobody else sees."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.mpc import clear, constants, fitting, inference, planning, roles
from primia_jax.mpc.circuit import Config
from primia_jax.mpc.clear import Checked
from primia_jax.mpc.planning import PUBLIC, Plan
from primia_jax.types import Array, PyTree

_TARGET_ERROR = 1e-3


class Private:
  """A planned function with its weights; all three roles play in this process.

  Keys are drawn anew for each call. The one who calls sees everything, so this is for research and
  for the model owner's own tests; `model_owner` begins an inference between institutions.

  Attributes:
    plan: what everybody may see.
  """

  def __init__(self, plan: Plan, weights: list[Array]):
    self.plan, self._weights, self._online = plan, weights, roles.online(plan)

  @functools.cached_property
  def _cast(self) -> tuple[roles.Dealer, roles.ModelOwner, roles.DataOwner]:
    model_owner = self.model_owner()
    dealer = roles.Dealer(self.plan, model_owner.tag)
    return dealer, model_owner, roles.DataOwner(self.plan, model_owner.publish(dealer.blind()))

  @functools.cached_property
  def _compare(self) -> Callable[[Sequence[PyTree]], Checked]:
    return clear.comparer(self.plan)

  def __call__(self, *inputs: PyTree) -> PyTree:
    """fn's outputs in float32 for the data owner's arguments, computed under encryption.

    Raises:
      ValueError: an argument has not the planned shape, or a number leaves its planned range.
      TypeError: it is a tracer: masks serve once; `transform` goes through jit and vmap.
    """
    dealer, model_owner, data_owner = self._cast
    first, second = dealer.deal()
    asked, question = data_owner.ask(data_owner.prepare(second), *inputs)
    answered = model_owner.answer(model_owner.prepare(first), question)
    return data_owner.reveal(self._online(answered, asked))

  def check(self, *inputs: PyTree) -> Checked:
    """The encrypted computation's outputs, fn's own, and their largest difference, in the clear.

    Raises:
      ValueError: a value leaves its planned range; the message names the layer and the cure.
    """
    return self._compare((self._weights, *inputs))

  def transform(self, key: Array, *inputs: PyTree) -> PyTree:
    """The same as a traceable function, for `jit` and `vmap`: for simulation only.

    Under jit a key cannot know that it was used; see `inference.transform`.
    """
    return inference.transform(self.plan)(key, self._weights, *inputs)

  def model_owner(self) -> roles.ModelOwner:
    """The model owner of this plan, with the weights; a new publication begins with it."""
    return roles.ModelOwner(self.plan, self._weights)


def secret(
  fn: Callable,
  *args: PyTree,
  examples: Iterable[Any],
  target_error: float | None = None,
  config: Config | None = None,
  owners: Sequence[str] | Mapping[str, str] | None = None,
) -> Private:
  """Prepares fn for encrypted inference: calibrates, chooses the ring, plans, compiles.

  The first example then runs under encryption and is compared with the clear.

  Args:
    fn: a JAX function, an NNX module, an Equinox module or any other callable pytree, or a method
      of one. The arrays of such a module are the model owner's secret, as those of `args` are. All
      that fn holds besides is public, and a warning names its arrays: what it closes over, and what
      an object holds that is no pytree, such as a bound Linen module.
    args: the model owner's arguments (and public ones, see `owners`), in fn's order. Their arrays
      are secret, whatever their dtype. PRNG keys, single whole numbers and truth values (counters,
      switches) and what is no array (functions) are public. An array by which a secret value is
      indexed or shaped must be public: give it as an argument with the owner "public".
    examples: for calibration, from the model owner's own data: what the data owner will give, each
      of the shape that a call takes. A tuple is several arguments; an array is iterated over.
    target_error: largest error of an output, met on the examples with a factor of 1.5 to spare;
      1e-3 unless a config is given.
    config: a ring of one's own; None takes the cheapest that meets the target.
    owners: for each argument, or by its name, "model_owner", "data_owner" or "public" (a constant
      while fn is traced). Default: `args` come first and are the model owner's.

  Raises:
    NotImplementedError: a primitive has no protocol; the message names it, its line and a cure.
    ValueError: no ring reaches the target, a range does not fit the ring, an owner is unknown,
      there are no examples, or nothing is the model owner's.

  >>> import jax, jax.numpy as jnp
  >>> weights, images = jnp.eye(3) / 2, jnp.array([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])
  >>> private = secret(lambda w, x: jax.nn.relu(x @ w), weights, examples=images, target_error=1e-2)
  >>> private(images[0]).tolist()
  [0.5, 0.0, 1.5]
  >>> private.check(images[1]).error < 1e-2
  True
  """
  written = fn
  fn, args, owners = _with_module(fn, args, owners)
  inputs = [jax.tree.map(jnp.asarray, v if isinstance(v, tuple) else (v,)) for v in examples]
  if not inputs:
    raise ValueError("examples is empty; give inputs like those to come, from your own data")
  order = _order(fn, owners, len(args), len(inputs[0]))
  weights, call = _parted(fn, args, order)
  public = [v for v, owner in zip(args, _givers(order), strict=True) if owner == PUBLIC]
  held = constants.held(call, (weights, *inputs[0]), written, public)
  if not weights:
    raise ValueError(_nothing_secret(held))
  constants.warn(held, stacklevel=2)
  owned = ("model_owner", *["data_owner"] * len(inputs[0]))
  each = [(weights, *given) for given in inputs]
  if config is None:
    plan = fitting.fit(call, owned, each, target_error or _TARGET_ERROR)
  else:
    plan = planning.plan(call, owned, each[0], config, planning.calibrate(call, owned, each))
  private = Private(plan, weights)
  _try(private, inputs[0], target_error)
  return private


def _try(private: Private, example: Sequence[PyTree], target_error: float | None) -> None:
  """Compiles by running an example, and compares it."""
  checked, got = private.check(*example), private(*example)
  if target_error is not None and checked.error > target_error:
    raise ValueError(
      f"the error on the first example is {checked.error:.3g}, more than "
      f"target_error={target_error}; use another config, or none to choose one"
    )
  same = all(map(np.array_equal, jax.tree.leaves(got), jax.tree.leaves(checked.outputs)))
  if private.plan.config.exact and not same:
    raise RuntimeError("the protocol differs from its integer model; please report this function")


# ---- what belongs to whom


def _order(fn: Callable, owners: Any, num_args: int, num_inputs: int) -> list[str]:
  """The owner of each argument, in fn's order."""
  if owners is None:
    return ["model_owner"] * num_args + ["data_owner"] * num_inputs
  if isinstance(owners, Mapping):
    names = list(inspect.signature(fn).parameters)
    if wrong := [name for name in owners if name not in names]:
      raise ValueError(f"owners names {wrong}, but the arguments are {names}")
    missing = [name for name in names if name not in owners]
    if missing and len(owners) < num_args + num_inputs:
      raise ValueError(f"owners leaves out {missing}; name the owner of each argument")
    owners = [owners[name] for name in names if name in owners]
  allowed = ("model_owner", "data_owner", PUBLIC)
  if wrong := [owner for owner in owners if owner not in allowed]:
    raise ValueError(f"owners={wrong}; use {', '.join(allowed)}")
  found = owners.count("data_owner")
  if found != num_inputs or len(owners) - found != num_args:
    raise ValueError(
      f"owners has {found} arguments of the data owner and {len(owners) - found} others, but an "
      f"example has {num_inputs} and {num_args} were given"
    )
  return list(owners)


def _parted(
  fn: Callable, args: Sequence[PyTree], order: Sequence[str]
) -> tuple[list[Array], Callable]:
  """The model owner's secret arrays, and fn of (them, *the data owner's arguments)."""
  leaves, tree = jax.tree.flatten(tuple(args))
  pairs = zip(args, _givers(order), strict=True)
  whose = [owner for arg, owner in pairs for _ in jax.tree.leaves(arg)]
  is_secret = [by == "model_owner" and _is_secret(v) for v, by in zip(leaves, whose, strict=True)]
  weights = [jnp.asarray(v) for v, mine in zip(leaves, is_secret, strict=True) if mine]

  def call(weights: list[Array], *inputs: PyTree) -> PyTree:
    own = iter(weights)
    filled = [next(own) if mine else v for v, mine in zip(leaves, is_secret, strict=True)]
    given, theirs = iter(jax.tree.unflatten(tree, filled)), iter(inputs)
    return fn(*(next(theirs if owner == "data_owner" else given) for owner in order))

  return weights, call


def _givers(order: Sequence[str]) -> list[str]:
  """The owners of `args`."""
  return [owner for owner in order if owner != "data_owner"]


def _is_secret(v: Any) -> bool:
  """Whether the model owner keeps a leaf to itself: not if it is static (`secret` says what is)."""
  if not isinstance(v, jax.Array | np.ndarray | np.generic | float | complex):
    return False
  dtype = jnp.result_type(v)
  if jax.dtypes.issubdtype(dtype, jax.dtypes.extended):  # a PRNG key
    return False
  return jnp.issubdtype(dtype, jnp.inexact) or np.ndim(v) > 0


def _nothing_secret(held: Sequence[str]) -> str:
  """Why there is nothing to do for the model owner."""
  if not held:
    return (
      "nothing is the model owner's: the data owner could compute this function alone; give the "
      "weights as an argument, as in secret(module.apply, variables, examples=...)"
    )
  return (
    f"nothing is the model owner's: the function itself holds {', '.join(held)}, which would be "
    "public, part of the plan; give them as an argument, as in secret(module.apply, variables, "
    "examples=...)"
  )


def _with_module(fn: Any, args: tuple, owners: Any) -> tuple[Callable, tuple, Any]:
  """Modules as functions of their arrays: NNX graphs are split, callable pytrees taken apart."""
  nnx: Any = sys.modules.get("flax.nnx")
  is_graph = lambda v: nnx is not None and isinstance(v, nnx.Module)
  is_tree = lambda v: is_graph(v) or jax.tree.leaves(v) != [v]
  is_method = isinstance(fn, types.MethodType) and is_tree(fn.__self__)
  if is_method or is_tree(fn):
    args = (fn.__self__ if is_method else fn, *args)
    fn = fn.__func__ if is_method else lambda module, *rest: module(*rest)
    if owners is not None:
      module = next(iter(inspect.signature(fn).parameters))
      named = isinstance(owners, Mapping)
      owners = {module: "model_owner", **owners} if named else ("model_owner", *owners)
  if not any(map(is_graph, args)):
    return fn, args, owners
  split = [nnx.split(v) if is_graph(v) else (None, v) for v in args]
  graphs = [graph for graph, _ in split]

  @functools.wraps(fn)
  def merged(*given: PyTree) -> PyTree:
    own = zip(graphs, given, strict=False)
    whole = [v if graph is None else nnx.merge(graph, v) for graph, v in own]
    return fn(*whole, *given[len(graphs) :])

  return merged, tuple(state for _, state in split), owners
