"""TRL's `DPOTrainer` under the clock: the same Llama, pairs, tokens a microbatch and optimizer settings on one rank.

It pads (its `padding_free` is switched off in this version); a microbatch holds as many pairs as have, on average, the
tokens of one of ours. The reference's log-probabilities are computed once, before the first step, as ours are
(`precompute_ref_log_probs`, which is not its default). Its other defaults stay (fused AdamW, the loss without whole
logits), but for recomputing activations and bf16, which are off as ours are.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from configs.stages import Config, PreferenceConfig
from parallel.platform import PlatformName
from tools.bench.hf_loop import build_llama, ticking, training_arguments

if TYPE_CHECKING:
    from tools.bench.clock import StepClock


def run_trl_dpo(config: Config, platform_name: PlatformName, clock: StepClock) -> None:
    """Train a Llama of the config's sizes by DPO for the clock's steps, alone in this process, in fp32."""
    import datasets
    import transformers
    import trl

    assert isinstance(config, PreferenceConfig)

    class Counting(trl.DPOTrainer):
        """Counts what the model reads: every token but the first of each answer, which nothing predicts."""

        def _prepare_dataset(self, dataset: Any, *unused: Any, **others: Any) -> Any:
            """Return the dataset as it is, since it has its tokens."""
            return dataset

        def compute_loss(self, model: Any, inputs: Any, *words: Any, **options: Any) -> Any:
            clock.count(int(inputs["attention_mask"][:, 1:].sum()))
            return super().compute_loss(model, inputs, *words, **options)

    pairs = _read_pairs(config)
    num_tokens = sum(2 * len(one["prompt_ids"]) + len(one["chosen_ids"]) + len(one["rejected_ids"]) for one in pairs)
    train = config.train
    pairs_each = round(train.micro_batch_size * train.seq_len / (num_tokens / len(pairs) - 2))
    with tempfile.TemporaryDirectory() as scratch:
        settings = training_arguments(config, platform_name, clock.total_steps, scratch)
        arguments = trl.DPOConfig(
            **settings | {"per_device_train_batch_size": pairs_each},
            beta=config.preference.method.beta,
            precompute_ref_log_probs=True,
            max_length=None,
            logging_steps=train.log_every,
            gradient_checkpointing=False,
            bf16=False,
            seed=config.run.seed,
        )
        trainer = Counting(
            model=build_llama(config.model),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(pairs),
            processing_class=transformers.AutoTokenizer.from_pretrained(str(config.data.tokenizer)),
            callbacks=[ticking(clock)],
        )
        trainer.train()


def _read_pairs(config: PreferenceConfig) -> list[dict[str, list[int]]]:
    """Return the pairs that `fit` sees, of the same cache, as TRL tokenises them: the prompt, and both answers."""
    from trainer.data.chat.cache import prepare_conversations
    from trainer.data.indexed import TokenDataset

    [source] = prepare_conversations(config).train
    dataset = TokenDataset(source.path)
    pairs = []
    for first in range(0, dataset.num_documents, 2):
        answers = []
        for number in (first, first + 1):
            length = int(dataset.lengths[number])
            tokens, sides = dataset.read(number, 0, length).tolist(), dataset.read_mask(number, 0, length)
            assert sides is not None
            answers.append((tokens, int((sides > 0).argmax())))
        (chosen, begin), (rejected, other) = answers
        assert begin == other and chosen[:begin] == rejected[:begin]
        pairs.append({"prompt_ids": chosen[:begin], "chosen_ids": chosen[begin:], "rejected_ids": rejected[begin:]})
    return pairs
