"""Errors of Python, torch and the operating system whose cause a user can mend -> one sentence. Torch-free."""

from __future__ import annotations

import errno

from configs.errors import in_one_line
from configs.stages import Config, GrpoConfig, RftConfig
from parallel.failures import error_chain

_GIB = 2**30
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
_ADVICE = {
    errno.ENOSPC: "make room on that disk, or set run.dir to another one",
    errno.EDQUOT: "make room within the quota, or set run.dir to another disk",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or use more ranks, which share the files",
    errno.EROFS: "set run.dir to a disk that can be written",
    errno.EACCES: "give this user the permission, or name another path",
    errno.EPERM: "give this user the permission, or name another path",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the host's limit on open files",
    errno.EIO: "look at that disk, or set run.dir to another one",
    errno.ESTALE: "look at that file system, or set run.dir to another disk",
}


def describe_cause(error: BaseException, config: Config, world_size: int) -> str | None:
    """Return what is wrong and what to change, or None for an error that is not the user's to mend."""
    for link in error_chain(error):
        if _is_memory(link):
            return _memory_sentence(link, config, world_size)
        if isinstance(link, OSError) and link.errno in _ADVICE:
            return describe_os_error(link, f"a file of run.dir {config.run.dir}")
    return None


def describe_os_error(error: OSError, place: str = "a file") -> str:
    """Return where the operating system refused what, and what to change."""
    advice = f"; {_ADVICE[error.errno]}" if error.errno in _ADVICE else ""
    return f"{error.filename or place}: {(error.strerror or str(error)).lower()}{advice}"


def describe_continuation(config: Config | None) -> str:
    """Return what the same command would do next, as things are on disk now."""
    if config is None:
        return "nothing had begun"
    if isinstance(config, RftConfig):
        return "the same command goes on behind the answers that are written"
    from trainer.checkpoint.layout import latest_checkpoint

    try:
        latest = latest_checkpoint(str(config.run.dir))
    except OSError:
        return "the same command continues from the last checkpoint, if there is one"
    if latest is None:
        return "no checkpoint has been written, so the same command begins anew"
    if config.checkpoint.resume == "never":
        return f"checkpoint.resume=auto continues from {latest}"
    return f"the same command continues from {latest}"


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY_WORDS)


def _memory_sentence(error: BaseException, config: Config, world_size: int) -> str:
    from configs.plan.derive import derive_layout
    from configs.plan.estimate import estimate_memory

    needed = estimate_memory(config, derive_layout(config, world_size)).total
    said = f" ({in_one_line(error)})" if str(error).strip() else ""
    answers = "rollout.max_rows, rollout.cache_gib, " if isinstance(config, GrpoConfig) else ""
    return (
        f"memory ran out{said}: by estimate a rank takes {needed / _GIB:,.1f} GiB or more; more ranks with a larger "
        f"parallel.tp or parallel.pp would take less each, so would a smaller {answers}train.micro_batch_size or "
        "train.seq_len, and train.recompute.granularity=full"
    )
