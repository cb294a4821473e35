"""The command line all entry points of `launch/` share: what was typed, not what it means. Torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from configs.errors import BadInput

_OPTIONS = ("--help", "-h", "--dry-run", "--world-size")


@dataclass(frozen=True)
class Arguments:
    """What was typed after the name of the entry point."""

    config_path: str | None = None
    overrides: tuple[str, ...] = ()
    dry_run: bool = False
    world_size: int | None = None
    help: bool = False


def usage(stage: str) -> str:
    """Return the usage text of one stage's entry point, without the fields of the config."""
    return f"""\
usage: {stage}.py CONFIG [key=value ...] [--dry-run [--world-size N]]

  CONFIG          YAML file of the run, for example configs/demo/{stage}.yaml; its `base:` (a path relative to it, or
                  a list of them) is read first, and the file's own fields go over it
  key=value       override of a field by its dotted name, for example train.num_steps=100 parallel.tp=2
  --dry-run       print the resolved config and what follows from it; check it and what it names; start nothing
  --world-size N  with --dry-run: number of ranks to plan for (default: the launcher's, else the fewest the layout has)
  --help          print this and every field of the config

start on one machine:   torchrun --nproc-per-node 4 launch/{stage}.py CONFIG
exit codes:             0 done, 2 bad input, 3 stopped after saving (signal), 4 non-finite, 5 peer lost or timed out
                        (torchrun turns each of them but 0 into 1; python -m launch.local and srun pass them on)"""


def parse_arguments(argv: Sequence[str], stage: str) -> Arguments:
    """Parse what follows the entry point's name; `stage` is the entry point's name for messages.

    Raises BadInput naming the word that cannot be understood.
    """
    if any(word in ("--help", "-h") for word in argv):
        return Arguments(help=True)
    words = list(argv)
    config_path: str | None = None
    overrides: list[str] = []
    dry_run, world_size = False, None
    while words:
        word = words.pop(0)
        if word == "--dry-run":
            dry_run = True
        elif word == "--world-size" or word.startswith("--world-size="):
            value = word.partition("=")[2] if "=" in word else (words.pop(0) if words else "")
            world_size = _world_size(value)
        elif word.startswith("-"):
            raise BadInput(f"{word}: unknown option; {_nearest_option(word)}")
        elif "=" in word and "/" not in word.partition("=")[0]:  # a config with "=" in its name is written ./a=b.yaml
            overrides.append(word)
        elif config_path is None:
            config_path = word
        else:
            raise BadInput(f"{word}: a second config; the first is {config_path}; overrides are written key=value")
    if config_path is None:
        raise BadInput(f"no config given; for example: {stage}.py configs/demo/{stage}.yaml (--help lists every field)")
    if world_size is not None and not dry_run:
        raise BadInput("--world-size goes with --dry-run; a real run takes its size from torchrun or srun")
    return Arguments(config_path, tuple(overrides), dry_run, world_size)


def _world_size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--world-size: '{text}' is not a number of ranks; a value that would work: 8")
    return int(text)


def _nearest_option(word: str) -> str:
    if "=" in word:
        return f"overrides are written without dashes: {word.lstrip('-')}"
    near = difflib.get_close_matches(word, _OPTIONS, n=1)
    return f"did you mean {near[0]}?" if near else "the options are --dry-run, --world-size N and --help"
