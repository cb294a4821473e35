"""What a run is told. Says which Python to use where this one will not do, before a package is imported.

Every command imports this first; it and the commands' own files keep to what an older Python can read.
"""

import importlib.util
import sys

if sys.version_info < (3, 12) or any(importlib.util.find_spec(name) is None for name in ("pydantic", "yaml")):
    reason = "is older than Python 3.12" if sys.version_info < (3, 12) else "lacks Shardwright's packages"
    sys.stderr.write(
        f"{sys.executable} {reason}; run `make setup` once, then use .venv/bin/python "
        "(or `. .venv/bin/activate` first)\n"
    )
    sys.exit(2)
