"""Tasks that can train their own base model, and their tokenizers."""
