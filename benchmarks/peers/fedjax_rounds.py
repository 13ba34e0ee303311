"""FedJAX: federated averaging with its jit backend. fedjax_rounds.py ROUNDS DATA MODEL K THREADS
(not used)
"""

import sys

import fedjax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import stepping

num_rounds, path, model, num_sampled, _ = sys.argv[1:]
with np.load(path) as data:
  images, labels = data["x"], data["y"]


def net(batch):
  x = batch["x"]
  if model == "mlp":
    return hk.Linear(10)(jax.nn.relu(hk.Linear(32)(hk.Flatten()(x))))
  x = jax.nn.relu(hk.Conv2D(32, 3, padding="VALID")(x))
  x = jax.nn.relu(hk.Conv2D(64, 3, padding="VALID")(x))
  x = hk.MaxPool(2, 2, "VALID")(x)
  return hk.Linear(10)(jax.nn.relu(hk.Linear(128)(hk.Flatten()(x))))


def loss(batch, logits):
  return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1)[:, 0]


classifier = fedjax.create_model_from_haiku(
  hk.transform(net), sample_batch={"x": images[0, :1], "y": labels[0, :1]}, train_loss=loss
)
clients = fedjax.InMemoryFederatedData(
  {i: {"x": x, "y": y} for i, (x, y) in enumerate(zip(images, labels, strict=True))}
)
sampler = fedjax.client_samplers.UniformGetClientSampler(
  clients, num_clients=int(num_sampled), seed=0
)
fedjax.set_for_each_client_backend("jit")
algorithm = fedjax.algorithms.fed_avg.federated_averaging(
  fedjax.model_grad(classifier),
  fedjax.optimizers.sgd(0.1),
  fedjax.optimizers.sgd(1.0),
  fedjax.ShuffleRepeatBatchHParams(batch_size=16, num_epochs=1),
)
state = algorithm.init(classifier.init(jax.random.PRNGKey(0)))


def one_round(index):
  global state
  sampler.set_round_num(index)
  state, _ = algorithm.apply(state, sampler.sample())
  jax.block_until_ready(state.params)


stepping.run(int(num_rounds), one_round, "fedjax", "jax")
