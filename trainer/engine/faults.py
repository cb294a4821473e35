"""Which ranks and data made a step non-finite."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from parallel.collectives import gather_objects
from parallel.mesh import Mesh
from trainer.optim.update import has_non_finite_gradient


@dataclass
class MicrobatchReport:
    """This rank's losses of the last step by microbatch, for finding the cause of a non-finite one."""

    sample_ids: list[tuple[int, ...]] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)


def describe_fault(report: MicrobatchReport, replicas: list[Any], mesh: Mesh) -> str:
    """Return which ranks and data had a non-finite loss, else which ranks hold non-finite gradients.

    Collective: all ranks of the world must call this.
    """
    bad_samples = [
        sample
        for ids, loss in zip(report.sample_ids, report.losses, strict=True)
        if not bool(torch.isfinite(loss))
        for sample in ids
    ]
    findings = gather_objects((mesh.coordinates(), bad_samples, has_non_finite_gradient(replicas)))
    losses = [f"{where}, samples {samples}" for where, samples, _ in findings if samples]
    if losses:
        return "non-finite loss on " + "; ".join(losses)
    gradients = [where for where, _, is_bad in findings if is_bad]
    return "non-finite gradients on " + "; ".join(gradients) if gradients else "the sum of the gradients overflows"
