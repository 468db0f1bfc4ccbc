"""The search of rescale factors: ask for candidates, evaluate them, tell their values."""
