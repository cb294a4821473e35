"""A Hugging Face model directory, checked: its family, our `model` section, and its tensors as the engine's."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from configs.errors import BadInput
from configs.sections.model import ModelConfig
from trainer.hf.config_json import architecture_of, find_family, left_aside, load_config_json, read_head, read_model
from trainer.hf.directories import find_model_directory
from trainer.hf.fp8_blocks import dequantise, num_blocks
from trainer.hf.quantisation import QUANTISATION_KEY, SCALE_SUFFIX, read_block_size
from trainer.hf.rules import HfTensor, Rule
from trainer.hf.safetensors_files import SafetensorsDirectory, StoredTensor
from trainer.hf.tensors import model_rules

_FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_COMPUTED = r"\.rotary_emb\.inv_freq$"  # old files hold what follows from config.json


class HfModel:
    """A model directory whose files, config and shapes agree with each other."""

    def __init__(self, directory: str | Path, model: ModelConfig | None = None, num_ids: int | None = None) -> None:
        """Open and check; `model` gives what `config.json` does not say (padding of the vocabulary).

        With `num_ids` the directory may have as many ids, and those beyond the model's are not read. Raises BadInput
        for anything that is missing, disagrees, or cannot be expressed.
        """
        self.directory = find_model_directory(Path(directory))
        config = load_config_json(self.directory)
        self.family = find_family(config, self.directory / "config.json")
        self.model = read_model(config, self.directory / "config.json")
        self.head = read_head(config, self.directory / "config.json")
        self.architecture = architecture_of(self.family, self.head)
        self._block_size = read_block_size(config)[0]
        self._full_format = _FORMATS.get(str(config.get("dtype", config.get("torch_dtype"))), torch.bfloat16)
        self._num_prediction_layers = 0
        if self.family.has_prediction_layers:
            announced = config.get("num_nextn_predict_layers", config.get("num_mtp_layers"))
            self._num_prediction_layers = max(1, announced or 0)
        self._files = SafetensorsDirectory(self.directory)
        self._name_as_whole_model()
        rules = model_rules(model or self.model, self.family.names, self.head, num_ids)
        self.rules = {rule.megatron.name: rule for rule in rules}
        self._check_shapes()
        self.ignored = self._find_ignored()
        self.notes = [
            f"config.json: {', '.join(aside)} left aside, as transformers' {self.architecture} does"
            for aside in [left_aside(config)]
            if aside
        ]
        self._last: tuple[str, torch.Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the largest tensor, as it is read."""
        stored = max(self._files.tensors.values(), key=lambda tensor: tensor.num_bytes).dtype
        return self._full_format if stored in _FP8 else stored

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the number format in which the engine's tensor of that name is read."""
        stored = self._files.tensors[self.rules[name].hf[0].name].dtype
        return self._full_format if stored in _FP8 else stored

    def num_bytes(self, rule: Rule) -> int:
        """Return the bytes of all Hugging Face tensors of a rule."""
        return sum(self._files.tensors[part.name].num_bytes for part in rule.hf)

    def read(self, name: str) -> torch.Tensor:
        """Return the engine's whole tensor of that name; the last one is kept, since its pieces follow each other."""
        if self._last is None or self._last[0] != name:
            self._last = None
            rule = self.rules[name]
            parts = [self._read_part(part) for part in rule.hf]
            dtypes = {part.dtype for part in parts}
            if len(dtypes) > 1:
                raise BadInput(
                    f"{self.directory}: {', '.join(part.name for part in rule.hf)} differ in their number format "
                    f"({', '.join(sorted(map(str, dtypes)))}) and cannot be joined; write them in one."
                )
            self._last = (name, rule.conversion.merge(parts))
        return self._last[1]

    def _read_part(self, part: HfTensor) -> torch.Tensor:
        stored = self._files.read(part.name)
        if stored.dtype not in _FP8:
            return stored
        assert self._block_size is not None  # else refused at the start
        scales = self._files.read(part.name + SCALE_SUFFIX)
        return dequantise(stored, scales, self._block_size, self._full_format)

    def _name_as_whole_model(self) -> None:
        """Give the tensors of a base model (saved as LlamaModel, say) the names that they have in the whole one."""
        tensors, embedding = self._files.tensors, self.family.names.embedding
        prefix = embedding.partition(".")[0] + "."
        if embedding in tensors or embedding.removeprefix(prefix) not in tensors:
            return
        output = self.family.names.output
        if self.head == "vocabulary" and output not in tensors and not self.model.tie_embeddings:
            raise BadInput(
                f"{self.directory}: holds a base model without an output layer ({output}), which "
                f"{self.architecture} has beside it; save it as {self.architecture}."
            )
        self._files.tensors = {
            name if name in (output, self.family.names.score) else prefix + name: one for name, one in tensors.items()
        }

    def _check_shapes(self) -> None:
        for rule in self.rules.values():
            for part in rule.hf:
                stored = self._files.tensors.get(part.name)
                if stored is None:
                    raise BadInput(
                        f"{self.directory}: lacks {part.name}, which a {self.architecture} of its config.json "
                        "has; download the model again."
                    )
                if stored.dtype not in _FORMATS.values():
                    self._check_quantised(part, stored)
                if stored.shape != part.shape:
                    raise BadInput(
                        f"{stored.file}: {part.name} has shape {list(stored.shape)}, config.json says "
                        f"{list(part.shape)}; use the config.json that belongs to these weights."
                    )

        if self._block_size is not None and not any(one.dtype in _FP8 for one in self._files.tensors.values()):
            raise BadInput(
                f"{self.directory / 'config.json'}: {QUANTISATION_KEY} is given, but no tensor is quantised; remove it."
            )

    def _check_quantised(self, part: HfTensor, stored: StoredTensor) -> None:
        """Raise BadInput unless the tensor is FP8 by blocks, with its scales beside it."""
        kind = str(stored.dtype).removeprefix("torch.")
        if stored.dtype.is_floating_point and stored.dtype.itemsize > 1:
            raise BadInput(f"{stored.file}: {part.name} is {kind}; save it in one of {', '.join(_FORMATS)}.")
        name = part.name + SCALE_SUFFIX
        scales = self._files.tensors.get(name)
        if stored.dtype not in _FP8 or self._block_size is None or len(part.shape) != 2 or scales is None:
            raise BadInput(
                f"{stored.file}: {part.name} is {kind}; such quantised weights cannot be converted, only float8 with "
                f"{name} beside it and {QUANTISATION_KEY}.weight_block_size in config.json."
            )
        wanted = num_blocks(part.shape, self._block_size)
        if not scales.dtype.is_floating_point or scales.shape != wanted:
            raise BadInput(
                f"{scales.file}: {name} is {str(scales.dtype).removeprefix('torch.')} of shape {list(scales.shape)}, "
                f"blocks of {list(self._block_size)} need floating point of shape {list(wanted)}; use the config.json "
                "that belongs to these weights."
            )

    def _find_ignored(self) -> list[str]:
        """Return the tensors that are no part of the model here. Raises BadInput for one that nobody expects."""
        wanted = {part.name for rule in self.rules.values() for part in rule.hf}
        tensors = self._files.tensors
        wanted |= {name + SCALE_SUFFIX for name in wanted if name in tensors and tensors[name].dtype in _FP8}
        patterns = [_COMPUTED]
        for number in range(self._num_prediction_layers):
            patterns.append("^" + re.escape(self.family.names.layer.format(layer=self.model.num_layers + number)))
        further = sorted(self._files.tensors.keys() - wanted)
        unknown = [name for name in further if not any(re.search(pattern, name) for pattern in patterns)]
        names = self.family.names
        if names.output in unknown and self.model.tie_embeddings and self.head == "vocabulary":
            if not torch.equal(self._files.read(names.output), self._files.read(names.embedding)):
                raise BadInput(
                    f"{self.directory}: {names.output} differs from {names.embedding} though config.json ties them; "
                    "set tie_word_embeddings to false."
                )
            unknown.remove(names.output)
            further.remove(names.output)
        if unknown:
            shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            raise BadInput(
                f"{self.directory}: holds tensors that a {self.architecture} here has no place for: {shown}; "
                "remove them if they are not part of the model."
            )
        return [name for name in further if not re.search(_COMPUTED, name)]
