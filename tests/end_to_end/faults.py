"""Faults that tests put into a run on the pool's ranks, each undone when the run ends."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import pkgutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch


@contextlib.contextmanager
def inject(fault: str | None, rank: int) -> Iterator[None]:
    """Put the named fault in place for the duration of a `with` block."""
    with contextlib.nullcontext() if fault is None else FAULTS[fault](rank):
        yield


@contextlib.contextmanager
def signal_while_reading(number: int, *, call: int, is_hit: bool) -> Iterator[None]:
    """Send this rank a signal, if it is the one to hit, while it reads the batches of its `call`-th step."""
    from trainer.data.reader import BatchReader

    read, calls = BatchReader.read_step, [0]

    def read_step(self):
        calls[0] += 1
        if calls[0] == call and is_hit:
            os.kill(os.getpid(), number)
        return read(self)

    with patch.object(BatchReader, "read_step", read_step):
        yield


@contextlib.contextmanager
def nan_loss(rank: int) -> Iterator[None]:
    """Make the loss of the sample with number 11 and of all after number 24 on rank 1 NaN."""
    from trainer.stages.next_token import NextTokenObjective

    loss = NextTokenObjective.loss

    def poisoned(self, output, batch):
        is_bad = rank == 1 and any(sample == 11 or sample >= 24 for sample in batch.sample_ids)
        return loss(self, output * float("nan") if is_bad else output, batch)

    with patch.object(NextTokenObjective, "loss", poisoned):
        yield


@contextlib.contextmanager
def full_disk_at_step_4(rank: int) -> Iterator[None]:
    """Let the disk run full (ENOSPC) while rank 1 writes the checkpoint of step 4."""
    from trainer.checkpoint import writing
    from trainer.checkpoint.save import CheckpointWriter

    write = CheckpointWriter._write

    def write_on_full_disk(self, pending, pieces):
        is_full = pending.step == 4 and rank == 1
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with patch.object(writing.torch, "save", side_effect=error) if is_full else contextlib.nullcontext():
            write(self, pending, pieces)

    with patch.object(CheckpointWriter, "_write", write_on_full_disk):
        yield


@contextlib.contextmanager
def full_disk_at_the_end_of_step_4(rank: int) -> Iterator[None]:
    """Let the disk run full (ENOSPC) while rank 0 writes down what the ranks have written as step 4."""
    from trainer.checkpoint.manifest import Manifest

    write = Manifest.write

    def write_on_full_disk(self, directory):
        if self.step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, directory)

    with patch.object(Manifest, "write", write_on_full_disk):
        yield


@contextlib.contextmanager
def too_small_disk_at_step_4(rank: int) -> Iterator[None]:
    """Report 1 kB of free space from the second checkpoint on, on rank 0 alone."""
    from trainer.checkpoint.save import CheckpointWriter

    check = CheckpointWriter._check_space

    def check_small_disk(self, pending, num_bytes):
        space = SimpleNamespace(free=1000)
        is_small = pending.step == 4 and rank == 0
        with patch("shutil.disk_usage", return_value=space) if is_small else contextlib.nullcontext():
            check(self, pending, num_bytes)

    with patch.object(CheckpointWriter, "_check_space", check_small_disk):
        yield


@contextlib.contextmanager
def blind_rank(rank: int) -> Iterator[None]:
    """Let rank 1 see no checkpoint yet, as on a file system of a network."""
    with patch("trainer.run.start.latest_checkpoint", return_value=None) if rank == 1 else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def looking_before_locking(rank: int) -> Iterator[None]:
    """Fail where the start is looked for in a directory that is not locked."""
    from trainer.run import run

    find = run.find_start

    def find_locked(config, stage_name):
        assert (Path(config.run.dir) / ".lock").is_file(), "not locked"
        return find(config, stage_name)

    with patch.object(run, "find_start", find_locked):
        yield


@contextlib.contextmanager
def slow_disk(rank: int) -> Iterator[None]:
    """Let deleting an old checkpoint take longer than a collective may wait."""
    from trainer.checkpoint import save

    delete = save.delete_rest

    def delete_slowly(doomed):
        time.sleep(6)
        delete(doomed)

    with patch.object(save, "delete_rest", delete_slowly):
        yield


@contextlib.contextmanager
def moved_while_saving(rank: int) -> Iterator[None]:
    """Move the run's directory away when the checkpoint of step 6 has been written but not yet named."""
    from trainer.checkpoint.save import CheckpointWriter

    publish = CheckpointWriter._publish

    def publish_moved(self, pending, parts):
        if pending.step == 6:
            run_dir = self._dir.parent
            run_dir.rename(run_dir.with_name("moved"))
        return publish(self, pending, parts)

    with patch.object(CheckpointWriter, "_publish", publish_moved):
        yield


