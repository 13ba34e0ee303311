"""The README's promises: its example runs, and the commands and files it names exist."""

import contextlib
import io
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_quickstart_runs_and_learns():
  (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(compile(code, "README.md", "exec"), {})
  losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out.getvalue())]
  assert len(losses) == 3
  assert losses[-1] < losses[0]


def test_named_commands_and_files_exist():
  for module in re.findall(r"`(experiments\.\w+|benchmarks\.\w+)", README):
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
  for target in re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
  for path in re.findall(r"\]\((\w+\.\w+)\)|--flagfile=(\S+)", README):
    assert (ROOT / next(filter(None, path))).is_file(), path
  for module in re.findall(r"^  (\w+\.py) ", README, re.MULTILINE):
    assert (ROOT / "primia_jax" / module).is_file(), module
