"""Functions of shared numbers, built from gates and products."""
