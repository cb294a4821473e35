"""The one rule of paths: this user may enter and read each path of a config on this machine. Torch-free.

What is not there is no problem here: a plan for another machine may name it, and a run says what it misses.
"""

from __future__ import annotations

from collections.abc import Iterator

from configs.fields import path_values
from configs.paths import find_access_problem
from configs.stages import Config


def check_paths(config: Config) -> Iterator[str]:
    """Yield one sentence for each path of the config that is closed to this user."""
    for field, path, kind in path_values(config):
        problem = find_access_problem(path, kind.suffixes)
        if problem is not None:
            yield f"{field}: {problem}; give it the permissions, or name another path"
