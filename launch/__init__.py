"""How a run starts. Says which Python to use where this one lacks the packages, before one of them is imported."""

import importlib.util
import sys

if any(importlib.util.find_spec(name) is None for name in ("pydantic", "yaml")):
    sys.stderr.write(
        f"{sys.executable} lacks Shardwright's packages; run `make setup` once, then use .venv/bin/python "
        "(or `. .venv/bin/activate` first)\n"
    )
    sys.exit(2)
