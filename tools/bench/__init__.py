"""Benchmarks: each compares our training loop with another on the same model, data and layout."""
