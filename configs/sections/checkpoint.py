"""The `checkpoint` section: saving, loading, and where weights come from. Torch-free plain data."""

from __future__ import annotations

from typing import Annotated

from configs.sections.base import PathKind, PathText, PositiveInt, Section


class CheckpointConfig(Section):
    """Saving and loading; a checkpoint of any layout loads on any other."""

    save_every: PositiveInt | None = None
    """Steps between checkpoints; null for only after the last step and on SIGTERM or SIGUSR1."""
    keep_last: PositiveInt = 3
    """Newest checkpoints kept; that of the lowest validation loss is kept too where train.patience is set."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of this many steps are kept for good; null for none."""
    async_save: bool = True
    """Write in the background while training goes on."""
    resume: Annotated[PathText, PathKind(words=("auto", "never"))] = "auto"
    """auto: continue from `<run.dir>/checkpoints/latest` if there is one; never: refuse to continue;
    or a checkpoint's path."""
    init_from: PathText | None = None
    """Warm start: weights alone from this checkpoint (or run directory); step, optimizer and data start anew."""
    init_from_hf: PathText | None = None
    """Warm start from the directory of a Hugging Face model, onto any layout; `model` must say the same as its
    config.json (`python tools/convert_hf.py model DIR` prints it)."""
    export_hf: bool = False
    """Write each checkpoint as a Hugging Face model too, under `hf/` in its directory; training waits for it."""
