"""The noise of counts of scores: its scale, and what it hides of one patient."""

import math

import jax
import numpy as np
import pytest
import scipy.stats

from primia_jax import metrics, prng, score_noise
from primia_jax.privacy import accounting, grid, noise

STDDEV, BINS, MOST = 3.0, 400, 1000
LABELS = np.array([0, 1, 1, 2])
CHANCES = np.eye(3)[[0, 1, 0, 2]] * 0.7 + 0.1
PATIENTS = np.array(["a", "b", "b", "c"])  # of b both images are of one class


def test_the_noise_is_of_the_scale_that_is_charged():
  secret = prng.random_key()
  given = LABELS, CHANCES, PATIENTS, BINS, MOST
  sent = score_noise.noised(*given, STDDEV, secret)
  confusion, table = metrics.shared_counts(*given[:4], 1)
  half = np.array([[0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]])  # b's images count one half each
  rest = np.concatenate([
    (sent["confusion"] - np.where(half > 0, half, confusion)).ravel(),
    (sent["table"] - table)[table == 0],
  ])  # fmt: skip
  num = len(rest)
  assert num > 3000
  of = lambda scale: scipy.stats.chi2.cdf((rest**2).sum() / scale**2, num)
  right = math.sqrt(score_noise.variance(3, BINS, MOST, STDDEV))
  assert STDDEV <= right < 1.01 * STDDEV
  assert 1e-6 < of(right) < 1 - 1e-6
  assert not 1e-6 < of(right * 2 / 3) < 1 - 1e-6
  assert not 1e-6 < of(right * 3 / 2) < 1 - 1e-6
  assert abs(rest.mean()) < 5 * right / math.sqrt(num)
  again = score_noise.noised(*given, STDDEV, prng.random_key())
  assert (again["table"] != sent["table"]).mean() > 0.9
  with pytest.raises(ValueError, match="most_images=3"):
    score_noise.noised(*given[:4], 3, STDDEV, secret)


def advantage(stddev, num=4000):
  """How much better than by chance the best observer tells if patient a was scored, whose images it
  has.
  """
  on, bins = score_noise._grid(3, 2, MOST, stddev), 2
  whole = int(on.steps)

  def count(rows):
    given = LABELS[rows], CHANCES[rows], PATIENTS[rows]
    return np.concatenate([a.ravel() for a in metrics.shared_counts(*given, bins, whole)])

  pair = count(slice(0, None)), count(slice(1, None))
  direction = (pair[0] - pair[1]) / np.linalg.norm(pair[0] - pair[1])
  said = []
  for i, counts in enumerate(pair):
    keys, whole_counts = jax.random.bits(jax.random.key(i), (num, 8), np.uint32), np.int32(counts)
    release = jax.vmap(lambda key, counts=whole_counts: grid.noised(counts, on, key, 0))
    said.append(np.asarray(release(keys), np.float64) @ direction)
  middle = (pair[0] + pair[1]) @ direction / 2
  return (said[0] > middle).mean() + (said[1] <= middle).mean() - 1


def test_an_observer_tells_a_patient_s_presence_no_better_than_the_ledger_says():
  """The bound is attained, and with less noise than is charged it is broken."""
  charged = score_noise.release(3, STDDEV)
  assert charged.noise_multiplier == STDDEV / 2  # sqrt(1 + L) counts
  bound = 2 * scipy.stats.norm.cdf(1 / (2 * charged.noise_multiplier)) - 1
  error = 4 / math.sqrt(4000)
  assert bound - error < advantage(STDDEV) < bound + error
  assert advantage(STDDEV / 4) > bound + error
  assert charged.extra_delta == noise.error_of_release()
  with pytest.raises(ValueError, match="without noise nothing is private"):
    score_noise.release(3, 0.0)
  assert accounting.epsilon(accounting.spend(accounting.Ledger("patient", 1e-6), charged)) > 1
