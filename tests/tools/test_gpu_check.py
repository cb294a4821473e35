"""gpu_check's own checks, run on CPU ranks at small size: they pass on sound code and fail on broken code."""

import json

import pytest

from configs.errors import BadInput
from tests import forked
from tools import gpu_check
from tools.device_checks.outcome import Outcome, judge, run_check

TINY = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "vocab_size": 100}


def run_step_checks(place):
    from tools.device_checks.engine import build_config
    from tools.device_checks.hosts import check_device_facts
    from tools.device_checks.profile import check_profile
    from tools.device_checks.speed import check_speed
    from tools.device_checks.steps import check_collectives, check_loss_scaler, check_steps
    from tools.one_rank import open_world

    with open_world("cpu") as mesh:
        outcomes = [
            check_device_facts(mesh),
            check_collectives(mesh),
            *(check_steps(mesh, name) for name in ("fp32", "bf16", "fp16")),
        ]
        outcomes += [check_loss_scaler(mesh), check_speed(mesh, "tiny", build_config("fp32", TINY), num_steps=2)]
        outcomes += [check_steps(mesh, "bf16", {"recipe": "delayed", "backend": "emulated"})]
        outcomes += [check_steps(mesh, "bf16", {"recipe": "tensorwise", "backend": "torch"})]
        outcomes += [check_profile(mesh, "tiny", build_config("fp32", TINY))]
    return outcomes


def test_large_shapes_break_no_rule():
    from configs.rules.check import check_config
    from tools.device_checks.speed import llama_shape

    for model in ("llama3_2_1b", "llama3_2_3b"):
        config = llama_shape(model, "bf16", 8192, {"recipe": "tensorwise", "backend": "torch"})
        assert check_config(config, 1, platform="cuda", has_te=False) == []
        assert config.train.global_batch_size == 4


def run_fp8_products(place):
    """Check torch's own FP8 product on the CPU, sound and with a scale that is forgotten."""
    from dataclasses import replace
    from unittest.mock import patch

    from tools.device_checks.fp8 import check_multiply
    from tools.one_rank import open_world
    from trainer.model.fp8.multiply import multiply_scaled

    def forgetful(left, right, dtype, *, is_forward):
        return multiply_scaled(replace(left, inverse_scale=left.inverse_scale * 2), right, dtype, is_forward=is_forward)

    # torch multiplies FP8 in a plain loop on some processors
    small = ((32, 48, 80), (64, 80, 48))
    with open_world("cpu") as mesh, patch("tools.device_checks.fp8.SHAPES", small):
        sound = check_multiply(mesh, "tensorwise")
        with patch("trainer.model.fp8.multiply.multiply_scaled", forgetful):
            return sound, check_multiply(mesh, "tensorwise")


def test_a_wrong_fp8_product_is_seen(ranks):
    sound, broken = ranks.run(run_fp8_products)[0]
    assert sound.status == "passed" and 0 < sound.figures["error"] < 1e-2, sound
    assert broken.status == "failed" and "error" in broken.detail


@pytest.mark.slow
def test_the_loops_cost_is_measured(monkeypatch):
    from tools.bench import throughput
    from tools.device_checks import speed

    monkeypatch.setattr(throughput, "subprocess", forked)

    model = json.dumps({"model": TINY | {"max_position_embeddings": 4096, "vocab_size": 128}})
    monkeypatch.setattr(speed, "MODELS", type("Folder", (), {"__truediv__": lambda *_: Text(model)})())
    outcome = speed.check_loop_cost("cpu", seq_len=256)
    assert outcome.status == "passed" and 0.3 < outcome.figures["ratio"] < 3


class Text:
    """A file of this text."""

    def __init__(self, text):
        self._text = text

    def read_text(self, encoding):
        return self._text


def run_attention_checks(place):
    from tools.device_checks.attention import check_attention
    from tools.one_rank import open_world

    with open_world("cpu") as mesh:
        return [check_attention(mesh, name, use_te=False, seq_len=96) for name in ("fp32", "bf16", "fp16")]


