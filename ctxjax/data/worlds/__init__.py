"""Tasks that can train a base model of their own, and their tokenizers."""
