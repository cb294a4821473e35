"""NVIDIA GPUs with NCCL."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from configs.errors import BadInput
from parallel.platform.base import AttentionKernels, DeviceFacts, PlatformName
from parallel.platform.gpu_peaks import find_peaks

FP8_CAPABILITIES = {"blockwise": (9, 0), "mxfp8": (10, 0)}
"""From which compute capability Transformer Engine runs a recipe that needs more than Ada."""


class CudaPlatform:
    """Runs every rank on one GPU; one instance a process."""

    name: PlatformName = "cuda"
    backend = "nccl"
    control_backend = "gloo"
    lone_backend = "nccl"
    fuses_kernels = True
    queues_collectives = True
    overlaps_communication = True

    def __init__(self) -> None:
        self._peak = 0
        """Of the memory allocated before the allocator last began anew to look for it."""

    def activate(self, local_rank: int) -> torch.device:
        """Make GPU `local_rank` current and return it."""
        # Lets tensor-parallel communication start before the matmul queued after it; read when the context is made.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        if not torch.cuda.is_available():
            raise BadInput(
                "SHARDWRIGHT_PLATFORM: PyTorch finds no GPU that it can use here (look at nvidia-smi, and at torch's "
                f"build: {torch.__version__}); a value that would work: cpu"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)

    def get_rng_state(self) -> torch.Tensor:
        """Return the state of the current GPU's generator."""
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore the current GPU's generator."""
        torch.cuda.set_rng_state(state)

    def synchronize(self) -> None:
        """Wait until all queued work of the current GPU is done."""
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def record_waits(self) -> Iterator[list[str]]:
        """Note the places of operations that wait; an explicit `synchronize` is not one of them."""
        places: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield places
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [one for one in seen if "synchronizing" in str(one.message)]
        places += [f"{one.filename.rsplit('/', 1)[-1]}:{one.lineno}" for one in waits]

    def peak_memory_bytes(self) -> int:
        """Return the most GPU memory allocated so far, in bytes."""
        return max(self._peak, torch.cuda.max_memory_allocated())

    @contextlib.contextmanager
    def measure_peak(self) -> Iterator[list[int]]:
        """Note the most GPU memory that was allocated within the context."""
        found: list[int] = []
        self._peak = self.peak_memory_bytes()
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.append(torch.cuda.max_memory_allocated())

    def peak_tflops(self) -> Mapping[str, float]:
        """Return the datasheet's dense peaks of this GPU, empty for an unknown one."""
        return find_peaks(torch.cuda.get_device_name())

    def check_precision(self, compute: str) -> str | None:
        """Refuse bf16 before Ampere, which computes it very slowly."""
        if compute == "bf16" and torch.cuda.get_device_capability() < (8, 0):
            return f"precision.compute: {torch.cuda.get_device_name()} has no bf16 units; use fp16 or fp32."
        return None

    def attention_kernels(self, compute: str) -> AttentionKernels:
        """Return flash attention from Ampere on in formats of 16 bits, else the one that takes them all."""
        has_flash = compute in ("bf16", "fp16") and torch.cuda.get_device_capability() >= (8, 0)
        return "flash" if has_flash else "efficient"

    def pack_weight(self, weight: torch.Tensor, num_tokens: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return None: cuBLAS reads weights as they lie."""
        return None

    def check_fp8(self, recipe: str) -> str | None:
        """Refuse GPUs before Ada and Hopper, for blocks those before Hopper, for MXFP8 those before Blackwell."""
        capability, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
        if capability < (8, 9):
            return f"precision.fp8.backend: {name} has no FP8 units; a value that would work: emulated"
        if capability < FP8_CAPABILITIES.get(recipe, (8, 9)):
            return (
                f"precision.fp8.recipe: {name} has no units for {recipe}; a value that would work: tensorwise, or "
                "precision.fp8.backend=emulated"
            )
        return None

    def describe(self) -> dict[str, str]:
        """Return the GPU, its memory and the CUDA and NCCL versions."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        return {
            "device": f"{properties.name}, {memory}, {torch.cuda.device_count()} on host",
            "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
            "collectives": f"NCCL {nccl}",
        }

    def inspect(self) -> DeviceFacts:
        """Return the GPU, its memory, highest clock and driver."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        free, _ = torch.cuda.mem_get_info()
        return DeviceFacts(
            name=properties.name,
            memory_bytes=properties.total_memory,
            free_bytes=free,
            clock_mhz=properties.clock_rate / 1000,  # reported in kHz
            driver=_driver_version(),
        )

    def dump_collectives(self) -> str | None:
        """Return what NCCL's flight recorder holds, which is on unless TORCH_FR_BUFFER_SIZE is 0."""
        from torch._C._distributed_c10d import _dump_nccl_trace_json  # type: ignore[attr-defined]

        return _dump_nccl_trace_json(includeCollectives=True, onlyActive=False).decode()

    def is_peer_failure(self, error: BaseException) -> bool:
        """Return whether NCCL or the store says that a peer died or did not answer."""
        return isinstance(error, torch.distributed.DistError)


def _driver_version() -> str:
    """Return the version of the kernel's NVIDIA module, such as 580.65.06."""
    try:
        found = re.search(r"\d+\.\d+(?:\.\d+)?", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found.group() if found else "unknown"
