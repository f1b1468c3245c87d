"""Preferences: pairs and single labelled completions, given or sampled, the losses as parts, the presets."""
