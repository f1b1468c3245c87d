"""Models that score: rewards of completions and of steps, labels for the latter, search guided by them."""
