"""Functions as flat lists of equations: the same results, nothing public left, and where each
equation stands.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from primia_jax.mpc.lowering import program
from primia_jax.mpc.lowering.program import PUBLIC, Ref

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
W = np.random.default_rng(1).standard_normal(3).astype(np.float32)


def flat(fn, args, owners=None):
  """The program, after checking that it computes what fn does."""
  traced = program.trace(fn, args, owners or ["secret"] * len(args))
  env = program.evaluate(traced, jax.tree.leaves(tuple(args)))
  outputs = [env[v.number] if isinstance(v, Ref) else v for v in traced.outputs]
  got = jax.tree.unflatten(traced.out_tree, outputs)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, fn(*args))
  return traced


def names(traced):
  return [equation.name for equation in traced.equations]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_is_unrolled(reverse):
  def fn(x, w):
    step = lambda carry, row: ((carry[0] + row * w, carry[1] * 2.0), (row.sum(), carry[0]))
    return lax.scan(step, (jnp.zeros(3), 1.0), x, reverse=reverse)

  traced = flat(fn, (X, W))
  assert "scan" not in names(traced)
  assert names(traced).count("reduce_sum") == len(X)
  assert jax.tree.structure(fn(X, W)) == traced.out_tree


def test_a_scan_without_anything_scanned_over():
  traced = flat(lambda x: lax.scan(lambda c, _: (c * 2 + 1, None), x, None, length=3), (X,))
  assert names(traced).count("mul") == 3


def test_calls_are_inlined():
  @jax.custom_jvp
  def doubled(x):
    return 2.0 * x

  @jax.custom_vjp
  def tripled(x):
    return 3.0 * x

  doubled.defjvps(lambda tangent, out, x: 2 * tangent)
  tripled.defvjp(lambda x: (tripled(x), None), lambda _, g: (3 * g,))
  fn = lambda x: jax.jit(lambda y: jax.checkpoint(doubled)(tripled(y)) + 1)(x)
  assert names(flat(fn, (X,))) == ["mul", "mul", "add"]


@pytest.mark.parametrize(("public", "name"), [(1.0, "sin"), (-1.0, "cos")])
def test_a_condition_on_a_public_value_leaves_one_branch(public, name):
  fn = lambda x, p: lax.cond(p > 0, jnp.sin, jnp.cos, x)
  assert names(flat(fn, (X, np.float32(public)), ["secret", PUBLIC])) == [name]


def test_a_switch_takes_its_branch():
  fn = lambda x, i: lax.switch(i, [jnp.sin, jnp.cos, jnp.tanh], x)
  for i, name in enumerate(["sin", "cos", "tanh", "tanh"]):  # beyond the last is the last
    assert names(flat(fn, (X, np.int32(i)), ["secret", PUBLIC])) == [name]


def test_loops_on_public_conditions_are_unrolled():
  """A counter, a public bound, and a public number decide; what is carried along is secret."""

  def fn(x, n):
    doubled = lax.fori_loop(0, n, lambda i, v: v * 2.0, x)
    count, total = lax.while_loop(
      lambda c: c[0] * c[0] < 10,
      lambda c: (c[0] + 1, c[1] + jnp.asarray(x)[c[0]]),
      (0, jnp.zeros(3)),
    )
    chosen = lax.fori_loop(0, 3, lambda i, v: lax.cond(i == 1, jnp.sin, jnp.cos, v), doubled)
    return chosen, count, total

  traced = flat(fn, (X, np.int32(3)), ["secret", PUBLIC])
  found = names(traced)
  assert found.count("mul") == 3
  assert [name for name in found if name in ("sin", "cos")] == ["cos", "sin", "cos"]
  assert not isinstance(traced.outputs[1], Ref)
  assert int(traced.outputs[1]) == 4


def test_a_carry_that_starts_public_and_a_public_sequence():
  def fn(x):
    step = lambda carry, row: ((carry[0] + row * x, carry[1] + 1), (carry[0], carry[1]))
    return lax.scan(step, (jnp.zeros((4, 3)), 0), np.arange(5, dtype=np.float32))

  traced = flat(fn, (X,))
  assert [isinstance(v, Ref) for v in traced.outputs] == [True, False, True, False]


def test_an_empty_scan():
  flat(lambda x: lax.scan(lambda c, _: (c * 2, c), x, None, length=0), (X,))


def test_what_no_output_needs_is_left_out():
  assert names(flat(lambda x: (jnp.sort(x), jnp.sin(x))[1], (X,))) == ["sin"]


def test_reductions_are_no_calls():
  """Their jaxpr is that of two elements."""
  traced = flat(lambda x: lax.reduce(x, np.float32(1), lambda a, b: a * b, (1,)), (X,))
  assert names(traced) in (["reduce"], ["reduce_prod"])


def test_keys_and_counters_are_values_like_others():
  state = {"key": jax.random.key(0), "raw": jax.random.PRNGKey(1), "count": np.uint32(3)}

  def fn(state, x):
    bits = jax.random.key_data(state["key"])[0] + state["raw"][1] + state["count"]
    return x * (bits % np.uint32(8)).astype(np.float32)

  traced = flat(fn, (state, X))
  assert np.all(np.isfinite(program.measurer(traced)(jax.tree.leaves((state, X)))))


def test_magnitudes():
  fn = lambda x, w: (
    jnp.pad(x, 1, constant_values=-jnp.inf).max(1),
    x * w,
    x[:, :0],
    lax.complex(x, x),
  )
  traced = program.trace(fn, (X, W[None]), ["secret"] * 2)
  largest = program.measurer(traced)([X, W[None]])
  assert len(largest) == traced.num_values
  of = lambda v: np.abs(v).max()
  np.testing.assert_allclose(largest[traced.outputs[1].number], of(X * W), rtol=1e-6)
  np.testing.assert_allclose(largest[traced.outputs[3].number], of(X + 1j * X), rtol=1e-6)
  assert largest[traced.outputs[2].number] == 0
  assert largest[0] == of(X)
  assert largest.max() < 10
  assert np.isnan(program.measurer(traced)([X * np.nan, W[None]])[0])


def test_a_long_unrolled_program_is_measured_equation_by_equation():
  fn = lambda x, w: lax.fori_loop(0, 9, lambda i, v: jnp.tanh(v * w + x), x)
  traced = program.trace(fn, (X, W[None]), ["secret"] * 2)
  assert not program.runs_as_one(traced)
  whole = jax.jit(functools.partial(program.evaluate, traced))([X, W[None]])
  largest = program.measurer(traced)([X, W[None]])
  assert {*np.flatnonzero(largest)} == {*whole}
  of = [program.magnitude(whole[i]) for i in sorted(whole)]
  np.testing.assert_allclose(largest[sorted(whole)], of, rtol=1e-6)


def test_what_is_public_is_computed_on_the_spot():
  def fn(x, p):
    p = lax.while_loop(lambda v: v.sum() < 100, lambda v: 2 * v, jnp.abs(p))
    return x + p[None], jnp.sin(p), 7.0

  traced = flat(fn, (X, W), ["secret", PUBLIC])
  assert names(traced) == ["add"]
  assert [isinstance(v, Ref) for v in traced.outputs] == [True, False, False]
  assert isinstance(traced.inputs[0], Ref)
  np.testing.assert_array_equal(traced.inputs[1], W)


def test_what_is_public_stays_an_array_inside_jit():
  programs = []

  @jax.jit
  def fn(x):
    inner = lambda x, p: lax.scan(lambda c, row: (c * jnp.sin(p) + row, jnp.cos(p)), x[0], x)
    programs.append(program.trace(inner, (x, W), ["secret", PUBLIC]))
    return x

  fn(X)
  public = [v for e in programs[0].equations for v in e.inputs if not isinstance(v, Ref)]
  assert len(public) >= len(X)
  assert not any(isinstance(v, jax.core.Tracer) for v in public)


def test_evaluate_gives_what_follows_from_what_is_given():
  traced = program.trace(lambda x, w: (x * 2, w + 1, (x * 2) @ w), (X, W), ["secret"] * 2)
  env = program.evaluate(traced, [X, None])
  doubled, plus, product = (v.number for v in traced.outputs)
  np.testing.assert_array_equal(env[doubled], X * 2)
  assert not {plus, product} & set(env)
  assert set(program.evaluate(traced, [X, W])) == set(range(traced.num_values))


def test_each_equation_knows_its_line_and_scope():
  def fn(x):
    with jax.named_scope("outer"):
      y = jnp.sin(x)
      with jax.named_scope("inner"):
        y = jax.jit(jnp.cos)(y)
    return jnp.tanh(y)

  first = inspect.getsourcelines(fn)[1]
  assert [(e.name, e.layer, e.source) for e in program.trace(fn, (X,), ["secret"]).equations] == [
    ("sin", "outer", f"mpc_program_test.py:{first + 2}"),
    ("cos", "outer/inner", f"mpc_program_test.py:{first + 4}"),
    ("tanh", "(top)", f"mpc_program_test.py:{first + 5}"),
  ]


def test_shapes_and_dtypes_of_what_goes_in_and_out():
  traced = flat(
    lambda tree: {"most": tree["x"].argmax(1), "bits": tree["x"] > 0}, ({"x": X, "w": W},)
  )
  assert [(v.shape, v.dtype) for v in traced.avals] == [((3,), np.float32), ((4, 3), np.float32)]
  assert [np.dtype(d) for d in traced.out_dtypes] == [np.dtype(bool), np.dtype(np.int32)]
  assert all(len(e.outputs) == len(e.avals) for e in traced.equations)


@pytest.mark.parametrize(
  ("fn", "reason"),
  [
    (
      lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
      r"cond on a secret value at mpc_program_test.py:\d+",
    ),
    (
      lambda x: lax.while_loop(lambda v: v.sum() > 0, lambda v: v - 1, x),
      r"while loop on a secret condition at mpc_program_test.py:\d+",
    ),
  ],
)
def test_control_flow_on_secrets_is_refused(fn, reason):
  with pytest.raises(NotImplementedError, match=reason):
    program.trace(fn, (X,), ["secret"])


def test_bad_arguments_are_refused():
  with pytest.raises(ValueError, match="1 owners for 2 arguments"):
    program.trace(lambda x, w: x @ w, (X, W), ["secret"])
  with pytest.raises(ValueError, match="public argument has only a shape"):
    program.trace(
      lambda x, w: x @ w, (X, jax.ShapeDtypeStruct(W.shape, W.dtype)), ["secret", PUBLIC]
    )


def test_a_public_argument_is_a_constant_while_tracing():
  """Python may branch on it, and loop as often as it says."""

  def fn(x, power, flip):
    for _ in range(int(power) - 1):
      x = x * 2
    return -x if flip else x

  args = (np.ones(2, np.float32), np.int32(3), np.bool_(True))
  program = flat(fn, args, ["secret", PUBLIC, PUBLIC])
  assert [e.name for e in program.equations] == ["mul", "mul", "neg"]
