"""The README's promises: its example runs, and the commands and files it names exist."""

import contextlib
import io
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def printed(number):
  """What an example of the README prints."""
  code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(code, "README.md", "exec"), {})
  return out.getvalue()


def test_the_quickstart_runs_and_learns():
  losses = [float(x) for x in re.findall(r"loss ([\d.]+)", printed(0))]
  assert len(losses) == 3
  assert losses[-1] < losses[0]


def test_the_encrypted_example_agrees_with_the_function():
  numbers = [
    [float(x) for x in re.findall(r"\d\.\d+(?:e-\d+)?", row)] for row in re.findall(r"\[\[.*?\]\]", printed(1))
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
