"""Rules of LoRA: modules that the model has, and what frozen weights cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator

from configs.fp8 import RECIPES, resolve_backend
from configs.plan.adapters import MIXTRAL_NAMES, module_names
from configs.sections.lora import ALL_LINEAR, LoraConfig
from configs.sections.model import ModelConfig
from configs.stages import Config


def check_lora(config: Config, *, has_te: bool) -> Iterator[str]:
    """Yield every rule of the `lora` section that is broken, one sentence each with a value that would work."""
    lora = config.lora
    if lora is None:
        return
    yield from _check_targets(lora, config.model)
    fp8 = config.precision.fp8
    if fp8 is not None and resolve_backend(fp8, has_te=has_te) == "te":
        works = "torch" if "torch" in RECIPES[fp8.recipe].backends else "emulated"
        yield (
            f"precision.fp8.backend: LoRA's layers are not Transformer Engine's, here it is {fp8.backend}; a value "
            f"that would work: {works}"
        )


def _check_targets(lora: LoraConfig, model: ModelConfig) -> Iterator[str]:
    there = module_names(model)
    known = {ALL_LINEAR, *there, *(MIXTRAL_NAMES if model.moe is not None else ())}
    unknown = [name for name in lora.target_modules if name not in known]
    if unknown or not lora.target_modules:
        what = f"{', '.join(unknown)}: no linear of this model's layers" if unknown else "is empty"
        yield f"lora.target_modules: {what}; values that would work: {ALL_LINEAR}, or some of {', '.join(there)}"
    elif ALL_LINEAR in lora.target_modules and len(lora.target_modules) > 1:
        yield f"lora.target_modules: {ALL_LINEAR} names all; a value that would work: {ALL_LINEAR}"
