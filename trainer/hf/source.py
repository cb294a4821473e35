"""A Hugging Face model directory, checked: its family, our `model` section, and its tensors as the engine's."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from configs.errors import BadInput
from configs.sections.model import ModelConfig
from trainer.hf.config_json import find_family, load_config_json, read_model
from trainer.hf.rules import Rule
from trainer.hf.safetensors_files import SafetensorsDirectory
from trainer.hf.tensors import model_rules

_FORMATS = (torch.bfloat16, torch.float16, torch.float32)
_COMPUTED = r"\.rotary_emb\.inv_freq$"  # old files hold what follows from config.json


class HfModel:
    """A model directory whose files, config and shapes agree with each other."""

    def __init__(self, directory: str | Path, model: ModelConfig | None = None) -> None:
        """Open and check; `model` gives what `config.json` does not say (padding of the vocabulary).

        Raises BadInput for anything that is missing, disagrees, or cannot be expressed.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise BadInput(
                f"{directory}: no such directory; give that of a Hugging Face model (hf download ID --local-dir DIR "
                "fetches one)."
            )
        config = load_config_json(self.directory)
        self.family = find_family(config, self.directory / "config.json")
        self.model = read_model(config, self.directory / "config.json")
        self._files = SafetensorsDirectory(self.directory)
        self.rules = {rule.megatron.name: rule for rule in model_rules(model or self.model, self.family.names)}
        self._check_shapes()
        self.ignored = self._find_ignored()
        self._last: tuple[str, torch.Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the largest tensor."""
        return max(self._files.tensors.values(), key=lambda tensor: tensor.num_bytes).dtype

    def num_bytes(self, rule: Rule) -> int:
        """Return the bytes of all Hugging Face tensors of a rule."""
        return sum(self._files.tensors[part.name].num_bytes for part in rule.hf)

    def read(self, name: str) -> torch.Tensor:
        """Return the engine's whole tensor of that name; the last one is kept, since its pieces follow each other."""
        if self._last is None or self._last[0] != name:
            self._last = None
            rule = self.rules[name]
            parts = [self._files.read(part.name) for part in rule.hf]
            dtypes = {part.dtype for part in parts}
            if len(dtypes) > 1:
                raise BadInput(
                    f"{self.directory}: {', '.join(part.name for part in rule.hf)} differ in their number format "
                    f"({', '.join(sorted(map(str, dtypes)))}) and cannot be joined; write them in one."
                )
            self._last = (name, rule.conversion.merge(parts))
        return self._last[1]

    def _check_shapes(self) -> None:
        for rule in self.rules.values():
            for part in rule.hf:
                stored = self._files.tensors.get(part.name)
                if stored is None:
                    raise BadInput(
                        f"{self.directory}: lacks {part.name}, which a {self.family.architecture} of its config.json "
                        "has; download the model again."
                    )
                if stored.dtype not in _FORMATS:
                    raise BadInput(
                        f"{stored.file}: {part.name} is {stored.dtype}; quantised weights cannot be converted, only "
                        "bfloat16, float16 and float32."
                    )
                if stored.shape != part.shape:
                    raise BadInput(
                        f"{stored.file}: {part.name} has shape {list(stored.shape)}, config.json says "
                        f"{list(part.shape)}; use the config.json that belongs to these weights."
                    )

    def _find_ignored(self) -> list[str]:
        """Return the tensors that are no part of the model here. Raises BadInput for one that nobody expects."""
        wanted = {part.name for rule in self.rules.values() for part in rule.hf}
        patterns = [_COMPUTED]
        if self.family.ignored_tensors is not None:
            patterns.append(self.family.ignored_tensors.format(num_layers=self.model.num_layers))
        further = sorted(self._files.tensors.keys() - wanted)
        unknown = [name for name in further if not any(re.search(pattern, name) for pattern in patterns)]
        names = self.family.names
        if names.output in unknown and self.model.tie_embeddings:
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
                f"{self.directory}: holds tensors that a {self.family.architecture} here has no place for: {shown}; "
                "remove them if they are not part of the model."
            )
        return [name for name in further if not re.search(_COMPUTED, name)]
