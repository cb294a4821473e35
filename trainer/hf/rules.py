"""How one tensor of a Megatron-Core checkpoint is made of Hugging Face tensors, and back. Pure; knows no files.

Merging and splitting are exact inverses, so what goes in comes out bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class HfTensor:
    """A tensor by its Hugging Face name."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class MegatronTensor:
    """A tensor by its place in a Megatron-Core checkpoint, on whatever layout that was written."""

    name: str
    """Name in the model, such as `decoder.layers.3.self_attention.linear_qkv.weight`; experts count within the name
    too: `decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight`."""
    shape: tuple[int, ...]


class Conversion(Protocol):
    """Two pure functions that undo each other."""

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the Megatron-Core tensor of these Hugging Face tensors."""
        ...

    def split(self, merged: torch.Tensor) -> list[torch.Tensor]:
        """Return the Hugging Face tensors of this Megatron-Core tensor."""
        ...


@dataclass(frozen=True)
class Rule:
    """One Megatron-Core tensor and the Hugging Face tensors it holds."""

    megatron: MegatronTensor
    hf: tuple[HfTensor, ...]
    conversion: Conversion


class Same:
    """One tensor, the same on both sides."""

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0]

    def split(self, merged: torch.Tensor) -> list[torch.Tensor]:
        return [merged]


@dataclass(frozen=True)
class PaddedRows:
    """A vocabulary matrix whose rows are padded with zeros to `num_rows`, or cut to as many."""

    num_real: int
    num_rows: int

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """`[num_real, hidden]` -> `[num_rows, hidden]`."""
        return torch.nn.functional.pad(parts[0], (0, 0, 0, self.num_rows - self.num_real))

    def split(self, merged: torch.Tensor) -> list[torch.Tensor]:
        """`[at least num_real, hidden]` -> `[num_real, hidden]`."""
        return [merged[: self.num_real]]


class GateUp:
    """The gate's rows above the up projection's: `[ffn, hidden]` twice -> `[2 ffn, hidden]`."""

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(parts))

    def split(self, merged: torch.Tensor) -> list[torch.Tensor]:
        return list(merged.chunk(2))


@dataclass(frozen=True)
class GroupedQkv:
    """Query, key and value interleaved by query group: each group's queries, then its key, then its value."""

    num_heads: int
    num_groups: int
    head_dim: int

    def merge(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """`[heads head_dim, ...]`, `[groups head_dim, ...]` twice -> `[(heads + 2 groups) head_dim, ...]`."""
        rest = parts[0].shape[1:]
        return torch.cat([part.reshape(self.num_groups, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)

    def split(self, merged: torch.Tensor) -> list[torch.Tensor]:
        """`[(heads + 2 groups) head_dim, ...]` -> query, key, value."""
        rest = merged.shape[1:]
        sizes = [self.num_heads // self.num_groups * self.head_dim, self.head_dim, self.head_dim]
        grouped = merged.reshape(self.num_groups, sum(sizes), *rest)
        return [part.reshape(-1, *rest) for part in grouped.split(sizes, dim=1)]
