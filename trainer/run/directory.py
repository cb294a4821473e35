"""The run directory is the run: writes what was asked, with what command, and what was found on the machine."""

from __future__ import annotations

import datetime
import importlib.util
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from configs.errors import BadInput
from configs.fp8 import describe_fp8, resolve_backend, uses_te_layers
from configs.load import resolved_dict
from configs.plan.adapters import adapted_modules, count_adapter_parameters
from configs.stages import Config
from parallel.collectives import broadcast_object, gather_objects, on_rank_zero
from parallel.mesh import Mesh
from parallel.platform import has_transformer_engine
from parallel.watch.reports import WATCH
from parallel.watch.watch import Watch
from trainer.checkpoint.layout import (
    BEST,
    EXPORT,
    LATEST,
    checkpoints_dir,
    name_best,
    remove_leftovers,
    set_aside_after,
)
from trainer.disk.growing import remove_leftover
from trainer.disk.lock import FileLock
from trainer.engine.state import TrainState
from trainer.hf.companions import carry
from trainer.optim.adam import has_fused_adam
from trainer.report.live import LiveLine
from trainer.report.log import add_rank_file, console, next_attempt
from trainer.report.reporter import Reporter
from trainer.report.sinks import MetricsWriter
from trainer.run.code_version import find_commit, package_version
from trainer.run.start import Start

log = logging.getLogger(__name__)

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "transformer-engine", "flash-attn")


def check_run_directory(run_dir: str) -> None:
    """Raise BadInput if `run.dir` cannot be a directory that this user writes; creates nothing."""
    advice = "choose a path like runs/<name> that can be created."
    if not run_dir or "\0" in run_dir:
        raise BadInput(f"run.dir: {run_dir!r} is not a path; {advice}")
    existing = Path(run_dir).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise BadInput(f"run.dir: {existing} is not a directory that can be written to; {advice}")
    for link in (checkpoints_dir(run_dir) / LATEST, checkpoints_dir(run_dir) / BEST):
        if link.exists() and not link.is_symlink():
            raise BadInput(f"{link}: is not a link but a file or directory of its own; move it away.")


class RunLock:
    """Keeps a second run out of a run directory while the first one writes there."""

    def __init__(self, run_dir: str) -> None:
        self._path = Path(run_dir) / ".lock"
        self._lock = FileLock(self._path)
        self._made: list[Path] = []
        self._found: os.stat_result | None = None

    @contextmanager
    def held(self, mesh: Mesh, *, patience_seconds: float) -> Iterator[None]:
        """Hold the directory within the context, or raise BadInput on all ranks, naming who holds it.

        A directory that was made for the lock and holds nothing else goes with it: a refused command leaves nothing.
        Collective: all ranks of the world must call this.
        """
        try:
            problem = broadcast_object(self._take(patience_seconds) if mesh.rank == 0 else None)
            if problem:
                raise BadInput(problem)
            yield
        finally:
            self._lock.release()
            for directory in self._made:
                with suppress(OSError):
                    directory.rmdir()

    def check(self) -> None:
        """Raise BadInput on the rank that holds the lock if the directory is not the run's any more.

        Whoever moved or removed it would get it anew with the next checkpoint, without config and metrics; with a run
        that has begun there since, two would write to it.
        """
        if self._found is None:
            return
        directory = self._path.parent
        try:
            is_there = os.path.samestat(directory.stat(), self._found)
        except FileNotFoundError:
            is_there = False
        if not is_there or self._lock.is_taken_over():
            raise BadInput(
                f"run.dir: {directory} was moved, removed or taken over by another run while this one trained, and "
                "nothing more is saved; move it back and give the same command again, or choose another path."
            )

    def _take(self, patience_seconds: float) -> str | None:
        """Take the lock and return None, or the sentence that says why not."""
        directory = self._path.parent
        deadline = time.monotonic() + patience_seconds
        try:
            missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
            directory.mkdir(parents=True, exist_ok=True)
            self._made = missing
            holder = self._lock.take()
            if holder is not None and patience_seconds > 0:
                log.info("run.dir: %s is being written to by %s; waiting for it", directory, holder)
            while holder is not None and time.monotonic() < deadline:
                time.sleep(1.0)
                holder = self._lock.take()
            self._found = directory.stat()
        except OSError as error:
            return f"run.dir: {directory} cannot be written to ({error}); choose another path."
        if holder is None:
            return None
        return f"run.dir: {directory} is being written to by {holder}; wait for it, or choose another path."


def open_run_directory(
    config: Config, mesh: Mesh, run_dir: Path, start: Start, state: TrainState, launcher: str, watch: Watch
) -> Reporter:
    """Begin writing: the first thing on disk, after everything that can be refused has been checked.

    Collective: all ranks of the world must call this.
    """
    details = describe_environment(config, mesh, has_te=has_transformer_engine())
    try:
        watch.start(start_rank_log(run_dir, mesh).parent / WATCH)
    except OSError as error:
        raise BadInput(f"run.dir: {run_dir} cannot be written to ({error}); choose another path.") from error
    log.info("%s: %s", config.run.name, start.describe())
    for change in start.changes:
        log.warning("%s: %s", "going on with another config" if start.resume_from else "warm start", change)
    on_rank_zero(partial(_begin_on_rank_zero, config, details, run_dir, start, state, launcher))
    if mesh.rank != 0:
        return Reporter(config, mesh, None, None)
    show_start(config, details)
    writer = MetricsWriter(run_dir, tensorboard=config.log.tensorboard, resume_step=state.step)
    live = LiveLine(config.train.num_steps, start_step=state.step, log_every=config.train.log_every)
    return Reporter(config, mesh, writer, live)


