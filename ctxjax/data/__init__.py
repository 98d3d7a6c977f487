"""Questions, contexts and graders; prompts through the tokenizer's chat template; order and prefetch."""
