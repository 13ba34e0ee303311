"""The two apps that Flower sends to its nodes, by name."""
