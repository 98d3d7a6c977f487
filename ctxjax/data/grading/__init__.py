"""Grading: from a response to a grade."""
