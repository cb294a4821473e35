"""`checkpoint.json`: what a checkpoint is, where its run was, and the hash of every file. Torch-free.

It is written last; a directory without it is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from configs.errors import BadInput
from configs.load import resolved_dict
from configs.roles import CRITIC, HeadKind
from configs.stages import Config
from trainer.checkpoint.layout import list_checkpoints
from trainer.checkpoint.migrate import refuse_unknown, rename_fields, resolve_saved
from trainer.engine.state import TrainState

MANIFEST = "checkpoint.json"
FORMAT_VERSION = 1
IMPORT_STAGE = "import_hf"
"""Stage name of a checkpoint that was made of a Hugging Face model; a run begins from it with checkpoint.init_from."""
# Fields of `model` that shape no weight and may differ between the run that saved and the run that continues. The
# vocabulary's padding is layout: rows that a checkpoint lacks are zeros, rows too many are not read.
FREE_MODEL_FIELDS = frozenset({"hidden_dropout", "attention_dropout", "init_std", "vocab_pad_multiple"})
# A new stage may also stretch the context, or see less of it at once.
FREE_WARM_START_FIELDS = FREE_MODEL_FIELDS | {"rope", "max_position_embeddings", "window_size", "window_pattern"}


@dataclass(frozen=True)
class Manifest:
    """The contents of `checkpoint.json`."""

    step: int
    state: dict[str, Any]
    """Progress of the run (`trainer.engine.state.TrainState`)."""
    stage: dict[str, Any]
    """Name of the training stage and what it keeps (data cursor)."""
    layout: dict[str, int]
    """Sizes of the axes that wrote it; another layout may read it."""
    config: dict[str, Any]
    """The resolved config of the run, in the names of today's version whichever wrote it."""
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]
    """`bytes` and `sha256` by file name."""
    base: dict[str, str] | None = None
    """Of adapters, whose files hold no other weights: which they belong to (`trainer.checkpoint.base_weights`)."""
    models: dict[str, dict[str, Any]] | None = None
    """Of the models beside the policy, by role: which they are (`trainer.run.second_models`)."""
    head: HeadKind = "vocabulary"
    """What the run's model says of a token."""
    format_version: int = FORMAT_VERSION

    @property
    def template(self) -> str | None:
        """The chat template that the run named in its stage's section; None for its tokenizer's own, or no stage of
        conversations."""
        sections = (self.config.get(name) or {} for name in ("sft", "preference", "reward", "grpo"))
        return next((section["template"] for section in sections if section.get("template") is not None), None)

    def of_critic(self) -> Manifest | None:
        """Return what the manifest would be if the critic were the run's own model; None where there is no critic."""
        critic = (self.models or {}).get(CRITIC)
        if critic is None:
            return None
        return replace(self, config={**self.config, "model": critic["model"]}, base=None, head="scalar")

    def write(self, directory: Path) -> None:
        """Write `checkpoint.json` into `directory` and force it to disk."""
        path = directory / MANIFEST
        with open(path, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1)
            file.flush()
            os.fsync(file.fileno())


