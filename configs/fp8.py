"""FP8 recipes as plain data: what shares a scale, which backends run it, what sizes it wants. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.sections.precision import Fp8Config
from configs.stages import Config

Block = tuple[int | None, int | None]
"""What shares a scale: rows, and elements along the contraction; None is all of them."""
_TENSOR: Block = (None, None)


@dataclass(frozen=True)
class Recipe:
    """How the operands of a matrix multiplication are scaled; every scale is a power of two."""

    activation_block: Block
    """Of activations and of gradients."""
    weight_block: Block
    format: Literal["e4m3", "hybrid"]
    """Where `precision.fp8.format` is not given."""
    backends: tuple[str, ...]
    has_history: bool = False
    """Scales come from the largest values of earlier steps."""

    @property
    def alignment(self) -> int | None:
        """Elements along the contraction that share a scale; None where that is not a fixed number."""
        return self.activation_block[1]


RECIPES: dict[str, Recipe] = {
    "delayed": Recipe(_TENSOR, _TENSOR, "hybrid", ("te", "torch", "emulated"), has_history=True),
    "tensorwise": Recipe(_TENSOR, _TENSOR, "hybrid", ("te", "torch", "emulated")),
    "rowwise": Recipe((1, None), (1, None), "hybrid", ("torch", "emulated")),
    "blockwise": Recipe((1, 128), (128, 128), "e4m3", ("te", "emulated")),
    "mxfp8": Recipe((1, 32), (1, 32), "e4m3", ("te", "emulated")),
}


def fp8_format(fp8: Fp8Config) -> Literal["e4m3", "hybrid"]:
    """Return the number formats: e4m3 for all operands, or hybrid with e5m2 for gradients."""
    return fp8.format or RECIPES[fp8.recipe].format


def resolve_backend(fp8: Fp8Config, *, has_te: bool) -> Literal["te", "torch", "emulated"]:
    """Return the backend that runs a recipe on a machine that `check_backend` accepts."""
    if fp8.backend != "auto":
        return fp8.backend
    return "te" if has_te and "te" in RECIPES[fp8.recipe].backends else "torch"


def uses_te_layers(config: Config, *, has_te: bool) -> bool:
    """Return whether the layers are Transformer Engine's: where it is installed, unless LoRA or FP8 runs without it.

    Its layers fuse norms into linears, and adapters want what is between them.
    """
    fp8 = config.precision.fp8
    return has_te and config.lora is None and (fp8 is None or resolve_backend(fp8, has_te=has_te) == "te")


def describe_fp8(fp8: Fp8Config, backend: str) -> str:
    """Return a recipe and what runs it in words."""
    kept = fp8.num_first_layers_kept + fp8.num_last_layers_kept
    return f"{fp8.recipe}, {fp8_format(fp8)}, backend {backend}" + (f", {kept} layers kept out" if kept else "")
