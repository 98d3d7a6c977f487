"""Many runs as one study: a grid of configurations, arms, seeds and learning rates, and one report over all of them."""
