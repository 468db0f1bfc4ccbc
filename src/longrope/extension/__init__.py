"""All stages of an extension in order: search, fine-tune, second interpolation, recovery."""
