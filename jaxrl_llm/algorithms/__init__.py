"""Algorithms: objectives as frozen records, and the update steps that they compile into."""
