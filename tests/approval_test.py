"""Approvals: a site refuses whatever its operator has not approved, and names both sides."""

import jax
import numpy as np
import pytest

from primia_jax import approval, models
from primia_jax.approval import NotApproved

SETTINGS = {"rounds": 3, "model": "mlp"}
CONFIG = models.ModelConfig("mlp", 3, (8, 8, 1))
PARAMS = models.build(CONFIG).init(jax.random.key(0))
APPROVED = approval.of(approval.shared(SETTINGS), "0.1.0 abc", "mlp", PARAMS)


def offered(settings=SETTINGS, code="0.1.0 abc", model="mlp", params=PARAMS):
  return approval.of(approval.shared(settings), code, model, params)


def refused(said):
  return pytest.raises(NotApproved, match=said)


def test_what_was_approved_is_trained_and_kept_in_a_file():
  approval.check(APPROVED, offered({"model": "mlp", "rounds": 3}))
  approval.check_parameters(APPROVED, jax.tree.map(lambda a: a + 1, PARAMS))
  assert approval.decode(approval.encode(APPROVED)) == APPROVED
  assert approval.digest(APPROVED) == approval.digest(offered())
  assert approval.digest(APPROVED) != approval.digest(offered(code="0.1.0 abd"))
  for wrong in (b"", b"{}", b"[1]", approval.encode(APPROVED).replace(b'"mlp"', b'"mlp", "x": 1')):
    with pytest.raises(ValueError, match="the approval is damaged"):
      approval.decode(wrong)
  with pytest.raises(ValueError, match="of version 2; this code reads version 1"):
    approval.decode(approval.encode(APPROVED).replace(b'"version": 1', b'"version": 2'))


def test_another_configuration_code_or_model_is_refused_by_name():
  with refused("rounds=300 where 3 was approved; seed=1 where None was approved"):
    approval.check(APPROVED, offered({"rounds": 300, "model": "mlp", "seed": 1}))
  with refused(r"other code: 0\.1\.0 evil where 0\.1\.0 abc was approved"):
    approval.check(APPROVED, offered(code="0.1.0 evil"))
  with refused("another model: cnn where mlp was approved"):
    approval.check(APPROVED, offered(model="cnn"))


def test_a_layer_that_copies_images_is_refused():
  """An imprint layer before the model (Fowl et al. 2022), or a first layer widened to be one."""
  params, state = PARAMS
  planted = {**params, "imprint": {"kernel": np.ones((64, 512), np.float32)}}
  with refused(r"imprint.* is float32\[64, 512\] where no such parameter was approved"):
    approval.check(APPROVED, offered(params=(planted, state)))
  wider = jax.tree.map(lambda a: np.zeros((*a.shape[:-1], 4096), a.dtype), params)
  for check in (lambda p: approval.check(APPROVED, offered(params=p)), refuse_later):
    with refused(r"is float32\[4096\] where float32\[\d+\] was approved"):
      check((wider, state))
  name, *_ = params
  with refused("is no such parameter where float32"):
    refuse_later(({k: v for k, v in params.items() if k != name}, state))
  with refused("numbers that are not finite"):
    refuse_later((jax.tree.map(lambda a: np.full_like(a, np.nan), params), state))


def refuse_later(params):
  approval.check_parameters(APPROVED, params)


def test_planted_starting_parameters_are_refused():
  """Of the approved form, one number changed."""
  flat, tree = jax.tree.flatten(PARAMS)
  planted = [np.array(flat[0]), *flat[1:]]
  planted[0].flat[0] += 1e-6
  theirs = offered(params=jax.tree.unflatten(tree, planted))
  with refused(f"other starting parameters: {theirs.start} where {APPROVED.start} was approved"):
    approval.check(APPROVED, theirs)
