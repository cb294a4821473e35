"""TRL's `SFTTrainer` under the clock: the same Llama, samples, masks, row length and optimizer settings on one rank.

It packs best-fit (`packing=True`, `bfd`) and lays the rows of a microbatch end to end without padding; transformers'
`sdpa` keeps the samples apart by a dense mask over them. Its defaults stay (fused AdamW, the loss without whole
logits), but for recomputing activations and bf16, which are off as ours are.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from configs.stages import Config, SftConfig
from parallel.platform import PlatformName
from tools.bench.hf_loop import build_llama, ticking, training_arguments

if TYPE_CHECKING:
    from tools.bench.clock import StepClock


def run_trl(config: Config, platform_name: PlatformName, clock: StepClock) -> None:
    """Fine-tune a Llama of the config's sizes for the clock's steps, alone in this process, in fp32."""
    import transformers
    import trl

    assert isinstance(config, SftConfig)

    class Counting(trl.SFTTrainer):
        """Counts what the loss sees: every token but the first of each sample, which nothing predicts."""

        def compute_loss(self, model: Any, inputs: Any, *words: Any, **options: Any) -> Any:
            clock.count(int((inputs["position_ids"] > 0).sum()))
            return super().compute_loss(model, inputs, *words, **options)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = trl.SFTConfig(
            **training_arguments(config, platform_name, clock.total_steps, scratch),
            packing=True,
            max_length=config.train.seq_len,
            logging_steps=config.train.log_every,
            gradient_checkpointing=False,
            bf16=False,
            seed=config.run.seed,
        )
        trainer = Counting(
            model=build_llama(config.model),
            args=arguments,
            train_dataset=_read_samples(config),
            processing_class=transformers.AutoTokenizer.from_pretrained(str(config.data.tokenizer)),
            callbacks=[ticking(clock)],
        )
        trainer.train()


def _read_samples(config: SftConfig) -> Any:
    """Return the samples that `fit` sees, of the same cache, before packing; labels as TRL wants them."""
    import datasets

    from trainer.data.chat.cache import prepare_conversations
    from trainer.data.indexed import TokenDataset

    [source] = prepare_conversations(config).train
    dataset = TokenDataset(source.path)
    samples = []
    for number, length in enumerate(dataset.lengths.tolist()):
        tokens, trained = dataset.read(number, 0, length).tolist(), dataset.read_mask(number, 0, length)
        assert trained is not None
        labels = [token if is_trained else -100 for token, is_trained in zip(tokens, trained.tolist(), strict=True)]
        samples.append({"input_ids": tokens, "labels": labels})
    return datasets.Dataset.from_list(samples)
