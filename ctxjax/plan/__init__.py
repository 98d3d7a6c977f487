"""Plan a run: does it fit a slice of chips, how fast can it be at best, and how much do the chips send to each other?

The whole step (distill/train_step.py) is compiled ahead of time for the named devices, from shapes only.
"""
