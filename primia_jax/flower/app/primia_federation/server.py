"""What the coordinator's SuperLink runs."""

from primia_jax.flower.coordinating import app

__all__ = ["app"]
