"""A run: its arms, step by step, and their checkpoints.

In this room ``step`` is the index of a training step, from 0, and ``taken`` is the number of steps taken so far. The
step that people read, in metrics.jsonl, in the name of a checkpoint and in messages, is ``taken``.
"""
