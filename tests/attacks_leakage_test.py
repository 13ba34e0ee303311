"""What leaves a site besides its update: from real messages, in the clear and under noise."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federated_sites import IDS, LABELS, NUM, L, load

from primia_jax import algorithms, evaluation, federated, local, secagg, sites, summation
from primia_jax.attacks import leakage
from primia_jax.metrics import clopper_pearson
from primia_jax.privacy import accounting, plan
from primia_jax.privacy.reconstruction import max_true_positive_rate
from primia_jax.types import Site

REAL = np.arange(LABELS.shape[1])[None] < NUM[:, None]
COUNTS = [np.bincount(labels[real], minlength=L) for labels, real in zip(LABELS, REAL, strict=True)]
MOST, BATCH = 16, 4
# of one site, whose 11 images take 3 steps of 4
SITE = Site(
  jnp.int32(0),
  jnp.ones((MOST, 1, 2, 1)),
  jnp.zeros(MOST, jnp.int32),
  jnp.int32(11),
  jnp.arange(8, dtype=jnp.uint32),
)
LOSS = local.classification_loss(
  lambda p, s, x, *, train, key: (jnp.einsum("bhwc,wl->bl", x, p), s), lambda key, x, y: (x, y), 2
)
PLAIN = local.Recipe(
  local.epochs(BATCH, MOST), local.gradients(LOSS), None, optax.sgd, lambda t: 0.1
)
PRIVATE = plan.dp_sgd(
  LOSS, num_units=MOST, sampling_rate=0.25, steps=3, rounds=1, delta=1e-3, noise_multiplier=1.0
).recipe(optax.sgd, lambda t: 0.1)


@pytest.mark.parametrize(
  ("algorithm", "want"),
  [
    (
      algorithms.fedavg(PLAIN, weighting="uniform"),
      {"weight": 1, "metrics.num_examples": 11 / 16, "metrics.correct": 11 / 16},
    ),
    (
      algorithms.fedavg(PRIVATE),
      {"weight": 11 / 16, "metrics.num_examples": 0, "metrics.correct": 0, "metrics.loss": 0},
    ),
    (
      algorithms.fednova(PLAIN),
      {"weight": 11 / 16, "metrics.num_examples": 11 / 16, "more": 11 / 16 * 3 / 4},
    ),
  ],
  ids=["uniform", "private", "fednova"],
)
def test_the_numbers_of_a_message_are_those_named(algorithm, want):
  """Its images are all of class 0, which the model says from its first bias on: all are right."""
  params = jnp.array([[1.0, 0.0], [1.0, 0.0]])
  shared = federated.Global(
    params, {}, algorithm.init_server(params), jnp.int32(0), jax.random.key(0)
  )
  state = algorithm.init_site(params, {})
  message, _ = jax.jit(algorithm.site)(shared, state, SITE)
  got = leakage.besides_update(message)
  names = {"weight", "metrics.loss", "metrics.correct", "metrics.num_examples"}
  assert set(got) - {"more"} == names
  assert set(want) <= set(got)
  for name, value in want.items():
    assert float(got[name]) == pytest.approx(value), name
  if "more" in got:  # FedNova tells steps, and with them images up to a batch
    steps = round(float(got["more"] / got["weight"]) * PLAIN.steps.max_steps)
    assert steps == 3  # so it has 9 to 12 images


@pytest.mark.parametrize("noise", [0.0, 20.0])
def test_one_of_two_sites_subtracts_its_own_counts_and_noise_hides_the_others(noise):
  """The control: masks hide no site from the only other one."""
  two = summation.masked(secagg.secure_sum(2, max_abs=1000.0))
  count = evaluation.class_counting(L, two, sites.scan(), noise)
  got = leakage.of_missing_site(count(federated.Sites(IDS[:2], load)), COUNTS[1])
  assert np.array_equal(got, COUNTS[0]) == (noise == 0)


def site_of(labels):
  size = len(LABELS[0]) + 1
  stacked = Site(
    np.zeros(1, np.int32),
    np.zeros((1, size, 1, 1, 1), np.float32),
    np.pad(labels, (0, size - len(labels)))[None].astype(np.int32),
    np.array([len(labels)], np.int32),
  )
  return federated.in_memory(stacked)


@pytest.fixture(scope="module")
def counts():
  """(noise) -> 150 counts each with and without one image of class 1, all others known."""
  others = LABELS[0][REAL[0]]

  @functools.cache
  def played(noise):
    count = evaluation.class_counting(L, summation.clear(), sites.scan(), noise)
    trials = 1 if not noise else 150
    return [
      np.stack([count(site_of(labels)) for _ in range(trials)])
      for labels in (others, np.append(others, 1))
    ]

  return played, np.bincount(others, minlength=L)


def test_exact_counts_tell_of_everybody(counts):
  played, known = counts
  absent, present = played(0.0)
  assert leakage.presence(absent, known, (1,)).tolist() == [0]
  assert leakage.presence(present, known, (1,)).tolist() == [1]
  assert leakage.attribute(present, known).tolist() == [1]


def test_noised_counts_tell_what_their_noise_allows(counts):
  """Deviation 1: right in 69 %, as the closed form has it, and no more than f-DP allows."""
  played, known = counts
  absent, present = played(1.0)
  scores = [leakage.presence(c, known, (1,)) for c in (absent, present)]
  right = int(np.sum(scores[0] <= 0.5) + np.sum(scores[1] > 0.5))
  low, high = clopper_pearson(right, 300, 0.999)
  assert low < 0.5 + 0.5 * math.erf(0.5 / math.sqrt(2)) < high  # Phi(1 / 2)
  release = accounting.gaussian("class counts", 1.0)
  ledger = accounting.spend(accounting.Ledger("example", 1e-3), release)
  false = clopper_pearson(int(np.sum(scores[0] > 0.5)), 150, 0.999)[1]
  true = clopper_pearson(int(np.sum(scores[1] > 0.5)), 150, 0.999)[0]
  assert true <= max_true_positive_rate(ledger, false)
  found = int(np.sum(leakage.attribute(present, known) == 1))
  assert 1 / L < clopper_pearson(found, 150, 0.999)[0] < found / 150 < 0.9


def test_a_validation_image_shows_in_exact_confusion_counts():
  known = np.array([[5, 1], [2, 7]])
  released = known + np.array([[0, 0], [1, 0]])
  assert leakage.presence(released, known, (1, 0)) == 1
  assert leakage.presence(released, known, (1, 1)) == 0
  with pytest.raises(ValueError, match="do not fit"):
    leakage.presence(released, known, (1,))
