"""The gate before the first update: which distance is measured, when it refuses, and what it then says."""

from __future__ import annotations

import numpy as np
import pytest

from configs.errors import BadInput
from configs.sections.grpo import GrpoSection
from configs.sections.precision import PrecisionConfig
from tests.small_rollouts import make_rollout
from trainer.rl.gate import check_agreement, default_tolerance

# Two rollouts of 3 and 1 tokens drawn; predictions 0 1 and 4 of the first are the policy's: it drew ids 1, 2 and 5.
FIRST = make_rollout((1, 2, 2, 1), sample=0, log_probs=[-1.0, -2.0, -3.0], token_ids=[10, 11, 12, 13, 14, 15])
SECOND = make_rollout((3, 1), sample=1, log_probs=[-0.5], source="gsm8k", group=4)
SCORED = {FIRST.key: np.array([-1.0, -2.1, 9.0, 9.0, -2.8]), SECOND.key: np.array([9.0, 9.0, -0.4])}


def spell(ids) -> str:
    return " ".join(f"<{number}>" for number in ids)


def test_the_distance_is_the_mean_over_all_tokens_drawn():
    mean = check_agreement([FIRST, SECOND], SCORED, 0.11, spell)
    assert mean == pytest.approx((0.0 + 0.1 + 0.2 + 0.1) / 4)
    assert check_agreement([SECOND], SCORED, 0.11, spell) == pytest.approx(0.1)
    assert check_agreement([], {}, 1e-9, spell) == 0


def test_what_is_too_far_apart_is_refused_with_the_worst_token():
    with pytest.raises(BadInput) as refusal:
        check_agreement([SECOND, FIRST], SCORED, 0.09, spell)
    said = str(refusal.value)
    assert said.startswith("grpo.gate_tolerance: ") and "\n" not in said
    for part in ("0.1 nats", "0.09", "'<15>'", "sample 0 to row 10 of made-up", "-3.0000 against -2.8000"):
        assert part in said, (part, said)
    accepted = float(said.rsplit("such as ", 1)[1])
    assert check_agreement([SECOND, FIRST], SCORED, accepted, spell) < accepted
    assert GrpoSection(gate_tolerance=accepted).gate_tolerance == accepted


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("of", ["training", "generation"])
def test_what_is_no_number_never_passes(value, of):
    scored, rollout = {FIRST.key: SCORED[FIRST.key].copy()}, FIRST
    if of == "training":
        scored[FIRST.key][1] = value
    else:
        rollout = make_rollout((1, 2, 2, 1), log_probs=[-1.0, value, -3.0], token_ids=FIRST.token_ids)
    with pytest.raises(BadInput) as refusal:
        check_agreement([rollout], scored, 1e6, spell)
    said = str(refusal.value)
    assert "'<12>'" in said and "such as inf" not in said, "what cannot be set is no advice"


def test_tolerances_follow_the_number_format():
    tolerances = [default_tolerance(PrecisionConfig(compute=compute)) for compute in ("fp32", "bf16", "fp16")]
    assert tolerances == [1e-4, 0.05, 0.05]
