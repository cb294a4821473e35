"""Hugging Face's `Trainer` under the clock: the same Llama, batch, sequence and optimizer settings on one rank.

Its defaults stay as they are (fused AdamW, a log line every 500 steps); saving and reports are off.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from configs.plan.derive import padded_vocab_size
from configs.sections.model import ModelConfig
from configs.stages import Config
from parallel.platform import PlatformName

if TYPE_CHECKING:
    from tools.bench.clock import StepClock


def run_hf(config: Config, platform_name: PlatformName, clock: StepClock) -> None:
    """Train a Llama of the config's sizes for the clock's steps, alone in this process, in fp32."""
    import transformers

    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            **training_arguments(config, platform_name, clock.total_steps, scratch)
        )
        trainer = transformers.Trainer(
            model=build_llama(config.model),
            args=arguments,
            train_dataset=_read_samples(config, clock.total_steps),
            callbacks=[ticking(clock)],
        )
        trainer.train()


def ticking(clock: StepClock) -> Any:
    """Return the callback by which a trainer of Hugging Face's kind ticks at the start of each optimizer step."""
    import transformers

    class Tick(transformers.TrainerCallback):
        """Ticks."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
            clock.tick()

    return Tick()


def training_arguments(config: Config, platform_name: PlatformName, num_steps: int, output_dir: str) -> dict[str, Any]:
    """Return the config's batch and optimizer as `TrainingArguments` names them, without saving and reports."""
    train, settings = config.train, config.optimizer
    return {
        "output_dir": output_dir,
        "use_cpu": platform_name == "cpu",
        "max_steps": num_steps,
        "per_device_train_batch_size": train.micro_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // train.micro_batch_size,
        "learning_rate": settings.lr,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "adam_epsilon": settings.eps,
        "max_grad_norm": settings.clip_grad,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def build_llama(model: ModelConfig) -> Any:
    """Return a Llama of the config's sizes with weights of its own."""
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=padded_vocab_size(model),
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            head_dim=model.head_dim,
            max_position_embeddings=model.max_position_embeddings,
            rms_norm_eps=model.norm_eps,
            tie_word_embeddings=model.tie_embeddings,
        )
    )


def _read_samples(config: Config, num_steps: int) -> Any:
    """Return the samples `fit` would see in `num_steps` steps; Trainer shifts the labels itself."""
    from trainer.data.corpus import open_corpus

    reader = open_corpus(config).build_reader(dp_rank=0, dp_size=1)
    assert reader is not None
    rows = [row for _ in range(num_steps) for batch in reader.read_step() for row in batch.tokens]
    reader.close()
    return [{"input_ids": row, "labels": row} for row in rows]
