"""Text from the engine that trains."""
