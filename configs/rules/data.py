"""Rules of the data: sources, their weights and parts, and how samples are made of documents. Torch-free."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

from configs.rules.model import check_unused
from configs.sections.data import SourceConfig
from configs.stages import ComparisonsConfig, Config, GrpoConfig, SftConfig, Split

_LEAST_SHARE = 1e-12  # of a source in a blend: less than one sample of the longest run a config can name


def check_data(config: Config) -> Iterator[str]:
    """Yield every rule of what is read that is broken, one sentence each with a value that would work."""
    data, train = config.data, config.train
    if isinstance(config, SftConfig) and config.chat_template is not None:
        yield from _check_conversations(config)
    elif isinstance(config, ComparisonsConfig):
        reason = f"in learning from comparisons, whose sources are in {config.section}"
        yield from _check_chats(config, reason, "data/pairs.jsonl")
    elif isinstance(config, GrpoConfig):
        yield from _check_prompts(config)
    elif train.num_steps > 0 and not data.train:
        yield (
            f"data.train: {_length(config)} need at least one source; a value that would work: "
            "[{path: data/corpus_train}]"
        )
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        paths = [os.path.normpath(source.path) for source in config.sources(split)]
        for path in sorted({path for path in paths if paths.count(path) > 1}):
            yield f"{config.source_field(split)}: {path} is listed more than once; list it once and raise its weight"
    yield from _check_packing(config)
    yield from _check_long_documents(config)
    yield from _check_weights("data.train", [weight for source in data.train for weight in _part_weights(source)])
    field = config.source_field("validation")
    different = {os.path.normpath(source.path): source for source in config.sources("validation")}.values()
    names = [source.name for source in different]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{field}: several sources are logged under the file name {name}; give them different file names"
    for name in ("eval_every", "patience"):
        if getattr(train, name) is not None and not config.sources("validation"):
            yield f"train.{name}: has no effect without {field}; a value that would work: null"
    if train.patience is not None and train.eval_every is None:
        yield (
            f"train.eval_every: null validates only before the first and after the last step, so that train.patience="
            f"{train.patience} never counts; a value that would work: {max(train.num_steps // 10, 1)}"
            if train.num_epochs is None
            else "train.eval_every: is needed beside train.patience; a value that would work: 100"
        )
    if not config.run.name.strip():
        yield "run.name: is empty; a value that would work: run"


def _length(config: Config) -> str:
    """Return how long the run is, in words."""
    epochs = config.train.num_epochs
    return f"{config.train.num_steps} steps" if epochs is None else f"{epochs:g} epochs"


def _check_conversations(config: SftConfig) -> Iterator[str]:
    """Yield what is wrong with the conversations of fine-tuning, which take the place of `data`'s sources."""
    sft = config.sft
    yield from _check_chats(config, "in supervised fine-tuning, whose sources are in sft", "data/chats.jsonl")
    reason = None if sft.validation or not sft.num_answers else "without sft.validation, where its questions are"
    if sft.train_on == "all":
        reason = "with sft.train_on=all, which does not say where answers begin"
    if reason is not None:
        yield from check_unused(sft, "sft", ("num_answers", "max_answer_tokens"), reason)


def _check_prompts(config: GrpoConfig) -> Iterator[str]:
    """Yield what is wrong with the prompts of reinforcement learning, which take the place of `data`'s sources."""
    yield from _check_chats(config, "in reinforcement learning, whose prompts are in grpo", "data/prompts.jsonl")
    names = [source.name for source in config.grpo.prompts]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"grpo.prompts: several sources have the file name {name}, by which answers are kept; give them others"


def _check_chats(config: Config, reason: str, example: str) -> Iterator[str]:
    """Yield what is wrong with sources of chats and with what `data` says beside."""
    data, field = config.data, config.source_field("train")
    yield from check_unused(data, "data", ("train", "validation", "packing", "document_mask"), reason)
    if data.tokenizer is None:
        yield (
            "data.tokenizer: is needed to tokenise conversations; a value that would work: the directory of the "
            "model's Hugging Face tokenizer"
        )
    sources = config.sources("train")
    if config.train.num_steps > 0 and not sources:
        yield f"{field}: {_length(config)} need at least one source; a value that would work: [{{path: {example}}}]"
    weights = [source.weight for source in sources]
    yield from _check_weights(field, [weight for weight in weights if weight is not None])
    if None in weights and any(weight is not None for weight in weights):
        place = weights.index(None)
        yield f"{field}[{place}].weight: is missing, and other sources have one; a value that would work: 1.0"


def _check_weights(field: str, weights: Sequence[float]) -> Iterator[str]:
    if weights and not (math.isfinite(sum(weights)) and min(weights) / sum(weights) > _LEAST_SHARE):
        yield (
            f"{field}: the weights are too large to be added, or too far apart for each source to be drawn from; "
            "values that would work: weights such as 0.7 and 0.3"
        )


def _check_packing(config: Config) -> Iterator[str]:
    data = config.data
    if data.packing != "concat" and not data.document_mask:
        yield (
            f"data.document_mask: false would let what data.packing={data.packing} puts into a row see each other; a "
            "value that would work: true"
        )


def _check_long_documents(config: Config) -> Iterator[str]:
    names = ("long_document_tokens", "long_document_share")
    for number, source in enumerate(config.data.validation):
        yield from check_unused(source, f"data.validation[{number}]", names, "on what is only evaluated")
    for number, source in enumerate(config.data.train):
        missing = [name for name in names if getattr(source, name) is None]
        if len(missing) == 1:
            example = {"long_document_tokens": config.train.seq_len, "long_document_share": 0.7}[missing[0]]
            other = next(name for name in names if name not in missing)
            yield (
                f"data.train[{number}].{missing[0]}: is needed beside {other}; a value that would work: {example} (or "
                f"leave out both)"
            )


def _part_weights(source: SourceConfig) -> list[float]:
    """Return the weights of the long documents of a source and of the others, or of the whole source."""
    share = source.long_document_share
    if share is None or share == 1:
        return [source.weight]
    return [source.weight * share, source.weight * (1 - share)]
