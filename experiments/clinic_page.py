"""A page for this machine alone: drop an image, see the protocol's phases, and get the answer.

  primia-page --checkpoint=runs/first
  primia-page --connect=HOST:PORT --folder=hospital --model=chest-1
  primia-page --card=chest-1.json --folder=hospital

It prints an address with a secret in it, to be opened in a browser of this machine, and serves it
until it is stopped (Ctrl-C). With --checkpoint all three roles run in this one process, which
protects nothing by itself. With --connect this is a clinic of a model owner's server, as in
primia-infer; with --card it shares images between two servers, as in primia-ask.
"""

from absl import flags

from primia_jax.clinic import page

from . import clinics, running, settings

settings.define_flags(clinics.Remote)
settings.define_flags(clinics.Clinic)
flags.DEFINE_integer("port", 0, "port on 127.0.0.1; 0 takes any free one", 0, 65535)
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def main() -> None:
  s, remote = settings.from_flags(clinics.Clinic), settings.from_flags(clinics.Remote)
  clinics.check(s, remote, [name for name in FLAGS if FLAGS[name].present])
  model, ask, learned, warning = clinics.load(s, remote)
  with page.serve(model, ask, learned, FLAGS.port, warning) as address:
    print(f"Open {address}\nCtrl-C stops the page.", flush=True)
    clinics.wait()


if __name__ == "__main__":
  running.start(main, keeps_small=True)
