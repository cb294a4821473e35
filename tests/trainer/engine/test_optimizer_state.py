"""What checkpoints hold of the optimizer: every element once and in its place, copied only where two ranks share it."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from configs.stages import Config
from tests.pool import Place
from tests.small_runs import build_stage, open_engine, save_checkpoint, small_config, train_steps

NUM_STEPS = 2
# Sizes that neither 128 nor the ranks divide, so that Megatron-Core pads parameters and buckets.
ODD_MODEL = {"num_layers": 2, "hidden_size": 40, "ffn_hidden_size": 52, "vocab_pad_multiple": 1}


def save_and_collect(place: Place, config: Config, run_dir: str, bucket_size: int | None) -> dict[str, np.ndarray]:
    """Train, save, and return this rank's pieces of the moments and main weights by key and place, as they lie."""
    import megatron.core.distributed as replication

    from trainer.engine.state import TrainState

    settings = replication.DistributedDataParallelConfig
    if bucket_size is not None:
        replication.DistributedDataParallelConfig = functools.partial(settings, bucket_size=bucket_size)
    try:
        with open_engine(place, config) as engine:
            if bucket_size is not None:
                assert all(len(buffer.buckets) > 2 for buffer in engine.modules[0].buffers)
            stage = build_stage(engine)
            state, _ = train_steps(stage, TrainState(), NUM_STEPS)
            save_checkpoint(engine, state, stage, Path(run_dir))
            return pieces_of(engine)
    finally:
        replication.DistributedDataParallelConfig = settings


def pieces_of(engine) -> dict[str, np.ndarray]:
    """Return what the optimizer updates here, by Megatron-Core's own maps: `state/key/layer/first` -> elements."""
    from trainer.engine.sharded_state import build_model_state

    names = {}
    for name, shard in build_model_state(engine.chunks, engine.mesh)["model0"].items():
        layer = re.search(r"layers\.(\d+)\.", name)
        names[getattr(shard, "data", None)] = f"{shard.key}/{layer[1] if layer else ''}"
    pieces = {}
    for part in engine.optimizer.chained_optimizers:
        for group in part.gbuf_ranges:
            for bucket in next(iter(group.values())):
                for parameter, ranges in bucket["param_map"].items():
                    index, order = part.model_param_group_index_map[parameter]
                    main = part.optimizer.param_groups[index]["params"][order]
                    states = {"param": main, **part.optimizer.state[main]}
                    for state, values in states.items():
                        key = f"{state}/{names[parameter]}/{ranges['param'].start}"
                        pieces[key] = values.detach().numpy().copy()
    return pieces


# With buckets, Megatron-Core's own `fully_reshardable` stores what lies a bucket's padding further on.
@pytest.mark.parametrize("bucket_size", [None, 3000], ids=["one_bucket", "buckets"])
@pytest.mark.parametrize("world, compute", [(1, "fp32"), (3, "fp32"), (4, "bf16")])
def test_every_element_is_stored_once_in_its_place(ranks, tmp_path, world, compute, bucket_size):
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.tensors import CheckpointTensors

    config = small_config(
        world,
        model=ODD_MODEL,
        precision={"compute": compute},
        train={"global_batch_size": 24},
        parallel={"overlap_grad_reduce": bucket_size is not None, "overlap_param_gather": False},
    )
    pieces = ranks.run(save_and_collect, config, str(tmp_path), bucket_size, world=world)
    checkpoint = resolve_checkpoint(str(tmp_path))
    tensors = CheckpointTensors(checkpoint)
    num_elements, num_cut = 0, 0
    for own in pieces:
        for key, expected in own.items():
            state, name, layer, first = key.split("/")
            is_weight = state == "param" and compute == "fp32"
            stored = tensors.read(name if is_weight else f"optimizer.state.{state}.{name}")
            stored = (stored[int(layer)] if layer else stored).flatten()
            piece = stored[int(first) : int(first) + expected.size]
            assert np.array_equal(piece.float().numpy(), expected), key
            num_elements += expected.size if state == "param" else 0
            num_cut += piece.numel() < stored.numel()
    assert num_cut > 0 or world == 1
    assert any(values.any() for own in pieces for key, values in own.items() if key.startswith("exp_avg"))
    num_bytes = sum(math.prod(tensors.shape(key)) * tensors.dtype(key).itemsize for key in tensors.keys)
    assert num_bytes == {"fp32": 12, "bf16": 14}[compute] * num_elements  # a weight that is its own main copy once


def resume_in(place: Place, config: Config, run_dir: str) -> dict[str, np.ndarray]:
    """Resume and return this rank's pieces, and the weights as `weight/<name>`."""
    from trainer.checkpoint.layout import resolve_checkpoint
    from trainer.checkpoint.load import resume

    with open_engine(place, config) as engine:
        resume(config, engine.mesh, build_stage(engine), resolve_checkpoint(run_dir))
        weights = {f"weight/{name}": value.float().detach().numpy() for name, value in named_weights(engine)}
        return pieces_of(engine) | weights


def named_weights(engine):
    return engine.chunks[0].named_parameters()


@pytest.mark.parametrize("before, after", [("fp32", "bf16"), ("bf16", "fp32"), ("fp32", "fp16"), ("bf16", "bf16")])
def test_the_main_weights_go_on_in_another_format(ranks, tmp_path, before, after):
    """They are what the optimizer had, to the bit, and the weights are those in the new format, not rounded twice."""
    import torch

    configs = {name: small_config(precision={"compute": name}) for name in (before, after)}
    trained = ranks.run(save_and_collect, configs[before], str(tmp_path), None)[0]
    resumed = ranks.run(resume_in, configs[after], str(tmp_path))[0]
    assert any(key.startswith("exp_avg") for key in trained)
    for key, values in trained.items():
        assert np.array_equal(resumed[key], values), key
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    mains = np.sort(np.concatenate([values for key, values in resumed.items() if key.startswith("param/")]))
    rounded = torch.from_numpy(mains).to(formats[after]).float().numpy()
    weights = np.concatenate([values.ravel() for key, values in resumed.items() if key.startswith("weight/")])
    assert np.array_equal(np.sort(rounded), np.sort(weights))


def find_copies(place: Place, config: Config) -> list[str]:
    """Return the keys of what a rank saves that does not lie where training has it."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    with open_engine(place, config) as engine:
        state = engine.sharded_state(None)
        ours = {value.untyped_storage().data_ptr() for _, value in named_weights(engine)}
        for part in engine.optimizer.chained_optimizers:
            for main, states in part.optimizer.state.items():
                ours |= {value.untyped_storage().data_ptr() for value in (main, *states.values())}
        shards = [one for one in nested_values(state) if getattr(one, "data", None) is not None]
        shards = [one for one in shards if hasattr(one.data, "untyped_storage")]
        assert len(shards) > 20
        return [one.key for one in shards if one.data.untyped_storage().data_ptr() not in ours]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_one_rank_saves_what_it_has_without_a_copy(ranks, compute):
    assert ranks.run(find_copies, small_config(precision={"compute": compute}))[0] == []


def test_few_parameters_are_copied_where_ranks_share_them(ranks):
    """Of the 27 parameters at most one and its two moments a border between two of the four ranks."""
    copies = [key for own in ranks.run(find_copies, small_config(4), world=4) for key in own]
    assert 0 < len(copies) <= 2 * 3
