"""What crossed the boundary of the sites in a federated run, for its `disclosure.md`.

Bytes are those of the numbers themselves. Where each site has a process, every message is listed,
too (`messages_crossed`).
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from primia_jax import disclosure, secagg
from primia_jax.disclosure import Crossing, Policy
from primia_jax.types import PyTree

from . import messages_crossed
from .configs import Train

FILE = "disclosure.md"
_OPEN = "nothing: the server sees what each site sends"
_SCORE_BYTES = 4  # of a count, and of a loss
_OF_MESSAGES = (
  "A message holds numbers of the rows without that word. Messages are those of this site, from "
  "all of its starts. Flower adds its node's number and times to each, and TLS hides them from the "
  "network. What operators send by hand is public: `public.json`, the roster, the configuration."
)


def of_run(
  config: Train, rows: Sequence[Mapping[str, Any]], sent: PyTree, num_classes: int, num_tested: int
) -> list[Crossing]:
  """Lists what crossed, by the settings of a run and the lines of its rounds.

  Args:
    config: of the run.
    rows: one for each round that was not aborted, with the sites in it.
    sent: what a site sends each round, or arrays of the same shapes.
    num_classes: of the model.
    num_tested: test images, of which the report tells scores.
  """
  a, p, rounds = config.aggregation, config.privacy, len(rows)
  numbers = sum(np.size(leaf) for leaf in jax.tree.leaves(sent))
  updates = sum(row.get("survivors", len(row["sites"])) for row in rows)
  asked = sum(len(row["sites"]) for row in rows)
  everyone = config.hospitals.num_sites
  cells = 4 * num_classes if config.data.is_multi else num_classes**2  # of confusion matrices
  protection, width, count_width = _OPEN, 4, _SCORE_BYTES
  if a.is_secure:
    n = config.sites_in_round
    secure = a.secure_sum(n, n, config.in_processes)
    width = secagg.bytes_per_number(secure)
    count_width = secagg.bytes_per_number(a.secure_sum(n, n, config.in_processes, 1.0))
    protection = f"masks: only the sum over at least {secure.threshold or n} sites opens"
  spent = next((row["epsilon"] for row in reversed(rows) if "epsilon" in row), None)
  charge = "nothing: without differential privacy" if spent is None else f"epsilon {spent:.4g}"
  # Between processes the coordinator passes on what opens a sum, and each site opens it itself.
  multiprocess = config.in_processes
  reader = "coordinator and all sites" if multiprocess else "server"
  crossed = [
    Crossing("update of the model", "each site", reader, updates, width * numbers * updates,
             protection, charge),
    Crossing("sum of updates", "all of them open it" if multiprocess else "server",
             "coordinator and all sites" if multiprocess else "server and sites", rounds,
             0 if multiprocess else 4 * numbers * rounds, "none: the sum is what training needs",
             "with the updates"),
  ]  # fmt: skip
  if not multiprocess:
    crossed.append(
      Crossing("global model", "server", "each site of a round", asked, 4 * numbers * asked,
               "none: it is made of the sums", "with the updates")
    )  # fmt: skip
  if config.training.class_weights:
    is_noised = p.dp != "none" and p.dp_count_noise
    noised = f"noise of deviation {p.dp_count_noise:g}, and " if is_noised else ""
    crossed.append(
      Crossing("images of each class", "each site", reader, everyone,
               count_width * num_classes * everyone, noised + protection,
               "in the same ledger" if noised else "nothing: exact counts")
    )  # fmt: skip
  if p.validates:
    size = count_width * (cells + 1)
    crossed.append(
      Crossing("validation counts and loss", "each site", reader, rounds * everyone,
               size * rounds * everyone, protection, "nothing: exact counts")
    )  # fmt: skip
  if not num_tested:
    return crossed
  size, tested = _SCORE_BYTES * cells, config.disclosure.policy().count(num_tested)
  crossed.append(
    Crossing(f"test scores of {tested} images", "whoever has the test images", "readers of the "
             "report", 1, size, "floors of the policy", "nothing: test images are in no ledger")
  )  # fmt: skip
  return crossed


def write(folder: pathlib.Path, title: str, policy: Policy, crossed: Sequence[Crossing]) -> None:
  """Writes `disclosure.md`."""
  has_messages = any(one.what.startswith(messages_crossed.PREFIX) for one in crossed)
  note = _OF_MESSAGES if has_messages else ""
  text = disclosure.markdown(title, policy, crossed, note=note)
  (folder / FILE).write_text(text, encoding="utf-8")
