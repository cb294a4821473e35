"""Commands that need the engine, run in forks of the pool's server, which has imported it: for tests of what they do.

Takes the command lines that `subprocess` takes, of this interpreter, with a script or `-m` and a module.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.pool import fork_server

LAUNCHER = ["-m", "launch.local", "--nproc-per-node"]


class Popen:
    """What tests and tools use of `subprocess.Popen`; what goes to stdout and stderr is in the file `stdout`."""

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path,
        env: Mapping[str, str] | None = None,
        stdout: IO[Any] | None = None,
        stderr: object = None,
    ) -> None:
        """Start the command in `cwd` with the environment `env`, by default this process's.

        The ranks of a command that begins with `launch.local` are forks too.
        """
        assert command[0] == sys.executable
        words = list(command[1:])
        if words[:3] == LAUNCHER:
            words[:3] = ["-m", "tests.forked"]
        output = os.devnull if stdout is None else stdout.name
        arguments = (words, str(cwd), dict(os.environ if env is None else env), output)
        self._process = fork_server().Process(target=_become, args=arguments)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while it runs."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """Wait for the end and return the exit code."""
        self._process.join()
        return self._process.exitcode

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self._process.kill()


def run(
    command: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, check: bool = False, **captured: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end as `subprocess.run` does; what it writes to stdout and stderr comes as `stderr`."""
    with tempfile.NamedTemporaryFile("r") as output:
        code = Popen(command, cwd, env, output).wait()
        done = subprocess.CompletedProcess(command, -1 if code is None else code, "", output.read())
    if check:
        done.check_returncode()
    return done


def _become(words: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    """Turn this fork into the command."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _launch(num_ranks: int, script: Path, arguments: Sequence[str]) -> int:
    from launch.fork import run_script
    from launch.local import run_ranks

    code = run_ranks([], num_ranks, is_forked=True)
    if code is None:
        run_script(script, arguments)
        return 0
    return code


if __name__ == "__main__":
    sys.exit(_launch(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
