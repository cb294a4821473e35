"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, out and in."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from configs.errors import BadInput
from configs.fields import value_text
from configs.plan.adapters import linear_path
from configs.roles import HEAD, HeadKind
from configs.sections.lora import LoraConfig
from configs.sections.model import ModelConfig
from trainer.checkpoint.tensors import CheckpointTensors
from trainer.disk.growing import growing_directory
from trainer.hf.adapters import ModuleAdapter, StoredAdapters, adapted_by_weight
from trainer.hf.companions import carried_config
from trainer.hf.config_json import find_family, write_model
from trainer.hf.export_source import ExportSource
from trainer.hf.families import choose_family
from trainer.hf.importing import ConversionReport, count_non_finite
from trainer.hf.rules import Rule
from trainer.hf.safetensors_files import OutputTensor, SafetensorsFile, write_file
from trainer.hf.tensors import model_rules

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_CLASSIFIER = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
_HEADS = {"score", "classifier"}
"""What PEFT names in `modules_to_save` of any sequence classifier; of those here the head is `score`."""
# What of PEFT's LoRA is done here, and what PEFT takes where the key is missing: others compute something else.
_ONLY: dict[str, Any] = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "lora_bias": False,
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
    "target_parameters": None, "layer_replication": None, "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}  # fmt: skip