def run_broken(place):
    """Run checks with a wrong attention scale, an optimizer that climbs and a collective that does nothing."""
    import torch.distributed as dist

    from tools.device_checks import steps
    from tools.device_checks.attention import check_attention
    from tools.one_rank import open_world
    from trainer.model.attention.core import SdpaCoreAttention
    from trainer.stages import training

    attend, schedule, gather = SdpaCoreAttention._attend, training.compute_learning_rate, dist.all_gather_into_tensor
    try:
        SdpaCoreAttention._attend = lambda self, query, *rest: attend(self, query * 1.01, *rest)
        training.compute_learning_rate = lambda *unused: -1e-4
        dist.all_gather_into_tensor = lambda *unused: None
        with open_world("cpu") as mesh:
            return [
                check_attention(mesh, "fp32", use_te=False, seq_len=32),
                steps.check_steps(mesh, "fp32"),
                steps.check_collectives(mesh),
            ]
    finally:
        SdpaCoreAttention._attend, training.compute_learning_rate = attend, schedule
        dist.all_gather_into_tensor = gather


def run_model_checks(place):
    """Run what a model must do on any device, sound and with each of its parts broken."""
    from unittest.mock import patch

    import torch.distributed as dist

    from parallel.replaced_names import resolve
    from tools.device_checks import conversations, lora, model, models, preferences, routers, steps
    from tools.one_rank import open_world
    from trainer.engine.engine import Engine
    from trainer.model.lora.adapter import Adapter
    from trainer.optim.update import update_weights

    def update_always(self, sums):
        return update_weights(self.optimizer, self.config, self.mesh, is_loss_finite=True)

    checks = [
        lambda: steps.check_control_group(mesh),
        lambda: model.check_replaced_names(mesh),
        lambda: model.check_scores(mesh),
        lambda: routers.check_router_gradient(mesh),
        lambda: steps.check_empty_batch(mesh),
        lambda: model.check_rotation(mesh),
        lambda: lora.check_lora(mesh, "bf16"),
        lambda: conversations.check_conversations(mesh),
        lambda: preferences.check_preferences(mesh),
        lambda: model.check_generation(mesh, "fp32"),
        lambda: models.check_turns(mesh, "bf16"),
    ]
    with open_world("cpu") as mesh:
        sound = [check() for check in checks]
        owner, name, _ = resolve("megatron.core.optimizer.clip_grads:l2_norm_impl")
        faults = [
            patch.object(dist, "all_gather_object", lambda *unused, **options: None),
            patch.object(owner, name, None),
            patch("trainer.engine.forward.forward_language_model", shift_labels),
            patch("trainer.engine.engine.scale_router_losses", lambda *unused: None),
            patch.object(Engine, "_update", update_always),
            patch("trainer.model.dynamic_rope.compute_dynamic_frequencies", rotate_by_the_longest),
            patch.object(Adapter, "merge", lambda self: None),
            patch("trainer.stages.sft.with_sample_weights", weigh_all_tokens),
            patch("trainer.stages.comparisons.sum_by_sequence", lambda values, *_: values.flatten()[:4]),
            patch("trainer.model.attention.cache.CachedTokens.visible", see_all_keys),
            patch("trainer.engine.turns.Turns._bring", bring_zeros),
        ]
        broken = []
        for check, fault in zip(checks, faults, strict=True):
            with fault:
                broken.append(check())
    return sound, broken


def weigh_all_tokens(batch):
    """Weigh every trained token of a row as much as the others, whatever its sample."""
    import dataclasses

    from trainer.data.batch import with_sample_weights

    columns = dict(with_sample_weights(batch).columns)
    columns["weights"] = batch.loss_mask * columns["ends"].sum() / batch.loss_mask.sum()
    return dataclasses.replace(batch, columns=columns)


def bring_zeros(turns):
    """Give memory back to the device without what was in it."""
    for storage, copy in turns._copies.values():
        storage.resize_(copy.numel())
        storage.fill_(0)
    turns.is_away = False


def shift_labels(model, batch):
    """Score the tokens themselves, not those that follow."""
    return model(batch.tokens, batch.position_ids, None, labels=batch.tokens)


def rotate_by_the_longest(rope, head_dim, lengths):
    """Rotate all documents as the longest among them."""
    from trainer.model.rope import compute_dynamic_frequencies

    return compute_dynamic_frequencies(rope, head_dim, lengths.max().expand(len(lengths)))


def see_all_keys(tokens, window, dtype):
    """Let every row see as far as the longest does."""
    return 0, tokens.longest, None


def test_what_a_model_must_do_on_any_device_is_seen(ranks):
    sound, broken = ranks.run(run_model_checks)[0]
    assert [one.status for one in sound] == ["passed"] * len(sound), sound
    assert "gloo beside gloo" in sound[0].detail and "Adam and gradient norm torch's" in sound[1].detail
    assert "128 of 256 tokens count" in sound[3].detail
    assert [one.status for one in broken] == ["failed"] * len(sound), broken
    for outcome, words in zip(
        broken,
        (
            "gather_objects changed the value",
            "l2_norm_impl is not ours",
            "differ by",
            "gradient is off",
            "changed the",
            "dynamic: losses differ by",
            "merged logits differ by",
            "losses differ by",
            "scores or losses differ by",
            "grouped: differs by",
            "by turns and",
        ),
        strict=True,
    ):
        assert words in outcome.detail


