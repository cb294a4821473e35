"""A world of one rank and engines on it, new or with a checkpoint's weights: what checks and comparisons run on."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import BadInput
from configs.stages import Config, RewardModelConfig
from parallel.platform import PlatformName, detect_platform_name

if TYPE_CHECKING:
    from parallel.mesh import Mesh
    from trainer.engine.engine import Engine

# The world needs a layout and a time-out, which are the defaults; the model is not looked at.
_ONE_RANK = {
    "model": {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8},
    "train": {"num_steps": 0},
}


@contextlib.contextmanager
def open_world(platform_name: PlatformName) -> Iterator[Mesh]:
    """Start a world of one rank with the platform's collectives and yield its mesh; it ends with the context."""
    import torch.distributed as dist

    from parallel.mesh import build_mesh, destroy_mesh, init_world
    from parallel.platform import load_platform

    platform = load_platform(platform_name)
    device = platform.activate(0)
    config = Config.model_validate(_ONE_RANK)
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        meeting = (Path(folder) / "store").as_uri()
        init_world(platform, config, rank=0, world_size=1, init_method=meeting)
        try:
            yield build_mesh(platform, device, config)
        finally:
            destroy_mesh()
            dist.destroy_process_group()


@contextlib.contextmanager
def open_engine(config: Config, mesh: Mesh) -> Iterator[Engine]:
    """Yield an engine with new weights, built as `trainer.run` builds it; its memory is free after the context."""
    from trainer.engine.build import build_engine

    engine = build_engine(config, mesh)
    try:
        yield engine
    finally:
        engine.close()
        del engine
        gc.collect()


@contextlib.contextmanager
def open_checkpoint(path: Path) -> Iterator[Engine]:
    """Yield an fp32 engine with the weights of a checkpoint. Raises BadInput where there is none, or it is damaged."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.manifest import read_manifest

    checkpoint = resolve_checkpoint(path)
    if checkpoint is None:
        raise BadInput(f"{path}: holds no complete checkpoint; give a run directory such as runs/demo.")
    manifest = read_manifest(checkpoint)
    model = manifest.config["model"]
    length = min(64, model["max_position_embeddings"])
    kind = RewardModelConfig if manifest.head == "scalar" else Config
    config = kind.model_validate(
        {"model": model, "precision": {"compute": "fp32"}, "train": {"num_steps": 0, "seq_len": length}}
    )
    with open_world(detect_platform_name()) as mesh, open_engine(config, mesh) as engine:
        from trainer.run.weights import load_weights  # imports megatron-core, which the platform prepares first

        load_weights(engine, str(checkpoint))
        yield engine
