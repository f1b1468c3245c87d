"""Training loops: data, sampling, rewards, updates, checkpoints and reports of a run."""
