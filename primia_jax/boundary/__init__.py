"""What crosses a trust boundary, and whether a fresh mask hides it."""

from primia_jax.boundary.report import Crossing as Crossing
from primia_jax.boundary.report import Report as Report
from primia_jax.boundary.report import Unmasked as Unmasked
from primia_jax.boundary.report import Violation as Violation
from primia_jax.boundary.rounds import audit as audit
from primia_jax.boundary.rounds import audit_round as audit_round
from primia_jax.boundary.secret import audit_secret as audit_secret
