"""What validation refuses -> one sentence that names the field, what is wrong with it, and a value that would work."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from configs.fields import SchemaField, field_at, location_text, schema_fields, value_text
from configs.sections.base import Section
from configs.stages import STAGE_CONFIGS

_BOUNDS = {
    "greater_than_equal": "at least",
    "greater_than": "above",
    "less_than_equal": "at most",
    "less_than": "below",
}
_NOT_A_SECTION = ("model_type", "model_attributes_type", "dict_type")

_NAMES_IN_OTHERS = {
    "learning_rate": ("optimizer.lr",), "max_grad_norm": ("optimizer.clip_grad",),
    "adam_beta1": ("optimizer.beta1",), "adam_beta2": ("optimizer.beta2",), "adam_epsilon": ("optimizer.eps",),
    "lr_scheduler_type": ("schedule.kind",), "warmup_ratio": ("schedule.warmup_fraction",),
    "max_steps": ("train.num_steps",), "num_train_epochs": ("train.num_epochs",),
    "per_device_train_batch_size": ("train.micro_batch_size",),
    "gradient_accumulation_steps": ("train.global_batch_size",), "train_batch_size": ("train.global_batch_size",),
    "ppo_mini_batch_size": ("train.global_batch_size",), "num_mini_batches": ("grpo.num_minibatches",),
    "max_length": ("train.seq_len",), "max_seq_length": ("train.seq_len",), "cutoff_len": ("train.seq_len",),
    "eval_steps": ("train.eval_every",), "logging_steps": ("train.log_every",),
    "save_steps": ("checkpoint.save_every",), "save_total_limit": ("checkpoint.keep_last",), "output_dir": ("run.dir",),
    "gradient_checkpointing": ("train.recompute.granularity",), "bf16": ("precision.compute",),
    "fp16": ("precision.compute",), "model_name_or_path": ("checkpoint.init_from_hf",),
    "use_peft": ("lora",), "lora_r": ("lora.rank",), "lora_rank": ("lora.rank",), "lora_alpha": ("lora.alpha",),
    "dataset_name": ("sft.train", "preference.train", "reward.train", "grpo.prompts", "data.train"),
    "dataset": ("sft.train", "preference.train", "reward.train", "grpo.prompts", "data.train"),
    "chat_template_path": ("sft.template", "preference.template", "reward.template", "grpo.template"),
    "assistant_only_loss": ("sft.train_on",), "train_on_prompt": ("sft.train_on",), "mask_history": ("sft.train_on",),
    "neftune_noise_alpha": ("sft.neftune_alpha",), "label_smoothing_factor": ("sft.label_smoothing",),
    "beta": ("preference.beta", "online_dpo.beta", "distill.beta", "grpo.kl.coefficient"),
    "temperature": ("distill.temperature", "rollout.temperature"), "top_k": ("rollout.top_k",),
    "pref_beta": ("preference.beta",), "pref_loss": ("preference.loss",),
    "loss_type": ("preference.loss", "online_dpo.loss", "grpo.algorithm"),
    "rpo_alpha": ("preference.sft_weight", "online_dpo.sft_weight"), "cpo_alpha": ("preference.sft_weight",),
    "pref_ftx": ("preference.sft_weight",), "simpo_gamma": ("preference.target_margin", "online_dpo.target_margin"),
    "teacher_model_name_or_path": ("distill.teacher",), "reward_model_path": ("grpo.reward_model.init_from",),
    "num_generations": ("grpo.group_size",), "n": ("grpo.group_size",), "reward_funcs": ("grpo.rewards",),
    "custom_reward_function": ("grpo.rewards",), "max_completion_length": ("rollout.max_new_tokens",),
    "max_response_length": ("rollout.max_new_tokens",), "response_length": ("rollout.max_new_tokens",),
    "num_iterations": ("grpo.num_epochs",), "ppo_epochs": ("grpo.num_epochs",), "num_ppo_epochs": ("grpo.num_epochs",),
    "kl_loss_coef": ("grpo.kl.coefficient",), "kl_coef": ("grpo.kl.coefficient",),
    "init_kl_coef": ("grpo.kl.coefficient",), "target_kl": ("ppo.adaptive_kl.target",),
    "cliprange": ("grpo.clip_low",), "epsilon": ("grpo.clip_low",), "epsilon_high": ("grpo.clip_high",),
    "cliprange_value": ("ppo.critic.value_clip",), "lam": ("ppo.gae_lambda",),
    "critic_warmup": ("ppo.critic.warmup_steps",), "value_model_path": ("ppo.critic.init_from",),
    "adv_estimator": ("grpo.algorithm",), "loss_agg_mode": ("grpo.normalisation",),
}  # fmt: skip
"""What TRL, LLaMA-Factory and verl call fields that are here under another name: the first that a stage has is meant
(configs/README.md)."""


def validation_sentences(error: ValidationError, schema: type[Section]) -> list[str]:
    """Return one sentence for each thing that makes values none of a schema, naming the field."""
    return [_sentence(detail["type"], detail["loc"], detail, schema) for detail in error.errors()]


def _sentence(kind: str, location: tuple[str | int, ...], detail: Mapping[str, Any], schema: type[Section]) -> str:
    """Turn one pydantic error into a sentence that names the field and a value that would work."""
    path = location_text(location)
    if kind == "extra_forbidden":
        return f"{path}: {_why_unknown(location, detail['input'], schema)}"
    field = field_at(location, schema)
    example = field.example if field else _example_around(location, schema)
    if isinstance(location[-1], int) and field is not None:
        example = field.item_example
    elif kind in _NOT_A_SECTION and field is not None and field.section is not None:
        example = f"a mapping of {', '.join(field.section.model_fields)}"
    elif kind == "literal_error" and field is not None:
        example = next(iter(difflib.get_close_matches(str(detail["input"]), _choices(field), n=1)), example)
    if kind == "missing":
        if len(location) == 1 and field is not None and field.section is not None:
            return f"{path}: missing section; add one, or a base: that has it"
        return f"{path}: missing; a value that would work: {example}"
    return f"{path}: {_rule_broken(kind, detail, field)}; a value that would work: {example}"


def _example_around(location: tuple[str | int, ...], schema: type[Section]) -> str:
    """Show the field that a location lies in, where it is a key or a value of a mapping with names of its own."""
    around = (field_at(location[:depth], schema) for depth in range(len(location) - 1, 0, -1))
    field = next((one for one in around if one is not None), None)
    return f"{field.path}: {field.example}" if field else "see --help"


def _rule_broken(kind: str, detail: Mapping[str, Any], field: SchemaField | None) -> str:
    given = detail["input"]
    is_bound = kind in _BOUNDS
    shown = repr(given) if isinstance(given, str) and not is_bound else value_text(given)
    shown = shown if len(shown) <= 60 else f"{shown[:40]}... ({len(shown)} characters)"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind.startswith("int_"):
        return f"{shown} is not a whole number"
    if kind.startswith("float_"):
        return f"{shown} is not a number"
    if kind == "finite_number":
        return f"{shown} is not a finite number"
    if kind.startswith("bool_"):
        return f"{shown} is not true or false"
    if kind == "string_type":
        return f"{shown} is not text"
    if kind == "literal_error" and field is not None:
        return f"{shown} is not one of {', '.join(_choices(field))}"
    if kind == "tuple_type":
        return f"{shown} is not a list"
    if kind in _NOT_A_SECTION:
        return f"{shown} is not a section with fields"
    if is_bound:
        return f"{shown} must be {_BOUNDS[kind]} {next(iter(detail['ctx'].values()))}"
    return f"{shown} is refused ({detail['msg']})"


def _choices(field: SchemaField) -> list[str]:
    """Return the words that a field takes."""
    return field.type_text.removeprefix("list of ").split(" | ")


def _why_unknown(location: tuple[str | int, ...], given: object, schema: type[Section]) -> str:
    """Say whose field it is where another stage has it; else what is nearest to it."""
    stages = {config: stage for stage, config in STAGE_CONFIGS.items()}
    for other, stage in stages.items():
        if schema in stages and other is not schema and field_at(location, other) is not None:
            this = stages[schema]
            return f"belongs to the stage {stage} (launch/{stage}.py), this is {this}; remove it, or start that one"
    return f"unknown field; {_suggestion(location, given, schema)}"


def _innermost_name(name: str, given: object) -> str:
    """Return the last part of a dotted name, such as verl's actor_rollout_ref.rollout.n, of which `name` is known."""
    while isinstance(given, Mapping) and len(given) == 1:
        name, given = next(iter(given.items()))
    return str(name)


