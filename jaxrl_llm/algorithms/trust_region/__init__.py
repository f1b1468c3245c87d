"""TRPO: the natural-gradient step, its parts, and the exact divergence."""
