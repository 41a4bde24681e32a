"""Checkpoints: official weights -> ours, and back."""
