"""What runs inside: shuts itself in, then runs a program of which nothing is trusted.

Run by sandbox.py as: python -I -S contained.py, with a job as JSON on standard input. Standard error is for what keeps
it from containing the program, and nothing else; the program gets none.
"""

import ctypes
import json
import os
import resource
import signal
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_NO_NEW_PRIVILEGES = 1, 4, 38
_NO_SUID, _NO_DEVICES, _BIND, _RECURSIVE, _PRIVATE = 2, 4, 1 << 12, 1 << 14, 1 << 18
_SET_MOUNT_ATTRIBUTES, _HERE, _ALL_BELOW = 442, -100, 0x8000  # the system call has one number on all machines
_DETACH = 2
_ROOT = "/sys"  # nothing a program needs lies there, and it is hidden from this process alone
_DEVICES = ("null", "zero", "random", "urandom")
_NOBODY = 65534
_UNUSED_IDS = 2_000_000_000  # so that processes are counted for each program alone; a process id is added


def main() -> None:
    """Read the job, contain this process, run the program, and end with its exit code, or 128 + its signal."""
    job = json.loads(sys.stdin.buffer.read())
    os.umask(0o022)
    _call("prctl", _SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != job["parent"]:
        os._exit(1)
    is_root = _enter_namespaces() if job["isolation"] == "namespaces" else None
    first = os.fork()
    if first:
        os._exit(_wait_for(first))
    _call("prctl", _SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    user = os.getuid()
    if is_root is None:
        os.chdir(job["box"])
    else:
        user = _unused_id(job["parent"]) if is_root else user
        _make_root(job, user)
    program = os.fork()
    if program:
        os._exit(_wait_for(program))  # where it is process 1 of its namespace all others end with it
    if is_root:
        _become(user)
    _run(job)


def _enter_namespaces() -> bool:
    """Leave the network, the mounts and the processes of this machine; return whether as its true root."""
    flags = os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    if os.geteuid() == 0:
        try:
            os.unshare(flags)
            return True
        except PermissionError:  # root of a container
            _become(_NOBODY)
    user, group = os.getuid(), os.getgid()
    os.unshare(flags | os.CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return False


def _make_root(job: dict, user: int) -> None:
    """Make a root in memory that has Python and the system's libraries, for reading alone, and a box to write into."""
    root = _ROOT
    _call("mount", None, b"/", None, _RECURSIVE | _PRIVATE, None)
    size = f"size={job['disk_bytes']},nr_inodes=10000,mode=755"
    _call("mount", b"tmpfs", root.encode(), b"tmpfs", _NO_SUID | _NO_DEVICES, size.encode())
    for path in job["paths"]:
        if os.path.islink(path) and os.path.dirname(path) == "/":
            os.symlink(os.readlink(path), root + path)
        elif os.path.exists(path):
            _bind(path, root + path)
    os.makedirs(root + "/dev/shm")
    for name in _DEVICES:
        with open(f"{root}/dev/{name}", "w"):
            pass
        _call("mount", f"/dev/{name}".encode(), f"{root}/dev/{name}".encode(), None, _BIND, None)
    for path in ("/box", "/tmp", "/dev/shm"):
        os.makedirs(root + path, exist_ok=True)
        os.chown(root + path, user, -1)
    os.chdir(root)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir("/box")


def _bind(path: str, target: str) -> None:
    """Show a path in the new root, for reading alone."""
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    _call("mount", path.encode(), target.encode(), None, _BIND | _RECURSIVE, None)
    read_only_without_suid_and_devices = (ctypes.c_uint64 * 4)(1 | 2 | 4, 0, 0, 0)
    attributes = ctypes.byref(read_only_without_suid_and_devices)
    _call("syscall", _SET_MOUNT_ATTRIBUTES, _HERE, target.encode(), _ALL_BELOW, attributes, ctypes.c_size_t(32))


def _unused_id(process: int) -> int:
    """Return a user that nobody is, or nobody itself where this machine knows few users."""
    user = _UNUSED_IDS + process
    with open("/proc/self/uid_map") as file:
        ranges = [(int(first), int(count)) for first, _, count in (line.split() for line in file)]
    return user if any(first <= user < first + count for first, count in ranges) else _NOBODY


def _become(user: int) -> None:
    """Give up root for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    _call("prctl", _SET_DUMPABLE, 1, 0, 0, 0)


def _run(job: dict) -> None:
    """Replace this process by the program, with its limits, its input and an empty environment."""
    errors = os.dup(2)
    os.set_inheritable(errors, False)
    try:
        for name, text in (("program.py", job["program"]), ("input", job["input"])):
            with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
                file.write(text)
        os.dup2(os.open("input", os.O_RDONLY), 0)
        os.unlink("input")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for name, value in job["limits"].items():
            resource.setrlimit(getattr(resource, name), (value, value))
        _call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        _call("prctl", _SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        os.execve(job["python"], [job["python"], "-I", "program.py"], {"OMP_NUM_THREADS": "1"})
    except BaseException as error:
        os.write(errors, f"{type(error).__name__}: {error}".encode())
        os._exit(1)


def _wait_for(process: int) -> int:
    """Wait for a process, and reap whatever else ends before it; return its exit code, or 128 + its signal."""
    while True:
        ended, status = os.wait()
        if ended == process:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _call(name: str, *arguments: object) -> None:
    if getattr(_LIBC, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
