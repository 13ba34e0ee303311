"""All cases of the table, in its order."""

from benchmarks.conformance import elementwise, frameworks, layers, linear, structure

CASES = [*elementwise.CASES, *structure.CASES, *linear.CASES, *layers.CASES, *frameworks.CASES]
