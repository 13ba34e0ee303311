"""What the update of the last layer tells: its inputs, exactly, of one image and one step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.attacks import linear, scores
from primia_jax.attacks.evidence import Evidence
from primia_jax.types import Array

from . import laboratory
from .context import Context
from .parts import Part
from .recognition import seen_by

_THREAT = "honest server, one image and one step a site"


def audit(context: Context) -> Part:
  """Inverts the head's update under each protection, and states the rank of a round's own."""
  title = "The last layer"
  on = laboratory.bench(context, context.effort.candidates, context.effort.victims)
  if head(on.model.params) is None or on.num_victims < 1:
    return Part(title, ("Left out: the model has no dense last layer, or too few images.",))
  inputs = jax.jit(lambda gradient: linear.invert(*_of_head(gradient)))
  of_image = jax.jit(
    lambda image, label: inputs(
      laboratory.mean_gradient(context, on.model, image[None], label[None])
    )
  )
  candidates = np.stack([of_image(*pair) for pair in zip(on.images, on.labels, strict=True)])
  truth, evidence = np.arange(on.num_victims), []
  for protection in laboratory.protections(context):
    context.note(f"the last layer, {protection.name}")
    found = np.stack(
      [
        inputs(gradient)
        for gradient in laboratory.updates(context, on, protection, range(len(truth)))
      ]
    )
    named = scores.identify(jnp.nan_to_num(found), jnp.asarray(candidates), jnp.asarray(truth))
    evidence.append(
      Evidence(
        _THREAT, "head inversion", protection.name,
        f"identification among {len(candidates)}, {len(truth)} images",
        named.rate, named.interval, named.chance, occurs=False,
      )
    )  # fmt: skip
  evidence = [evidence[0], *(one._replace(control=evidence[0]) for one in evidence[1:])]
  text = (
    f"One image at each site and one step of SGD, on {on.which}: the quotient of the head's two "
    "gradients is the head's input, exactly where one image took part. The adversary names the "
    f"candidate whose input is nearest. {on.num_victims} images were tried.",
    *_rank(context),
  )
  return Part(title, text, tuple(evidence))


def head(params: Any) -> Mapping[str, Array] | None:
  """The parameters of the dense last layer; None where there is none of that name."""
  for name in ("head", "linear"):
    if isinstance(params, Mapping) and {"kernel", "bias"} <= set(params.get(name, ())):
      return params[name]
  return None


def _of_head(gradient: Any) -> tuple[Array, Array]:
  found = head(gradient)
  assert found is not None  # `audit` asked
  return found["kernel"], found["bias"]


def _rank(context: Context) -> list[str]:
  """What the updates of a recorded round hold of inputs."""
  if not context.has_transcript or context.config.federation.algorithm == "fedbn":
    return []
  one = context.rounds()[0]
  lines = []
  for view in seen_by(context.config, one).values():
    kernel, _ = _of_head(jax.tree.map(lambda a: a[0], view.updates))
    values = np.linalg.svd(np.asarray(kernel, np.float64), compute_uv=False)
    shares = values**2 / np.sum(values**2)
    told = ", ".join(f"{100 * share:.3g} %" for share in shares[:4])
    lines.append(f"{view.threat}: rank {int(linear.rank(kernel))} (shares {told})")
  return [
    f"The head's own update in round {one.number} holds no more directions of inputs than its "
    f"rank: {'; '.join(lines)}. No direction is a single image; candidates can still be tested "
    "(Recognising images in updates)."
  ]
