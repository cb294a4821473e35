"""Which frozen weights a checkpoint of adapters belongs to: where they lie, and how to know them again. Torch-free."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import BadInput
from trainer.checkpoint.manifest import MANIFEST, read_manifest

_SAMPLES, _SAMPLE_BYTES = 16, 2**16


@dataclass(frozen=True)
class BaseWeights:
    """The checkpoint, or the Hugging Face model, that adapters were trained beside."""

    path: str
    """Of the checkpoint itself, not of its run, which may train on; absolute."""
    fingerprint: str
    """Of the files' contents: all of a checkpoint's hashes, or samples of a Hugging Face model's files."""

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is one of ours."""
        return (Path(self.path) / MANIFEST).is_file()

    def as_dict(self) -> dict[str, str]:
        """Return plain data for `checkpoint.json`."""
        return {"path": self.path, "fingerprint": self.fingerprint}


def identify_base(place: Path) -> BaseWeights:
    """Return a checkpoint's or a Hugging Face model's directory as the base of adapters. Raises BadInput."""
    place = Path(os.path.abspath(place))
    try:
        is_checkpoint = (place / MANIFEST).is_file()
        return BaseWeights(str(place), _of_checkpoint(place) if is_checkpoint else _of_model(place))
    except OSError as error:
        raise BadInput(f"{place}: cannot be read ({error}); make it readable.") from error


def recorded_base(base: Mapping[str, str] | None, checkpoint: Path, place: Path | None = None) -> BaseWeights | None:
    """Return the base that a checkpoint of adapters names, None of one that holds all weights.

    `place` is where it is now, if it was moved. Raises BadInput where it is missing or is another one.
    """
    if base is None:
        return None
    where = place or Path(base["path"])
    if not where.is_dir():
        raise BadInput(
            f"{checkpoint}: holds adapters of the weights in {where}, which is not there; move them back, or name "
            "their place as checkpoint.init_from (or checkpoint.init_from_hf) of the run."
        )
    found = identify_base(where)
    if found.fingerprint != base["fingerprint"]:
        raise BadInput(
            f"{checkpoint}: holds adapters of the weights that were in {base['path']}; those in {where} are others: "
            "name the place of the former as checkpoint.init_from (or checkpoint.init_from_hf)."
        )
    return found


def _of_checkpoint(checkpoint: Path) -> str:
    manifest = read_manifest(checkpoint)
    return _hash_of({name: info["sha256"] for name, info in manifest.files.items()})


def _of_model(directory: Path) -> str:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise BadInput(f"{directory}: holds no safetensors files; name a Hugging Face model or a checkpoint.")
    return _hash_of({file.name: _sample(file) for file in files})


def _sample(file: Path) -> str:
    """Return a hash of the size of a file and of pieces spread over it."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
