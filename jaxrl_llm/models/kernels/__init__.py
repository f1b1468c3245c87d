"""Implementations of attention beside the dense one, which needs all scores in memory."""