@contextlib.contextmanager
def moved_directory(rank: int, *, is_taken_over: bool = False) -> Iterator[None]:
    """Move the run's directory away in its third step; another run may have begun at the path before we look."""
    from trainer.run.directory import RunLock

    check, calls = RunLock.check, [0]

    def check_moved(self):
        calls[0] += 1
        if calls[0] == 3:
            directory = self._path.parent
            directory.rename(directory.with_name("moved"))
            if is_taken_over:
                directory.mkdir()
                self._path.touch()
        check(self)

    with patch.object(RunLock, "check", check_moved):
        yield


SAVING = {
    "writing": (1, "trainer.checkpoint.writing.TensorFileWriter.write_piece", "exp_avg_sq"),
    "hashing": (1, "trainer.checkpoint.writing.hash_file", ""),
    "gathering": (1, "trainer.checkpoint.save.gather_to_rank_zero", ""),
    "metadata": (0, "trainer.checkpoint.writing._write_to_disk", "metadata.json"),
    "manifest": (0, "json.dump", "'layout'"),
    "rename": (0, "os.replace", ".partial-step_00000004"),
    "latest": (0, "os.replace", ".latest.new"),
    "hiding": (0, "os.replace", ".deleted-step_00000002"),
    "deletion": (0, "trainer.checkpoint.save.delete_rest", ""),
}
"""What is under way in a save (of keep_last 1): the rank, function and words in its arguments of the call to die in."""


@contextlib.contextmanager
def killed_while_saving(rank: int, phase: str) -> Iterator[None]:
    """End the process, as kill -9 does, in the save of step 4."""
    from trainer.checkpoint.save import CheckpointWriter

    killed, place, words = SAVING[phase]
    owner_name, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    plain, save, now = getattr(owner, name), CheckpointWriter.save, {"step": 0}

    def save_step(self, state, stage):
        self.finish()  # on a slow disk the save before is still under way, which is not the one to die in
        now["step"] = state.step
        save(self, state, stage)

    def call_or_die(*args, **options):
        if now["step"] >= 4 and words in str(args):  # the next save may be what publishes this one
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*args, **options)

    with contextlib.ExitStack() as stack:
        if rank == killed:
            stack.enter_context(patch.object(CheckpointWriter, "save", save_step))
            stack.enter_context(patch.object(owner, name, call_or_die))
        yield


@contextlib.contextmanager
def killed_in_second_round(rank: int) -> Iterator[None]:
    """End the process, as kill -9 does, when the second file of rollouts is written but not yet named."""
    replace, calls = os.replace, [0]

    def replace_or_die(source, target):
        calls[0] += Path(target).parent.name == "rollouts"
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    with patch.object(os, "replace", replace_or_die):
        yield


@contextlib.contextmanager
def sigterm_in_round(rank: int) -> Iterator[None]:
    """Send rank 0 a SIGTERM while it writes the first rollouts."""
    from trainer.run import rejection

    write = rejection.write_rollouts

    def write_signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    with patch.object(rejection, "write_rollouts", write_signalled):
        yield


