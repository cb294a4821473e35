"""A checkpoint of many ranks saved and loaded by the real code in one process, rank after rank, and what each one does.

The state has the pieces of a dense model, each of a few numbers; a rank's file operations and the bytes that it
receives are counted. `python tests/trainer/checkpoint/many_ranks.py 1024 16384` prints both for 128 layers at tp8 pp16.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import io
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from parallel import collectives
from tests.small_runs import small_config
from trainer.checkpoint import save, shares, stored
from trainer.checkpoint.layout import delete_rest
from trainer.checkpoint.save import CheckpointWriter
from trainer.checkpoint.stored import open_manifest, open_stored
from trainer.engine.state import TrainState

LINEARS = {"qkv": 0, "proj": 1, "gate": 0, "up": 0, "fc2": 1}
OPERATIONS = "stat lstat listdir scandir mkdir rename replace unlink rmdir symlink readlink statvfs fsync".split()


class World:
    """Ranks that come one after another: collectives give each what the others have sent, or will send."""

    def __init__(self, size: int, tp: int, pp: int, layers: int) -> None:
        self.size, self.rank = size, 0
        self.tp, self.pp, self.dp, self.layers = tp, pp, size // (tp * pp), layers
        self.operations: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.received: collections.Counter[int] = collections.Counter()
        self.gathered: list[Any] = []
        """What the ranks hand rank 0 next."""
        self.shared: Iterator[torch.Tensor] = iter(())
        """What the ranks of a group send each other next."""
        self.num_sent = 0
        self.told: list[Any] = []
        """What rank 0 has told the others since they last came."""
        self._replayed: Iterator[Any] = iter(())
        self._tables: dict[tuple[int, int], list[np.ndarray]] = {}

    def begin(self, rank: int) -> None:
        """Let the next calls be those of a rank; rank 0 comes first."""
        self.rank = rank
        if rank == 0:
            self.told.clear()
        self._replayed = iter(self.told)

    def mesh(self) -> Any:
        """Return what the code asks of a mesh."""
        return SimpleNamespace(
            rank=self.rank,
            world_size=self.size,
            device=torch.device("cpu"),
            platform=SimpleNamespace(synchronize=lambda: None),
            dp_cp_group=SimpleNamespace(size=lambda: self.dp, rank=lambda: self.rank // self.tp % self.dp),
            expert_dp_group=SimpleNamespace(size=lambda: 1),
            sizes=lambda: {"world": self.size},
        )

    def state(self, rank: int, *, is_loading: bool = False) -> dict[str, Any]:
        """Return a rank's shards: weights, the optimizer's share of them, the random generators."""
        tp, dp, pp = rank % self.tp, rank // self.tp % self.dp, rank // self.tp // self.dp
        weights = self._weights(tp, dp, pp)
        optimizer = {}
        for number, (name, weight) in enumerate(weights.items()):
            if number * self.dp // len(weights) == dp:  # ZeRO-1: the rank that holds it, or most of it
                for kind in ("param", "exp_avg", "exp_avg_sq"):
                    replica = (*weight.replica_id[:-1], 0)
                    key = f"optimizer.state.{kind}.{weight.key}"
                    optimizer[kind + name] = ShardedTensor(
                        key, torch.zeros_like(weight.data), weight.dtype, weight.local_shape, weight.global_shape,
                        weight.global_offset, weight.axis_fragmentations, replica, weight.prepend_axis_num,
                    )  # fmt: skip
        generators = ShardedObject("rng", torch.zeros(5056, dtype=torch.uint8), (self.size,), (rank,), replica_id=0)
        return {"model": weights, "optimizer": optimizer, "rng": generators, "step": 7}

    def _weights(self, tp: int, dp: int, pp: int) -> dict[str, ShardedTensor]:
        found = {}
        for layer in range(pp * self.layers // self.pp, (pp + 1) * self.layers // self.pp):
            place = (0, layer, self.layers)
            for name, axis in LINEARS.items():
                found[f"{layer}.{name}"] = ShardedTensor.from_rank_offsets(
                    f"decoder.layers.{name}", torch.full((2, 2), layer * 100.0 + tp), place, (1 + axis, tp, self.tp),
                    replica_id=(0, 0, dp), prepend_axis_num=1,
                )  # fmt: skip
            for name in ("norm1", "norm2"):
                found[f"{layer}.{name}"] = ShardedTensor.from_rank_offsets(
                    f"decoder.layers.{name}", torch.ones(2), place, replica_id=(0, tp, dp), prepend_axis_num=1
                )
        for name, stage in (("embedding", 0), ("output_layer", self.pp - 1)):
            if stage == pp:
                found[name] = ShardedTensor.from_rank_offsets(
                    name, torch.ones(2, 2), (0, tp, self.tp), replica_id=(0, 0, dp)
                )
        return found

    # The names of torch.distributed that `parallel.collectives` uses.
    ReduceOp = dist.ReduceOp

    def get_rank(self) -> int:
        """Return the rank whose turn it is."""
        return self.rank

    def get_world_size(self) -> int:
        """Return the number of ranks."""
        return self.size

    def barrier(self, group: Any = None) -> None:
        """Pass: the others have come, or will."""

    def all_reduce(self, tensor: torch.Tensor, op: Any = None, group: Any = None) -> None:
        """Leave what a rank has: no rank has a problem, and the sum of bytes need not be right."""
        assert op is not dist.ReduceOp.MIN or int(tensor) == self.size
        self.received[self.rank] += tensor.nbytes

    def broadcast_object_list(self, values: list[Any], src: int, group: Any = None) -> None:
        """Hand on what rank 0 said."""
        assert src == 0
        if self.rank == 0:
            self.told.append(values[0])
        else:
            values[0] = next(self._replayed)
            self.received[self.rank] += _num_bytes(values[0])

    def gather_object(self, value: Any, values: list[Any] | None, dst: int, group: Any = None) -> None:
        """Give rank 0 what all have."""
        if values is not None:
            values[:] = self.gathered
            sizes = [_num_bytes(one) for one in values]
            self.received[0] += len(sizes) * max(sizes)  # torch pads all to the largest

    def gather_tables(self, table: np.ndarray, group: Any, device: torch.device) -> list[np.ndarray]:
        """Give the ranks of a data-parallel group each other's tables."""
        place = self.rank % self.tp, self.rank // self.tp // self.dp
        if place not in self._tables:
            self._tables[place] = [shares.describe_shards(_tensors(self.state(rank))) for rank in self._group(*place)]
        tables = self._tables[place]
        assert np.array_equal(table, tables[group.rank()])
        self.received[self.rank] += len(tables) * max(one.nbytes for one in tables)
        return tables

    def send_to_group(self, values: torch.Tensor, owner: int, group: Any, device: torch.device) -> None:
        """Give a rank what another has read: the next of what all of its group ask for."""
        sent = next(self.shared)
        if owner != group.rank():
            values.copy_(sent)
        self.num_sent += 1

    def _group(self, tp: int, pp: int) -> list[int]:
        return [(pp * self.dp + dp) * self.tp + tp for dp in range(self.dp)]


