"""Config -> open data: tokenizer, training blend, validation sources; and the readers of one rank. Knows no model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from configs.errors import BadInput
from configs.plan.derive import consumed_samples_after, global_batch_size_at, steps_of_samples
from configs.rules.training import check_schedule_length
from configs.sections.data import DataConfig
from configs.sections.train import STEPS_OF_EPOCHS
from configs.stages import Config
from trainer.data.blend import Blend, open_blend
from trainer.data.dataset_files import DatasetMeta
from trainer.data.indexed import TokenDataset, check_tokenizer, check_vocab_size
from trainer.data.packed_source import PackedSource
from trainer.data.reader import BatchReader, Finish, ValidationReader
from trainer.data.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Everything `data` names, open and checked."""

    config: Config
    """With as many steps as `train.num_epochs` are, where that is given."""
    data: DataConfig
    """What is read: the config's own, or what was made of its conversations."""
    tokenizer: Tokenizer | None
    blend: Blend | None
    validation: dict[str, TokenDataset]
    """Validation sources by the name they are logged under."""

    def build_reader(self, *, dp_rank: int, dp_size: int, finish: Finish | None = None) -> BatchReader | None:
        """Return the training reader of one data-parallel rank, or None where no training data is named.

        `finish` adds to every microbatch what a stage needs beside.
        """
        if self.blend is None:
            return None
        return BatchReader(
            self.blend,
            micro_batch_size=self.config.train.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            global_batch_size_at=partial(global_batch_size_at, self.config.train),
            vocab_size=self.config.model.vocab_size,
            document_end_id=_mask_end(self.data, self.blend.sources[0].dataset, self.tokenizer),
            prefetch_steps=self.data.prefetch_steps,
            finish=finish,
        )

    def build_whole_readers(self, *, dp_rank: int, dp_size: int, finish: Finish) -> list[ValidationReader]:
        """Return for one data-parallel rank a reader of each training source that reads all of it once, if packed."""
        train = self.config.train
        return [
            ValidationReader(
                source.dataset,
                seq_len=train.seq_len,
                num_samples=source.num_samples,
                micro_batch_size=train.micro_batch_size,
                dp_rank=dp_rank,
                dp_size=dp_size,
                vocab_size=self.config.model.vocab_size,
                packing=source.packing,
                finish=finish,
            )
            for source in (self.blend.sources if self.blend is not None else ())
        ]

    def describe_order(self) -> list[str]:
        """Return a sentence for each training source whose documents are packed or drawn by length."""
        train = self.config.train
        num_samples = consumed_samples_after(train, train.num_steps)
        return list(self.blend.describe_order(num_samples)) if self.blend is not None else []

    def build_validation_readers(
        self, *, dp_rank: int, dp_size: int, finish: Finish | None = None
    ) -> dict[str, ValidationReader]:
        """Return one reader per validation source for one data-parallel rank."""
        train = self.config.train
        readers = {
            name: ValidationReader(
                dataset,
                seq_len=train.seq_len,
                num_samples=train.eval_num_samples,
                micro_batch_size=train.micro_batch_size,
                dp_rank=dp_rank,
                dp_size=dp_size,
                vocab_size=self.config.model.vocab_size,
                document_end_id=_mask_end(self.data, dataset, self.tokenizer),
                packing=self.data.packing,
                finish=finish,
            )
            for name, dataset in self.validation.items()
        }
        for name, reader in readers.items():
            num_rows = reader.source.num_samples
            if isinstance(reader.source, PackedSource) and reader.num_samples < num_rows:
                log.info(
                    "validation %s: %d of its %d rows, drawn once (train.eval_num_samples)",
                    name,
                    reader.num_samples,
                    num_rows,
                )
        return readers


