"""README and docs: their examples run and reuse no key; the commands and files they name exist."""

import contextlib
import copy
import functools
import io
import pathlib
import re

import jax
import numpy as np
import pytest

from primia_jax import federated, prng
from primia_jax.secagg import simulation

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
SERVICE = (ROOT / "docs" / "service.md").read_text()
TRAINING, PRIVATE, ENCRYPTED, APART = re.findall(
  r"```python\n(.*?)```", README + SERVICE, re.DOTALL
)


def privately():
  """The first example with the private one's two lines in place of its recipe."""
  lines = TRAINING.splitlines()
  (place,) = [i for i, line in enumerate(lines) if line.startswith("recipe = ")]
  lines[place : place + 1] = PRIVATE.strip().splitlines()
  return "\n".join(lines)


def run(code, names=None):
  """Runs an example; returns what it prints and its names."""
  names, out = {} if names is None else names, io.StringIO()
  # A reader has JAX's default promotion, which optax.adam needs.
  with contextlib.redirect_stdout(out), jax.numpy_dtype_promotion("standard"):
    exec(compile(code, "README.md", "exec"), names)
  return out.getvalue(), names


@functools.cache
def first_run(code):
  with recording() as seen:
    printed, names = run(code)
  return printed, names, seen


@contextlib.contextmanager
def recording():
  """Records (what, key, purpose, round) of each key that masks a message or makes noise."""
  seen, begin, fresh, key_of = [], simulation.begin, federated.fresh_secrets, prng.key_of

  def begin_recorded(config, words, *args, **kwargs):
    begun = begin(config, words, *args, **kwargs)
    pairs = {np.asarray(key).tobytes() for key in begun.rows.keys.reshape(-1, 8)}
    noises = [np.asarray(key).tobytes() for key in begun.rows.noise]
    seen.extend(("mask", key, *map(int, words[::-1])) for key in [*pairs, *noises])
    return begun

  def fresh_recorded(round, purpose, ids):
    secrets = fresh(round, purpose, ids)
    seen.extend(("noise", secret.tobytes(), int(purpose), round) for secret in secrets)
    return secrets

  def key_recorded(secret):
    key = key_of(secret)
    seen.append(("dealt", np.asarray(key).tobytes(), 0, 0))
    return key

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(simulation, "begin", begin_recorded)
    patch.setattr(prng, "key_of", key_recorded)
    patch.setattr(federated, "fresh_secrets", fresh_recorded)
    patch.setattr(federated.Sites, "__new__", _with_default(federated.Sites, fresh_recorded))
    yield seen


def _with_default(kind, secrets):
  """Makes the sites of an example draw their secrets where they are recorded."""
  made = kind.__new__
  return lambda cls, *args, **kwargs: made(cls, *args, **({"secrets": secrets} | kwargs))


def test_the_examples_are_short():
  lines = [line for line in TRAINING.splitlines() if line.strip()]
  assert len(lines) <= 12
  assert len(PRIVATE.strip().splitlines()) == 2
  assert len(privately().splitlines()) == len(TRAINING.splitlines()) + 1


def test_the_first_example_runs_and_learns():
  losses = [float(x) for x in re.findall(r"loss ([\d.]+)", first_run(TRAINING)[0])]
  assert len(losses) == 3
  assert losses[-1] < losses[0]


def test_the_private_example_keeps_its_budget():
  _, names, _ = first_run(privately())
  assert int(names["state"].round) == 3
  assert 5.9 < names["privacy"].epsilon(rounds=3) <= 6.0
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(names["state"].params))


@pytest.mark.parametrize("code", [TRAINING, privately()], ids=["plain", "private"])
def test_no_key_serves_twice_in_an_example_or_a_restart(code):
  """An example that is run again, stepped twice from one state, or copied draws other keys."""
  _, names, seen = first_run(code)
  seen = list(seen)
  with recording() as more:
    state, sites = names["run"].init(*names["model"].init(names["key"])), names["hospitals"]
    sites = sites._replace(secrets=federated.fresh_secrets)
    with jax.numpy_dtype_promotion("standard"):
      for start in (state, state, copy.deepcopy(state)):  # round 0, as the example began
        names["run"].step(names["key"], start, sites)
  seen += more
  masks, noises = ([row for row in seen if row[0] == what] for what in ("mask", "noise"))
  assert len(masks) == 6 * (3 + 3)  # six sums: a key for each pair of sites, one for each noise
  assert len(noises) == 6 * 3
  assert len({row[1] for row in seen}) == len(seen)  # not even for another purpose or round


def test_the_encrypted_examples_agree_with_the_function_and_reuse_no_key():
  (printed, names, seen), again = first_run(ENCRYPTED), recording()
  with again as more:
    apart, _ = run(APART, dict(names))
  number = r"\d\.\d+(?:e-\d+)?"
  private, encrypted, plain = (
    [float(x) for x in re.findall(number, row)]
    for row in re.findall(r"\[\s*\d.*?\]", printed + apart)
  )
  wanted = names["apply"](names["weights"], names["images"][0])
  np.testing.assert_allclose(private, wanted, atol=0.02)
  np.testing.assert_allclose(encrypted, plain, atol=0.02)
  assert float(re.findall(number, printed)[-1]) < 0.02  # the error that `check` found
  keys = [row[1] for row in [*seen, *more]]
  assert len(keys) == (1 + 2 * 2) + (1 + 2)  # of B, and two for each inference
  assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("text", DOCS)
def test_named_commands_and_files_exist(text):
  for module in re.findall(r"(experiments\.\w+|benchmarks\.\w+)", text):
    place = ROOT / module.replace(".", "/")
    assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module
  for target in re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
  for path in re.findall(r"\]\(([\w/]+\.\w+)\)|--flagfile=(\S+?)[`\s]", text):
    assert (ROOT / next(filter(None, path))).is_file(), path
  for module in re.findall(r"^  (\w+(?:\.py|/)) ", text, re.MULTILINE):
    assert (ROOT / "primia_jax" / module).exists(), module
