"""Privacy-preserving medical image analysis in JAX."""
