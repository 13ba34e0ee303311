"""Who sees what of a run, what its ledger says, and how near a peer comes to another's update."""

from __future__ import annotations

import jax
import numpy as np

from primia_jax.attacks import views
from primia_jax.privacy import ledger

from .. import markdown
from .context import Context
from .parts import Part
from .recognition import seen_by


def points(context: Context) -> Part:
  """Who could see what, in this run."""
  config = context.config
  rows = [(point.who, point.sees, point.assumed) for point in views.THREATS]
  table = markdown.table(("adversary", "sees", "assumed"), rows)
  n = config.hospitals.num_sites
  hidden = (
    "masks hide single updates from the server"
    if config.aggregation.is_secure
    else f"the server sees single updates (aggregation={config.aggregation.aggregation})"
  )
  text = f"This run has {n} sites, {config.sites_in_round} in a round; {hidden}."
  failures = []
  if not config.aggregation.is_secure:
    failures.append("no secure aggregation: the server sees each site's update")
  if config.privacy.dp == "none":
    failures.append(
      "no differential privacy: nothing bounds what updates, sums and the model tell of an image"
    )
  if context.has_transcript and n == 2 and config.aggregation.is_secure:
    failures += _of_two(context)
  return Part("Who sees what", (text, table), (), tuple(failures))


def _of_two(context: Context) -> list[str]:
  """How near the peer's view is to the other's update."""
  one = context.rounds()[0]
  seen = seen_by(context.config, one)
  if views.PEER not in seen:
    return []
  other = jax.tree.leaves(jax.tree.map(lambda a: a[1], seen[views.EACH].updates))
  mine = jax.tree.leaves(jax.tree.map(lambda a: a[0], seen[views.PEER].updates))
  norm = lambda leaves: float(np.sqrt(sum(np.sum(np.square(a)) for a in leaves)))
  gap = norm([a - b for a, b in zip(mine, other, strict=True)]) / norm(other)
  return [
    f"two sites: site {int(one.ids[0])} takes its own update off the sum and has that of site "
    f"{int(one.ids[1])}, with a relative error of {gap:.1g} in round {one.number}"
  ]


def budget(context: Context) -> Part:
  """What the run's own ledger says."""
  title = "Ledger"
  if not context.ledgers:
    return Part(title, ("The run has no differential privacy: no ledger bounds what it tells.",))
  said = ledger.statement(context.ledgers)
  if context.config.privacy.dp_seed >= 0:
    said = {markdown.NOT_PRIVATE: "noise comes from dp_seed, which anyone can repeat", **said}
  return Part(title, (markdown.table(("fact", "value"), said.items()),))
