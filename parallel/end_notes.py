"""What is left for a batch script of why a run ended: a file in the directory that SHARDWRIGHT_ENDS names.

Imports no packages: the process beside a rank uses it too (`parallel/watch/sentinel.py`).
"""

from __future__ import annotations

import contextlib
import os
import socket


def note_end(exit_code: int, sentence: str = "") -> None:
    """Leave a file CODE.HOST with who ended so and why in the directory that SHARDWRIGHT_ENDS names, if there is one.

    A batch script reads there why the ranks ended: torchrun turns every code into 1, and srun tells the largest of all
    nodes, which may be that of ranks that only lost a peer. A host's first rank with that code is the one that writes.
    """
    directory = os.environ.get("SHARDWRIGHT_ENDS")
    if not directory:
        return
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    with contextlib.suppress(OSError):  # also where the disk is full: the empty file says enough
        with open(os.path.join(directory, f"{int(exit_code)}.{host}"), "x", encoding="utf-8") as file:
            file.write(f"rank {os.environ.get('RANK', '0')} on {host}{': ' if sentence else ''}{sentence}\n")
