"""What follows from a config: layouts, layers per chunk against megatron-core, and the batch-size ramp."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from configs.errors import BadInput
from configs.plan.derive import (
    chunk_layers,
    consumed_samples_after,
    derive_layout,
    global_batch_size_at,
    layers_per_pp_stage,
    num_microbatches,
    padded_vocab_size,
    ramp_batch_sizes,
    tokens_after,
    tokens_per_step,
)
from configs.sections.model import ModelConfig
from configs.sections.parallel import ParallelConfig
from configs.sections.train import BatchRampConfig, TrainConfig
from configs.stages import Config


def model_of(num_layers: int = 4, **fields: object) -> ModelConfig:
    sizes = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "vocab_size": 500}
    return ModelConfig(num_layers=num_layers, **(sizes | fields))


def config_of(**parallel: object) -> Config:
    train = TrainConfig(num_steps=10, seq_len=32, global_batch_size=16, micro_batch_size=2)
    return Config(model=model_of(), train=train, parallel=ParallelConfig(**parallel))


def test_layout_gives_what_remains_to_data_parallelism() -> None:
    layout = derive_layout(config_of(tp=2, pp=2, cp=2, ep=4, etp=1, vpp=2, sp=True), 32)
    assert (layout.dp, layout.edp, layout.etp, layout.sp, layout.vpp) == (4, 4, 1, True, 2)
    assert derive_layout(config_of(tp=2), 8).etp == 2


@pytest.mark.parametrize(("parallel", "world_size"), [({"tp": 2, "pp": 2}, 6), ({"ep": 4}, 6), ({}, 0)])
def test_layout_refuses_a_world_it_does_not_divide(parallel: dict[str, int], world_size: int) -> None:
    with pytest.raises(BadInput, match="no multiple of"):
        derive_layout(config_of(**parallel), world_size)


def test_vocabulary_is_padded_up_and_never_down() -> None:
    assert padded_vocab_size(model_of(vocab_size=500)) == 512
    assert padded_vocab_size(model_of(vocab_size=512)) == 512
    assert padded_vocab_size(model_of(vocab_size=513, vocab_pad_multiple=10)) == 520


STAGE_CASES = [
    (12, 1, 1, None, None),
    (12, 2, 1, None, None),
    (12, 3, 2, None, None),
    (24, 4, 3, None, None),
    (10, 3, 1, None, 2),
    (10, 3, 1, 2, None),
    (13, 4, 1, 2, 3),
    (5, 2, 1, 2, 3),
    (5, 2, 1, None, 2),
    (14, 4, 2, 2, 4),
    (16, 4, 2, None, 4),
    (12, 2, 2, 4, None),
    (12, 2, 2, None, 4),
    (28, 4, 2, 4, None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("num_layers", "pp", "vpp", "first", "last"), STAGE_CASES)
def test_chunks_hold_the_layers_megatron_core_builds(
    num_layers: int, pp: int, vpp: int, first: int | None, last: int | None
) -> None:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    parallel = ParallelConfig(pp=pp, vpp=vpp, num_layers_in_first_pp_stage=first, num_layers_in_last_pp_stage=last)
    theirs = SimpleNamespace(
        num_layers=num_layers,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        pipeline_model_parallel_layout=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    chunks = chunk_layers(model_of(num_layers), parallel)
    for pp_rank in range(pp):
        for vp_stage in range(vpp):
            stage = vp_stage if vpp > 1 else None
            offset = get_transformer_layer_offset(theirs, stage, pp_rank)
            count = get_num_layers_to_build(theirs, stage, pp_rank)
            assert chunks[pp_rank][vp_stage] == range(offset, offset + count)
    assert sorted(layer for stage in chunks for chunk in stage for layer in chunk) == list(range(num_layers))


@pytest.mark.parametrize(
    ("num_layers", "parallel", "start"),
    [
        (4, {"pp": 3}, "parallel.pp: 4 layers do not divide evenly among 3"),
        (4, {"pp": 8}, "parallel.pp: 4 layers do not divide evenly among 8"),
        (4, {"pp": 2, "vpp": 4}, "parallel.vpp: 4 does not divide the 2 layers"),
        (4, {"num_layers_in_last_pp_stage": 1}, "parallel.num_layers_in_last_pp_stage: has no meaning"),
        (
            5,
            {"pp": 2, "num_layers_in_first_pp_stage": 2, "num_layers_in_last_pp_stage": 2},
            "parallel.num_layers_in_last_pp_stage: the two stages hold 2 + 2 layers, not the 5 of model.num_layers",
        ),
        (
            12,
            {"pp": 2, "vpp": 2, "num_layers_in_first_pp_stage": 4, "num_layers_in_last_pp_stage": 8},
            "parallel.num_layers_in_last_pp_stage: two interleaved pipeline stages",
        ),
        (
            4,
            {"pp": 2, "num_layers_in_first_pp_stage": 4},
            "parallel.num_layers_in_first_pp_stage: 4 leaves too few of model.num_layers=4",
        ),
    ],
)
def test_layers_that_do_not_divide_are_refused(num_layers: int, parallel: dict[str, int], start: str) -> None:
    with pytest.raises(BadInput) as caught:
        layers_per_pp_stage(model_of(num_layers), ParallelConfig(**parallel))
    assert str(caught.value).startswith(start)


def test_the_uneven_last_stage_suggested_really_works() -> None:
    with pytest.raises(BadInput, match="num_layers_in_last_pp_stage=2"):
        layers_per_pp_stage(model_of(14), ParallelConfig(pp=4))
    assert layers_per_pp_stage(model_of(14), ParallelConfig(pp=4, num_layers_in_last_pp_stage=2)) == (4, 4, 4, 2)


RAMPS = [(4, 4, 16, 100), (8, 8, 64, 1000), (1, 3, 16, 7), (2, 2, 4, 1), (16, 16, 16, 50)]


def ramped(start: int, increment: int, full: int, num_samples: int) -> TrainConfig:
    ramp = BatchRampConfig(start=start, increment=increment, num_samples=num_samples)
    return TrainConfig(num_steps=1, seq_len=8, global_batch_size=full, batch_ramp=ramp)


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramp_follows_megatron_lms_formula(ramp: tuple[int, int, int, int]) -> None:
    start, increment, full, num_samples = ramp
    train = ramped(*ramp)
    num_increments = (full - start) // increment
    for consumed in range(num_samples + 20):
        expected = full
        if consumed < num_samples:
            expected = start + increment * (consumed * num_increments // num_samples)
        assert global_batch_size_at(train, consumed) == expected
        assert expected in ramp_batch_sizes(train)
    assert global_batch_size_at(train, 0) == start
    assert global_batch_size_at(train, num_samples) == full


@pytest.mark.parametrize("ramp", RAMPS)
def test_consumed_samples_equal_a_walk_step_by_step(ramp: tuple[int, int, int, int]) -> None:
    train, consumed = ramped(*ramp), 0
    for num_steps in range(120):
        assert consumed_samples_after(train, num_steps) == consumed
        assert tokens_after(train, num_steps) == consumed * 8
        consumed += global_batch_size_at(train, consumed)


def test_batches_without_a_ramp() -> None:
    config = config_of(tp=2)
    assert ramp_batch_sizes(config.train) == (16,)
    assert consumed_samples_after(config.train, 10**12) == 16 * 10**12
    assert tokens_per_step(config.train) == 16 * 32
    assert num_microbatches(config, derive_layout(config, 8), 16) == 2
    with pytest.raises(BadInput, match="a value that would work: 18"):
        num_microbatches(config, derive_layout(config, 6), 16)


def test_vocabulary_in_place_of_layers():
    """Llama 3.1 405B: 126 layers and two more on 8 stages of 8 chunks, the first and the last one layer short."""
    parallel = ParallelConfig(pp=8, vpp=8, vocabulary_counts_as_layers=True)
    chunks = chunk_layers(model_of(126), parallel)
    assert layers_per_pp_stage(model_of(126), parallel) == (15, *[16] * 6, 15)
    assert chunks[0][0] == range(0, 1) and chunks[1][0] == range(1, 3) and chunks[7][7] == range(125, 126)
    assert sorted(layer for stage in chunks for chunk in stage for layer in chunk) == list(range(126))
