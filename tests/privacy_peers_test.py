"""Opacus and jax-privacy as oracles, each where installed: equal sums of clipped gradients, equal
noise and epsilon.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from primia_jax import local, models
from primia_jax.privacy import accounting, clipping, grid, plan
from primia_jax.privacy.grid import Rounded
from primia_jax.types import Batch, Metrics

SIZE, CLASSES, UNITS = (
  16,
  3,
  12,
)  # smaller images leave groups of two values, whose variance float32 hardly holds
KEY, SECRET = jax.random.key(0), jnp.arange(8, dtype=jnp.uint32)
LAYERS = [f"{kind}{i}" for i in range(1, 5) for kind in ("conv", "norm")] + [
  "head"
]  # of the model, in their order
SHARES = {0.5: "all", 5.6: "some", 1e3: "none"}  # clip norm -> how many units it scales down
NORMS = pytest.mark.parametrize("l2_clip_norm", SHARES, ids=SHARES.get)
FINE = lambda dim, max_units: grid.choose(dim, 1e-7, max_units)  # hardly any rounding
RUNS = pytest.mark.parametrize(
  ("sigma", "num_units", "batch_size", "steps", "delta"),
  [
    (1.1, 60_000, 256, 3525, 1e-5),
    (1.0, 1600, 32, 2000, 1 / 1600),
    (3.0, 50_000, 4096, 2468, 1e-5),
  ],
  ids=["MNIST", "a hospital", "De et al. 2022, CIFAR-10"],
)


@pytest.fixture
def opacus():
  return pytest.importorskip("opacus", reason="Opacus is not installed: not compared with it")


@pytest.fixture
def jax_privacy():
  return pytest.importorskip(
    "jax_privacy", reason="jax-privacy is not installed: not compared with it"
  )


def prepare(key, images, targets):
  return images, targets


@functools.cache
def work():
  """A shipped model with GroupNorm, its loss, and a batch."""
  model = models.build(models.ModelConfig("cnn", CLASSES, (SIZE, SIZE, 1), width=0.5))
  params, _ = model.init(KEY)
  rng = np.random.default_rng(0)
  images = rng.normal(size=(UNITS, SIZE, SIZE, 1)).astype(np.float32)
  labels = rng.integers(0, CLASSES, UNITS).astype(np.int32)
  loss = local.classification_loss(model.apply, prepare, CLASSES)
  return params, loss, Batch(jnp.asarray(images), jnp.asarray(labels), jnp.ones(UNITS))


@functools.cache
def our_sum(l2_clip_norm):
  params, loss, batch = work()
  summed = clipping.clipped_sum(loss, l2_clip_norm=l2_clip_norm, grid_of=FINE)
  total, _, share = jax.jit(summed)(params, {}, batch, KEY)
  assert {0: "none", 1: "all"}.get(float(share), "some") == SHARES[l2_clip_norm]
  return grid.real(total.integers, total.step)


def assert_equal(ours, theirs):
  """To 2e-4 of the largest entry, leaf by leaf: norms are upper bounds, and sums are rounded."""
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(np.abs(b).max()))


def spent(sigma, rate, steps, delta, accountant):
  ledger = accounting.spend(
    accounting.Ledger("example", delta), accounting.gaussian("gradients", sigma, rate), steps
  )
  return accounting.epsilon(ledger, accountant)


def torch_leaves(tree):
  """Our parameters, or gradients, as PyTorch orders and lays them out."""
  leaves = [
    tree[layer][name]
    for layer in LAYERS
    for name in ("kernel", "scale", "bias")
    if name in tree[layer]
  ]
  return [np.transpose(a, {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[a.ndim]) for a in leaves]


def torch_model(torch, params):
  """The same model in PyTorch, with the same weights."""
  nn, layers, before = torch.nn, [], 1
  for features in (8, 16, 32, 64):
    layers += [nn.MaxPool2d(2)] if layers else []
    layers += [
      nn.Conv2d(before, features, 3, padding=1, bias=False),
      nn.GroupNorm(min(32, features), features),
      nn.ReLU(),
    ]
    before = features
  model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))
  with torch.no_grad():
    for mine, value in zip(model.parameters(), torch_leaves(params), strict=True):
      mine.copy_(torch.from_numpy(np.array(value)))
  return model


@NORMS
@pytest.mark.parametrize("how", ["hooks", "ghost"])
@pytest.mark.filterwarnings("ignore")  # PyTorch's and Opacus's own
def test_the_clipped_sum_is_that_of_opacus(opacus, how, l2_clip_norm):
  torch = pytest.importorskip("torch")
  params, _, batch = work()
  images, labels = (
    torch.from_numpy(np.array(a)) for a in (batch.images.transpose(0, 3, 1, 2), batch.labels)
  )
  model, criterion = torch_model(torch, params), torch.nn.CrossEntropyLoss()
  data = torch.utils.data.TensorDataset(images, labels)
  made = opacus.PrivacyEngine().make_private(
    module=model,
    optimizer=torch.optim.SGD(model.parameters(), 1.0),
    criterion=criterion,
    data_loader=torch.utils.data.DataLoader(data, batch_size=UNITS),
    noise_multiplier=0.0,
    max_grad_norm=l2_clip_norm,
    poisson_sampling=False,
    grad_sample_mode=how,
  )
  model, optimizer, criterion = made[:3] if how == "ghost" else (*made[:2], criterion)
  criterion(model(images), labels.long()).backward()
  optimizer.pre_step()  # which clips, and takes the mean
  theirs = [UNITS * p.grad.numpy() for p in model.parameters()]
  assert_equal(torch_leaves(our_sum(l2_clip_norm)), theirs)


@RUNS
@pytest.mark.filterwarnings("ignore")
def test_epsilon_is_that_of_opacus(opacus, sigma, num_units, batch_size, steps, delta):
  rate, orders = (
    batch_size / num_units,
    [a for a in accounting.ORDERS if a <= 512],
  )  # its binomials overflow beyond
  rdp = opacus.accountants.analysis.rdp
  curve = rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=orders)
  by_rdp, _ = rdp.get_privacy_spent(orders=orders, rdp=curve, delta=delta)
  assert spent(sigma, rate, steps, delta, "rdp") == pytest.approx(by_rdp, rel=1e-6)
  prv = opacus.accountants.PRVAccountant()
  prv.history = [(sigma, rate, steps)]
  tight = prv.get_epsilon(delta, eps_error=0.002)
  assert spent(sigma, rate, steps, delta, "pld") == pytest.approx(tight, rel=0.01)


def their_loss(params, images, labels):
  _, loss, _ = work()
  return loss(params, {}, Batch(images, labels, jnp.ones(labels.shape)), KEY)[0]


@NORMS
def test_the_clipped_sum_is_that_of_jax_privacy(jax_privacy, l2_clip_norm):
  params, _, batch = work()
  summed = jax.jit(
    jax_privacy.clipped_grad(their_loss, l2_clip_norm=l2_clip_norm, batch_argnums=(1, 2))
  )
  theirs = summed(params, batch.images, batch.labels)
  assert_equal(*map(jax.tree.leaves, (our_sum(l2_clip_norm), theirs)))


def linear_loss(params, images, labels):
  return jnp.mean((images.reshape(images.shape[0], -1) @ params - labels.astype(jnp.float32)) ** 2)


def test_padding_and_what_is_not_finite_are_left_out_as_in_jax_privacy(jax_privacy):
  _, _, batch = work()
  params, images = jnp.zeros(SIZE * SIZE), batch.images.at[3].set(jnp.nan)
  their_sum = jax_privacy.clipped_grad(linear_loss, l2_clip_norm=1.0, batch_argnums=(1, 2))
  metrics = Metrics(*3 * [jnp.ones(())])
  our_loss = lambda params, state, rows, key: (
    linear_loss(params, rows.images, rows.labels),
    (state, metrics),
  )
  our_sum = clipping.clipped_sum(our_loss, grid_of=FINE)
  for padding in (jnp.arange(UNITS) % 2 == 0, jnp.ones(UNITS, bool)):
    ours, _, _ = our_sum(
      params, {}, Batch(images, batch.labels, 1.0 - padding.astype(jnp.float32)), KEY
    )
    theirs = their_sum(params, images, batch.labels, is_padding_example=padding)
    np.testing.assert_allclose(grid.real(ours.integers, ours.step), theirs, rtol=2e-4, atol=2e-4)
  with pytest.raises(
    ValueError, match="num_microbatches=0"
  ):  # a Poisson batch without any example, as it draws them
    their_sum(params, images[:0], batch.labels[:0])


def test_sensitivity_and_noise_are_those_of_jax_privacy(jax_privacy):
  sigma, l2_clip_norm = 1.3, 0.7
  _, loss, _ = work()
  ours = plan.dp_sgd(
    loss, num_units=UNITS, sampling_rate=0.5, steps=1, rounds=1, delta=1 / UNITS,
    noise_multiplier=sigma, l2_clip_norm=l2_clip_norm,
  )  # fmt: skip
  theirs = jax_privacy.clipped_grad(linear_loss, l2_clip_norm=l2_clip_norm, batch_argnums=(1, 2))
  assert theirs.sensitivity() == ours.clipping.l2_clip_norm
  adder = jax_privacy.noise_addition.gaussian_privatizer(
    stddev=sigma * theirs.sensitivity(), prng_key=KEY
  )
  zeros, on = jnp.zeros(200_000), grid.choose(200_000, sigma)
  total = Rounded(zeros.astype(jnp.int32), jnp.float32(l2_clip_norm / on.steps), on)
  numbers = {"secret": SECRET, "step": jnp.uint32(0), "num_units": jnp.int32(2)}
  samples = (
    ours.privatizer.update(total, (), **numbers)[0],  # over 2 x 1/2 units
    adder.update(zeros, adder.init(zeros))[0],
  )
  assert stats.ks_2samp(*samples).pvalue > 1e-3
  assert (
    stats.ks_2samp(samples[0], samples[1] * 1.03).pvalue < 1e-6
  )  # a difference that counts would be seen


@RUNS
def test_epsilon_is_that_of_jax_privacy(jax_privacy, sigma, num_units, batch_size, steps, delta):
  theirs = pytest.importorskip("jax_privacy.accounting")
  options = {
    "noise_multipliers": sigma,
    "num_samples": num_units,
    "batch_size": batch_size,
    "delta": delta,
  }
  for accountant, config in (
    ("rdp", theirs.RdpAccountantConfig(orders=accounting.ORDERS)),
    ("pld", theirs.PldAccountantConfig()),
  ):
    epsilon = theirs.DpsgdTrainingAccountant(config).compute_epsilon(
      steps, theirs.DpParams(**options)
    )
    assert spent(sigma, batch_size / num_units, steps, delta, accountant) == pytest.approx(
      epsilon, rel=0.01
    )
