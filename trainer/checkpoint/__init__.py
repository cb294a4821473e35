"""Checkpoints: where they lie (layout), what says they are whole (manifest), writing and reading them on any layout."""
