"""What a clinic's questions tell of the final model, if it were served under encryption."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax import models
from primia_jax.attacks import extraction
from primia_jax.attacks.evidence import Evidence, beats_chance
from primia_jax.types import Array, Params

from .. import markdown
from ..configs.model import normalise
from . import context as shared
from .context import Context
from .parts import Part

_BITS = 10  # after the binary point, to which answers are rounded, about as a service's
_UNIT = 2.0**-_BITS
_STEPS, _BATCH, _RATE = 200, 32, 2e-3  # of the surrogate
_MOST = 2048  # queries
_SHARES = (1 / 16, 1 / 4, 1.0)  # of the public images that are asked
_LARGEST = 4096  # inputs of a linear model that is solved for
_THREAT = "clinic that asks an encrypted service"


def audit(context: Context) -> Part:
  """Imitates the model from its answers to public images, and says what an answer is worth."""
  title, trained = "Questions to the final model", context.trained
  if trained.model_state:
    return Part(title, ("Left out: the imitation knows no models with BatchNorm.",))
  number = models.num_parameters(trained.params)
  num_classes = len(trained.label_names)
  public, _ = shared.take(context.images.test, np.arange(len(context.images.test.labels)))
  order = np.random.default_rng(context.effort.audit_seed).permutation(len(public))
  asked = public[order[: min(_MOST, len(public) // 2)]]
  unseen = public[order[len(asked) :][:_MOST]]
  if len(asked) < _BATCH:
    return Part(title, ("Left out: there are too few public images to ask about.",))
  answer = jax.jit(
    lambda params, images: jax.lax.map(
      lambda image: _logits(context, params, image[None])[0], images
    )
  )
  answers = extraction.rounded(answer(trained.params, asked), _UNIT)
  truth = np.asarray(answer(trained.params, unseen))
  frequent = np.bincount(truth.argmax(1)).max() / len(truth)
  attack = extraction.surrogate(functools.partial(_logits, context), optax.adam(_RATE), _BATCH)
  learn = jax.jit(extraction.learn(attack, _STEPS))
  start, _ = context.config.model.initial(
    trained.config, jax.random.key(context.effort.audit_seed + 1)
  )
  rows, evidence = [], []
  soft = extraction.targets(answers, "logits")
  for share in _SHARES:
    num = max(2, round(share * len(asked)))
    context.note(f"extraction, {num} queries")
    key = jax.random.key(context.effort.audit_seed)
    mine, _ = learn(key, start, jnp.asarray(asked), soft, jnp.int32(num))
    same = extraction.agreement(np.asarray(answer(mine, unseen)), truth)
    percent = "{:.0f} % [{:.0f}, {:.0f}]".format(*(100 * v for v in same))
    rows.append((f"{num:,}", f"{num * num_classes:,}", f"{number / num:,.0f}", percent))
    evidence.append(
      Evidence(
        _THREAT, f"surrogate, {num:,} queries", "encrypted inference",
        f"same class, on {len(unseen)} other images", same.value, (same.low, same.high),
        float(frequent), note="guessing gives the most frequent class", occurs=False,
      )
    )  # fmt: skip
  text = (
    f"The model has {number:,} parameters. An encrypted service hides them, and not what its "
    f"answers say: {num_classes} numbers for each question, rounded to multiples of "
    f"2^-{_BITS} here. A clinic that follows the protocol asks about public images and trains a "
    "model of the same architecture on the answers; agreement is with the run's model on images "
    "that it did not ask about.",
    markdown.table(("queries", "numbers seen", "parameters per query", "agreement"), rows),
    f"To fix all parameters takes as many numbers at least: {-(-number // num_classes):,} queries, "
    f"1/{num_classes} per parameter. {_linear(context)} Nothing but a limit on questions, or "
    "answers of the class alone (--output=label), bounds this.",
  )
  failures = (
    f"a clinic that may put {num:,} questions to the model under encryption imitates it: the same "
    f"class on {percent} of other images, where the most frequent class is {frequent:.0%}",
  )
  return Part(title, text, tuple(evidence), failures if beats_chance(evidence[-1]) else ())


def _logits(context: Context, params: Params, images: Array) -> Array:
  return context.trained.model.apply(params, {}, normalise(images))[0]


def _linear(context: Context) -> str:
  """Where the model is linear in known features: solved for exactly, with this many questions."""
  trained = context.trained
  if trained.config.name != "scatter_linear":
    return (
      "A linear model of known features reaches that; for a network nobody knows a way that does."
    )
  features = np.shape(trained.params["linear"]["kernel"])[0]
  said = f"This model is linear in known features: {features + 1:,} queries do it, exactly."
  if features > _LARGEST:
    return said
  rng = np.random.default_rng(context.effort.audit_seed)
  queries = rng.normal(size=(features + 1, features))
  kernel, bias = (np.asarray(trained.params["linear"][n], np.float64) for n in ("kernel", "bias"))
  answers = np.asarray(extraction.rounded(queries @ kernel + bias, _UNIT))
  found, _ = extraction.solve_linear(queries, answers)
  error = np.linalg.norm(found - kernel) / np.linalg.norm(kernel)
  return said + f" From answers rounded as above the kernel's relative error was {error:.2g}."
