"""Measurements of a model with factors."""
