"""Removability: the views decoded and compared, the metrics, and their statistics."""
