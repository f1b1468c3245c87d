"""Policy gradients: the objective as a record of parts, its estimators and surrogates, the update step, the presets."""
