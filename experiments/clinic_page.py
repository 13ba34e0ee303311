"""A page for this machine alone: drop an image, see the protocol's phases, and get the answer.

  primia-page --checkpoint=runs/first

It prints an address with a secret in it, to be opened in a browser of this machine, and serves it
until it is stopped (Ctrl-C). All three roles run in this one process, so it protects nothing by
itself.
"""

from absl import flags

from primia_jax.clinic import page

from . import clinics, running, settings

settings.define_flags(clinics.Clinic)
flags.DEFINE_integer("port", 0, "port on 127.0.0.1; 0 takes any free one", 0, 65535)
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def main() -> None:
  s = settings.from_flags(clinics.Clinic)
  clinics.check(s)
  print(f"{clinics.WARNING}\nCalibrating and compiling ...", flush=True)
  model, ask = clinics.load(s)
  with page.serve(model, ask, clinics.learned(s), FLAGS.port, clinics.WARNING) as address:
    print(f"Open {address}\nCtrl-C stops the page.", flush=True)
    clinics.wait()


if __name__ == "__main__":
  running.start(main)
