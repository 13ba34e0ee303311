"""From a JAX function to a circuit of shared numbers."""
