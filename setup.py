"""Lists the packages, and puts the C kernels into the wheel where a C compiler builds them."""

import pathlib
import shutil
import sys

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from primia_jax import compiling  # noqa: E402


class Wheel(bdist_wheel):
  """A wheel for all Pythons: of this platform if the kernels can be built, else of any."""

  def run(self):
    build = pathlib.Path(self.get_finalized_command("build_py").build_lib)
    for package in ("primia_jax", "primia_experiments"):  # what an earlier build left
      shutil.rmtree(build / package, ignore_errors=True)
    library = build / "primia_jax" / compiling.PORTABLE.name
    library.parent.mkdir(parents=True)
    try:
      compiling.build(library, ROOT / "third_party")
    except compiling.ERRORS as error:
      print(f"the wheel carries no C kernels: {compiling.reason(error)}", file=sys.stderr)
    else:
      self.root_is_pure = False
      self.distribution.has_ext_modules = lambda: True  # so that files go to the platform's folder
    super().run()

  def get_tag(self):
    return "py3", "none", super().get_tag()[2]


def installed(package: str) -> str:
  """`experiments` would be too common a name in site-packages."""
  return f"primia_{package}" if package.startswith("experiments") else package


setup(
  packages=[installed(name) for name in find_packages(include=["primia_jax*", "experiments*"])],
  package_dir={"primia_experiments": "experiments"},
  cmdclass={"bdist_wheel": Wheel},
)
