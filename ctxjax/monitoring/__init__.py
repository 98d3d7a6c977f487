"""What a run writes while it lasts, and what it warns of."""
