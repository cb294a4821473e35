"""What is written here, Megatron-Core and PyTorch read with their own code, bit for bit, on every layout."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from configs.stages import Config
from tests.pool import Place
from tests.small_runs import build_stage, open_engine, small_config, train_steps

MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64}
ADAPTERS = {"lora": {"rank": 4, "alpha": 8}, "checkpoint": {"async_save": False, "init_from": "a seed"}}
FP8_MODEL = {"hidden_size": 256, "ffn_hidden_size": 256, "num_layers": 2, "num_query_groups": 4}
CASES = {
    "tp2_pp2_vpp2": (4, 256, {"parallel": {"tp": 2, "pp": 2, "vpp": 2}}),
    "experts_of_many_ranks": (4, 1, {"parallel": {"ep": 2}, "model": {"moe": MOE, "tie_embeddings": True}}),
    "bf16": (2, 1, {"precision": {"compute": "bf16"}}),
    "adapters": (2, 256, {"parallel": {"tp": 2}} | ADAPTERS),
    "fp8": (2, 256, {"model": FP8_MODEL, "precision": {"fp8": {"recipe": "delayed", "backend": "emulated"}}}),
}


def save_and_read(place: Place, config: Config, run_dir: str, ranks_per_directory: int) -> list[str]:
    """Save after each of two steps and return what the readers give otherwise than this rank holds it."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    from parallel.collectives import barrier
    from trainer.checkpoint import layout
    from trainer.checkpoint.parts import collect
    from trainer.checkpoint.save import CheckpointWriter
    from trainer.engine.state import TrainState

    with open_engine(place, config) as engine, patch.object(layout, "FILES_PER_DIRECTORY", ranks_per_directory):
        stage = build_stage(engine)
        writer, state = CheckpointWriter(run_dir, config, engine.mesh), TrainState()
        for _ in range(2):  # the first save deals out what the later ones write
            state, _ = train_steps(stage, state, 1)
            writer.save(state, stage)
            writer.finish()
        checkpoint = (Path(run_dir) / "checkpoints" / "latest").resolve()
        assert (checkpoint / "part_0001").is_dir() == (place.world_size > ranks_per_directory)
        readings = [dist_checkpointing.load_plain_tensors(str(checkpoint))]
        barrier()
        whole = Path(run_dir) / f"whole_{place.rank}.pt"
        dcp_to_torch_save(checkpoint, whole)
        readings.append(torch.load(whole, weights_only=False))
        shards, common = save_preprocess(collect(stage.parts, None))
        wrong = [] if dist_checkpointing.load_common_state_dict(str(checkpoint)).keys() == common.keys() else ["common"]
        for shard in nested_values(shards):
            if isinstance(shard, ShardedObject):
                wrong += [] if saved(readings[1][shard.unique_key]) == saved([shard.data]) else [shard.key]
                continue
            data = shard.data[(None,) * shard.prepend_axis_num]
            for tensors in readings:
                read = tensors[shard.key]
                assert tuple(read.shape) == tuple(shard.global_shape)
                for axis, (begin, length) in enumerate(zip(shard.global_offset, data.shape, strict=True)):
                    read = read.narrow(axis, begin, length)
                if read.dtype != data.dtype or not torch.equal(read, data):
                    wrong.append(shard.key)
        return wrong


def saved(content: Any) -> bytes:
    """Return what saving writes of a content."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_megatron_core_and_pytorch_read_what_is_written_here(ranks, tmp_path, case):
    world, ranks_per_directory, sections = CASES[case]
    config = small_config(world, **sections)
    assert ranks.run(save_and_read, config, str(tmp_path), ranks_per_directory, world=world) == [[]] * world
