"""Losses as pure functions of what the model returned; each returns a `Loss`, summed, never averaged."""
