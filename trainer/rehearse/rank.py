"""One rank of a job of any size, rehearsed in this process: the real engine takes a real step on fake tensors.

The process has the fake runtime in front of CUDA's (`parallel.platform.fake.runtime`) and calls `prepare` before
anything imports Megatron-Core. Other ranks are there as members of groups alone.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.plan.derive import derive_layout, num_microbatches, padded_vocab_size
from configs.stages import Config
from parallel.mesh import Mesh, build_mesh, destroy_mesh
from parallel.platform import CLUSTER_PLATFORM, load_platform
from parallel.platform.fake.collectives import CALLS, Call, forget_groups
from parallel.platform.fake.tensors import ROUTED, NoKernel, Watch, replace_functions
from parallel.replaced_names import NamePatch, replace_names
from trainer.engine.objective import Objective
from trainer.rehearse.memory import Memory, state_bytes


@dataclass(frozen=True)
class Rehearsal:
    """What one rank did in a step."""

    rank: int
    place: str
    """Its coordinates."""
    memory: dict[str, int]
    """Bytes on the device at the peak of the step: weights, gradients, optimizer, activations, logits, buffers."""
    num_microbatches: int
    calls: tuple[Call, ...]
    """Its collectives, sends and receives, in order."""


def prepare() -> None:
    """Replace what needs a device or other processes; the layers are Megatron-Core's, without Transformer Engine."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
    replace_functions()


@contextlib.contextmanager
def fake_world(config: Config, world_size: int, rank: int) -> Iterator[tuple[Mesh, Memory]]:
    """Be one rank of a world that is not there, with fake tensors and counted memory within the context."""
    platform = load_platform(CLUSTER_PLATFORM)
    device = platform.activate(0)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        mesh = build_mesh(platform, device, config)
        forget_groups()
        replace_names(_KERNELS)
        vocabulary = padded_vocab_size(config.model) // config.parallel.tp
        with FakeTensorMode(allow_non_fake_inputs=True), Watch(), Memory(vocabulary) as memory:
            yield mesh, memory
    finally:
        forget_groups()
        destroy_mesh()
        dist.destroy_process_group()


def rehearse(config: Config, world_size: int, rank: int) -> Rehearsal:
    """Take a step of next-token training, or of a reward model, as one rank of the job; raise what the step raises.

    Of more than two microbatches a pipeline stage the further ones repeat, and are left out.
    """
    from trainer.engine.build import build_engine
    from trainer.stages.next_token import NextTokenObjective
    from trainer.stages.reward import RewardObjective

    layout = derive_layout(config, world_size)
    count = min(num_microbatches(config, layout, config.train.global_batch_size), 2 * layout.pp)
    if config.model.moe is not None:
        tokens = config.train.micro_batch_size * config.train.seq_len // layout.cp // (layout.tp if layout.sp else 1)
        ROUTED["tokens"] = tokens * config.model.moe.top_k
    with fake_world(config, world_size, rank) as (mesh, memory):
        engine = build_engine(config, mesh)
        batch = _batch(config)
        is_scalar = config.head == "scalar"
        objective: Objective = RewardObjective(0.01, mesh.cp_group) if is_scalar else NextTokenObjective()
        # the first step makes what later ones find; it need not be whole
        engine.train_step([batch] * min(count, layout.pp), objective, 1e-3)
        state = state_bytes(engine)
        buffers = memory.bytes - sum(state.values())
        CALLS.clear()
        memory.start()
        engine.train_step([batch] * count, objective, 1e-3)
        calls = tuple(CALLS)
        moving = memory.peak - sum(state.values()) - buffers - memory.logits_at_peak
        found = {**state, "activations": moving, "logits": memory.logits_at_peak, "buffers": buffers}
        place = mesh.coordinates()
        engine.close()
    return Rehearsal(rank, place, found, count, calls)


def _batch(config: Config) -> Any:
    """Return a microbatch of made-up tokens; for a scalar head, of one pair of answers."""
    from trainer.data.batch import build_batch

    train = config.train
    shape = (train.micro_batch_size, train.seq_len + 1)
    windows = np.random.default_rng(5).integers(0, config.model.vocab_size, shape)
    batch = build_batch(windows, tuple(range(train.micro_batch_size)))
    if config.head == "vocabulary":
        return batch
    numbers, ends = torch.zeros_like(batch.tokens), torch.ones_like(batch.tokens, dtype=torch.int32)
    columns = {"sequence": numbers, "ends": ends}
    return replace(batch, columns=columns, sequences={"side": torch.tensor([1, 2]), "margin": torch.zeros(1)})


def _leave_order(tokens: Any, sizes: Any, order: Any, probs: Any = None, fused: bool = False) -> tuple[Any, Any]:
    """Stand for the sorting of tokens by expert, which needs their numbers."""
    return tokens, probs


_NO_DATA = "needs data, which fake tensors do not have"
_KERNELS = (
    NamePatch("megatron.core.transformer.moe.token_dispatcher:sort_chunks_by_idxs", _leave_order, _NO_DATA),
    NamePatch("trainer.model.fp8.cast:_cast_kernel", NoKernel(), _NO_DATA),
    NamePatch("trainer.model.fp8.cast:_scale_kernel", NoKernel(), _NO_DATA),
)
