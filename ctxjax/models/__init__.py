"""The decoder, its parameters, and Hugging Face folders in and out."""
