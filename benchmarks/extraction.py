"""What a clinic's queries tell about a model: agreement of a surrogate by number of queries.

  python -m benchmarks.extraction --data=FOLDER/pneumoniamnist_28.npz

The model is the small CNN, trained on half of PneumoniaMNIST's training images. The clinic asks it
about images of the other half, and sees logits truncated to multiples of 2^-16 (the encoded output
of a plan in Z_2^64), or the label alone. It trains the same network, from other parameters, on what
it saw. Agreement is on the 624 test images, beside the model's own accuracy and the agreement of a
surrogate that asks nothing. For a linear head on the model's own features, the error of the weights
from one query more than it has features.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

from benchmarks import measuring
from primia_jax import local, models
from primia_jax.attacks import extraction, shadows
from primia_jax.types import Site

_DATA = flags.DEFINE_string("data", "../shared/data/pneumoniamnist_28.npz", "The images.")
_QUERIES = flags.DEFINE_multi_integer("queries", [8, 32, 128, 512, 2048], "Numbers of queries.")
_STEPS = flags.DEFINE_integer("steps", 400, "Of a surrogate, in batches of 32.", lower_bound=1)
_EPOCHS = flags.DEFINE_integer("epochs", 5, "Of the model that is asked.", lower_bound=1)

CONFIG, UNIT, RATE = models.ModelConfig("cnn", 2, (28, 28, 1)), 2.0**-16, 2e-3


def main(_):
  file, rng = np.load(_DATA.value), np.random.default_rng(0)
  order = rng.permutation(len(file["train_labels"]))
  own, asked = np.split(order, 2)
  images, labels = file["train_images"][..., None], file["train_labels"].astype(np.int32)
  floats = lambda x: x.astype(np.float32) / 255
  test, test_labels = floats(file["test_images"][..., None]), file["test_labels"]
  model = models.build(CONFIG)
  predict = jax.jit(lambda params, x: model.apply(params, {}, x)[0])
  loss_fn = local.classification_loss(model.apply, lambda key, x, y: (floats(x), y), 2)
  steps = local.epochs(32, len(own), min_examples=len(own), num_epochs=_EPOCHS.value)
  recipe = local.Recipe(steps, local.gradients(loss_fn), None, optax.adam, lambda t: RATE)
  site = Site(jnp.int32(0), jnp.asarray(images[own]), jnp.asarray(labels[own]), jnp.int32(len(own)))
  victim, _ = jax.jit(shadows.trainer(recipe, model.init))(jax.random.key(0), site)
  answers = np.asarray(predict(victim, test))
  right = extraction.agreement(answers, np.eye(2)[test_labels])
  measuring.say("accuracy of the model asked", [right.value], "share", None)

  queries = jnp.asarray(floats(images[asked[: max(_QUERIES.value)]]))
  outputs = extraction.rounded(predict(victim, queries), UNIT)
  attack = extraction.surrogate(predict, optax.adam(RATE), batch_size=32)
  learn, start = jax.jit(extraction.learn(attack, _STEPS.value)), model.init(jax.random.key(1))[0]
  untrained = extraction.agreement(predict(start, test), answers)
  measuring.say("agreement of a surrogate that asks nothing", [untrained.value], "share", None)
  for answer, seen in (("logits", outputs), ("label", jnp.argmax(outputs, axis=-1))):
    targets = extraction.targets(seen, answer)
    for number in _QUERIES.value:
      params, _ = learn(jax.random.key(2), start, queries, targets, jnp.int32(number))
      found = extraction.agreement(predict(params, test), answers)
      name = f"agreement of a surrogate from {number} queries, {answer}"
      measuring.say(name, [found.value], "share", None, interval=(found.low, found.high))

  features = rng.normal(size=(129, 128))
  kernel, bias = (np.asarray(victim["head"][name]) for name in ("kernel", "bias"))
  seen = np.floor((features @ kernel + bias) / UNIT) * UNIT
  solved = extraction.solve_linear(features, seen)[0]
  error = np.linalg.norm(solved - kernel) / np.linalg.norm(kernel)
  measuring.say("linear head from 129 queries of 128 features", [error], "relative error", 1e-2)


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
