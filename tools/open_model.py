"""A checkpoint's or a Hugging Face model's weights on the ranks of a launcher, in any layout, without an optimizer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import BadInput
from configs.roles import HeadKind
from configs.stages import Config
from parallel.environment import Environment
from parallel.platform import detect_platform_name, has_transformer_engine, load_platform

if TYPE_CHECKING:
    from trainer.engine.sharded_model import ShardedModel


def read_config_of(
    place: Path, overrides: Sequence[str], *, seq_len: int, world_size: int, seq_len_option: str = "train.seq_len"
) -> Config:
    """Return the config with which the model in `place` takes sequences of `seq_len` tokens on so many ranks.

    Architecture, number format and tokenizer are those of the place, the layout is one of data parallelism alone;
    `overrides` such as `parallel.cp=2` change that. `seq_len_option` is what the user gave the length by. Raises
    BadInput for what cannot be.
    """
    from configs.load import config_of
    from configs.rules.check import check_config

    values = _read_place(place)
    model = values["model"]
    model["max_position_embeddings"] = max(model["max_position_embeddings"], seq_len)
    values["train"] = {"num_steps": 0, "seq_len": seq_len, "micro_batch_size": 1, "global_batch_size": world_size}
    config, problems = config_of(values, overrides, "pretrain")
    if config is not None:
        has_te = has_transformer_engine()
        problems += check_config(config, world_size, platform=detect_platform_name(), has_te=has_te)
    if config is not None and config.train.seq_len != seq_len:
        raise BadInput(f"train.seq_len: {config.train.seq_len} would have no effect here; leave it out")
    if problems or config is None:
        raise BadInput("\n".join(problems).replace("train.seq_len: ", f"{seq_len_option}: "))
    return config


def read_template_of(place: Path) -> str | None:
    """Return the chat template that a run was trained with; None for its tokenizer's own, and for other places."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.manifest import read_manifest

    checkpoint = resolve_checkpoint(place)
    return None if checkpoint is None else read_manifest(checkpoint).template


def _read_place(place: Path) -> dict[str, Any]:
    """Return the sections that say what the model is; of a Hugging Face model fp32 on CPUs, elsewhere bf16."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.manifest import read_manifest
    from trainer.hf.config_json import load_config_json, read_model
    from trainer.hf.directories import find_model_directory

    checkpoint = resolve_checkpoint(place)
    if checkpoint is not None:
        saved = read_manifest(checkpoint).config
        return {
            "model": saved["model"],
            "precision": {"compute": saved["precision"]["compute"]},
            "data": {"tokenizer": saved["data"]["tokenizer"]},
        }
    if not (place / "config.json").is_file() and not (place / "snapshots").is_dir():
        raise BadInput(
            f"{place}: holds no complete checkpoint and no Hugging Face model; give a run such as runs/demo."
        )
    directory = find_model_directory(place)
    model = read_model(load_config_json(directory), directory / "config.json").model_dump()
    compute = "fp32" if detect_platform_name() == "cpu" else "bf16"
    return {"model": model, "precision": {"compute": compute}, "data": {"tokenizer": str(directory)}}


@contextlib.contextmanager
def open_model(
    config: Config, place: Path, environment: Environment, head: HeadKind = "vocabulary"
) -> Iterator[ShardedModel]:
    """Join the ranks and yield the model with its weights. Collective: all ranks of the world must call this."""
    import torch.distributed as dist

    from parallel.mesh import build_mesh, destroy_mesh, init_world

    os.environ.update(environment.as_variables())
    platform = load_platform(detect_platform_name())
    problem = platform.check_precision(config.precision.compute)
    if problem:
        raise BadInput(problem)
    device = platform.activate(environment.local_rank)
    init_world(platform, config, rank=environment.rank, world_size=environment.world_size, init_method="env://")
    try:
        mesh = build_mesh(platform, device, config)
        # These import Megatron-Core, which must happen after the platform is active.
        from trainer.engine.build import POLICY, ModelPlan, open_models
        from trainer.run.weights import load_weights

        with open_models({POLICY: ModelPlan(config, is_trained=False, head=head)}, mesh) as models:
            load_weights(models[POLICY], str(place))
            yield models[POLICY]
    finally:
        destroy_mesh()
        dist.destroy_process_group()