def _tensors(state: dict[str, Any]) -> list[ShardedTensor]:
    return [*state["model"].values(), *state["optimizer"].values()]


def _num_bytes(value: Any) -> int:
    return len(pickle.dumps(value))


@contextlib.contextmanager
def pretend(world: World) -> Iterator[None]:
    """Put the world in the place of torch.distributed, and count file operations."""
    chosen: dict[int, Any] = {}
    choose = shares.choose_writers

    def choose_once(tables: Sequence[np.ndarray]) -> Any:
        if id(tables) not in chosen:
            chosen[id(tables)] = choose(tables)
        return chosen[id(tables)]

    def counted(name: str, call: Any) -> Any:
        def count(*args: Any, **options: Any) -> Any:
            world.operations[world.rank][name] += 1
            if name == "fsync":
                return None  # it need not be waited for here
            outcome = call(*args, **options)
            if name == "listdir":
                world.operations[world.rank]["names listed"] += len(outcome)
            return outcome

        return count

    with contextlib.ExitStack() as stack:
        for target, name, new in (
            (collectives, "dist", world),
            *((module, "gather_tables", world.gather_tables) for module in (shares, stored)),
            (stored, "send_to_group", world.send_to_group),
            (shares, "choose_writers", choose_once),
            (builtins, "open", counted("open", builtins.open)),
            (io, "open", counted("open", io.open)),
            *((os, name, counted(name, getattr(os, name))) for name in OPERATIONS),
        ):
            stack.enter_context(patch.object(target, name, new))
        yield


