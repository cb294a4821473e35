"""A distributed checkpoint -> a Hugging Face model directory, tensor by tensor, without building the model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.errors import BadInput
from parallel.collectives import gather_objects
from trainer.disk.growing import growing_directory
from trainer.hf.adapters import TensorStore
from trainer.hf.companions import (
    carried_config,
    drop_missing_code,
    set_padding,
    set_token_limit,
    token_ids,
    write_chat_template,
    write_companions,
)
from trainer.hf.config_json import find_family, has_other_context, write_model
from trainer.hf.export_source import ExportSource, open_tensors
from trainer.hf.importing import ConversionReport, count_non_finite, share
from trainer.hf.rules import PaddedRows, Rule
from trainer.hf.safetensors_files import OutputTensor, plan_files, write_file, write_index
from trainer.hf.tensors import model_rules

MAX_FILE_BYTES = 5 * 10**9
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export_checkpoint(
    source: ExportSource,
    target: Path,
    *,
    dtype: torch.dtype | None,
    rank: int,
    world_size: int,
    on_bytes: Callable[[int], None],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> ConversionReport:
    """Write the model directory, which appears when it is whole; `dtype` None keeps each tensor's own.

    Peak memory is a few of the largest tensors. Raises BadInput. Collective: all ranks of the world must call this.
    """
    started = time.perf_counter()
    config = write_model(source.model, carried_config(source.carried), source.head)
    rules = list(model_rules(source.model, find_family(config, "config.json").names, source.head))
    parts = _Parts(open_tensors(source, rules), rules, dtype)
    files = plan_files(parts.outputs, max_file_bytes)
    mine = share([sum(tensor.num_bytes for tensor in group) for group in files.values()], rank, world_size)
    with growing_directory(target, rank=rank) as growing:
        for name, group in list(files.items())[mine]:
            write_file(growing / name, group, lambda tensor: parts.produce(tensor, on_bytes))
        counts = gather_objects((parts.non_finite, parts.num_bytes))
        notes = []
        if rank == 0:
            write_index(growing, files)
            notes = _write_rest(growing, source, config, parts.main_dtype)
    return ConversionReport(
        num_tensors=len(parts.outputs),
        num_bytes=sum(count[1] for count in counts),
        seconds=time.perf_counter() - started,
        non_finite={name: number for count in counts for name, number in count[0].items()},
        ignored=[],
        notes=notes,
    )


class _Parts:
    """The Hugging Face tensors of a checkpoint, made when their turn comes."""

    def __init__(self, stored: TensorStore, rules: list[Rule], dtype: torch.dtype | None) -> None:
        self._stored = stored
        self._places: dict[str, tuple[Rule, int]] = {}
        self._last: tuple[str, list[torch.Tensor]] | None = None
        self.outputs: list[OutputTensor] = []
        self.non_finite: dict[str, int] = {}
        self.num_bytes = 0
        for rule in rules:
            _check_stored(stored, rule)
            own = stored.dtype(rule.megatron.name)
            for position, part in enumerate(rule.hf):
                self._places[part.name] = (rule, position)
                # The bias of a router is kept in fp32 as `transformers` does: it chooses experts by small differences.
                kept = own if dtype is None or rule.megatron.name.endswith("router.expert_bias") else dtype
                self.outputs.append(OutputTensor(part.name, kept, part.shape))

    @property
    def main_dtype(self) -> torch.dtype:
        """The number format of the largest tensor."""
        return max(self.outputs, key=lambda tensor: tensor.num_bytes).dtype

    def produce(self, output: OutputTensor, on_bytes: Callable[[int], None]) -> torch.Tensor:
        """Return one tensor; the last rule's are kept, since they follow each other."""
        rule, position = self._places[output.name]
        if self._last is None or self._last[0] != rule.megatron.name:
            self._last = None
            self._last = (rule.megatron.name, rule.conversion.split(self._stored.read(rule.megatron.name)))
        own = self._last[1][position]
        tensor = own.to(output.dtype)
        num_bad = count_non_finite(tensor)
        if num_bad and num_bad > count_non_finite(own):
            largest = torch.finfo(output.dtype).max
            raise BadInput(
                f"{self._stored.path}: {output.name} holds values beyond the {largest:g} of {output.dtype}; "
                "write it as bf16 or fp32."
            )
        if num_bad:
            self.non_finite[output.name] = num_bad
        self.num_bytes += tensor.nbytes
        on_bytes(self.num_bytes)
        return tensor


def _write_rest(growing: Path, source: ExportSource, config: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """Write `config.json` and its companions; return what was changed or left out. Rank 0 alone calls this."""
    write_companions(growing, source.carried, source.tokenizer)
    if source.template is not None:
        write_chat_template(growing, source.template)
    notes = []
    if has_other_context(source.model, carried_config(source.carried)):
        notes += set_token_limit(growing, source.model.max_position_embeddings)
    if source.carried is None:
        config = config | token_ids(growing)
    if source.head == "scalar":
        padding, said = set_padding(growing)
        notes += said
        config = {name: value for name, value in config.items() if name != "pad_token_id"}
        config |= {} if padding is None else {"pad_token_id": padding}
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config = config | {key: str(dtype).removeprefix("torch.")}
    (growing / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return notes + drop_missing_code(growing)


def _check_stored(stored: TensorStore, rule: Rule) -> None:
    """Raise BadInput unless the checkpoint holds the tensor; a vocabulary may be padded further than we would."""
    name, shape = rule.megatron.name, stored.shape(rule.megatron.name)
    if shape is None:
        raise BadInput(f"{stored.path}: lacks {name}, which a model of its config has; it cannot be exported.")
    is_vocabulary = isinstance(rule.conversion, PaddedRows)
    fits = shape[1:] == rule.megatron.shape[1:] and (
        shape[0] >= rule.hf[0].shape[0] if is_vocabulary else shape[0] == rule.megatron.shape[0]
    )
    if not fits:
        raise BadInput(
            f"{stored.path}: {name} has shape {list(shape)}, its config says {list(rule.megatron.shape)}; it cannot be "
            "exported."
        )
