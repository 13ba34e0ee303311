"""Images found in the update of an epoch: by images at a site, batch size and sites in the sum.

The form of the question is Hatamizadeh et al. 2023, "Do gradient inversion attacks make federated
learning unsafe?". Who learns what: the adversary has the mean update of a cell's sites, an honest
server's view without secure aggregation for one site, and with it for several. It knows the model,
the learning rate, all labels and the order of images; it searches for all images together.
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from primia_jax import durable
from primia_jax.attacks import inversion, priors, scores, tuning, updates
from primia_jax.types import Array, Key, LossFn, ModelState, Params, PyTree

# (images sought together at most, share of the steps): a larger search is made with fewer
_LADDER = ((32, 1.0), (128, 1 / 3), (None, 0.15))
_TUNED = 24  # images of a cell, at most, for which the weight is chosen anew


class Cell(NamedTuple):
  """One place of the grid.

  Attributes:
    num_images: at each site.
    batch_size: of a step of SGD.
    num_sites: in the sum that the adversary sees; 1 without secure aggregation.
  """

  num_images: int
  batch_size: int
  num_sites: int

  @property
  def total(self) -> int:
    """Images behind the update."""
    return self.num_images * self.num_sites


@dataclasses.dataclass(frozen=True)
class Search:
  """How hard to search.

  Attributes:
    steps: for up to 32 images; a third for up to 128, and 0.15 of them for more.
    travel: how far a pixel may go, in units of pixels in [0, 1]: signed Adam's step size is this
      over the number of steps, and 0.1 at most.
    weights: of total variation, among which tuning chooses first.
    ladder: further weights, tried while the best is the last.
    least: images that are attacked in each cell, and images on which its weight is chosen, at
      least, where the pools hold as many.
    rate: the sites' learning rate.
  """

  steps: int = 400
  travel: float = 10.0
  weights: tuple[float, ...] = (0.03, 0.1, 0.3)
  ladder: tuple[float, ...] = tuning.LADDER
  least: int = 12
  rate: float = 0.1

  def steps_for(self, total: int) -> int:
    """Steps of a search for so many images."""
    share = next(share for most, share in _LADDER if most is None or total <= most)
    return max(1, round(self.steps * share))


class Images(NamedTuple):
  """Images in [0, 1], float32 [N, H, W, C], and labels, all different.

  Attributes:
    attacked: those behind the updates that are reported.
    tuning: those behind the updates on which weights are chosen.
    decoys: [D, ...] images of the same kind that are behind no update; chance is 1 / (D + 1).
  """

  attacked: tuple[np.ndarray, np.ndarray]
  tuning: tuple[np.ndarray, np.ndarray]
  decoys: np.ndarray


class Outcome(NamedTuple):
  """What was found in a cell.

  Attributes:
    weight: of total variation; where it was not chosen in this cell, as given.
    is_at_end: whether it is the last of all weights that there are.
    steps: of the search.
    num_attacks: updates that were attacked.
    psnr: [M] in dB, of the guess for each true image, guesses in the order that suits the attacker.
    ssim: [M], of the same.
    named: [M] bool, whether a guess is nearer to the true image than to all decoys.
    guesses: [M, H, W, C]; the first of them, from a file.
  """

  weight: float
  is_at_end: bool
  steps: int
  num_attacks: int
  psnr: np.ndarray
  ssim: np.ndarray
  named: np.ndarray
  guesses: np.ndarray


class Explored(NamedTuple):
  """A grid.

  Attributes:
    outcomes: of each cell.
    controls: of each cell, a single image alone, searched in as many steps.
  """

  outcomes: dict[Cell, Outcome]
  controls: dict[Cell, Outcome]


def cells(
  site_images: Sequence[int], batch_sizes: Sequence[int], num_sites: Sequence[int], most: int
) -> list[Cell]:
  """All cells with full batches and at most so many images together, the smaller ones first.

  Raises:
    ValueError: there is none.
  """
  found = [
    Cell(n, batch, sites)
    for n in site_images
    for batch in batch_sizes
    for sites in num_sites
    if n % batch == 0 and n * sites <= most
  ]
  if not found:
    raise ValueError(
      f"no cell of site_images={[*site_images]}, batch_sizes={[*batch_sizes]} and "
      f"num_sites={[*num_sites]} has full batches and at most {most} images"
    )
  return sorted(found, key=lambda cell: (cell.total, cell.num_images, cell.batch_size))


def epoch(loss_fn: LossFn, cell: Cell, rate: float) -> updates.Simulate:
  """The mean over sites of their change in one epoch of SGD; images and labels are [S N, ...]."""
  order = jnp.arange(cell.num_images, dtype=jnp.int32).reshape(-1, cell.batch_size)
  site = updates.local_training(loss_fn, rate, order)

  def simulate(seen: updates.Seen, images: Array) -> PyTree:
    split = lambda a: a.reshape(cell.num_sites, cell.num_images, *a.shape[1:])
    one = lambda images, labels: site(seen._replace(labels=labels), images)
    sent = jax.vmap(one)(split(images), split(seen.labels))
    return jax.tree.map(lambda a: a.mean(0), sent)

  return simulate


def attack(
  key: Key,
  cell: Cell,
  loss_fn: LossFn,
  model: tuple[Params, ModelState],
  images: Images,
  search: Search,
  weight: float | None = None,
  steps: int | None = None,
) -> Outcome:
  """Makes a cell's updates, and searches their images.

  Args:
    key: of the searches.
    cell: the place of the grid.
    loss_fn, model: of the sites, and their parameters and state before the update.
    images: as many as `cell.total` at least to attack; also to tune on, where `weight` is None.
    search: how hard.
    weight: of total variation; None to choose it on the tuning images by the mean SSIM.
    steps: of the search; None for `search.steps_for(cell.total)`.

  Raises:
    ValueError: there are too few images.
  """
  steps = search.steps_for(cell.total) if steps is None else steps
  pools = [images.attacked] if weight is not None else [images.attacked, images.tuning]
  fewest = min(len(labels) for _, labels in pools)
  if fewest < cell.total:
    raise ValueError(f"{cell} needs {cell.total} images to attack or to tune on; {fewest} are left")
  solve = _solver(cell, loss_fn, model, images.attacked[0].shape[1:], search, steps)
  chosen = tuning.Tuned(weight, False) if weight is not None else None
  on = lambda pool, w: _all(key, cell, solve, pool, images.decoys, w, search.least)
  if chosen is None:
    on_tuned = lambda w: on(images.tuning, w).ssim.mean()
    chosen = tuning.tune(search.weights, on_tuned, search.ladder)
  found = on(images.attacked, chosen.value)
  return found._replace(steps=steps, is_at_end=chosen.is_at_end)


def explore(
  key: Key,
  cells: Sequence[Cell],
  loss_fn: LossFn,
  model: tuple[Params, ModelState],
  images: Images,
  search: Search,
  folder: pathlib.Path,
  about: str,
  note: Callable[[str], None] = lambda text: None,
) -> Explored:
  """Attacks cell after cell, and keeps each in a file, so that who stops it loses one cell.

  The weight of total variation is tuned in cells of at most 24 images. A larger one takes that of
  the largest tuned cell with as many sites and the same batch size, or else of a single image.

  Args:
    key, loss_fn, model, images, search: as for `attack`.
    cells: the smaller ones first.
    folder: of the files; created.
    about: what the model and the images are. Files of others are refused.
    note: told which cell is at work.

  Raises:
    ValueError: there are too few images, or the folder holds cells of another search.
  """
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  single = Cell(1, 1, 1)

  def kept(name: str, cell: Cell, weight: float | None, steps: int) -> Outcome:
    path = folder / f"{name}.npz"
    told = repr((about, tuple(cell), search, steps, f"tuned on {search.least}"))
    if (found := load(path, told)) is None:
      found = attack(key, cell, loss_fn, model, images, search, weight, steps)
      save(path, found, told)
    return found

  note("grid, a single image")
  alone = kept("single", single, None, search.steps)
  controls = {search.steps: alone}
  tuned: dict[tuple[int, int], float] = {}
  outcomes = {}
  for i, cell in enumerate(cells):
    note(f"grid, cell {i + 1} of {len(cells)}: {cell.total} images")
    steps = search.steps_for(cell.total)
    if steps not in controls:
      controls[steps] = kept(f"single_{steps}", single, alone.weight, steps)
    as_before = tuned.get((cell.batch_size, cell.num_sites), alone.weight)
    weight = None if cell.total <= _TUNED else as_before
    name = "_".join(map(str, cell))
    outcomes[cell] = alone if cell == single else kept(name, cell, weight, steps)
    if weight is None:
      tuned[cell.batch_size, cell.num_sites] = outcomes[cell].weight
  return Explored(outcomes, {cell: controls[one.steps] for cell, one in outcomes.items()})


def save(path: pathlib.Path, outcome: Outcome, about: str) -> None:
  """Writes a cell's outcome, with the first 16 of its guesses, and what it is about."""
  data = io.BytesIO()
  kept = outcome._replace(guesses=outcome.guesses[:16])
  np.savez_compressed(data, about=about, **kept._asdict())
  durable.replace(path, data.getvalue())


