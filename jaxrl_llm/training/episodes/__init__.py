"""What every rollout needs: rewards, judges, dynamic sampling, evaluation."""
