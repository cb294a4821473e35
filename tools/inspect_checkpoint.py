"""Show what a checkpoint holds: progress, layout, architecture, data ledger, versions, size; and whether it is whole.

Run: python tools/inspect_checkpoint.py runs/demo [--tensors] [--verify]
PATH is a checkpoint, a `latest` link or a run directory. Exit code 0, 1 damaged (--verify), 2 bad input.
Reads checkpoint.json alone: torch-free but for --tensors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script: the packages are beside tools/, which Python puts first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.errors import BadInput
from configs.plan.estimate import count_parameters
from configs.roles import HeadKind
from configs.sections.model import ModelConfig
from tools.console import Progress, end_process, run_command
from tools.paths import path_argument

if TYPE_CHECKING:
    from trainer.checkpoint.manifest import Manifest


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint as a whole, however many files its shards lie in."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint a path means. Raises BadInput where there is none."""
    from trainer.checkpoint.layout import resolve_checkpoint

    checkpoint = resolve_checkpoint(path)
    if checkpoint is None:
        raise BadInput(
            f"{path}: holds no complete checkpoint; give a run directory such as runs/demo, or "
            "runs/demo/checkpoints/step_00000100"
        )
    return checkpoint


def describe(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield the facts of a manifest as (name, text)."""
    state, config = manifest.state, manifest.config
    yield "step", f"{manifest.step} of {config['train']['num_steps']}"
    yield "consumed", f"{state['consumed_samples']:,} samples, {state['consumed_tokens']:,} tokens"
    yield "skipped steps", f"{state['num_skipped_steps']}"
    yield "run", f"{config['run']['name']} (seed {config['run']['seed']})"
    yield "stage", manifest.stage["name"]
    yield "layout", ", ".join(f"{axis} {size}" for axis, size in manifest.layout.items())
    fp8 = config["precision"].get("fp8")  # checkpoints from before FP8 have none
    yield "precision", config["precision"]["compute"] + (f", fp8 {fp8['recipe']} ({fp8['backend']})" if fp8 else "")
    yield "versions", ", ".join(f"{name} {text}" for name, text in manifest.versions.items())
    num_bytes = sum(entry["bytes"] for entry in manifest.files.values())
    yield "size", f"{_megabytes(num_bytes)} in {len(manifest.files)} files"
    if config.get("lora"):  # checkpoints from before LoRA have none
        lora, base = config["lora"], (manifest.base or {}).get("path", "unknown")
        head = ", and the head" if manifest.head == "scalar" else ""
        yield "holds", f"adapters of rank {lora['rank']} beside {', '.join(lora['target_modules'])} of {base}{head}"
    if manifest.head == "scalar":
        yield "head", "scalar: one value a token, as reward models and critics have"
    yield from _describe_model(config["model"], manifest.head)
    yield from _describe_ledger(manifest.stage["state"])


def _describe_model(model: dict[str, Any], head: HeadKind) -> Iterator[tuple[str, str]]:
    from pydantic import ValidationError

    try:
        count = count_parameters(ModelConfig(**model), head)
        active = f", {count.active:,} active per token" if count.active != count.total else ""
        yield "parameters", f"{count.total:,}{active}"
    except ValidationError:
        yield "parameters", "unknown: the model section was written by another version"
    for name, value in model.items():
        if name not in ModelConfig.model_fields or value != _default(name):
            yield f"model.{name}", _flat(value)


def _default(name: str) -> Any:
    """Return the default of a model field as it stands in a manifest."""
    from pydantic import BaseModel

    default = ModelConfig.model_fields[name].default
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default


def _describe_ledger(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what was read of each source, and whatever else the stage keeps."""
    if state.get("data") is None:
        yield "data", "none read yet"
        return
    for name, value in state["data"].items():
        if isinstance(value, dict) and value and all(isinstance(entry, dict) for entry in value.values()):
            for source, entry in value.items():
                yield f"data.{name}", f"{source}: {_flat(entry)}"
        elif value not in ({}, []):
            yield f"data.{name}", _flat(value)


def _flat(value: Any) -> str:
    """Return a value as one short line; nested fields as `name=value`."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={_flat(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(_flat(inner) for inner in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def find_all_damage(checkpoint: Path, manifest: Manifest) -> list[str]:
    """Hash every file of a checkpoint, showing progress, and return one sentence for each that is not as written."""
    from trainer.checkpoint.manifest import find_damage

    problems: list[str] = []
    done = 0
    with Progress("hashing", sum(entry["bytes"] for entry in manifest.files.values())) as progress:
        for name, entry in manifest.files.items():
            problems += find_damage(checkpoint, manifest, [name])
            done += entry["bytes"]
            progress.show(done, name)
    return problems


def list_tensors(checkpoint: Path) -> list[TensorEntry]:
    """Return every tensor in the checkpoint by name, from its metadata alone. Raises BadInput if that is unreadable."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        entries = FileSystemReader(str(checkpoint)).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a damaged pickle raises
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"{checkpoint / '.metadata'}: unreadable ({first_line}); --verify tells which files are damaged"
        ) from error
    return [
        TensorEntry(name, tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for name, entry in sorted(entries.items())
        if isinstance(entry, TensorStorageMetadata)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="inspect_checkpoint.py", description="Show what a checkpoint holds.")
    parser.add_argument("path", type=path_argument, help="checkpoint, latest link or run directory")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape and type")
    parser.add_argument("--verify", action="store_true", help="hash every file; exit code 1 if one has changed")
    arguments = parser.parse_args(argv)
    problems: list[str] = []

    def command() -> None:
        from trainer.checkpoint.manifest import read_manifest

        checkpoint = find_checkpoint(arguments.path)
        manifest = read_manifest(checkpoint, is_only_shown=True)
        _print_facts(checkpoint, manifest)
        if arguments.verify:
            problems.extend(find_all_damage(checkpoint, manifest))
            if not problems:
                print(f"whole: all {len(manifest.files)} files are as they were written")
        if arguments.tensors and not problems:
            _print_tensors(list_tensors(checkpoint))

    code = run_command(command)
    if not problems:
        return code
    for problem in problems:
        print(f"damaged: {problem}", file=sys.stderr)
    return 1


def _print_facts(checkpoint: Path, manifest: Manifest) -> None:
    facts = list(describe(manifest))
    width = max(len(name) for name, _ in facts)
    print(checkpoint)
    for name, text in facts:
        print(f"  {name:<{width}}  {text}")


def _print_tensors(entries: Sequence[TensorEntry]) -> None:
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(f"  {entry.name:<{width}}  {entry.dtype:<9} {list(entry.shape)}")
    print(f"{len(entries)} tensors")


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    end_process(main)