def load(path: pathlib.Path, about: str) -> Outcome | None:
  """A cell's outcome that was kept; None where there is none.

  Raises:
    ValueError: the file is damaged, or about something else.
  """
  if not path.is_file():
    return None
  try:
    with np.load(path, allow_pickle=False) as data:
      if (said := str(data["about"])) == about:
        held = {name: data[name] for name in Outcome._fields}
  except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
    raise ValueError(f"{path} is damaged ({error}); remove it") from error
  if said != about:
    raise ValueError(f"{path} is of another search: {said}; name another folder, not for {about}")
  for name, kind in (("weight", float), ("is_at_end", bool), ("steps", int), ("num_attacks", int)):
    held[name] = kind(held[name])
  return Outcome(**held)


def _solver(
  cell: Cell,
  loss_fn: LossFn,
  model: tuple[Params, ModelState],
  shape: tuple[int, ...],
  search: Search,
  steps: int,
) -> Callable[[Key, Array, Array, float], Array]:
  """(key, images, labels, weight) -> the guesses, from the update alone; compiled once."""
  simulate = jax.jit(epoch(loss_fn, cell, search.rate))
  settings = inversion.Settings(steps=steps, rate=min(0.1, search.travel / steps))
  height, width, channels = shape
  variables = inversion.pixels((cell.total, height, width, channels))

  @jax.jit
  def find(key: Key, seen: updates.Seen, weight: Array) -> Array:
    smooth = lambda _, images: weight * priors.total_variation(images)
    made = inversion.inversion(simulate, variables, settings, smooth)
    return inversion.selected(inversion.run(made, key, seen))

  def solve(key: Key, images: Array, labels: Array, weight: float) -> Array:
    seen = updates.Seen(*model, None, labels)
    seen = seen._replace(update=simulate(seen, images))
    return find(key, seen, jnp.float32(weight))

  return solve


