"""A Hugging Face model -> a distributed checkpoint of ours, tensor by tensor, the work shared among ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import yaml

from configs.load import resolved_dict
from configs.sections.model import ModelConfig
from configs.stages import Config
from parallel.collectives import gather_objects, gather_to_rank_zero
from trainer.checkpoint.layout import (
    PARTIAL_PREFIX,
    checkpoint_name,
    checkpoints_dir,
    part_directory,
    publish,
)
from trainer.checkpoint.manifest import IMPORT_STAGE, Manifest
from trainer.checkpoint.places import choose_place
from trainer.checkpoint.writing import IMPORT_FILE_BYTES, TensorFileWriter, write_metadata
from trainer.disk.growing import growing_directory
from trainer.engine.state import TrainState
from trainer.hf.companions import carry
from trainer.hf.source import HfModel

_PIECE = 2**22  # values
_COMPUTE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class ConversionReport:
    """What was converted, over all ranks."""

    num_tensors: int
    num_bytes: int
    seconds: float
    non_finite: dict[str, int]
    """Number of NaN and infinite values by tensor."""
    ignored: list[str]
    """Tensors left aside, as `transformers` does (multi-token prediction)."""
    notes: list[str]
    """What else was left aside, one sentence each (rank 0 knows)."""


def import_checkpoint(
    source: HfModel, run_dir: Path, *, rank: int, world_size: int, on_bytes: Callable[[int], None]
) -> ConversionReport:
    """Write the model as the first checkpoint of a new run directory, which appears when it is whole.

    Peak memory is a few of the largest tensors; `on_bytes` is told the bytes this rank has done so far. Raises
    BadInput. Collective: all ranks of the world must call this.
    """
    started = time.perf_counter()
    rules = list(source.rules.values())
    with growing_directory(run_dir, rank=rank) as growing:
        partial = checkpoints_dir(growing) / f"{PARTIAL_PREFIX}{checkpoint_name(0)}"
        (partial / part_directory(rank, world_size)).mkdir(parents=True, exist_ok=True)
        writer = TensorFileWriter(partial, rank, world_size, IMPORT_FILE_BYTES)
        non_finite: dict[str, int] = {}
        done = 0
        for rule in rules[share([source.num_bytes(rule) for rule in rules], rank, world_size)]:
            tensor = source.read(rule.megatron.name)
            num_bad = count_non_finite(tensor)
            if num_bad:
                non_finite[rule.megatron.name] = num_bad
            place, sizes = choose_place(rule.megatron.name, source.model)
            writer.write(place, sizes, tensor)
            done += source.num_bytes(rule)
            on_bytes(done)
        written = gather_to_rank_zero(writer.close())
        counts = gather_objects((done, non_finite))
        if written is not None:
            _finish(source, growing, partial, write_metadata(partial, written))
    return ConversionReport(
        num_tensors=sum(len(rule.hf) for rule in rules),
        num_bytes=sum(num_bytes for num_bytes, _ in counts),
        seconds=time.perf_counter() - started,
        non_finite={name: count for _, bad in counts for name, count in bad.items()},
        ignored=source.ignored,
        notes=source.notes,
    )


def share(sizes: Sequence[int], rank: int, world_size: int) -> slice:
    """Return which of the items in a row are this rank's, so that all ranks have about as many bytes."""
    total, bounds, done = sum(sizes), [0], 0
    for position, size in enumerate(sizes):
        while len(bounds) < world_size and done >= total * len(bounds) / world_size:
            bounds.append(position)
        done += size
    bounds += [len(sizes)] * (world_size + 1 - len(bounds))
    return slice(bounds[rank], bounds[rank + 1])


def count_non_finite(tensor: torch.Tensor) -> int:
    """Return how many values are NaN or infinite; by pieces, since the check takes several times their memory."""
    if math.isfinite(float(tensor.sum(dtype=torch.float32))):
        return 0  # one of them would show in the sum
    pieces = tensor.reshape(-1).split(_PIECE)
    return sum(piece.numel() - int(torch.isfinite(piece).sum()) for piece in pieces)


def model_yaml(model: ModelConfig) -> str:
    """Return a `model:` section as YAML, to be named as `base:` of a run."""
    return yaml.safe_dump({"model": model.model_dump(mode="json", exclude_defaults=True)}, sort_keys=False)


def _finish(source: HfModel, growing: Path, partial: Path, files: dict[str, dict[str, object]]) -> None:
    """Write what makes the files a checkpoint and the directory a run directory. Rank 0 alone calls this."""
    config = Config.model_validate(
        {
            "run": {"name": "imported", "dir": str(source.directory)},
            "model": source.model.model_dump(),
            "precision": {"compute": _COMPUTE.get(source.dtype, "fp32")},
            "train": {"num_steps": 0, "seq_len": min(4096, source.model.max_position_embeddings)},
        }
    )
    Manifest(
        step=0,
        state=TrainState().as_dict(),
        stage={"name": IMPORT_STAGE, "state": {}},
        layout={"world": 1},
        config=resolved_dict(config),
        versions={name: version(name) for name in ("torch", "megatron-core")},
        files=files,
        head=source.head,
    ).write(partial)
    publish(partial, 0)
    carry(source.directory, growing)
    (growing / "model.yaml").write_text(model_yaml(source.model), encoding="utf-8")