class Rehearsal:
    """Two saves of all ranks, the second of which makes the first superfluous, and a load of some."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.config = small_config(checkpoint={"async_save": False, "keep_last": 1})
        self.seconds: dict[str, float] = {}
        with pretend(self.world):
            self.writers = [self._writer(rank) for rank in range(world.size)]

    def _writer(self, rank: int) -> CheckpointWriter:
        self.world.rank = rank
        return CheckpointWriter(self.folder, self.config, self.world.mesh())

    def save(self, step: int) -> dict[str, Any]:
        """Save on all ranks and return what rank 0 and the others did."""
        world = self.world
        world.operations.clear(), world.received.clear()
        rest: list[Path] = []  # what rank 0 deletes when the others have deleted their parts
        with pretend(world), patch.object(save, "delete_rest", rest.append):
            for rank, writer in enumerate(self.writers):
                world.begin(rank)
                part = SimpleNamespace(sharded_state=lambda saved, rank=rank: world.state(rank))
                stage = SimpleNamespace(name="pretrain", parts={"policy": part}, state_dict=dict)
                writer.save(TrainState(step=step), stage)
            world.gathered = [writer._pending.written for writer in self.writers]
            started = time.perf_counter()
            for rank, writer in enumerate(self.writers):
                world.begin(rank)
                writer.finish()
                if rank == 0:
                    self.seconds["publish"] = time.perf_counter() - started
            world.begin(0)
            for doomed in rest:
                delete_rest(doomed)
        return self.figures()

    def load(self, ranks: Sequence[int]) -> dict[str, Any]:
        """Load on some ranks, 0 first, and return what rank 0 and the others did."""
        world = self.world
        world.operations.clear(), world.received.clear()
        checkpoint = (self.folder / "checkpoints" / "latest").resolve()
        with pretend(world):
            for rank in ranks:
                world.begin(rank)
                opened = open_stored(checkpoint, open_manifest(checkpoint), world.mesh())
                state = world.state(rank)
                world.shared = iter([weight.data for weight in sorted(state["model"].values(), key=shares.id_of)])
                state = world.state(rank)
                expected = {name: shard.data.clone() for name, shard in state["model"].items()}
                for shard in _tensors(state):
                    shard.data.fill_(-1)
                loaded = opened.load(state)
                assert loaded["step"] == 7 and next(world.shared, None) is None
                assert all(torch.equal(loaded["model"][name], value) for name, value in expected.items())
        return self.figures()

    def figures(self) -> dict[str, Any]:
        """Return operations and received bytes of rank 0 and the most of any other rank."""
        world = self.world
        others = [world.operations[rank] for rank in world.operations if rank]
        names = sorted({name for one in (world.operations[0], *others) for name in one})
        return {
            "rank_0": dict(world.operations[0]) | {"received": world.received[0]},
            "others": {name: max(one[name] for one in others) for name in names}
            | {"received": max(count for rank, count in world.received.items() if rank)},
        }


def main(sizes: Sequence[int]) -> None:
    """Rehearse each number of ranks and print what was counted."""
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            rehearsal = Rehearsal(World(size, tp=8, pp=16, layers=128), Path(folder))
            print(size, "save", rehearsal.save(1), flush=True)
            print(size, "later save", rehearsal.save(2), rehearsal.seconds, flush=True)
            print(size, "load", rehearsal.load([0, 1, size // 2, size - 1]))
            checkpoint = (Path(folder) / "checkpoints" / "latest").resolve()
            listed = [len(os.listdir(place)) for place in (checkpoint, *checkpoint.glob("part_*"))]
            sizes_of = {name: (checkpoint / name).stat().st_size for name in (".metadata", "checkpoint.json")}
            print(size, "names in a directory", max(listed), sizes_of)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([int(one) for one in sys.argv[1:]])