def _all(
  key: Key,
  cell: Cell,
  solve: Callable[[Key, Array, Array, float], Array],
  pool: tuple[np.ndarray, np.ndarray],
  decoys: np.ndarray,
  weight: float,
  least: int,
) -> Outcome:
  """Attacks the first images of the pool, at least so many where it has them."""
  num_attacks = min(-(-least // cell.total), len(pool[1]) // cell.total)
  psnr, ssim, named, guesses = [], [], [], []
  for i, (images, labels) in enumerate(_split(pool, cell.total, num_attacks)):
    found = np.asarray(
      solve(jax.random.fold_in(key, i), jnp.asarray(images), jnp.asarray(labels), weight)
    )
    guess = paired(found, images)
    guesses.append(guess)
    psnr.append(np.asarray(scores.psnr(jnp.asarray(guess), jnp.asarray(images))))
    ssim.append(np.asarray(scores.ssim(jnp.asarray(guess), jnp.asarray(images))))
    named.append(scores.identify_any(found, images, decoys).found)
  joined = [np.concatenate(parts) for parts in (psnr, ssim, named, guesses)]
  return Outcome(weight, False, 0, num_attacks, *joined)


def _split(
  pool: tuple[np.ndarray, np.ndarray], total: int, num: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  for i in range(num):
    rows = slice(i * total, (i + 1) * total)
    yield pool[0][rows], pool[1][rows]


def paired(guesses: np.ndarray, truth: np.ndarray) -> np.ndarray:
  """The guesses [B, H, W, C] in the order of the true images that makes the sum of squared errors
  least: what the attacker would show if it were told the order.
  """
  rows = [np.asarray(x, np.float64).reshape(len(x), -1) for x in (truth, guesses)]
  squares = [np.square(x).sum(1) for x in rows]
  error = squares[0][:, None] + squares[1][None] - 2 * rows[0] @ rows[1].T
  return np.asarray(guesses)[scipy.optimize.linear_sum_assignment(error)[1]]
