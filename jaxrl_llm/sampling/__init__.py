"""Sampling of completions: the distribution of a token, the decoding loop, and the compiled sampler."""
