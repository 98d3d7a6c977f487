"""The Hugging Face file format: model families, loading and saving."""