def open_corpus(config: Config, data: DataConfig | None = None) -> Corpus:
    """Open and check all data of the config, or `data` in its place. Raises BadInput naming the field or file.

    Writes nothing.
    """
    data = data or config.data
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer is not None else None
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise BadInput(
            f"model.vocab_size: {config.model.vocab_size} is less than the {tokenizer.vocab_size} token ids of "
            f"data.tokenizer {data.tokenizer}; a value that would work: {tokenizer.vocab_size}."
        )
    blend = open_blend(data.train, config.train.seq_len, config.run.seed, data.packing) if data.train else None
    validation: dict[str, TokenDataset] = {}
    for source in data.validation:
        validation[source.name if source.name not in validation else source.path] = TokenDataset(source.path)
    for dataset in [*(source.dataset for source in (blend.sources if blend else ())), *validation.values()]:
        check_vocab_size(dataset, config.model.vocab_size)
        if tokenizer is not None:
            check_tokenizer(dataset, tokenizer)
        _mask_end(data, dataset, tokenizer)
    trained_on = [source.dataset for source in blend.sources] if blend else []
    if data.document_mask and data.packing == "concat":
        _check_one_document_end(trained_on, tokenizer)
    if tokenizer is not None and trained_on and trained_on[0].meta is not None:
        tokenizer = _as_in_data(tokenizer, trained_on[0].meta)
    return Corpus(_with_steps_of_epochs(config, blend), data, tokenizer, blend, validation)


def _with_steps_of_epochs(config: Config, blend: Blend | None) -> Config:
    """Return the config with the steps in which `train.num_epochs` times the samples of all sources are drawn.

    Raises BadInput where these are too few for the schedule.
    """
    train = config.train
    if train.num_epochs is None or blend is None:
        return config
    in_epoch = sum(source.num_samples for source in blend.sources)
    num_samples = math.ceil(Fraction(str(train.num_epochs)) * in_epoch)  # 2.2 * 25 is above 55 in floating point
    if num_samples > STEPS_OF_EPOCHS:
        raise BadInput(
            f"train.num_epochs: {train.num_epochs:g} times the {in_epoch} samples of the data are more than a run can "
            "count; a value that would work: 3"
        )
    num_steps = steps_of_samples(train, num_samples)
    counted = config.model_copy(update={"train": train.model_copy(update={"num_steps": num_steps})})
    for problem in check_schedule_length(counted):
        raise BadInput(problem)
    return counted


def _mask_end(data: DataConfig, dataset: TokenDataset, tokenizer: Tokenizer | None) -> int | None:
    """Return the token by which document masks find the ends of documents, None where nothing asks for it."""
    is_searched = data.document_mask and data.packing == "concat"  # packed rows know their bounds
    return find_document_end(dataset, tokenizer) if is_searched else None


def find_document_end(dataset: TokenDataset, tokenizer: Tokenizer | None) -> int:
    """Return the token id that ends a dataset's documents: what it was made with, else the tokenizer's eos token.

    Raises BadInput where neither is known.
    """
    if dataset.meta is not None:
        return dataset.meta.eod_id
    if tokenizer is None:
        raise BadInput(
            f"data.document_mask: {dataset.prefix} has no .meta.json that says what ends its documents; set "
            "data.tokenizer to a directory, whose eos token is taken, or data.document_mask=false."
        )
    return tokenizer.eod_id


def _check_one_document_end(datasets: Sequence[TokenDataset], tokenizer: Tokenizer | None) -> None:
    """Refuse to mask a blend whose sources end documents in different tokens."""
    ends = {find_document_end(dataset, tokenizer): dataset.prefix for dataset in datasets}
    if len(ends) > 1:
        (first, one), (second, other) = list(ends.items())[:2]
        raise BadInput(
            f"data.document_mask: documents end in token {first} in {one} and in token {second} in {other}; make one "
            "of them again with the other's --eod, or set data.document_mask=false."
        )


def _as_in_data(tokenizer: Tokenizer, meta: DatasetMeta) -> Tokenizer:
    """Return the tokenizer with the tokens that begin and end documents of the data, which samples then use too."""
    if (tokenizer.eod_id, tokenizer.bos_id) == (meta.eod_id, meta.bos_id):
        return tokenizer
    token = tokenizer.backend.id_to_token(meta.eod_id) or tokenizer.eod_token
    return replace(tokenizer, eod_token=token, eod_id=meta.eod_id, bos_id=meta.bos_id)
