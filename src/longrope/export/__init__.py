"""Checkpoints with factors, as engines load them."""
