"""Config -> open data: tokenizer, training blend, validation sources; and the readers of one rank. Knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from configs.errors import BadInput
from configs.plan.derive import global_batch_size_at
from configs.stages import Config
from trainer.data.blend import Blend, open_blend
from trainer.data.indexed import TokenDataset, check_tokenizer, check_vocab_size
from trainer.data.reader import BatchReader, ValidationReader
from trainer.data.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Everything `data` names, open and checked."""

    config: Config
    tokenizer: Tokenizer | None
    blend: Blend | None
    validation: dict[str, TokenDataset]
    """Validation sources by the name they are logged under."""

    def build_reader(self, *, dp_rank: int, dp_size: int) -> BatchReader | None:
        """Return the training reader of one data-parallel rank, or None where no training data is named."""
        if self.blend is None:
            return None
        return BatchReader(
            self.blend,
            micro_batch_size=self.config.train.micro_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            global_batch_size_at=partial(global_batch_size_at, self.config.train),
            vocab_size=self.config.model.vocab_size,
            document_end_id=self._document_end_id,
            prefetch_steps=self.config.data.prefetch_steps,
        )

    def build_validation_readers(self, *, dp_rank: int, dp_size: int) -> dict[str, ValidationReader]:
        """Return one reader per validation source for one data-parallel rank."""
        train = self.config.train
        return {
            name: ValidationReader(
                dataset,
                seq_len=train.seq_len,
                num_samples=train.eval_num_samples,
                micro_batch_size=train.micro_batch_size,
                dp_rank=dp_rank,
                dp_size=dp_size,
                vocab_size=self.config.model.vocab_size,
                document_end_id=self._document_end_id,
            )
            for name, dataset in self.validation.items()
        }

    @property
    def _document_end_id(self) -> int | None:
        if not self.config.data.document_mask:
            return None
        assert self.tokenizer is not None  # open_corpus refuses document_mask without one
        return self.tokenizer.eod_id


def open_corpus(config: Config) -> Corpus:
    """Open and check all data of the config. Raises BadInput naming the field or file; writes nothing."""
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer is not None else None
    if data.document_mask and tokenizer is None:
        raise BadInput(
            "data.document_mask: needs data.tokenizer, whose eos token ends documents; set it to a directory."
        )
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise BadInput(
            f"model.vocab_size: {config.model.vocab_size} is less than the {tokenizer.vocab_size} token ids of "
            f"data.tokenizer {data.tokenizer}; a value that would work: {tokenizer.vocab_size}."
        )
    blend = open_blend(data.train, config.train.seq_len, config.run.seed) if data.train else None
    validation: dict[str, TokenDataset] = {}
    for source in data.validation:
        name = Path(source.path).name
        validation[name if name not in validation else source.path] = TokenDataset(source.path)
    for dataset in [*(source.dataset for source in (blend.sources if blend else ())), *validation.values()]:
        check_vocab_size(dataset, config.model.vocab_size)
        if tokenizer is not None:
            check_tokenizer(dataset, tokenizer)
    return Corpus(config, tokenizer, blend, validation)
