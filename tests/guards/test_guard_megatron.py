"""Each entry point of megatron-core has one caller of ours, so that an upgrade has a reading list."""

import re

import pytest

# The benchmark's bare loop is megatron-core without us, so it calls the entry points itself.
EXEMPT = "tools/bench/"


@pytest.mark.parametrize(
    ("module", "home"),
    [
        (r"megatron\.core(\.parallel_state)\b", r"parallel/mesh\.py"),
        (r"megatron\.core\.pipeline_parallel(\.schedules|\.get_forward_backward_func)\b", r"parallel/schedule\.py"),
        (r"megatron\.core\.models\.gpt(\.gpt_model)?\.GPTModel\b", r"trainer/model/build\.py"),
        (r"megatron\.core\.dist_checkpointing(?!\.mapping|\.dict_utils)\b", r"trainer/checkpoint/\w+\.py"),
        # the words in which models, optimizers and converters say which shard they hold
        (
            r"megatron\.core\.dist_checkpointing\.(mapping|dict_utils)\b",
            r"trainer/(checkpoint/load|engine/fp8_history|engine/sharded_state|hf/shards)\.py",
        ),
        (r"megatron\.core\.distributed\.\w*DistributedDataParallel\b", r"parallel/replicate\.py"),
    ],
)
def test_one_caller_each(product_files, module, home):
    users = [
        f"{file.name}:{one.line}"
        for file in product_files
        for one in file.imports
        if re.match(module, one.module) and not one.for_types_only and not file.name.startswith(EXEMPT)
    ]
    assert any(re.match(home, user) for user in users), f"nobody in {home} imports {module}"
    assert not [user for user in users if not re.match(home, user)], f"{module} belongs to {home} alone: {users}"