def _begin_on_rank_zero(
    config: Config, details: Mapping[str, Any], run_dir: Path, start: Start, state: TrainState, launcher: str
) -> None:
    """Write what describes the run, and set aside the checkpoints of a course of training that is given up."""
    try:
        write_run_files(config, details, run_dir, launcher=launcher)
        remove_leftovers(run_dir)
        for checkpoint in checkpoints_dir(run_dir).glob("*"):
            remove_leftover(checkpoint / EXPORT)
        if start.resume_from is not None:
            for aside in set_aside_after(run_dir, state.step):
                log.info("%s: set aside, since the run goes on from step %d", aside, state.step)
            if config.train.patience is not None:  # a kill may have come before `best` was moved
                name_best(run_dir, state.best_step)
        elif start.carried is not None:
            carry(start.carried, run_dir)
    except OSError as error:
        raise BadInput(f"run.dir: {run_dir} cannot be written to ({error}); choose another path.") from error


def describe_environment(config: Config, mesh: Mesh, *, has_te: bool) -> dict[str, Any]:
    """Return hosts, devices, layout, versions and the kernels found and chosen.

    Collective: all ranks of the world must call this.
    """
    platform, fp8 = mesh.platform.describe(), config.precision.fp8
    use_te = uses_te_layers(config, has_te=has_te)
    places = gather_objects((socket.gethostname(), platform["device"]))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hosts": sorted({host for host, _ in places}),
        "devices": [device for _, device in places],
        "platform": platform,
        "layout": mesh.sizes(),
        "python": sys.version.split()[0],
        "versions": {name: package_version(name) for name in PACKAGES},
        "chosen": {
            "layers": "Transformer Engine" if use_te else "Megatron-Core local layers, torch SDPA",
            "adam": has_fused_adam() or "torch fused AdamW",
            "fp8": "none" if fp8 is None else describe_fp8(fp8, resolve_backend(fp8, has_te=has_te)),
        },
    }


def write_run_files(config: Config, environment: Mapping[str, Any], run_dir: Path, *, launcher: str) -> None:
    """Write config.json and environment.json anew, and add to command.txt. Rank 0 alone calls this."""
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir / "config.json", json.dumps(resolved_dict(config), indent=1))
    ranks, hosts = len(environment["devices"]), len(environment["hosts"])
    started = f"# {environment['date']}: {ranks} ranks on {hosts} host(s), by {launcher}, each:\n"
    with open(run_dir / "command.txt", "a", encoding="utf-8") as file:  # earlier attempts' commands stay
        file.write(started + shlex.join([sys.executable, *sys.argv]) + "\n")
    commit = find_commit()
    found = {**environment, "commit": commit} if commit else environment
    _write(run_dir / "environment.json", json.dumps(found, indent=1))


def start_rank_log(run_dir: Path, mesh: Mesh) -> Path:
    """Open this rank's log file of this attempt. Collective: all ranks of the world must call this."""
    attempts = gather_objects(next_attempt(run_dir) if mesh.rank == 0 else None)
    return add_rank_file(run_dir, attempts[0], mesh.rank)


def show_start(config: Config, environment: Mapping[str, Any]) -> None:
    """Print what was found, what was chosen and why. Rank 0 alone calls this."""
    table = Table(show_header=False)
    layout = ", ".join(f"{name} {size}" for name, size in environment["layout"].items())
    te = environment["versions"]["transformer-engine"]
    rows = {
        "device": environment["platform"]["device"],
        "collectives": environment["platform"]["collectives"],
        "layout": layout,
        "precision": f"{config.precision.compute} compute, fp32 main weights, reductions and moments",
        "trained": _trained(config),
        "FP8": environment["chosen"]["fp8"],
        "Transformer Engine": te or "not installed: its layers and fusions are not used",
        "apex": "found" if importlib.util.find_spec("apex") else "not installed",
        "flash-attn": environment["versions"]["flash-attn"] or "not installed: torch's attention kernels are used",
        "layers": environment["chosen"]["layers"],
        "AdamW": environment["chosen"]["adam"],
        "run directory": config.run.dir or "",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _trained(config: Config) -> str:
    if config.lora is None:
        return "all weights"
    number = count_adapter_parameters(config.model, config.lora, config.head)
    modules = ", ".join(adapted_modules(config.model, config.lora))
    head = ", and the head" if config.head == "scalar" else ""
    return f"LoRA of rank {config.lora.rank}: {number:,} parameters, beside {modules}{head}"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.new")  # one name for all: what a kill leaves, the next start takes up
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
