"""The decoder-only transformer, its configuration, and loading and saving of checkpoints."""
