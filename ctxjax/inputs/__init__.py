"""The inputs of a run, opened or made before the first step: task, models, encoded questions, teacher samples."""