def read_manifest(checkpoint: Path, *, is_only_shown: bool = False) -> Manifest:
    """Return a checkpoint's manifest as today's version would have written it (`trainer.checkpoint.migrate`).

    Raises BadInput if it is missing or unreadable, or holds what only another version knows; a config that is only
    shown may hold that, and lack what is new.
    """
    path = checkpoint / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] > FORMAT_VERSION:
            raise BadInput(
                f"{path}: written in format {content['format_version']}, this version reads up to {FORMAT_VERSION}; "
                "use the version that wrote it."
            )
        known = {field.name for field in fields(Manifest)}
        refuse_unknown(sorted(content.keys() - known), path)
        progress = {field.name for field in fields(TrainState)}
        refuse_unknown([f"state.{name}" for name in content["state"] if name not in progress], path)
        config = rename_fields(content["config"], content["format_version"])
        if not is_only_shown:
            config = resolve_saved(config, content["stage"]["name"], path)
        state = TrainState(**content["state"]).as_dict()
        return Manifest(**content | {"config": config, "state": state, "format_version": FORMAT_VERSION})
    except FileNotFoundError:
        raise BadInput(
            f"{checkpoint}: not a complete checkpoint ({MANIFEST} is missing); name a directory like "
            "runs/<name>/checkpoints/step_00000100."
        ) from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({(error.strerror or str(error)).lower()}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: unreadable ({error}); {advise_another(checkpoint)}.") from error


def advise_another(checkpoint: Path) -> str:
    """Return what to do instead of using a damaged checkpoint: name the newest other one of its run."""
    others = [path for path in list_checkpoints(checkpoint.parent.parent) if path != checkpoint]
    return f"continue from checkpoint.resume={others[-1]}" if others else "there is no other checkpoint of the run"


def another_run(config: Config) -> str:
    """Return the advice how to leave the run directory's checkpoints alone: what makes it a run of its own."""
    run, resume = config.run, config.checkpoint.resume
    is_named = run.dir == os.path.join("runs", run.name)
    way = f"run.name={run.name}-2" if is_named else f"run.dir={run.dir}-2"
    return f"begin another run, such as {way}" + ("" if resume in ("auto", "never") else " checkpoint.resume=auto")


def check_architecture(
    manifest: Manifest, model: Mapping[str, Any], where: Path, *, is_warm_start: bool, otherwise: str = ""
) -> None:
    """Raise BadInput naming every `model` field in which the checkpoint and the config differ.

    `otherwise` is what to do instead of changing the model.
    """
    free = FREE_WARM_START_FIELDS if is_warm_start else FREE_MODEL_FIELDS
    differences = describe_differences(manifest.config["model"], model, free)
    if differences:
        raise BadInput(
            f"{where}: holds another architecture: {'; '.join(differences)}; use the model section of its "
            f"{MANIFEST}, or {otherwise or 'another checkpoint'}."
        )


def check_head(there: HeadKind, here: HeadKind, where: Path, *, may_be_new: bool) -> None:
    """Raise BadInput if a model with the head `here` cannot begin with weights of a model with the head `there`.

    One whose scalar head may be new, since it is trained or found elsewhere, takes a language model's weights but for
    the output layer.
    """
    if there == "scalar" and here == "vocabulary":
        raise BadInput(
            f"{where}: holds a model with a scalar head (a reward model or a critic), which has no output layer; name "
            "a language model, such as the one that it began with."
        )
    if there == "vocabulary" and here == "scalar" and not may_be_new:
        raise BadInput(
            f"{where}: holds a language model, which has no scalar head to score answers with; name a reward model "
            "(launch/reward.py makes one of it)."
        )


def check_continues(manifest: Manifest, config: Config, stage: str, where: Path) -> None:
    """Raise BadInput if a run of this config cannot continue the checkpoint.

    Its stage, architecture or seed differ, or the length or packing of its samples.
    """
    other = another_run(config)
    if manifest.stage["name"] != stage:
        raise BadInput(
            f"{where}: was saved by the {manifest.stage['name']} stage, this is {stage}; to begin a new stage from its "
            f"weights set checkpoint.init_from to it and {other}."
        )
    check_architecture(manifest, resolved_dict(config)["model"], where, is_warm_start=False, otherwise=other)
    _check_same_adapters(manifest, config, where, other)
    anew = f"{other} (with checkpoint.init_from={where} from its weights)"
    saved_seed = manifest.config["run"]["seed"]
    if saved_seed != config.run.seed:
        raise BadInput(
            f"run.seed: {config.run.seed} differs from the {saved_seed} of {where}, on which the order of the data "
            f"depends; use {saved_seed}, or {anew}."
        )
    ledger = manifest.stage["state"].get("data")
    seq_len = config.train.seq_len
    has_data = ledger is not None and bool(config.sources("train"))
    saved_seq_len = ledger.get("seq_len", seq_len) if has_data else seq_len
    if saved_seq_len != seq_len:
        raise BadInput(
            f"train.seq_len: {seq_len} differs from the {saved_seq_len} of {where}, whose data order cannot go on; use "
            f"{saved_seq_len}, or {anew}."
        )
    packing = config.packing
    saved_packing = ledger.get("packing", "concat") if has_data else packing
    if saved_packing != packing:
        (field, here), (_, there) = map(config.packing_setting, (packing, saved_packing))
        raise BadInput(
            f"{field}: {here} differs from the {there} of {where}, whose data order cannot go on; use {there}, or "
            f"{anew}."
        )


def _check_same_adapters(manifest: Manifest, config: Config, where: Path, other: str) -> None:
    """Raise BadInput unless what the checkpoint holds, all weights or adapters, is what the run trains."""
    saved, present = manifest.config.get("lora"), resolved_dict(config)["lora"]
    if (saved is None) != (present is None):
        there, here = ("all weights", "adapters") if saved is None else ("adapters (lora)", "all weights")
        raise BadInput(
            f"lora: {where} holds {there} and this run trains {here}; keep its lora section, or {other} (with "
            f"checkpoint.init_from={where} from its weights)."
        )
    if saved is None or present is None:
        return
    compared = {name: present[name] for name in ("rank", "alpha", "use_rslora", "target_modules")}
    differences = list(_differences("lora", saved, compared))
    if differences:
        raise BadInput(f"{where}: holds other adapters: {'; '.join(differences)}; use its lora section, or {other}.")


def describe_differences(there: Mapping[str, Any], here: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """Return every field in which two `model` sections differ, but for those that are `free` to."""
    return list(_differences("model", there, {name: value for name, value in here.items() if name not in free}))


def _differences(path: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for name, value in here.items():
        other = there.get(name)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _differences(f"{path}.{name}", other, value)
        elif other != value:
            yield f"{path}.{name} is {other!r} there and {value!r} here"


def hash_file(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the SHA-256 of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def find_damage(checkpoint: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """Return one sentence for each of the named files that is missing, truncated or altered."""
    problems = []
    for name in names:
        path, expected = checkpoint / name, manifest.files[name]
        try:
            num_bytes = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{path}: missing")
            continue
        if num_bytes != expected["bytes"]:
            problems.append(f"{path}: {num_bytes} bytes instead of {expected['bytes']}")
        elif hash_file(path)["sha256"] != expected["sha256"]:
            problems.append(f"{path}: its content has changed since it was written (SHA-256 differs)")
    return problems
