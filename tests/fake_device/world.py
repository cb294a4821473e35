"""Training steps of the CUDA platform on tensors without data, on a machine without a GPU.

A process of its own, started by the test with the runtime of `runtime.c` in front of CUDA's. Fake tensors compute
nothing but check devices, formats and shapes; collectives check their arguments; what the host reads from the device
is recorded, for there the GPU would wait. Reads cases and prints outcomes as JSON.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import sys
import traceback
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from configs.stages import Config

ROOT = Path(__file__).resolve().parents[2]
READS: collections.Counter[str] = collections.Counter()
TYPE_NAMES = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16"}
NUM_STEPS = 2  # the first makes what later ones find
NUM_ROUTED = 256  # tokens of a microbatch, times the experts of each
DOCUMENTS = (0, 5, 64, 100, 128)


class Watch(TorchDispatchMode):
    """Answers what fake tensors cannot: values that the host reads, and an operation whose fake version is wrong."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if operation is aten._local_scalar_dense.default:
            if args[0].device.type != "cuda":
                with contextlib.suppress(DataDependentOutputException):
                    return operation(*args, **kwargs)  # a constant
            record_read(args[0])
            return True if args[0].dtype is torch.bool else 0.0  # all is finite; no loss, no norm, no vote
        if operation is aten._to_copy.default and torch.device(kwargs.get("device") or "cuda").type == "cpu":
            record_read(args[0])
        if operation is aten.addmm.dtype_out:  # torch 2.11's fake version takes the format for `beta`
            total, left, right, dtype = args
            assert kwargs["out"] is total and total.dtype == dtype == torch.float32 and total.is_contiguous()
            assert left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16)
            assert (left.shape[0], right.shape[1]) == tuple(total.shape) and left.shape[1] == right.shape[0]
            assert {one.device.type for one in args[:3]} == {"cuda"}
            return total
        return operation(*args, **kwargs)


class Memory(TorchDispatchMode):
    """Counts the bytes of the storages that live on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = operation(*args, **(kwargs or {}))
        for one in tree_leaves(outputs):
            if isinstance(one, torch.Tensor) and one.device.type == "cuda":
                self._count(one.untyped_storage())
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known[storage] = True
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.bytes -= size


def record_read(tensor: torch.Tensor) -> None:
    """Count a read of a device tensor."""
    if tensor.device.type == "cuda":
        record_wait()


def record_wait(*unused: Any) -> None:
    """Count that the host waits, by the innermost function of ours or Megatron-Core's."""
    frames = [frame for frame in traceback.extract_stack() if is_ours(frame.filename)]
    READS[f"{Path(frames[-1].filename).stem}.{frames[-1].name}"] += 1


def is_ours(path: str) -> bool:
    """Return whether a file is of the product or of Megatron-Core."""
    inside = Path(path).is_relative_to(ROOT) and not Path(path).is_relative_to(ROOT / ".venv")
    return "megatron" in path or (inside and "fake_device" not in path)


class Done:
    """The handle of a collective, which is over."""

    def wait(self, *unused: Any) -> bool:
        return True


def check_devices(*tensors: torch.Tensor) -> None:
    """Refuse tensors that NCCL cannot send."""
    assert all(one.device.type == "cuda" and one.is_contiguous() for one in tensors), "not contiguous on the device"


def reduce(tensor: torch.Tensor, *unused: Any, async_op: bool = False, **options: Any) -> Done | None:
    """Stand for all_reduce and broadcast."""
    check_devices(tensor)
    return Done() if async_op else None


def gather(whole: Any, part: Any, *unused: Any, group: Any = None, async_op: bool = False, **options: Any) -> Any:
    """Stand for all_gather_into_tensor, and with the sizes exchanged for reduce_scatter_tensor."""
    check_devices(whole, part)
    large, small = max(whole.numel(), part.numel()), min(whole.numel(), part.numel())
    assert large == small * dist.get_world_size(group) and whole.dtype == part.dtype
    return Done() if async_op else None


def exchange(output: Any, inputs: Any, *unused: Any, async_op: bool = False, **options: Any) -> Any:
    """Stand for all_to_all_single."""
    check_devices(output, inputs)
    return Done() if async_op else None


def send(tensor: Any = None, *unused: Any, **options: Any) -> Done:
    """Stand for isend and irecv."""
    check_devices(tensor)
    return Done()


