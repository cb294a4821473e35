"""What of `data` a run cannot start without. Torch-free and numpy-free: it is told before anything starts up."""

from __future__ import annotations

import os
from collections.abc import Iterator

from configs.errors import BadInput
from configs.plan.derive import sequence_pieces
from configs.stages import Config, Split
from trainer.data.dataset_files import check_sizes, read_meta


def find_data_problems(config: Config, *, is_plan: bool = False) -> list[str]:
    """Return a sentence for each file of `data` that is missing, cut off, too short or made for a larger vocabulary.

    A plan may name what is not on this machine. Opens headers alone, so data of any size takes milliseconds; what is
    inside is `trainer.data.corpus`'s to check.
    """
    problems: list[str] = []
    directory = config.data.tokenizer
    if directory is not None and not is_plan and not os.path.isdir(directory):
        problems.append(f"data.tokenizer {directory}: no such directory; train one with tools/train_tokenizer.py")
    if config.chat_template is not None:
        problems += _conversation_problems(config, *config.chat_template, is_plan=is_plan)
    for name in ("train", "validation"):
        for source in getattr(config.data, name):
            if is_plan and not os.path.exists(f"{source.path}.idx"):
                continue
            try:
                problems += _source_problems(config, f"data.{name}", source.path)
            except BadInput as error:
                problems.append(f"data.{name}: {str(error).removeprefix('data ')}")
            except OSError as error:
                problems.append(f"data {error.filename}: cannot be read ({error.strerror}); check its permissions")
    return list(dict.fromkeys(problems))


def _conversation_problems(config: Config, field: str, template: str | None, *, is_plan: bool) -> Iterator[str]:
    """Yield what is missing of the conversations and the template; tokenising finds what is wrong inside."""
    from trainer.data.chat.template import load_template

    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        for number, source in enumerate(config.sources(split)):
            if not is_plan and not os.path.exists(source.path):
                yield f"{config.source_field(split)}[{number}].path: {source.path}: no such file or directory"
    directory = config.data.tokenizer
    if directory is not None and os.path.isdir(directory):
        try:
            load_template(template, directory, field)
        except BadInput as error:
            yield str(error)


def _source_problems(config: Config, field: str, prefix: str) -> Iterator[str]:
    """Yield what a source that is whole lacks for this run. Raises BadInput where it is not whole."""
    num_tokens, meta = check_sizes(prefix).num_tokens, read_meta(prefix)
    seq_len = config.train.seq_len
    if num_tokens <= seq_len and config.data.packing == "concat":
        pieces = sequence_pieces(config.parallel)
        fits = (num_tokens - 1) // pieces * pieces
        works = f"a value that would work: train.seq_len={fits}" if fits > 0 else f"it needs at least {pieces + 1}"
        yield (
            f"{field}: the {num_tokens} tokens of {prefix} give no sample of train.seq_len={seq_len} and the token "
            f"that follows; {works}"
        )
    if meta is not None and meta.vocab_size > config.model.vocab_size:
        yield (
            f"model.vocab_size: {config.model.vocab_size} is less than the {meta.vocab_size} token ids of {prefix}; "
            f"a value that would work: {meta.vocab_size}"
        )
