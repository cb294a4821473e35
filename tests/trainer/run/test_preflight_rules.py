"""What preflight says of made-up findings, without processes."""

from __future__ import annotations

import dataclasses

import pytest

from configs.stages import Config, RewardModelConfig
from trainer.run.preflight import _checkpoint_bytes
from trainer.run.preflight_rules import Disk, Found, Summed, judge_agreement, judge_clocks, judge_disks, judge_sums

GIB = 2**30
VERSIONS = {"torch": "2.11.0", "megatron-core": "0.19.2", "code": "abc"}
WHO = [f"rank {rank} (tp 0/1, dp {rank}/4) on node{rank}" for rank in range(4)]
FOUND = [
    Found(
        who,
        f"node{rank}",
        "H100",
        VERSIONS,
        {"Python": "3.12.3", "driver": "580.65"},
        80 * GIB,
        79 * GIB,
        1980.0,
    )
    for rank, who in enumerate(WHO)
]


def with_odd(rank, **fields):
    return [dataclasses.replace(one, **fields) if one is FOUND[rank] else one for one in FOUND]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"versions": VERSIONS | {"torch": "2.10.0"}}, "torch: {who} has 2.10.0, where 3 of 4 ranks have 2.11"),
        ({"versions": VERSIONS | {"code": "abc with changes"}}, "code: {who} has abc with changes, where 3"),
        ({"device": "A100"}, "device: {who} has A100, where 3 of 4 ranks have H100; "),
        ({"memory_bytes": 40 * GIB}, "memory: {who} has 40.0 GiB where others have 80.0 GiB; "),
    ],
    ids=["torch", "code", "device", "memory"],
)
def test_a_rank_that_is_unlike_the_others_is_named(fields, said):
    findings = judge_agreement(with_odd(2, **fields))
    assert len(findings.failures) == 1 and not findings.warnings
    assert findings.failures[0].startswith(said.format(who=WHO[2]))


@pytest.mark.parametrize(
    "fields",
    [{"system": FOUND[0].system | {"driver": "570.1"}}, {"clock_mhz": 1500.0}, {"free_bytes": 60 * GIB}],
    ids=["driver", "clock", "memory in use"],
)
def test_what_is_only_odd_is_a_warning(fields):
    findings = judge_agreement(with_odd(1, **fields))
    assert not findings.failures and len(findings.warnings) == 1 and WHO[1] in findings.warnings[0]
    nothing = judge_agreement(FOUND)
    assert not nothing.failures and not nothing.warnings


def test_a_wrong_sum_and_a_slow_link_are_named():
    speeds = [10.0, 9.0, 3.0, 11.0]
    sums = [Summed(who, "tp", (rank,), 0, speed) for rank, (who, speed) in enumerate(zip(WHO, speeds, strict=True))]
    findings = judge_sums([*sums, Summed(WHO[3], "dp", (0, 1, 2, 3), 7, 5.0)])
    assert len(findings.failures) == 1
    assert findings.failures[0].startswith(f"{WHO[3]}: 7 numbers of a sum over its dp group came out wrong; ")
    assert findings.warnings == [f"the tp group of {WHO[2]} passes 3.00 GB/s where others pass 9.50 GB/s"]


def test_disks_are_judged_by_host():
    good = Disk(WHO[0], None, True, 10**12)
    for bad, said in (
        (Disk(WHO[1], "no space left on device", True, 0), "cannot write to runs/x (no space left on device); "),
        (Disk(WHO[1], None, False, 10**12), "does not see what rank 0 writes to runs/x; "),
        (Disk(WHO[1], None, True, 10**9), "sees 1.00 GB free in runs/x, and a checkpoint takes at least 2.00 GB; "),
    ):
        (failure,) = judge_disks([good, bad], "runs/x", 2 * 10**9).failures
        assert failure.startswith(f"run.dir: {WHO[1]} {said}")


def test_a_clock_that_is_off_is_a_warning():
    findings = judge_clocks([(WHO[0], 1000.0), (WHO[1], 1000.2), (WHO[2], 1003.0), (WHO[3], 999.9)])
    assert not findings.failures and len(findings.warnings) == 1
    assert findings.warnings[0].startswith(f"the clock of {WHO[2]} is 2.9 s ahead of the others'; ")


def test_a_checkpoint_of_adapters_takes_them_and_a_head():
    """Of a Llama whose parameters PEFT counts as 15,680 in rank 4 and a head of 64: 12 bytes each."""
    model = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 112, "num_attention_heads": 4, "vocab_size": 251}
    fields = {"model": model | {"num_query_groups": 2}, "train": {"num_steps": 1}, "lora": {"rank": 4}}
    sizes = [_checkpoint_bytes(kind.model_validate(fields)) for kind in (Config, RewardModelConfig)]
    assert sizes == [12 * (15_680 - 64), 12 * 15_680]
