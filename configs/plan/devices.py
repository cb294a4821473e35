"""GPUs by the name that `tools/plan.py --device` takes: published peaks, memory, links. Torch-free.

Every figure is a datasheet's; what a program reaches of it is `configs.plan.efficiency`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from configs.errors import BadInput


@dataclass(frozen=True)
class Device:
    """One GPU: dense peaks in FLOP/s, memory in bytes, bandwidths in bytes/s in one direction."""

    name: str
    bf16_flops: float
    """Of fp16 too, with fp32 accumulation."""
    fp8_flops: float | None
    """None where the GPU has no FP8 units."""
    memory_bytes: float
    """What a process can allocate: some MiB less than the name says."""
    memory_bandwidth: float
    link_bandwidth: float
    """To the other GPUs of the node."""
    network_bandwidth: float
    """Of a GPU's own network card, as in DGX and HGX nodes."""
    source: str


_GIB = 2**30
_NDR = "network: one ConnectX-7 of 400 Gb/s a GPU (DGX H100 and H200 user guides)"
_DEVICES = (
    Device(
        "a100", 312e12, None, 79.2 * _GIB, 2.039e12, 300e9, 25e9,
        "NVIDIA A100 datasheet (SXM 80 GB); network: one ConnectX-6 of 200 Gb/s a GPU (DGX A100 user guide)",
    ),
    Device("h100", 989e12, 1979e12, 79.6 * _GIB, 3.35e12, 450e9, 50e9, f"NVIDIA H100 datasheet (SXM); {_NDR}"),
    Device(
        "h800", 989e12, 1979e12, 79.6 * _GIB, 3.35e12, 200e9, 50e9,
        "as H100; NVLink of 400 GB/s in both directions together and InfiniBand of 50 GB/s (arXiv:2505.09343, 4.1)",
    ),
    Device("h200", 989e12, 1979e12, 139.8 * _GIB, 4.8e12, 450e9, 50e9, f"NVIDIA H200 datasheet (SXM); {_NDR}"),
    Device(
        "b200", 2250e12, 4500e12, 178.0 * _GIB, 7.7e12, 900e9, 50e9,
        "NVIDIA HGX B200 datasheet; network: one ConnectX-7 of 400 Gb/s a GPU (DGX B200 user guide)",
    ),
)  # fmt: skip
DEVICES = {device.name: device for device in _DEVICES}


def find_device(name: str) -> Device:
    """Return a device by name; raise BadInput for one that is not known."""
    device = DEVICES.get(name.lower())
    if device is None:
        near = difflib.get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.3)
        raise BadInput(
            f"--device: no figures for {name!r}; known are {', '.join(DEVICES)}; a value that would work: "
            f"{near[0] if near else 'h100'}"
        )
    return device
