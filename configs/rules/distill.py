"""Rules of distillation: who teaches, what a cache cannot do, and fields that mean nothing to it. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from configs.rules.model import check_unused
from configs.sections.base import Section
from configs.stages import Config, DistillConfig, TeacherCacheConfig


def check_distill(config: Config) -> Iterator[str]:
    """Yield every rule of teachers, their caches and a student's own answers that the config breaks."""
    if not isinstance(config, DistillConfig):
        return
    distill, vocabulary = config.distill, config.model.vocab_size
    if distill.top_k is not None and distill.top_k > vocabulary:
        yield (
            f"distill.top_k: {distill.top_k} exceeds model.vocab_size={vocabulary}; a value that would work: "
            f"{min(64, vocabulary)}"
        )
    if config.is_of_text:
        yield from _check_text(config)
    targets = "in distillation, whose targets are the teacher's"
    yield from check_unused(config.sft, "sft", ("label_smoothing", "neftune_alpha"), targets)
    if isinstance(config, TeacherCacheConfig):
        yield from _check_cache(config)
        return
    if distill.teacher is None and distill.cache is None:
        yield (
            "distill.teacher: there is none to learn from; a value that would work: runs/demo_sft, the directory of "
            "the run that trained it (or distill.cache, what launch/teacher_cache.py wrote of one)"
        )
    if distill.cache is not None:
        yield from check_unused(distill, "distill", ("teacher", "top_k"), "with distill.cache, which has its own")
        if distill.lmbda:
            yield (
                "distill.lmbda: a cache knows nothing of the student's own answers; a value that would work: 0 (or "
                "distill.teacher in place of distill.cache)"
            )
    if distill.lmbda:
        yield from _check_answers(config)
    else:
        yield from check_unused(config.rollout, "rollout", tuple(type(config.rollout).model_fields), "with lmbda=0")


def _check_text(config: DistillConfig) -> Iterator[str]:
    """Yield what is wrong where `data` names what is read: nothing is asked there, and caches know documents."""
    distill, data = config.distill, config.data
    reason = "without sft.train, where text of data.train is read"
    names = [name for name in type(config.sft).model_fields if name not in ("label_smoothing", "neftune_alpha")]
    yield from check_unused(config.sft, "sft", names, reason)
    if distill.lmbda:
        yield (
            "distill.lmbda: text of data.train asks the student nothing; a value that would work: 0 (or conversations "
            "in sft.train)"
        )
    if distill.cache is None:
        return
    if data.packing != "best_fit":
        yield (
            f"data.packing: {data.packing} cuts documents where a seed says, and a cache knows them by what they are; "
            "a value that would work: best_fit"
        )
    if data.tokenizer is None:
        yield (
            "data.tokenizer: a cache is compared with it; a value that would work: the directory that the data was "
            "made with"
        )


def _check_answers(config: DistillConfig) -> Iterator[str]:
    """Yield what is wrong with the settings of a student's own answers."""
    rollout, seq_len = config.rollout, config.train.seq_len
    if config.longest_prompt < 1:
        yield (
            f"rollout.max_new_tokens: {rollout.max_new_tokens} leaves no room for a prompt in train.seq_len={seq_len}; "
            f"a value that would work: {max(seq_len // 2, 1)}"
        )
    if rollout.top_k is not None and rollout.top_k > config.model.vocab_size:
        yield f"rollout.top_k: {rollout.top_k} exceeds model.vocab_size={config.model.vocab_size}; a value to try: 50"
    if "" in rollout.stop_strings:
        yield "rollout.stop_strings: an empty text would stop every answer at once; a value that would work: []"
    if config.sft.train_on == "all":
        yield (
            "sft.train_on: all does not say where answers begin, which distill.lmbda asks the student for; a value "
            "that would work: assistant"
        )


def _check_cache(config: TeacherCacheConfig) -> Iterator[str]:
    """Yield what is wrong with a run that writes a cache."""
    distill, reason = config.distill, "in launch/teacher_cache.py, which trains nothing"
    if distill.cache is None:
        yield "distill.cache: says where to write, and is null; a value that would work: data/teacher_cache"
    if distill.top_k is None:
        yield (
            "distill.top_k: a cache holds so many ids of each token, and it is null; a value that would work: "
            f"{min(64, config.model.vocab_size)}"
        )
    if config.train.num_steps:
        yield f"train.num_steps: has no effect {reason}; a value that would work: 0"
    yield from check_unused(distill, "distill", ("teacher",), f"{reason}, and whose model is the teacher")
    yield from check_unused(distill, "distill", ("beta", "label_weight", "lmbda"), reason)
    yield from check_unused(config.rollout, "rollout", tuple(type(config.rollout).model_fields), reason)
    if config.lora is not None:
        yield f"lora: has no effect {reason}; a value that would work: null"
    unread: list[tuple[Section, str, set[str]]] = [
        (config.train, "train", {"num_steps", "seq_len", "global_batch_size", "micro_batch_size", "recompute"}),
        (config.optimizer, "optimizer", set()),
        (config.schedule, "schedule", set()),
        (config.checkpoint, "checkpoint", {"init_from", "init_from_hf"}),
        (config.sample, "sample", set()),
    ]
    for section, path, read in unread:
        names = [name for name in type(section).model_fields if name not in read]
        yield from check_unused(section, path, names, reason)
