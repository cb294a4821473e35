"""The adapter of one parallel linear: what it adds to the linear's output, on all ranks of its tp group.

Column-parallel: A is whole on each rank and B has the rank's rows. Row-parallel: A has the rank's columns and B is
whole. What is summed or gathered over the ranks is `rank` wide. Knows neither models nor files.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

from configs.plan.adapters import AdaptedLinear, linear_path
from configs.sections.lora import LoraConfig


@dataclass(frozen=True)
class Site:
    """Which linear of the whole model an adapter belongs to."""

    layer: int
    """From 0."""
    name: str
    """Within the layer, in Megatron-Core."""
    expert: int | None = None
    """Number among all experts of the layer; None outside them."""

    @property
    def path(self) -> str:
        """The linear's name in the whole model."""
        return linear_path(self.layer, self.name, self.expert)


class LoraLinear(torch.nn.Module):
    """Returns scaling * B A dropout(x); A `[parts * rank, in]`, B `[out, rank]`, of a gated linear `[2, out/2, rank]`.

    A part is a module of Hugging Face models with an adapter of its own: its rank rows of A belong to its rows of B.
    Each part drops other elements of the input, as PEFT's modules do.
    """

    def __init__(self, site: Site, adapted: AdaptedLinear, lora: LoraConfig, linear: Any) -> None:
        """`linear` is the frozen one beside which this lies; both matrices begin as zeros."""
        super().__init__()
        self.site, self.adapted = site, adapted
        self.group = linear.tp_group
        self.is_row = adapted.linear.split == "row"
        self.is_expert = site.expert is not None
        self.scaling = lora.scaling
        self._dropout = lora.dropout
        self._rank = lora.rank
        self._is_sequence_split = bool(linear.sequence_parallel) and not self.is_expert
        rows, columns = linear.weight.shape
        new = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.a = torch.nn.Parameter(torch.zeros(adapted.num_adapted * lora.rank, columns, **new))
        self.b = torch.nn.Parameter(torch.zeros(*((2, rows // 2) if adapted.is_gated else (rows,)), lora.rank, **new))
        owners = self._find_owners(rows)
        self.owners: torch.Tensor | None
        self.register_buffer("owners", owners.to(**new) if owners is not None else None, persistent=False)
        self._mark_parameters(linear)

    @property
    def split_dims(self) -> dict[str, int | None]:
        """The dimension of each matrix that is split over the tp group; None for the whole one."""
        return {"a": 1, "b": None} if self.is_row else {"a": None, "b": int(self.adapted.is_gated)}

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what is added to the linear's output `[seq, batch, out]`, as it lies there, for its own `inputs`."""
        a, b = self.a, self._rows_of_parts()
        is_split = self.group.size() > 1
        if is_split and self.is_expert:
            # The dispatcher sums inputs' gradients and outputs over these ranks; of the whole matrix each has a part.
            if self.is_row:
                b = copy_to_tensor_model_parallel_region(b, group=self.group)
            else:
                a = copy_to_tensor_model_parallel_region(a, group=self.group)
        low = self._project(inputs, a)  # [seq, batch, parts * rank]
        if is_split and not self.is_expert:
            low = self._across(low)
        return F.linear(low * self.scaling, b)

    @torch.no_grad()
    def fill(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take this rank's part of the whole matrices, A `[parts * rank, in]` and B `[out, rank]`."""
        wholes = {"a": a, "b": b.unflatten(0, (2, -1)) if self.adapted.is_gated else b}
        for name, dim in self.split_dims.items():
            whole = wholes[name]
            part = whole if dim is None else whole.chunk(self.group.size(), dim)[self.group.rank()]
            getattr(self, name).copy_(part)

    def delta(self) -> torch.Tensor:
        """Return scaling * B A in fp32, of the shape of this rank's weight of the linear."""
        return self.scaling * (self._rows_of_parts().detach().float() @ self.a.detach().float())

    def _across(self, low: torch.Tensor) -> torch.Tensor:
        """Sum or gather the projected input over the ranks; backwards its gradient."""
        of_column: Callable[..., torch.Tensor] = copy_to_tensor_model_parallel_region
        of_row: Callable[..., torch.Tensor] = reduce_from_tensor_model_parallel_region
        if self._is_sequence_split:
            of_column, of_row = gather_from_sequence_parallel_region, reduce_scatter_to_sequence_parallel_region
        result: torch.Tensor = (of_row if self.is_row else of_column)(low, group=self.group)
        return result

    def _project(self, inputs: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        if not (self.training and self._dropout > 0):
            return F.linear(inputs, a)
        with self._random_numbers():
            parts = [F.linear(F.dropout(inputs, self._dropout), part) for part in a.split(self._rank)]
        return torch.cat(parts, dim=-1)

    def _random_numbers(self) -> AbstractContextManager[Any]:
        """Draw alike on tp ranks that have the same input, and each its own where the inputs are parts."""
        if self.is_expert:
            context: AbstractContextManager[Any] = get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name())
            return context
        if self.is_row or self._is_sequence_split:
            context = get_cuda_rng_tracker().fork()
            return context
        return nullcontext()

    def _rows_of_parts(self) -> torch.Tensor:
        """Return B as `[out, parts * rank]`: each row in the columns of its part, zeros elsewhere."""
        b = self.b.flatten(0, -2)  # [out, rank]
        if self.owners is None:
            return b
        return (self.owners.unsqueeze(-1) * b.unsqueeze(1)).flatten(1)

    def _find_owners(self, num_rows: int) -> torch.Tensor | None:
        """Return which part each of this rank's rows belongs to, `[out, parts]` of zeros and ones; None if all to one.

        Rows of parts without an adapter belong to none.
        """
        parts, blocks = self.adapted.parts, self.adapted.num_blocks
        if len(parts) == 1:
            return None
        if self.adapted.is_gated:
            first, sizes, blocks = 0, [num_rows // 2] * 2, 1
        else:
            first, sizes = self.group.rank() * num_rows, [part.num_rows // blocks for part in parts]
        numbers = torch.tensor([number for number, part in enumerate(parts) if part.is_adapted])
        of_block = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
        of_row = of_block.repeat(blocks)[first : first + num_rows]
        return of_row.unsqueeze(1) == numbers

    def _mark_parameters(self, linear: Any) -> None:
        """Tell Megatron-Core how the matrices lie over ranks, and whose gradients are parts of a sequence's."""
        for name, dim in self.split_dims.items():
            parameter: Any = getattr(self, name)
            parameter.allreduce = linear.weight.allreduce
            if dim is not None:
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
            else:
                parameter.sequence_parallel = self._is_sequence_split
