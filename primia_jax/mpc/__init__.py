"""Encrypted inference: a JAX function as a protocol between a model owner and a data owner.

The model owner plans with its weights and calibrates on images of its own:

>>> import jax, jax.numpy as jnp
>>> from primia_jax import mpc
>>> def apply(weights, image):  # any function of supported primitives
...   return jax.nn.relu(image @ weights["in"]) @ weights["out"]
>>> weights = {"in": jnp.eye(4) / 2, "out": jnp.ones((4, 1))}
>>> image = jnp.array([[1.0, -2.0, 3.0, 0.5]])
>>> owners = ("model_owner", "data_owner")
>>> ranges = mpc.calibrate(apply, owners, [(weights, image)])
>>> config = mpc.Config(num_bits=32, fraction_bits=8)  # wider rings need jax_enable_x64
>>> plan = mpc.plan(apply, owners, (weights, image), config, ranges)

Three roles, each with nothing but its own (`roles` says who learns what):

>>> dealer, model_owner = mpc.Dealer(plan), mpc.ModelOwner(plan, weights)
>>> data_owner = mpc.DataOwner(plan, model_owner.publish(dealer.blind()))
>>> first, second = dealer.deal()  # for one inference; a second use is refused
>>> asked, question = data_owner.ask(data_owner.prepare(second), image)
>>> answered = model_owner.answer(model_owner.prepare(first), question)
>>> online = mpc.online(plan)  # both parties in this process; `mesh` puts each on its own device
>>> data_owner.reveal(online(answered, asked)).tolist()
[[2.25]]

The same in one call, and as a traceable function for research:

>>> mpc.infer(plan, weights, image).tolist()
[[2.25]]
>>> from primia_jax import prng
>>> mpc.secret(apply, owners, config, ranges)(prng.random_key(), weights, image).tolist()
[[2.25]]
"""

from primia_jax.mpc.circuit import Config
from primia_jax.mpc.clear import check
from primia_jax.mpc.fitting import fit
from primia_jax.mpc.inference import secret
from primia_jax.mpc.planning import Network, Plan, calibrate, plan
from primia_jax.mpc.roles import DataOwner, Dealer, ModelOwner, infer, online
from primia_jax.mpc.sharing import party_mesh

__all__ = [
  "Config",
  "DataOwner",
  "Dealer",
  "ModelOwner",
  "Network",
  "Plan",
  "calibrate",
  "check",
  "fit",
  "infer",
  "online",
  "party_mesh",
  "plan",
  "secret",
]