def _suggestion(location: tuple[str | int, ...], given: object, schema: type[Section]) -> str:
    """Name the nearest valid field: a sibling spelt alike, the same name elsewhere, or the nearest dotted path."""
    if any(isinstance(part, int) for part in location):
        parent = field_at(location[:-1], schema)
        return f"its fields are {parent.type_text.removeprefix('list of ')}" if parent else "see --help"
    path = ".".join(str(part) for part in location)
    parent_path, _, name = path.rpartition(".")
    known = [field.path for field in schema_fields(schema)]
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == parent_path}
    theirs = _innermost_name(name, given)
    ours = next((field for field in _NAMES_IN_OTHERS.get(theirs, ()) if field in known), None)
    if ours is not None:
        is_alike = ours.rpartition(".")[2] == theirs
        return f"did you mean {ours}?" if is_alike else f"what other trainers call {theirs} is {ours} here"
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
    if close:
        return f"did you mean {siblings[close[0]]}?"
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {difflib.get_close_matches(path, elsewhere, n=1, cutoff=0.0)[0]}?"
    close = difflib.get_close_matches(path, known, n=1, cutoff=0.75)  # below, the section's name alone is alike
    if close:
        return f"did you mean {close[0]}?"
    top = "the sections are" if schema in STAGE_CONFIGS.values() else "the fields are"
    return f"{f'{parent_path} has' if parent_path else top} {', '.join(siblings)}"
