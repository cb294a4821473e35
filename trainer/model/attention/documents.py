"""What attention is told of packed documents, in the form in which Megatron-Core hands it down to every layer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedDocuments(PackedSeqParams):
    """Boundaries on the device, as Megatron-Core and its kernels want them, and on the host, where work is planned."""

    bounds: tuple[int, ...] = ()
    """Where documents begin among the tokens of all rows, and the end."""
    num_rows: int = 1
    """Rows laid end to end."""
