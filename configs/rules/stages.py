"""Rules of single stages: what one asks for that the others do not, such as weights to begin with. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.stages import (
    Config,
    DistillConfig,
    GrpoConfig,
    LongContextConfig,
    PreferenceConfig,
    RewardModelConfig,
    RftConfig,
    SftConfig,
    TeacherCacheConfig,
)

_NEEDS_WEIGHTS = {
    LongContextConfig: "long context continues",
    TeacherCacheConfig: "a cache is made of what is said by",
    DistillConfig: None,  # a student may begin at random
    SftConfig: "supervised fine-tuning starts from",
    PreferenceConfig: "learning from preferences starts from",
    RewardModelConfig: "a reward model starts from",
    RftConfig: "rejection sampling draws from",
    GrpoConfig: "reinforcement learning starts from",
}


def check_stage(config: Config) -> Iterator[str]:
    """Yield every rule that the config breaks as the stage that its class is."""
    needs = next((words for kind, words in _NEEDS_WEIGHTS.items() if isinstance(config, kind)), None)
    if needs is None and config.lora is not None:
        needs = "LoRA adapts"
    if needs is not None:
        yield from _check_has_weights(config, needs)
    yield from _check_offload(config)


def _check_offload(config: Config) -> Iterator[str]:
    """Yield why models cannot rest on the host, or need not."""
    if not config.parallel.offload_models:
        return
    draws_answers = isinstance(config, GrpoConfig) and config.is_training
    if not draws_answers and not config.second_models:
        yield (
            "parallel.offload_models: this run has one model, which computes all the time, and nothing to do by turns; "
            "a value that would work: false"
        )
    fp8 = config.precision.fp8
    if fp8 is not None and fp8.param_gather:
        yield (
            "parallel.offload_models: weights that are in FP8 alone (precision.fp8.param_gather) stay on the device; "
            "a value that would work: false"
        )


def _check_has_weights(config: Config, needs: str) -> Iterator[str]:
    checkpoint = config.checkpoint
    is_going_on = checkpoint.resume not in ("auto", "never")
    if not is_going_on and checkpoint.init_from is None and checkpoint.init_from_hf is None:
        yield (
            f"checkpoint.init_from: {needs} a trained model, and none is named; a value that would work: "
            "runs/demo, the directory of the run that trained it (or checkpoint.init_from_hf, a Hugging Face model's)"
        )
