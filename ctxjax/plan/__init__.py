"""Whether a configuration fits a slice of chips, how fast it could be there, and what it would send: told beforehand.

The whole step (train_step.py) is compiled ahead of time for the named devices, from shapes alone.
"""
