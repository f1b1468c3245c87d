"""What every run needs: checkpoints, resuming, metrics, the report, stopping, processes."""
