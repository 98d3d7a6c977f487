"""What is opened or made before the first step: task, models, encoded questions, teacher's samples."""
