"""The L2 norm of many gradients, exact to fp32 rounding, and their scaling: used where neither TE nor apex is.

Megatron-Core's own stand-in asks the host for every tensor's norm, and on CPU sums millions of squares in one fp32
accumulator, which is off by 1e-5 and more: enough to make equal runs look different.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

ROW = 4096  # squares summed in fp32 before the fp64 sum takes over


def compute_l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Return the norm over all tensors as fp32 `[1]`, with the signature of `amp_C.multi_tensor_l2norm`."""
    squares = [_sum_squares(tensor) for tensors in tensor_lists for tensor in tensors]
    return torch.stack(squares).sum().sqrt().float().reshape(1), None


def compute_l2_norm_at_once(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], per_tensor: bool
) -> tuple[torch.Tensor, None]:
    """Return what `compute_l2_norm` does in one kernel over all tensors, where there is one that sums in a tree."""
    norms = torch._foreach_norm([tensor.detach() for tensors in tensor_lists for tensor in tensors])
    return torch.stack(norms).double().square().sum().sqrt().float().reshape(1), None


def _sum_squares(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // ROW * ROW
    total = torch.linalg.vector_norm(flat[whole:]).double().square()
    if whole:
        total = total + torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1).double().square().sum()
    return total


def scale_tensors(
    chunk_size: int, overflow: torch.Tensor, tensor_lists: Sequence[Sequence[torch.Tensor]], scale: float
) -> None:
    """Write `sources * scale` into the targets, with the signature of `amp_C.multi_tensor_scale`; clips in place."""
    sources, targets = tensor_lists
    if not targets:  # a pipeline stage without experts
        return
    if sources is targets:
        torch._foreach_mul_(list(targets), scale)
    else:
        torch._foreach_copy_(list(targets), torch._foreach_mul(list(sources), scale))
