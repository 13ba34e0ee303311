"""Differential privacy: what is done to gradients and updates, and what it costs."""
