"""CPU with gloo: the same code as on a cluster, for laptops, tests and rehearsals."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform as host_platform
import resource
from collections.abc import Callable, Iterator, Mapping

import torch

from parallel.platform.base import AttentionKernels, DeviceFacts, PlatformName
from parallel.platform.host_memory import host_memory_bytes
from parallel.platform.processor import highest_clock_mhz, processor_name

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 2**25
_FEWEST_PACKED = 8  # tokens; below, a product is no more than reading the weight
PEER_FAILURE_WORDS = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")


class CpuPlatform:
    """Runs every rank as a CPU process; one instance a process."""

    name: PlatformName = "cpu"
    backend = "gloo"
    control_backend = "gloo"
    lone_backend = "lone"
    fuses_kernels = False
    queues_collectives = False
    overlaps_communication = False

    def activate(self, local_rank: int) -> torch.device:
        """Apply the CPU patches to torch and Megatron-Core, keep freed memory, and return the device."""
        from parallel.platform.cpu_patches import apply_cpu_patches

        _keep_freed_memory()
        apply_cpu_patches()
        # Here the CPU's generator is the device's own, which Megatron-Core remarks on at every use.
        logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
        return torch.device("cpu")

    def get_rng_state(self) -> torch.Tensor:
        """Return the state of the one generator there is."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Restore the one generator there is."""
        torch.set_rng_state(state)

    def synchronize(self) -> None:
        """Do nothing: CPU work is done when the call returns."""

    @contextlib.contextmanager
    def record_waits(self) -> Iterator[list[str]]:
        """Note nothing: no work is queued."""
        yield []

    def peak_memory_bytes(self) -> int:
        """Return the largest resident set of this process so far, in bytes."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @contextlib.contextmanager
    def measure_peak(self) -> Iterator[list[int]]:
        """Note nothing: the resident set has no peak that could begin anew."""
        yield []

    def peak_tflops(self) -> Mapping[str, float]:
        """Return nothing: no vendor states a peak for this CPU that MFU could be measured against."""
        return {}

    def check_precision(self, compute: str) -> str | None:
        """Accept every format: the CPU computes bf16 and fp16 natively or by widening."""
        return None

    def attention_kernels(self, compute: str) -> AttentionKernels:
        """Return the CPU's own, which takes neither grouped heads nor packed documents."""
        return "cpu"

    def pack_weight(self, weight: torch.Tensor, num_tokens: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Pack for MKL, which otherwise does so in every product; in fp32, for enough tokens to be one."""
        if not torch.backends.mkl.is_available() or weight.dtype != torch.float32 or num_tokens < _FEWEST_PACKED:
            return None
        weight = weight.detach()
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, num_tokens)
        return lambda inputs: torch.ops.mkl._mkl_linear(inputs, packed, weight, None, num_tokens)

    def check_fp8(self, recipe: str) -> str | None:
        """Refuse: CPUs have no FP8 units."""
        return "precision.fp8.backend: a CPU has no FP8 units; a value that would work: emulated"

    def describe(self) -> dict[str, str]:
        """Return processor, cores, threads a rank and torch version."""
        cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads a rank"
        return {
            "device": f"CPU {host_platform.machine()}, {cores}",
            "torch": torch.__version__,
            "collectives": "gloo",
        }

    def inspect(self) -> DeviceFacts:
        """Return processor, host memory, clock and kernel."""
        memory = host_memory_bytes() or 0
        return DeviceFacts(
            name=f"CPU {processor_name()}, {os.cpu_count()} cores",
            memory_bytes=memory,
            free_bytes=memory,  # what other processes use changes by the second
            clock_mhz=highest_clock_mhz(),
            driver=f"{host_platform.system()} {host_platform.release()}",
        )

    def dump_collectives(self) -> str | None:
        """Return None: a wait for gloo is a wait of the host."""
        return None

    def is_peer_failure(self, error: BaseException) -> bool:
        """Return whether gloo says that a peer closed its connection or did not answer in time."""
        return isinstance(error, RuntimeError) and any(word in str(error) for word in PEER_FAILURE_WORDS)


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees, since the next step asks for it again; other C libraries do as they do.

    Given back, the pages come again one fault at a time, each of them zeroed: thousands a step, as the heap happens to
    lie. Tensors above 32 MiB, the most that glibc allows to be kept, still go back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, -1)  # never
        mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
