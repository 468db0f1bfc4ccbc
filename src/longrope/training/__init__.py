"""Fine-tuning with factors: windows, a loss that never holds a window's logits, recipes, the run."""
