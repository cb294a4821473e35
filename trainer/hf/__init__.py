"""Hugging Face checkpoints in and out: names and shapes (families, rules), files, import, export, comparison."""
