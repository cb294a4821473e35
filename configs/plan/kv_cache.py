"""Bytes of the key-value cache of generation <-> rows in it; alike on every rank. Torch-free."""

from __future__ import annotations

from configs.errors import BadInput
from configs.plan.context_bytes import head_sizes
from configs.plan.derive import layers_per_pp_stage
from configs.stages import Config, GrpoConfig

_LENGTH_MULTIPLE = 64  # so that caches of about one length have tables of angles of one length
_GIB = 2**30


def slot_length(longest: int) -> int:
    """Return the places of a slot that takes rows of up to `longest` tokens."""
    return -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


def bytes_of_token(config: Config) -> int:
    """Return what a token's keys and values take on the rank that has the most layers.

    Megatron-Core hands latent attention's values over as wide as its keys.
    """
    sizes = head_sizes(config.model, config.parallel.tp)
    layers = max(layers_per_pp_stage(config.model, config.parallel))
    return layers * sizes.groups * 2 * sizes.dim * (4 if config.precision.compute == "fp32" else 2)


def plan_cache(config: GrpoConfig) -> tuple[int, int]:
    """Return how many answers a replica draws at once, and the bytes on a rank that their cache takes.

    Raises BadInput where `rollout.cache_gib` holds not one.
    """
    rollout, longest = config.rollout, config.train.seq_len + 1
    num_rows = rollout.max_rows
    if rollout.cache_gib is not None:
        num_rows = min(num_rows, rows_that_fit(config, int(rollout.cache_gib * _GIB), longest))
    return num_rows, (num_rows * slot_length(longest) + 1) * bytes_of_token(config)


def rows_that_fit(config: Config, cache_bytes: int, longest: int) -> int:
    """Return how many rows of up to `longest` tokens a cache of so many bytes on each rank takes at once.

    It has r * slot_length(longest) + 1 places; the last is for tokens that only fill up a pass. Raises BadInput where
    not one row fits.
    """
    each, length = bytes_of_token(config), slot_length(longest)
    num_rows = (cache_bytes // each - 1) // length
    if num_rows < 1:
        needed = (length + 1) * each
        raise BadInput(
            f"cache_bytes: {cache_bytes} hold no row of {longest} tokens, prompt and answer, which takes "
            f"{needed / _GIB:.3g} GiB on a rank; a value that would work: {needed}"
        )
    return num_rows