def test_every_check_is_listed_with_its_own_name(tmp_path):
    from types import SimpleNamespace

    platform = SimpleNamespace(check_precision=lambda compute: None, check_fp8=lambda recipe: None)
    names = [
        name for name, _ in gpu_check.list_checks(SimpleNamespace(platform=platform), "cpu", tmp_path, quick=False)
    ]
    assert len(set(names)) == len(names) > 25
    assert names[:4] == ["device facts", "collectives", "flight recorder", "control group"]
    assert names[4:8] == ["replaced names", "scores", "router losses", "empty batch"]


@pytest.mark.slow
def test_steps_collectives_scaler_and_speed_pass(ranks):
    outcomes = ranks.run(run_step_checks)[0]
    assert [one.status for one in outcomes] == ["passed"] * 8 + ["skipped", "passed"], outcomes
    assert "no FP8 units" in outcomes[8].detail
    scaler, speed, profile = outcomes[5], outcomes[6], outcomes[9]
    assert profile.figures["seconds matrix products"] > 0 and profile.figures["waits"] == 0
    # 2^20 must come down at least four times before -1 * scale fits into fp16, whose largest number is 65504
    assert 4 <= scaler.figures["num_skipped"] <= 15 and scaler.figures["last_loss_scale"] <= 2**16
    assert speed.figures["tokens_per_second"] > 0 and speed.figures["peak_memory_gb"] > 0.05
    assert not [name for name in speed.figures if name.startswith("mfu")]  # no peak is known for a CPU


def test_a_profile_tells_kinds_of_work_and_waits():
    from tools.device_checks.profile import _judge

    kernels = {
        "nvjet_hsh_192x192": 6.0, "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": 2.0,
        "triton_poi_fused_mul_silu": 1.0, "void at::native::vectorized_elementwise_kernel": 1.0,
    }  # fmt: skip
    sound = _judge("profile", ["engine.py:222", "clip_grads.py:138"], kernels, 12.5)
    assert sound.status == "passed" and "matrix products 60%, attention 20%, compiled 10%" in sound.detail
    assert "busy 80% of the time, 2 waits (clip_grads.py:138, engine.py:222)" in sound.detail
    assert sound.figures["seconds element by element"] == 1.0 and sound.figures["kernel nvjet_hsh_192x192"] == 6.0
    waiting = _judge("profile", ["attention.py:76"] * 5, kernels, 12.5)
    assert waiting.status == "failed" and waiting.detail == "the host waits 5 times in a step (attention.py:76)"


def test_attention_passes_in_every_format(ranks):
    outcomes = ranks.run(run_attention_checks)[0]
    assert [one.status for one in outcomes] == ["passed"] * 3, outcomes
    errors = [max(one.figures.values()) for one in outcomes]
    assert 0 < errors[0] < 1e-5 and 1e-4 < errors[2] < errors[1]  # fp32 < fp16 < bf16, as their mantissas are long


def test_broken_code_fails_its_check(ranks):
    attention, steps, collectives = ranks.run(run_broken)[0]
    assert attention.status == "failed" and "causal: error" in attention.detail
    assert steps.status == "failed" and "it should have fallen" in steps.detail
    assert collectives.status == "failed" and collectives.detail == "all_gather changed the values"


@pytest.mark.slow
def test_a_checkpoint_travels_and_a_wrong_continuation_is_seen(tmp_path, monkeypatch):
    from tools.device_checks import checkpoint

    monkeypatch.setattr(checkpoint, "subprocess", forked)
    outcome = checkpoint.check_checkpoint("cpu", "cpu", tmp_path)
    assert outcome.status == "passed", outcome
    assert list(outcome.figures.values()) == [0.0, 0.0]
    stay = {step: 5.0 - step / 10 for step in range(1, 10)}
    losses = iter([stay, {4: 4.6, 5: 4.5, 6: 4.41}, {7: 4.3, 8: 4.2, 9: 4.1}])
    monkeypatch.setattr(checkpoint, "_run", lambda *unused, **options: next(losses))
    outcome = checkpoint.check_checkpoint("cpu", "cpu", tmp_path)
    assert outcome.status == "failed" and "cpu to cpu: losses of steps 4-6 differ by 2.3e-03" in outcome.detail


