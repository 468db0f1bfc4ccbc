"""Factors at run time: the exact switch between rows of a table while a text grows, and very long prompts."""
