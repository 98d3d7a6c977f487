"""Lessons that a model writes from its own traces, and the choice among contexts made of them."""
