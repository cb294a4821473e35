"""The protocol every platform fulfils: what the rest of the code may ask of a device. Knows no device by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch


PlatformName = Literal["cpu", "cuda"]
AttentionKernels = Literal["cpu", "efficient", "flash"]
"""What torch has for attention: for CPUs, for GPUs in any format, for newer ones in formats of 16 bits."""


@dataclass(frozen=True)
class DeviceFacts:
    """What is the same on all hosts of a kind."""

    name: str
    memory_bytes: int
    free_bytes: int
    """What no process uses now."""
    clock_mhz: float | None
    """The highest clock, where that is known."""
    driver: str
    """Version of the driver, or of the kernel where there is none."""


class Platform(Protocol):
    """A kind of device with its collective backend; one instance a process."""

    name: PlatformName
    """Name in configs, reports and `environment.json`."""
    backend: str
    """`torch.distributed` backend of the collectives."""
    control_backend: str
    """Backend of what the hosts tell each other beside the training step."""
    lone_backend: str
    """The same for a world of one rank."""
    fuses_kernels: bool
    """Whether run-time compiled fusions (bias + activation, RoPE) pay on this device."""
    queues_collectives: bool
    """Whether a collective is only queued when its call returns, and its wait too."""
    overlaps_communication: bool
    """Whether collectives run beside compute, so that overlapping them pays."""

    def activate(self, local_rank: int) -> torch.device:
        """Make the device of `local_rank` current, apply what Megatron-Core needs, and return the device."""
        ...

    def get_rng_state(self) -> torch.Tensor:
        """Return the state of the device's random generator."""
        ...

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore the state of the device's random generator."""
        ...

    def synchronize(self) -> None:
        """Wait until all queued device work is done."""
        ...

    def record_waits(self) -> AbstractContextManager[list[str]]:
        """Within the context, note each place (`file:line`) where the host waits for queued device work."""
        ...

    def peak_memory_bytes(self) -> int:
        """Return the most memory this process has held: on the device, or resident where there is none."""
        ...

    def measure_peak(self) -> AbstractContextManager[list[int]]:
        """Note the most device memory, in bytes, that was held within the context; nothing where that is not known.

        Not to be nested.
        """
        ...

    def peak_tflops(self) -> Mapping[str, float]:
        """Return the dense peak in TFLOP/s by number format (`bf16`, `fp8`), empty where unknown."""
        ...

    def check_precision(self, compute: str) -> str | None:
        """Return one sentence if the device cannot compute in this format, else None."""
        ...

    def attention_kernels(self, compute: str) -> AttentionKernels:
        """Return which of torch's attention kernels run here in this format."""
        ...

    def pack_weight(self, weight: torch.Tensor, num_tokens: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return what multiplies so many inputs `[..., in]` by a weight `[out, in]`, transposed, faster than torch.

        None where nothing is gained. It keeps a copy of the weight as it is now.
        """
        ...

    def check_fp8(self, recipe: str) -> str | None:
        """Return one sentence if the device has no FP8 units, or none for this recipe, else None."""
        ...

    def describe(self) -> dict[str, str]:
        """Return what was found: device name, library versions, backend."""
        ...

    def inspect(self) -> DeviceFacts:
        """Return what should be the same on every host, of the device that is active."""
        ...

    def dump_collectives(self) -> str | None:
        """Return, as JSON, the dump of the flight recorder of collectives that the host only queues; else None."""
        ...

    def is_peer_failure(self, error: BaseException) -> bool:
        """Return whether `error` says that another rank died or did not answer."""
        ...