def test_an_exception_is_a_failure_and_stops_no_other_check():
    def broken():
        raise ValueError("first line\nsecond line")

    def sound():
        return judge("b", [], "fine", {"x": 1.0})

    kept = []
    outcomes = gpu_check.run_checks([("a", broken), ("b", sound)], lambda so_far: kept.append(len(so_far)))
    assert kept == [1, 2], "a machine that is lost has left what was found on it"
    assert [(one.name, one.status) for one in outcomes] == [("a", "failed"), ("b", "passed")]
    assert outcomes[0].detail.startswith("ValueError in test_gpu_check.py:")
    assert outcomes[0].detail.endswith(": first line")
    assert run_check("c", lambda: judge("c", ["wrong", "worse"], "fine", {})).detail == "wrong; worse"


def test_checks_are_chosen_by_a_part_of_their_name():
    checks = [(name, lambda: judge("x", [], "fine", {})) for name in ("fp16 steps", "bf16 steps", "checkpoint")]
    assert gpu_check.choose(checks, ()) == checks
    assert [name for name, _ in gpu_check.choose(checks, ["steps"])] == ["fp16 steps", "bf16 steps"]
    with pytest.raises(BadInput, match="no check's name contains step9; names are fp16 steps, bf16 steps, checkpoint"):
        gpu_check.choose(checks, ["step9"])


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SHARDWRIGHT_PLATFORM", "cpu")
    assert gpu_check.main(["--out", str(tmp_path / "gpu.json")]) == 2
    said = capsys.readouterr().err
    assert "no GPU here" in said and said.count("\n") == 1
    assert not (tmp_path / "gpu.json").exists()


def test_exit_codes(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "HOST", "another")
    monkeypatch.setenv("SHARDWRIGHT_PLATFORM", "cpu")
    for all_passed, code in ((True, 0), (False, 1)):
        monkeypatch.setattr(gpu_check, "check_platform", lambda *unused, all_passed=all_passed, **options: all_passed)
        assert gpu_check.main([]) == code
    monkeypatch.setenv("SHARDWRIGHT_PLATFORM", "abacus")
    assert gpu_check.main([]) == 2
    assert "abacus" in capsys.readouterr().err


def test_table_and_json_hold_every_check(tmp_path, capsys):
    machine = {"date": "2025-01-01", "device": "some [GPU]", "collectives": "some", "torch": "2"}
    outcomes = [Outcome("a", "passed", "fine [x]", {"speed": 2.0}, 1.5), Outcome("b", "failed", "wrong")]
    gpu_check.print_table(machine, outcomes)
    gpu_check.write_json(tmp_path / "new" / "gpu.json", machine, outcomes, quick=True)
    out = capsys.readouterr().out
    assert "some [GPU]" in out and "fine [x]" in out and "failed" in out
    content = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert content["machine"] == machine and content["quick"] is True
    assert content["checks"][0] == {
        "name": "a", "status": "passed", "detail": "fine [x]", "figures": {"speed": 2.0}, "seconds": 1.5
    }  # fmt: skip


def run_reward_checks(place):
    """Check rewards, sound, with the worse answer preferred, and with others for answers alone."""
    from unittest.mock import patch

    from tools.device_checks.rewards import check_rewards
    from tools.one_rank import open_world
    from trainer.losses.reward import bradley_terry

    with open_world("cpu") as mesh:
        outcomes = [check_rewards(mesh, "bf16"), check_rewards(mesh, "bf16", has_adapters=True)]
        with patch("trainer.stages.reward.bradley_terry", lambda one, other, margin: bradley_terry(other, one, margin)):
            outcomes.append(check_rewards(mesh, "fp32"))
        with patch("trainer.evaluate.rewards.forward_values", lambda *both: 0.9 * forward_values(*both)):
            outcomes.append(check_rewards(mesh, "fp32"))
    return outcomes


def forward_values(model, batch):
    from trainer.engine import forward

    return forward.forward_values(model, batch)


def test_a_reward_model_that_learns_or_scores_wrongly_is_seen(ranks):
    *sound, swapped, shrunk = ranks.run(run_reward_checks)[0]
    assert [one.status for one in sound] == ["passed", "passed"], sound
    assert swapped.status == "failed" and "of the pairs are right" in swapped.detail
    assert shrunk.status == "failed" and "rewards in packed rows differ" in shrunk.detail
