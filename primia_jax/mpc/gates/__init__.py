"""ReLU, truncation and sign of shared numbers, and the comparisons inside them."""
