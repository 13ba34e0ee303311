"""What a site's other numbers tell: those that leave it besides its update.

- `evaluation.class_counting`: class counts, once, where class weights are asked for. Under DP with
  noise (`dp_count_noise`), which the ledger is charged for.
- `federated.Message.weight`: the site's number of units over a public bound, each round; 1 where
  weighting is uniform. The same under DP, where numbers of units are public.
- `Message.metrics`: loss, right answers and examples of the round, also where weighting is uniform;
  0 under DP.
- `Message.more`: of FedNova the number of steps, times the weight. Under DP it is the same at all
  sites.
- `evaluation.validation`: confusion counts and loss; under DP only with `--validation=exact`, exact
  and not charged.

Who learns what: under secure aggregation only sums over the round's sites are opened, in the clear
each site's. But sums of few sites are equations: a site subtracts its own number, and two sums that
differ by one site give that site's (`of_missing_site`). Whoever then knows all other units of a
site learns from an exact count whether the last one is there (`presence`) and of which class it is
(`attribute`), without any error. Noise of deviation s is a Gaussian release of sensitivity 1, and
`privacy.reconstruction.max_true_positive_rate` then bounds the first: `presence` reaches it.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from primia_jax.federated import Message


def besides_update(message: Message) -> dict[str, Any]:
  """All numbers of a message but the update, by name; such as {"weight": ..., "metrics.loss": ...}.

  Arrays are those of the message: of one site in the clear, or of a sum.
  """
  rest = message._replace(update=())
  leaves = jax.tree_util.tree_flatten_with_path(rest)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def of_missing_site(with_site: np.ndarray, without_site: np.ndarray) -> np.ndarray:
  """What one site added to a sum, from a sum that it is in and one that it is not in."""
  return np.asarray(with_site, np.float64) - np.asarray(without_site, np.float64)


def presence(released: np.ndarray, known: np.ndarray, cell: tuple[int, ...]) -> np.ndarray:
  """How much a site's counts speak for one unit, whose cell is known, as all other units are.

  It is the log-likelihood ratio up to scale and shift, for exact counts and for Gaussian noise:
  what the cell has more than is known. Above 1/2 presence is likelier than absence; the score is
  compared with any other threshold for another rate of false positives.

  Args:
    released: [..., *counts] such as class counts [L] or a confusion matrix [L, L].
    known: [*counts], of all units but the one in question.
    cell: its class, or (class, what the model says of it).

  Raises:
    ValueError: for shapes that do not fit.
  """
  released, known = np.asarray(released, np.float64), np.asarray(known, np.float64)
  if known.ndim != len(cell) or released.shape[-known.ndim :] != known.shape:
    raise ValueError(
      f"counts {released.shape}, known {known.shape} and a cell of {len(cell)} numbers do not fit"
    )
  return (released - known)[(..., *cell)]


def attribute(released: np.ndarray, known: np.ndarray) -> np.ndarray:
  """The class of the one unit that is there and not known: that with the largest surplus, [...].

  It is the likeliest class, for exact counts [..., L] and for equal Gaussian noise on each.
  """
  return np.argmax(np.asarray(released, np.float64) - np.asarray(known, np.float64), axis=-1)