@contextlib.contextmanager
def killed_at_call(owner: str, method: str, call: int) -> Iterator[None]:
    """Kill every rank (SIGKILL) at the `call`-th call of a method in this run."""
    kind, calls = pkgutil.resolve_name(owner), [0]
    original = getattr(kind, method)

    def call_or_die(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    with patch.object(kind, method, call_or_die):
        yield


@contextlib.contextmanager
def killed_in_step(step: int, owner: str, method: str, *, call: int = 1) -> Iterator[None]:
    """Kill every rank (SIGKILL) in a step of reinforcement learning, at the `call`-th call of a method in it."""
    from trainer.rl.collect import Collector

    module, _, name = owner.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    collect, original, now = Collector.collect, getattr(kind, method), {"step": 0, "calls": 0}

    def collect_in_step(self, prompts, step, *args):
        now.update(step=step, calls=0)
        return collect(self, prompts, step, *args)

    def call_or_die(self, *args, **kwargs):
        now["calls"] += 1
        if (now["step"], now["calls"]) == (step, call):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    with patch.object(Collector, "collect", collect_in_step), patch.object(kind, method, call_or_die):
        yield


@contextlib.contextmanager
def wrong_sums(rank: int) -> Iterator[None]:
    """Let sums come out one too high on rank 1."""
    import torch.distributed as dist

    all_reduce = dist.all_reduce

    def faulty(tensor, *args, **options):
        work = all_reduce(tensor, *args, **options)
        tensor += int(rank == 1)
        return work

    with patch.object(dist, "all_reduce", faulty):
        yield


@contextlib.contextmanager
def other_torch(rank: int) -> Iterator[None]:
    """Let rank 1 have another version of torch."""
    import torch

    with patch.object(torch, "__version__", "1.13.1") if rank == 1 else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def full_disk_on_a_host(rank: int, full: int = 1) -> Iterator[None]:
    """Let the disk be full where rank `full` is."""
    write = Path.write_bytes

    def write_on_full_disk(path, data):
        if rank == full and path.name.startswith(".preflight"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, data)

    with patch.object(Path, "write_bytes", write_on_full_disk):
        yield


@contextlib.contextmanager
def long_answers(rank: int) -> Iterator[None]:
    """Let the first call of a replica of ranks 0 and 1 take 8 s, in which these wait for each other at every token."""
    import torch.distributed as dist

    from trainer.generate.generator import EngineGenerator

    answer, calls = EngineGenerator._answer, []

    def slow(self, *args):
        calls.append(self)
        for _ in range(400 if rank in (0, 1) and len(calls) == 1 else 0):
            time.sleep(0.02 * rank)
            dist.barrier(group=self._model.mesh.tp_group)
        return answer(self, *args)

    with patch.object(EngineGenerator, "_answer", slow):
        yield


FAULTS = {
    "long_answers": long_answers,
    "wrong_sums": wrong_sums,
    "other_torch": other_torch,
    "full_disk_on_a_host": full_disk_on_a_host,
    "full_disk_where_rank_0_is": functools.partial(full_disk_on_a_host, full=0),
    "moved_directory": moved_directory,
    "moved_while_saving": moved_while_saving,
    "directory_taken_over": lambda rank: moved_directory(rank, is_taken_over=True),
    "blind_rank": blind_rank,
    "looking_before_locking": looking_before_locking,
    "slow_disk": slow_disk,
    "sigterm": lambda rank: signal_while_reading(signal.SIGTERM, call=3, is_hit=rank == 1),
    "sigusr1": lambda rank: signal_while_reading(signal.SIGUSR1, call=3, is_hit=rank == 1),
    "sigterm_rank_0_second_step": lambda rank: signal_while_reading(signal.SIGTERM, call=2, is_hit=rank == 0),
    "nan_loss": nan_loss,
    "full_disk": full_disk_at_step_4,
    "full_disk_at_the_end": full_disk_at_the_end_of_step_4,
    "too_small_disk": too_small_disk_at_step_4,
    "killed_in_second_round": killed_in_second_round,
    "sigterm_in_round": sigterm_in_round,
    "no_model": lambda rank: patch("trainer.engine.build.build_models", side_effect=AssertionError("a model")),
    "killed_drawing_answers": lambda rank: killed_at_call(
        "trainer.engine.sharded_model.ShardedModel", "compute_next_logits", 3
    ),
    "killed_in_second_scores": lambda rank: killed_at_call("trainer.engine.sharded_model.ShardedModel", "score", 2),
    "killed_in_second_update": lambda rank: killed_at_call("trainer.engine.engine.Engine", "train_step", 2),
    "killed_while_generating": lambda rank: killed_in_step(
        2, "trainer.engine.sharded_model.ShardedModel", "compute_next_logits", call=3
    ),
    "killed_while_scoring": lambda rank: killed_in_step(3, "trainer.environments.scoring.RewardPool", "score"),
    **{f"killed_{phase}": functools.partial(killed_while_saving, phase=phase) for phase in SAVING},
    "killed_in_the_update": lambda rank: killed_in_step(4, "trainer.engine.engine.Engine", "train_step", call=2),
}
