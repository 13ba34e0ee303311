"""What each hospital's SuperNode runs."""

from primia_jax.flower.bridging import app

__all__ = ["app"]
