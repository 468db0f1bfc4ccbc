"""A longer context window for a RoPE language model: LongRoPE (arXiv 2402.13753), searched, measured and exported."""

__version__ = "0.1.0"
