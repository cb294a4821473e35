"""The watch of a rank: starts the process beside it, tells that where the rank is, and leaves when it says so.

A run of one rank has nobody to wait for, and no watch. Linux alone has what it needs; elsewhere there is none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from configs.errors import ExitCode
from parallel.collectives import gather_objects
from parallel.control import control_group
from parallel.failures import leave, report
from parallel.mesh import Mesh
from parallel.watch import sentinel
from parallel.watch.beacon import open_memory
from parallel.watch.calls import CallRecorder
from parallel.watch.phases import light, put_out
from parallel.watch.reports import CONTROL, Rank, Report, read_report, shorten, write_ranks

log = logging.getLogger(__name__)
SHARE_OF_TIMEOUT = 0.75
"""Of `parallel.timeout_seconds`, after which the alarm is raised: the verdict comes before the collective gives up."""
_QUIET_SECONDS = 2.0
_ENDING_SECONDS = 5.0
_LOSS_SECONDS = 1.0
_CONTINUATION = "the same command continues from the last checkpoint, if there is one"


class Watch:
    """Watches this rank from `start` to `stop`."""

    def __init__(self, mesh: Mesh, *, local_rank: int, timeout_seconds: float) -> None:
        self._mesh, self._local_rank = mesh, local_rank
        self._limit = SHARE_OF_TIMEOUT * timeout_seconds
        self._exit = contextlib.ExitStack()
        self._socket: socket.socket | None = None
        self._folder: Path | None = None
        self._settings: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._told: list[dict[str, Any]] = []
        self._lock = threading.Lock()  # of what is told, and to whom
        self._is_ending = False
        self.ranks: list[Rank] = []
        """Who the ranks of the world are, once it has started."""

    @property
    def sees_waits(self) -> bool:
        """Whether it knows how long this rank waits for others."""
        return self._process is not None and not self._mesh.platform.queues_collectives

    def start(self, folder: Path) -> None:
        """Begin, writing to `folder`. Collective: all ranks of the world must call this."""
        mesh = self._mesh
        me = Rank(mesh.rank, socket.gethostname(), mesh.place())
        if mesh.world_size == 1 or not hasattr(os, "pidfd_open"):
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.ranks = [Rank(*one) for one in gather_objects(dataclasses.astuple(me))]
        if mesh.rank == 0:
            write_ranks(folder, self.ranks)
        stacks = os.memfd_create("stacks")
        self._exit.callback(os.close, stacks)
        faulthandler.register(sentinel.STACK_SIGNAL, file=stacks, all_threads=True)
        self._exit.callback(faulthandler.unregister, sentinel.STACK_SIGNAL)
        memory, cells = open_memory()
        self._exit.callback(os.close, memory)
        self._settings = self._describe(me, folder, memory, stacks)
        self._start_process()
        self._exit.callback(self._end_process)
        light(cells)
        self._exit.callback(put_out)
        self._exit.enter_context(CallRecorder(cells, self._tell_group).installed())

    def stop(self) -> None:
        """End, before the rank does: what it did not end by itself is then known to have ended otherwise."""
        self._exit.close()

    def find_lost(self) -> Report | None:
        """Return a rank whose process has ended before its time, once this rank has noticed that one is lost.

        Rank 0 looks at all of them; the others, which speak where it does not, at rank 0 alone.
        """
        numbers = range(len(self.ranks)) if self._mesh.rank == 0 else range(min(1, len(self.ranks)))
        deadline = time.monotonic() + _LOSS_SECONDS
        while self._folder is not None:
            reports = (read_report(self._folder, number) for number in numbers)
            lost = next((one for one in reports if one is not None and one.state == "ended"), None)
            if lost is not None or time.monotonic() > deadline:
                return lost
            time.sleep(0.1)
        return None

    def _end_process(self) -> None:
        assert self._process is not None and self._socket is not None
        with self._lock:
            self._is_ending = True
            self._say({"done": True})
        try:
            self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._socket.close()

    def _describe(self, me: Rank, folder: Path, memory: int, stacks: int) -> dict[str, Any]:
        """Return the settings of the process beside this rank, all but its end of the connection."""
        return {
            **dataclasses.asdict(me),
            "local_rank": self._local_rank,
            "pid": os.getpid(),
            "folder": str(folder),
            "exit_code": ExitCode.PEER_LOST,
            "limit_seconds": self._limit,
            "has_flight": self._mesh.platform.queues_collectives,
            "memory": memory,
            "stacks": stacks,
        }

    def _start_process(self) -> None:
        ours, theirs = socket.socketpair()
        settings = sentinel.Settings(**self._settings, socket=theirs.fileno())
        command = [sys.executable, "-I", "-S", sentinel.__file__, json.dumps(dataclasses.asdict(settings))]
        descriptors = (settings.memory, settings.stacks, settings.socket)
        self._process = subprocess.Popen(
            command, pass_fds=descriptors, stdin=subprocess.DEVNULL, start_new_session=True
        )
        theirs.close()
        self._socket = ours
        for message in self._told:
            self._say(message)
        threading.Thread(target=self._listen, args=(ours,), name="watch", daemon=True).start()

    def _replace_process(self, connection: socket.socket) -> None:
        """Start the process beside this rank again where a signal has ended it: else this rank would seem silent."""
        with self._lock:
            if self._is_ending or self._process is None or self._process.wait() >= 0:
                return
            connection.close()
            log.warning("the process that watches rank %d was killed; another takes its place", self._mesh.rank)
            self._start_process()

    def _tell_group(self, place: int, group: Any) -> None:
        ranks = dist.get_process_group_ranks(group)
        message = {"group": group.group_name, "axis": self._axis_of(group), "ranks": shorten(tuple(ranks))}
        with self._lock:
            self._told.append(message)
            self._say(message)

    def _axis_of(self, group: Any) -> str:
        mesh = self._mesh
        if group is control_group():
            return CONTROL
        named = {
            "tp": mesh.tp_group, "pp": mesh.pp_group, "cp": mesh.cp_group, "dp": mesh.dp_group,
            "dp_cp": mesh.dp_cp_group, "expert_dp": mesh.expert_dp_group, "stage": mesh.stage_group,
            "world": dist.group.WORLD,
        }  # fmt: skip
        found = next((axis for axis, one in named.items() if one is group), None)
        return found or group.group_desc.lower().removesuffix("_group") or group.group_name

    def _say(self, message: dict[str, Any]) -> None:
        assert self._socket is not None
        with contextlib.suppress(OSError):  # the process beside us has gone; the run does without
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, connection: socket.socket) -> None:
        """Do what the process beside us says, in a thread; where the main thread is does not matter."""
        with contextlib.suppress(OSError), connection.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                words = json.loads(line)
                if "dump" in words:
                    self._dump(Path(words["dump"]))
                else:
                    self._leave(words["sentence"], is_speaker=words["speaks"])
        self._replace_process(connection)

    def _dump(self, path: Path) -> None:
        """Write down what the flight recorder holds; it appears whole."""
        text = self._mesh.platform.dump_collectives()
        if text is not None:
            new = path.with_name(f".{path.name}.new")
            new.write_text(text, encoding="utf-8")
            os.replace(new, path)

    def _leave(self, sentence: str, *, is_speaker: bool) -> None:
        if not is_speaker:  # the one that speaks leaves first; launchers then end the others
            time.sleep(_QUIET_SECONDS)
            log.warning("%s", sentence)
        if is_speaker or self._local_rank == 0:  # a host has a launcher of its own, and perhaps a log
            report(f"{sentence}; {_CONTINUATION}", ExitCode.PEER_LOST, rank=self._mesh.rank)
        leave(ExitCode.PEER_LOST)
