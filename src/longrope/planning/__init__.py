"""What an extension will cost: memory, FLOPs and hours of every stage, from a configuration alone."""
