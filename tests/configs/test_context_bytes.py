"""Bytes sent to share attention: figures worked out by hand, from a config's own sizes."""

import pytest

from configs.plan.context_bytes import HeadSizes, SentBytes, head_sizes, microbatch_bytes
from tests.small_runs import small_config

LATENT = {
    "num_query_groups": None,
    "rope": {"interleaved": True},
    "mla": {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
}


def test_heads_of_a_tp_rank():
    model = small_config(model={"num_attention_heads": 8}).model
    assert [head_sizes(model, tp) for tp in (1, 2, 4)] == [
        HeadSizes(8, 2, 8, 8), HeadSizes(4, 1, 8, 8), HeadSizes(2, 1, 8, 8)
    ]  # fmt: skip
    latent = small_config(model=LATENT).model
    heads = latent.num_attention_heads
    assert head_sizes(latent, 2) == HeadSizes(heads // 2, heads // 2, 24, 16)


# 100 tokens a rank; 8 query heads and 2 key-value heads of 8: queries are 6400 elements, keys and values 3200.
@pytest.mark.parametrize(
    "parallel, compute, method, forward, backward",
    [
        ({"cp": 4}, "fp32", "ring", 3 * 3200 * 4, 3 * 3200 * 4 + 4 * 3200 * 4),
        ({"cp": 4}, "bf16", "ring", 3 * 3200 * 2, 3 * 3200 * 2 + 4 * 3200 * 4),
        ({"cp": 4}, "bf16", "all_gather", 3 * 3200 * 2, 3 * 3200 * 2),
        ({"cp": 2}, "bf16", "ulysses", 8000 * 2, 8000 * 2),
        # keys and values repeated to four heads: 6400 elements
        ({"cp": 4}, "bf16", "ulysses", 19200 * 2 * 3 / 4, 19200 * 2 * 3 / 4),
        ({"cp": 4, "cp_inner": 2}, "bf16", "hierarchical", 16000 + 6400, 16000 + 6400 + 2 * 3200 * 4),
    ],
)
def test_worked_examples(parallel, compute, method, forward, backward):
    config = small_config(
        parallel["cp"],
        model={"num_attention_heads": 8, "max_position_embeddings": 400},
        parallel=parallel | {"cp_attention": method},
        precision={"compute": compute},
        train={"seq_len": 100 * parallel["cp"], "micro_batch_size": 1},
    )
    assert microbatch_bytes(config, method) == SentBytes(forward, backward)
