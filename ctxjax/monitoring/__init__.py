"""What a run writes while it trains, and what it warns of."""
