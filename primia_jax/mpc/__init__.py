"""Encrypted inference: a JAX function as a protocol between a model owner and a data owner.

The model owner calibrates, chooses the ring and plans on data of its own, in one call:

>>> import jax, jax.numpy as jnp
>>> from primia_jax import mpc
>>> def apply(weights, image):  # any function of supported primitives, or a module
...   return jax.nn.relu(image @ weights["in"]) @ weights["out"]
>>> weights = {"in": jnp.eye(4) / 2, "out": jnp.ones((4, 1))}
>>> images = jnp.array([[1.0, -2.0, 3.0, 0.5], [2.0, 0.0, -1.0, 4.0]])
>>> private = mpc.secret(apply, weights, examples=images, target_error=1e-2)
>>> private(images[0]).tolist()  # all three roles in this process, under encryption
[2.25]
>>> private.check(images[1]).error < 1e-2
True

The same by three roles, each with nothing but its own (`roles` says who learns what). The plan and
the messages can be written to files (`write`, `read`):

>>> plan, model_owner = private.plan, private.model_owner()
>>> dealer = mpc.Dealer(plan, model_owner.tag)
>>> data_owner = mpc.DataOwner(plan, model_owner.publish(dealer.blind()))
>>> first, second = dealer.deal()  # for one inference; a second use is refused
>>> asked, question = data_owner.ask(data_owner.prepare(second), images[0])
>>> answered = model_owner.answer(model_owner.prepare(first), question)
>>> online = mpc.online(plan)  # both parties in this process; `mesh` puts each on its own device
>>> data_owner.reveal(online(answered, asked)).tolist()
[2.25]

For simulations under `jit` and `vmap`, `private.transform(key, image)` is traceable; a key is then
an array and cannot know that it was used.
"""

from primia_jax.mpc.circuit import Config
from primia_jax.mpc.clear import check
from primia_jax.mpc.fitting import fit
from primia_jax.mpc.planning import Plan, calibrate, plan
from primia_jax.mpc.pricing import Network
from primia_jax.mpc.private import Private, secret
from primia_jax.mpc.roles import DataOwner, Dealer, ModelOwner, infer, online
from primia_jax.mpc.saving import read, write
from primia_jax.mpc.sharing import party_mesh

__all__ = [
  "Config",
  "DataOwner",
  "Dealer",
  "ModelOwner",
  "Network",
  "Plan",
  "Private",
  "calibrate",
  "check",
  "fit",
  "infer",
  "online",
  "party_mesh",
  "plan",
  "read",
  "secret",
  "write",
]
