"""Questions, contexts and graders; prompts in the tokenizer's chat template; shuffled and prefetched batches."""
