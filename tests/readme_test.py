"""The README's promises: its example runs, and the commands and files it names exist."""

import contextlib
import io
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def printed(*numbers):
  """What the last of some examples of the README prints, run one after the other."""
  names: dict = {}
  for number in numbers:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
      exec(compile(code, "README.md", "exec"), names)
  return out.getvalue()


def test_the_quickstart_runs_and_learns():
  losses = [float(x) for x in re.findall(r"loss ([\d.]+)", printed(0))]
  assert len(losses) == 3
  assert losses[-1] < losses[0]


def test_the_private_example_keeps_its_budget():
  (epsilon,) = re.findall(r"epsilon ([\d.]+)", printed(0, 1))
  assert 5.9 < float(epsilon) <= 6.0


def test_the_encrypted_example_agrees_with_the_function():
  numbers = [
    [float(x) for x in re.findall(r"\d\.\d+(?:e-\d+)?", row)]
    for row in re.findall(r"\[\[.*?\]\]", printed(2))
  ]
  one_call, plain, phase_by_phase = numbers
  assert len(plain) == 3
  assert one_call == phase_by_phase
  assert max(abs(a - b) for a, b in zip(one_call, plain, strict=True)) < 0.02


def test_named_commands_and_files_exist():
  for module in re.findall(r"`(experiments\.\w+|benchmarks\.\w+)", README):
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
  for target in re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
  for path in re.findall(r"\]\((\w+\.\w+)\)|--flagfile=(\S+)", README):
    assert (ROOT / next(filter(None, path))).is_file(), path
  for module in re.findall(r"^  (\w+\.py) ", README, re.MULTILINE):
    assert (ROOT / "primia_jax" / module).is_file(), module
