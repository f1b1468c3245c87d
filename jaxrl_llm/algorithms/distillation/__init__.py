"""Distillation on the policy's own samples: the objective, the policy as its own teacher, the step, the presets."""