def gather_objects(values: list[Any], value: Any, group: Any = None) -> None:
    """Give every rank this one's value."""
    values[:] = [value] * len(values)


@contextlib.contextmanager
def coalesce(*unused: Any, **options: Any) -> Iterator[Done]:
    """Stand for the manager that joins collectives into one."""
    yield Done()


class SendOrReceive:
    """Stand for P2POp."""

    def __init__(self, operation: Any, tensor: Any, *unused: Any, **options: Any) -> None:
        self.tensor = tensor


COLLECTIVES = {
    "all_reduce": reduce,
    "broadcast": reduce,
    "all_gather_into_tensor": gather,
    "reduce_scatter_tensor": gather,
    "all_to_all_single": exchange,
    "isend": send,
    "irecv": send,
    "batch_isend_irecv": lambda operations: [send(one.tensor) for one in operations],
    "P2POp": SendOrReceive,
    "barrier": lambda *args, **options: None,
    "all_gather_object": gather_objects,
    "_coalescing_manager": coalesce,
}


def move(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Stand for `Module.to`, which cannot exchange fake parameters."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None and old.device != device:
                new = torch.nn.Parameter(old.detach().to(device))
                vars(new).update({key: value for key, value in vars(old).items() if key not in vars(new)})
                part._parameters[name] = new
        part._buffers.update({name: value.to(device) for name, value in part._buffers.items() if value is not None})
    return module


def spread_evenly(tensor: torch.Tensor) -> Any:
    """Return what the host reads of a vector: the tokens of a case spread evenly over experts or ranks."""
    record_read(tensor)
    total = NUM_ROUTED if not tensor.is_floating_point() else tensor.numel()
    return np.full(tuple(tensor.shape), total // max(1, tensor.numel()), dtype=np.int64)


def replace_functions() -> None:
    """Put the stand-ins above into torch, before Megatron-Core takes functions of it by name."""
    for name, replacement in COLLECTIVES.items():
        for module in (dist, c10d):
            setattr(module, name, replacement)
    torch.nn.Module.to = move
    torch.Tensor.pin_memory = lambda self: self
    torch.cuda.synchronize = record_wait
    plain_type, plain_numpy = torch.Tensor.type, torch.Tensor.numpy

    def type_name(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        is_question = not args and not options and self.device.type == "cuda" and self.dtype in TYPE_NAMES
        return f"torch.cuda.{TYPE_NAMES[self.dtype]}Tensor" if is_question else plain_type(self, *args, **options)

    torch.Tensor.type = type_name
    torch.Tensor.numpy = lambda self: spread_evenly(self) if isinstance(self, FakeTensor) else plain_numpy(self)
    FakeTensor.tolist = lambda self: spread_evenly(self).tolist()


class NoKernel:
    """Stand for a Triton kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: None


def replace_kernels() -> None:
    """Leave out what needs data: our Triton kernels, and the order of tokens by expert."""
    from megatron.core.transformer.moe import token_dispatcher

    from trainer.model.fp8 import cast

    token_dispatcher.sort_chunks_by_idxs = lambda tokens, sizes, order, probs=None, fused=False: (tokens, probs)
    cast._cast_kernel = cast._scale_kernel = NoKernel()


def reinforce(engine: Any, batches: list[Any]) -> None:
    """Take a step of reinforcement learning with all that its objective has; the columns are made up."""
    from configs.sections.grpo import GrpoSection
    from trainer.rl.objective import ADVANTAGES, OLD, REFERENCE, SAMPLED, PolicyObjective

    method = GrpoSection(algorithm="grpo", entropy_bonus=0.01, importance_cap=2.0).method
    columns = {name: torch.ones(batches[0].tokens.shape) for name in (ADVANTAGES, OLD, REFERENCE, SAMPLED, "share")}
    columns["ends"] = torch.ones(batches[0].tokens.shape, dtype=torch.int32)
    laid = [dataclasses.replace(one, columns=columns) for one in batches]
    objective = PolicyObjective(method, temperature=0.7, max_new_tokens=8, cp_group=engine.mesh.cp_group)
    engine.train_step(laid, objective, 1e-3)


def fine_tune(engine: Any, batches: list[Any]) -> None:
    """Take a step of fine-tuning with all that its objective has; the weights are made up, tensors here are fake."""
    from configs.sections.sft import SftSection
    from trainer.stages.sft import ConversationEvaluation, ConversationObjective

    sft = SftSection(weighting="sample", neftune_alpha=5.0, label_smoothing=0.1)
    columns = {name: torch.ones(batches[0].tokens.shape) for name in ("weights", "lengths")}
    columns["ends"] = torch.ones(batches[0].tokens.shape, dtype=torch.int32)
    weighed = [dataclasses.replace(one, columns=columns) for one in batches]
    engine.train_step(weighed, ConversationObjective(sft), 1e-3)
    reads = dict(READS)
    engine.sum_losses(weighed, ConversationEvaluation(sft))
    READS.clear()
    READS.update(reads)


def generate(engine: Any) -> dict[str, int]:
    """Draw three tokens for each of four rows, of which three fit, and return what the host reads meanwhile.

    Not with experts, of which nothing can be known here: who gets which token, and what other ranks have left to do.
    """
    from trainer.generate.generator import EngineGenerator
    from trainer.generate.sampling import Sampling

    if engine.config.model.moe is not None:
        return {}
    READS.clear()
    sampling = Sampling(3, temperature=0.7, top_k=20, top_p=0.9, num_samples=2)
    EngineGenerator(engine, max_rows=3).generate([[1, 2, 3], [4] * 60], sampling)
    return dict(READS)


def run_the_rest(engine: Any, batches: list[Any], objective: Any) -> dict[str, Any]:
    """Take steps of other objectives, an evaluation, scores, logits and answers; return what the host reads in some."""
    from trainer.engine.forward import forward_language_model, score_language_model

    READS.clear()
    reinforce(engine, batches)
    found = {"reads_of_policy": dict(READS)}
    READS.clear()
    fine_tune(engine, batches)
    found["reads_of_sft"] = dict(READS)
    engine.sum_losses(batches, objective)
    engine.score(batches, forward_language_model)
    engine.score(batches, functools.partial(score_language_model, entropy=True, is_greedy=True))
    engine.compute_logits(batches[0].tokens)
    return found | {"reads_of_generation": generate(engine)}


def run_case(config: Config, world: int, rank: int, *, is_whole: bool) -> dict[str, Any]:
    """Build the engine of one rank and take steps, with `is_whole` all else too; return what the last steps showed."""
    from parallel.mesh import build_mesh, destroy_mesh
    from parallel.platform import load_platform

    platform = load_platform("cuda")
    device = platform.activate(0)
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        mesh = build_mesh(platform, device, config)
        replace_kernels()
        from parallel.replaced_names import resolve
        from tools.device_checks.engine import made_up_batches
        from trainer.data.batch import Documents
        from trainer.engine import kernels
        from trainer.engine.build import build_engine
        from trainer.stages.next_token import NextTokenObjective

        objective = NextTokenObjective()
        with FakeTensorMode(allow_non_fake_inputs=True), Watch(), Memory() as memory:
            engine = build_engine(config, mesh)
            batches = made_up_batches(config)[:: mesh.dp_size]
            if config.data.document_mask:
                bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
                documents = Documents(tuple(DOCUMENTS), bounds, 59)
                batches = [dataclasses.replace(one, documents=documents) for one in batches]
            for _ in range(NUM_STEPS):
                READS.clear()
                memory.peak = memory.bytes
                engine.train_step(batches, objective, 1e-3)
            found = {"reads": dict(READS), "peak_bytes": memory.peak}
            if is_whole:
                found |= run_the_rest(engine, batches, objective)
            assert all(resolve(one.target)[2] is one.replacement for one in kernels.replace_kernels(platform))
            engine.close()
        return found
    finally:
        destroy_mesh()
        dist.destroy_process_group()


def main() -> None:
    """Run the cases and print what became of them."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    replace_functions()
    results = {}
    for name, case in json.load(sys.stdin).items():
        try:
            found = run_case(
                Config.model_validate(case["config"]), case["world"], case["rank"], is_whole=case["is_whole"]
            )
            results[name] = {"error": None, **found}
        except Exception as failure:
            places = [f"{one.filename}:{one.lineno}" for one in traceback.extract_tb(failure.__traceback__)]
            error = f"{type(failure).__name__}: {failure} at {' < '.join(reversed(places))}"
            nothing: dict[str, dict[str, int]] = {
                kind: {} for kind in ("reads", "reads_of_policy", "reads_of_sft", "reads_of_generation")
            }
            results[name] = {"error": error, **nothing, "peak_bytes": 0}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
