"""Functions that score an answer, one file a kind: `function(reply, **options)`, a number, or None: does not apply."""