def export_adapter(source: ExportSource, target: Path, *, dtype: torch.dtype | None, rank: int) -> ConversionReport:
    """Write the adapters of a checkpoint as PEFT does; experts have one adapter each, as PEFT's `nn.Linear` experts.

    The directory appears when it is whole. Raises BadInput. Collective: all ranks must call this; rank 0 writes.
    """
    started = time.perf_counter()
    if source.lora is None:
        raise BadInput(f"{source.checkpoint}: was trained without lora and holds no adapters; leave out --adapter.")
    config = write_model(source.model, carried_config(source.carried), source.head)
    rules = list(model_rules(source.model, find_family(config, "config.json").names, source.head))
    stored = StoredAdapters(CheckpointTensors(source.checkpoint), source.model, source.lora)
    non_finite: dict[str, int] = {}
    outputs: list[OutputTensor] = []
    with growing_directory(target, rank=rank) as growing:
        if rank == 0:
            tensors = _peft_tensors(stored, rules, dtype)
            outputs = [OutputTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
            non_finite = {name: bad for name, tensor in tensors.items() if (bad := count_non_finite(tensor))}
            write_file(growing / WEIGHTS, outputs, lambda output: tensors[output.name])
            modules = {name.removeprefix(_PREFIX).split(".lora_")[0] for name in tensors if ".lora_" in name}
            text = json.dumps(_write_config(source, source.lora, modules), indent=2)
            (growing / CONFIG).write_text(text + "\n", encoding="utf-8")
    num_bytes = sum(output.num_bytes for output in outputs)
    notes = []
    if source.head == "scalar":
        notes = ["PEFT asks the base how many labels there are: beside a language model open it with num_labels=1"]
    return ConversionReport(len(outputs), num_bytes, time.perf_counter() - started, non_finite, [], notes)


def _peft_tensors(stored: StoredAdapters, rules: list[Rule], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    tensors = {}
    for rule in rules:
        if rule.megatron.name == HEAD and stored.head is not None:
            tensors[_PREFIX + rule.hf[0].name] = stored.head.to(dtype or stored.head.dtype)
        if stored.has(rule.megatron.name):
            for adapter in stored.read(rule):
                if adapter is not None:
                    for name, matrix in _named(adapter).items():
                        tensors[name] = matrix.to(dtype or matrix.dtype).contiguous()
    return tensors


def _named(adapter: ModuleAdapter) -> dict[str, torch.Tensor]:
    a, b = _names(adapter.module)
    return {a: adapter.a, b: adapter.b}


def _names(module: str) -> tuple[str, str]:
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _write_config(source: ExportSource, lora: LoraConfig, modules: set[str]) -> dict[str, Any]:
    is_hf = source.base is not None and not source.base.is_checkpoint
    return {
        **_ONLY,
        **({"task_type": "CAUSAL_LM"} if source.head == "vocabulary" else _CLASSIFIER),
        "base_model_name_or_path": source.base.path if source.base is not None and is_hf else None,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }


class PeftAdapter:
    """The directory of a PEFT adapter, checked against the adapters that a run has."""

    def __init__(self, directory: Path, model: ModelConfig, lora: LoraConfig, head: HeadKind = "vocabulary") -> None:
        """Open and check. Raises BadInput for files that are missing or damaged, and for other adapters.

        For a model with a scalar head it may hold one beside the adapters.
        """
        self._directory = directory
        names = choose_family(model).names
        self._score = {_PREFIX + names.score: (1, model.hidden_size)} if head == "scalar" else {}
        self._has_head = False
        self._check_config(_read_config(directory), lora)
        self._file = SafetensorsFile(directory / WEIGHTS)
        self._rank = lora.rank
        self._adapted = adapted_by_weight(model, lora)
        self._rules = {
            rule.megatron.name: rule for rule in model_rules(model, names) if rule.megatron.name in self._adapted
        }
        self._check_tensors()

    def read(self, layer: int, name: str, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices of a linear, A `[parts * rank, in]` and B `[out, rank]`, zeros for parts without one."""
        rule = self._rules[f"{linear_path(layer, name, expert)}.weight"]
        a, b = [], []
        for hf, part in zip(rule.hf, self._adapted[rule.megatron.name].parts, strict=True):
            if part.is_adapted:
                of_a, of_b = _names(hf.name.removesuffix(".weight"))
                a.append(self._file.read(of_a))
                b.append(self._file.read(of_b))
            else:
                b.append(torch.zeros(hf.shape[0], self._rank))
        return torch.cat(a), rule.conversion.merge([rows.to(b[0].dtype) for rows in b])

    def read_head(self) -> torch.Tensor | None:
        """Return the scalar head's weight `[1, hidden]`; None where there is none, as beside a language model."""
        found = [self._file.read(name) for name in self._score if name in self._file.tensors]
        return found[0] if found else None

    def _check_config(self, config: dict[str, Any], lora: LoraConfig) -> None:
        where = self._directory / CONFIG
        saved = config.get("modules_to_save")
        if self._score and isinstance(saved, list) and _HEADS.issuperset(saved):
            config, self._has_head = config | {"modules_to_save": None}, bool(saved)
        for key, only in _ONLY.items():
            value = config.get(key, only)
            if value != only and (value or only):
                raise BadInput(f"{where}: {key} {value!r} is not supported, only {only!r}; use another adapter.")
        for key, field, default in (("r", "rank", 8), ("lora_alpha", "alpha", 8), ("use_rslora", "use_rslora", False)):
            ours, theirs = getattr(lora, field), config.get(key, default)
            if ours != theirs:
                raise BadInput(f"lora.{field}: {value_text(ours)} differs from {where}; use {value_text(theirs)}.")

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for rule in self._rules.values():
            for hf, part in zip(rule.hf, self._adapted[rule.megatron.name].parts, strict=True):
                if part.is_adapted:
                    a, b = _names(hf.name.removesuffix(".weight"))
                    expected |= {a: (self._rank, hf.shape[1]), b: (hf.shape[0], self._rank)}
        found = self._file.tensors
        expected |= {name: shape for name, shape in self._score.items() if self._has_head or name in found}
        where = self._directory / WEIGHTS
        for name in sorted(expected.keys() - found.keys())[:1]:
            raise BadInput(
                f"lora.target_modules: {where} lacks {name}; name the modules that it has, such as "
                f"{', '.join(sorted({one.split('.')[-3] for one in found}))}."
            )
        for name in sorted(found.keys() - expected.keys())[:1]:
            raise BadInput(
                f"lora.target_modules: {where} holds {name}, which has no adapter in this run; name its module too, or "
                "take another adapter."
            )
        for name, shape in expected.items():
            if found[name].shape != shape:
                raise BadInput(
                    f"{where}: {name} has shape {list(found[name].shape)}, this model has {list(shape)}; take the "
                    "adapter of this model."
                )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"lora.init_from: {path} cannot be read ({error}); name a PEFT adapter's directory.") from error
    return content
