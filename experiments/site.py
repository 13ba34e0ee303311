"""A hospital's own folder in a federation of institutions: who it is, whom it knows, what it may
train.

  primia-site init --site_dir=hospital_a --number=0 --name=hospital-a --data=folder:PATH
  primia-site init --site_dir=coordinator --role=coordinator --name=coordinator
  primia-site roster --site_dir=coordinator --federation=lungs --join=a.json,b.json,c.json
  primia-site roster --site_dir=hospital_a --accept=roster.json --digest="1f2e ..."
  primia-site offer --site_dir=coordinator --settings="--label_names=normal,viral --rounds=20"
  primia-site approve --site_dir=hospital_a --config=config.json
  primia-site offer --site_dir=coordinator --model=RUN
  primia-site approve --site_dir=hospital_a --config=config.json --model=COPY
  primia-site status --site_dir=hospital_a
  primia-site ledger --site_dir=hospital_a
  primia-site intersect --site_dir=hospital_a --other=1 --ids=patients.txt

init makes the folder, which its user alone can read, with a private key that never leaves it;
public.json in it goes to the coordinator. The coordinator joins the public parts into a roster and
sends it to all. The operators compare its digest by telephone, and accept it with the digest.
offer writes the configuration that the coordinator sends to all; its settings are flags of
primia-train. approve records what may be trained: settings, code, architecture and starting
parameters; primia-train --run_dir=hospital_a trains that and nothing else. With --model the
coordinator offers, and a site approves, that all score a finished model, which
primia-evaluate --run_dir=hospital_a then does. status and ledger are
for the operator's own eyes. roster without a file lists the fingerprints. intersect says which
patients two sites share, and tells neither any other's id.
"""

import dataclasses
from collections.abc import Callable

from absl import flags

from . import intersecting, joining, offering, running, settings
from .evaluations import Finished
from .site_folders import Limits, Own

FLAGS = flags.FLAGS
_OF_INIT, _OF_ROSTER = (joining.Init, Own, Limits), (joining.Join,)
_OF_OFFER, _OF_APPROVE = (offering.Offer, Finished), (joining.Approve, Finished)
_OF_INTERSECT = (intersecting.Intersect,)
_WORK: dict[str, tuple[Callable[..., None], tuple[type, ...]]] = {
  "init": (joining.init, _OF_INIT),
  "roster": (joining.rosters, _OF_ROSTER),
  "offer": (offering.offer, _OF_OFFER),
  "approve": (joining.approve, _OF_APPROVE),
  "status": (joining.status, ()),
  "ledger": (joining.ledger, ()),
  "intersect": (intersecting.intersect, _OF_INTERSECT),
}
COMMANDS = tuple(_WORK)

flags.DEFINE_string("site_dir", "", "this member's own folder")
for _kind in dict.fromkeys(kind for _, kinds in _WORK.values() for kind in kinds):
  settings.define_flags(_kind)
flags.adopt_module_key_flags(settings)


def main(command: str) -> None:
  work, own = _WORK[command]
  for other, (_, kinds) in _WORK.items():
    others = [kind for kind in kinds if kind not in own]
    names = [field.name for kind in others for field in dataclasses.fields(kind)]
    if given := [name for name in names if FLAGS[name].present]:
      raise ValueError(f"{given[0]} belongs to primia-site {other}, not to {command}; leave it out")
  work(FLAGS.site_dir, *map(settings.from_flags, own))


if __name__ == "__main__":
  running.start(main, commands=COMMANDS)
