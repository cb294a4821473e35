"""The `lora` section: which linears get a low-rank adapter, and how large it is. Torch-free plain data."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from configs.sections.base import Count, PathText, PositiveFloat, Section

ALL_LINEAR = "all-linear"


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class LoraConfig(Section):
    """Low-rank adapters beside frozen linears (arXiv:2106.09685): W x + scaling B A x; A and B are trained.

    Beside them a scalar head is, which no language model brings; all else is frozen.
    """

    rank: Count = 16
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 32.0
    """Scaling is alpha / rank."""
    use_rslora: bool = False
    """Scaling is alpha / sqrt(rank) instead (arXiv:2312.03732)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability on an adapter's input."""
    target_modules: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = (ALL_LINEAR,)
    """Linears that get an adapter, by their names in Hugging Face models (q_proj, gate_proj, ...), or all-linear: every
    linear of the layers, routers apart."""
    init_from: PathText | None = None
    """Directory of a PEFT adapter to begin with, and of a sequence classifier its head; null for a new one, which
    changes nothing at first."""

    @property
    def scaling(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
