"""A run: its arms, step by step, and their checkpoints."""
